"""KeyboardInterrupt and MemoryError in the verbs of a request: no byte and no slot is lost, the host serves on.

T0 and the gate interrupt each verb at some of its lines, T2 at each event and in more cells.
"""

from __future__ import annotations

import re
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
from .toy import PAGE
from .verbs import OPENING, VERBS, World, finish

ERRORS = (KeyboardInterrupt, MemoryError)

PANIC = re.compile(
    "thread '<unnamed>' panicked at 'a Display implementation .*\nstack backtrace:\nnote: .*\n"
)
"""The text that wasmer prints if a signal comes while it makes text of an import's name."""

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


def interruptions(places: Sequence[str], within: str) -> Iterator[Interruption]:
    """Yield an interruption per chosen event of an action that went through these places undisturbed.

    The events are those of functions of the name `within` if it is given.
    """
    events: Sequence[int] = range(1, len(places) + 1)
    if within:
        events = [at for at in events if places[at - 1].endswith(f" in {within}")]
        assert events
    elif not LONG:
        lines = dict(
            zip(reversed(places), reversed(events), strict=True)
        )  # the first event of each line
        events = sorted(lines.values())[1 :: max(len(lines) // (4 if FACTOR == 1 else 40), 1)]
    for number, at in enumerate(events):
        yield Interruption(ERRORS[number % 2]("injected"), at)


def interrupt(cell: Cell, verb: str, within: str = "") -> int:
    """Interrupt one verb at each event that `interruptions` chooses; return its number of events."""
    world = World(cell)
    with world:
        interrupted(world, verb, Interruption())  # warm up
        quiet = Interruption()
        interrupted(world, verb, quiet)
        assert len(quiet.places) > 3
        before = Footprint.now()
        for interruption in interruptions(quiet.places, within):
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


@pytest.mark.parametrize(
    ("sample", "verb", "within"),
    [
        (Cell("fake", "memfd"), "lease what waits", "call"),
        (Cell("fake", "memfd"), "reset by a new instance in a block", "reset"),
        (Cell("fake", "memfd", "on-demand"), "close", "unmap"),
        (Cell("fake", "memfd", "on-demand", growth="ftruncate"), "close", "_close_file"),
    ],
    ids=str,
)
def test_verb_interrupted_at_each_line_of_a_function_loses_nothing(
    sample: Cell, verb: str, within: str
) -> None:
    interrupt(sample, verb, within)


@pytest.mark.parametrize("sample", [Cell("wasmer", "memfd")], ids=str)
def test_memory_that_native_objects_reach_has_no_other_tenant_after_an_interrupted_close(
    sample: Cell,
) -> None:
    if sample.missing:
        pytest.skip(sample.missing)
    world, quiet = World(sample), Interruption()
    with world:
        instance = world.instance()
        assert instance.native is not None
        quiet.cut(instance.close)
        for at in range(1, len(quiet.places) + 1):
            interruption, instance = Interruption(KeyboardInterrupt(), at), world.instance()
            shown = memoryview(instance.native.exports.memory.buffer)
            interruption.cut(instance.close)
            del instance
            world.serves()
            with world.guest.instantiate() as following:
                following.call("fill", 0, PAGE, 0xDD)
                assert 0xDD not in bytes(shown[:PAGE]), interruption.places[-1]
            del shown


@pytest.mark.long
@sampled
def test_verb_interrupted_by_real_signals_loses_nothing(
    sample: Cell, note: Callable[[str, object], None]
) -> None:
    done = run("-m", "integration_tests.interrupted_by_signals", sample.host, sample.backend, "60")
    assert (done.returncode, PANIC.sub("", done.stderr)) == (0, "")
    assert int(done.stdout) > 1
    note("interrupts", int(done.stdout))
