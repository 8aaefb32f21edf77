"""KeyboardInterrupt and MemoryError in the verbs of a request: no byte and no slot is lost, the host serves on.

T0 and the gate interrupt each verb at some of its lines, T2 at each event and in more cells.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from memslot_plugin.tests.leaks import Footprint
from memslot_plugin.tests.profiles import FACTOR, LONG

from . import cells
from .cells import Cell
from .children import run
from .interrupts import Interruption
from .verbs import OPENING, VERBS, World, finish

ERRORS = (KeyboardInterrupt, MemoryError)

sampled = pytest.mark.parametrize(
    "sample",
    [
        pytest.param(cell, marks=pytest.mark.skip(reason=cell.missing) if cell.missing else ())
        for cell in ((*cells.PLAIN_CELLS, *cells.PAIRWISE_CELLS) if LONG else cells.SAMPLE_CELLS)
    ],
    ids=str,
)


def interrupted(world: World, verb: str, interruption: Interruption) -> None:
    """Interrupt one verb, and drop its result and arguments."""
    setup, action = VERBS[verb]
    given = setup(world)
    interruption.cut(lambda: action(world, given))
    finish(given)


@contextmanager
def judged(interruption: Interruption) -> Iterator[None]:
    """Name the place of the interruption in a failure. An unraisable exception is a failure too."""
    heard: list[Any] = []
    before, sys.unraisablehook = sys.unraisablehook, heard.append
    try:
        yield
        assert not heard, heard
    except BaseException as wrong:
        raise AssertionError(f"interrupted by the {interruption.places[-1]}") from wrong
    finally:
        sys.unraisablehook = before


def interruptions(places: Sequence[str]) -> Iterator[Interruption]:
    """Yield an interruption per chosen event of an action that went through these places undisturbed."""
    events: Sequence[int] = range(1, len(places) + 1)
    if not LONG:
        lines = dict(
            zip(reversed(places), reversed(events), strict=True)
        )  # the first event of each line
        events = sorted(lines.values())[1 :: max(len(lines) // (4 if FACTOR == 1 else 40), 1)]
    for number, at in enumerate(events):
        yield Interruption(ERRORS[number % 2]("injected"), at)


def interrupt(cell: Cell, verb: str) -> int:
    """Interrupt one verb at each chosen event; return its number of events."""
    world = World(cell)
    with world:
        interrupted(world, verb, Interruption())  # warm up
        quiet = Interruption()
        interrupted(world, verb, quiet)
        assert len(quiet.places) > 3
        before = Footprint.now()
        for interruption in interruptions(quiet.places):
            with judged(interruption):
                interrupted(world, verb, interruption)
                world.serves()
        world.table.close()
        world.guest.close()
        left = Footprint.now().descriptors - before.descriptors
        assert all("extension" in name for name in left), left  # an extension per slot that grew
    return len(quiet.places)


@pytest.mark.scales
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in OPENING])
@sampled
def test_verb_interrupted_at_any_line_loses_no_byte_and_no_slot(
    sample: Cell, verb: str, note: Callable[[str, object], None]
) -> None:
    note("events", interrupt(sample, verb))


@pytest.mark.long
@sampled
def test_verb_interrupted_by_real_signals_loses_nothing(
    sample: Cell, note: Callable[[str, object], None]
) -> None:
    done = run("-m", "integration_tests.interrupted_by_signals", sample.host, sample.backend, "60")
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 1
    note("interrupts", int(done.stdout))
