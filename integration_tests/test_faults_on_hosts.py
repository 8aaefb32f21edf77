"""Each system call of the core fails once, in each verb: an error that names it, no loss, no foreign byte."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest

import memslot_plugin as memslot
from memslot_plugin.tests import faults
from memslot_plugin.tests.faults import LEAKING, PLAUSIBLE, Fault
from memslot_plugin.tests.profiles import LONG

from . import cells
from .cells import Cell
from .verbs import VERBS, World, finish

CELLS = (
    cells.POSSIBLE_CELLS
    if LONG
    else [
        *(cell for cell in cells.PLAIN_CELLS if not cell.missing),
        Cell("fake", "memfd", allocation="on-demand", reset="madvise"),
        Cell("fake", "anonymous", growth="ftruncate", reset="pagemap"),
    ]
)


def failed_resets(world: World) -> int:
    return sum(pool.failed_resets for pool in world.host.statistics().pools)


def fails(world: World, verb: str, fault: Fault) -> bool:
    """Run a verb with a fault in its action; return True if the action reached it."""
    setup, action = VERBS[verb]
    given = setup(world)
    before = failed_resets(world)
    error, result = "", None
    with faults.injected(fault) as injection:
        try:
            result = action(world, given)
        except memslot.GrowthRefused:
            result = -1  # the answer of memory.grow
        except memslot.MemslotError as raised:
            error = str(raised)
            assert os.strerror(fault.error) in error.partition(": ")[2], error
            assert not verb.startswith("reset") or given.closed
    told = error or injection.logged or result == -1 or failed_resets(world) > before
    if verb != "close a host":  # its statistics are gone
        assert told or fault.may_be_silent or not injection.hit, f"no error and no log: {fault}"
    finish(given)
    return injection.hit


@pytest.mark.gate
@pytest.mark.long
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("tried", CELLS, ids=str)
def test_system_call_that_fails_once_in_a_verb_loses_nothing(
    tried: Cell, verb: str, note: Callable[[str, object], None]
) -> None:
    hits = 0
    with World(tried, audit=1.0) as world:
        for call, errors in PLAUSIBLE.items():
            if call in LEAKING:  # tested in test_faults.py
                continue
            for skip in itertools.count():
                chosen = errors if LONG else errors[skip % len(errors) :][:1]
                hit = 0
                for error in chosen:
                    hit += fails(world, verb, Fault(call, skip, error))
                    world.serves()
                    assert all(pool.limit == 3 for pool in world.host.statistics().pools)
                hits += hit
                if not hit:
                    break
    note("faults", hits)
