"""KeyboardInterrupt and MemoryError in every verb: nothing is lost, and the host goes on serving.

T0 and the gate interrupt each verb at some of its lines, and a night at every event, on every plain cell.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin.tests.leaks import Footprint
from memslot_plugin.tests.profiles import FACTOR, LONG

from . import cells, toy
from .cells import Cell
from .children import ROOT
from .interrupts import Interruption
from .verbs import TABLE, VERBS, World

ERRORS = (KeyboardInterrupt, MemoryError)

sampled = pytest.mark.parametrize(
    "sample",
    [
        pytest.param(cell, marks=pytest.mark.skip(reason=cell.missing) if cell.missing else ())
        for cell in (cells.PLAIN_CELLS if LONG else cells.SAMPLE_CELLS)
    ],
    ids=str,
)


def interrupted(world: World, verb: str, interruption: Interruption) -> None:
    """One verb, interrupted; its result and its arguments are dropped."""
    setup, action = VERBS[verb]
    given = setup(world)
    interruption.cut(lambda: action(world, given))


@contextmanager
def judged(interruption: Interruption) -> Iterator[None]:
    """Names the place in a failure; what finalizers and callbacks could not raise is one too."""
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
    """One for each event to be interrupted, of an action that has quietly been through these places."""
    events: Sequence[int] = range(1, len(places) + 1)
    if not LONG:
        lines = dict(zip(reversed(places), reversed(events), strict=True))  # where each is first
        events = sorted(lines.values())[1 :: max(len(lines) // (4 * FACTOR), 1)]
    for number, at in enumerate(events):
        yield Interruption(ERRORS[number % 2]("injected"), at)


def interrupt(cell: Cell, verb: str) -> int:
    """Interrupt one verb, again and again; return how many events it has."""
    world = World(cell)
    try:
        interrupted(world, verb, Interruption())  # makes what is made once
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
        assert all("extension" in name for name in left), left  # one for each slot that grew
        world.host.close()
    except BaseException:
        world.host.close(force=True)
        raise
    return len(quiet.places)


@pytest.mark.scales
@pytest.mark.parametrize("verb", VERBS)
@sampled
def test_verb_interrupted_at_any_line_loses_nothing(
    sample: Cell, verb: str, note: Callable[[str, object], None]
) -> None:
    note("events", interrupt(sample, verb))


@pytest.mark.long
@pytest.mark.parametrize("verb", ["instantiate", "close a grown instance", "reset after growth"])
@pytest.mark.parametrize(
    "changes",
    [{"allocation": "on-demand"}, {"growth": "ftruncate"}, {"reset": "madvise"}],
    ids=lambda changes: "-".join(changes.values()),
)
def test_verb_interrupted_in_other_ways_of_allocating_loses_nothing(
    plain_cell: Cell, changes: dict[str, str], verb: str
) -> None:
    cell = plain_cell.with_changes(**changes)
    if cell.refused:
        pytest.skip("impossible: wasmer grows its mappings by mprotect itself")
    interrupt(cell, verb)


def busy_host(cell: Cell) -> tuple[memslot.Host, list[Any]]:
    """A host with a guest in use, one whose instance waits, one that was dropped, and a fork."""
    host = cell.open(slots=4, audit=0.0)
    guests = [host.prepare(toy.A), host.prepare(TABLE)]
    with guests[1].lease() as leased:
        leased.call("bump")
    guests[1].instantiate()
    used = guests[0].instantiate()
    return host, [used, used.fork(1), guests]


def open_and_close(cell: Cell, interruption: Interruption) -> None:
    interruption.cut(lambda: cell.open().close())


def close_by_force(cell: Cell, interruption: Interruption) -> None:
    host, held = busy_host(cell)
    interruption.cut(lambda: host.close(force=True))
    host.close(force=True)
    with pytest.raises(memslot.UsedAfterClose):
        held[-1][0].instantiate()


@pytest.mark.scales
@pytest.mark.parametrize("life", [open_and_close, close_by_force])
@sampled
def test_host_whose_opening_or_closing_is_interrupted_leaves_nothing(
    sample: Cell, life: Callable[[Cell, Interruption], None]
) -> None:
    life(sample, Interruption())
    quiet = Interruption()
    life(sample, quiet)
    before = Footprint.now()
    for interruption in interruptions(quiet.places):
        with judged(interruption):
            life(sample, interruption)
            lost = Footprint.now().lost_since(before, mappings=64)
            assert not lost


@pytest.mark.gate
@pytest.mark.long
@sampled
def test_real_signals_at_random_moments_lose_nothing(
    sample: Cell, note: Callable[[str, object], None]
) -> None:
    command = [sys.executable, "-m", "integration_tests.interrupted_by_signals"]
    command += [sample.host, sample.backend, "60" if LONG else "1"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 1
    note("interrupts", int(done.stdout))
