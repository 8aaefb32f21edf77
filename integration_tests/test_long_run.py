"""Long runs of a host: descriptors, mappings and objects stay as before, in T2 resident memory too."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

import memslot_plugin as memslot
from memslot_plugin.settings import MIB
from memslot_plugin.tests.leaks import Footprint, count_objects
from memslot_plugin.tests.profiles import LONG, examples

from . import cells, toy
from .cells import Cell
from .soak import soak
from .toy import PAGE

WARM_UP = 2_000 if LONG else 100


def requests(guests: list[memslot.Guest], times: int) -> None:
    """Serve requests by new instances: most write a little, some a lot, a few grow, a few trap, a few reset."""
    for number in range(times):
        with guests[number % 16 == 5].instantiate(tenant="ann" if number % 2 else None) as instance:
            instance.call("store", number % (2 * PAGE), 255)
            if number % 64 == 0:
                instance.call("fill", 0, PAGE, 7)
            elif number % 256 == 1:
                instance.call("grow", 1)
            elif number % 64 == 2:
                with pytest.raises(memslot.GuestTrap):
                    instance.call("load", 2 * PAGE)
            elif number % 32 == 3:
                instance.reset()
                assert instance.call("load", 2 * PAGE - 1) == ord("t")


def resets(guests: list[memslot.Guest], times: int) -> None:
    with guests[0].instantiate() as instance:
        store, again = instance.function("store"), instance.reset
        for number in range(times):
            store(number % (2 * PAGE), 255)
            again()


@pytest.mark.scales
@pytest.mark.parametrize("serve", [requests, resets])
def test_process_after_a_long_run_is_as_before(
    plain_cell: Cell,
    serve: Callable[[list[memslot.Guest], int], None],
    note: Callable[[str, object], None],
) -> None:
    times = examples(500 if serve is requests else 4_000)
    with plain_cell.serving(slots=2, audit=0.0) as host:
        guests = [host.prepare(toy.A), host.prepare(toy.B)]
        serve(guests, WARM_UP)
        before, objects, blocks = Footprint.now(), count_objects(), sys.getallocatedblocks()
        serve(guests, times)
        after = Footprint.now()
        assert not after.lost_since(before, mappings=4)
        assert count_objects() <= objects + 50
        note("resident bytes more", after.resident - before.resident)
        if LONG:
            assert after.resident <= before.resident + 2 * MIB
            assert sys.getallocatedblocks() <= blocks + 8_000
        statistics = host.statistics()
        (pool,) = statistics.pools
        served = statistics.instances if serve is requests else statistics.resets
        assert served == times + WARM_UP
        assert (pool.failed_resets, pool.exhausted) == (0, 0)
        cells.check(host, in_use=0)


@pytest.mark.gate
@pytest.mark.long
def test_process_after_a_soak_is_as_before(
    real_cell: Cell, quickjs: bytes, note: Callable[[str, object], None]
) -> None:
    note("soak", soak(real_cell, 600 if LONG else 2, quickjs))
