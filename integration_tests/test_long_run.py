"""One host object serves 100,000 requests and is as it was before: memory, descriptors, mappings, objects."""

from __future__ import annotations

import sys
from collections.abc import Callable

import memslot_plugin as memslot
from memslot_plugin.reset import ORDINARY
from memslot_plugin.tests.patience import count_objects
from memslot_plugin.tests.profiles import EXPENSIVE

from . import cells, toy
from .cells import Cell
from .leaks import MIB, Footprint
from .toy import PAGE

REQUESTS = 100_000
WARM_UP = 2_000
RESETS = 1_000_000 if EXPENSIVE else 20_000


def serve(guests: list[memslot.Guest], requests: int) -> None:
    """Each request is an instance of its own; most write a little, some a lot, a few grow, a few trap, a few reset."""
    for number in range(requests):
        with guests[number % 16 == 5].instantiate(tenant="ann" if number % 2 else None) as instance:
            instance.call("store", number % (2 * PAGE), 255)
            if number % 64 == 0:
                instance.call("fill", 0, PAGE, 7)
            elif number % 256 == 1:
                instance.call("grow", 1)
            elif number % 64 == 2:
                try:
                    instance.call("load", 2 * PAGE)
                except memslot.GuestTrap:
                    continue
                raise AssertionError("a load behind the end did not trap")
            elif number % 32 == 3:
                instance.reset()
                assert instance.call("load", 2 * PAGE - 1) == (0 if number % 16 == 5 else ord("t"))


def test_a_hundred_thousand_requests_leave_the_process_as_it_was(
    plain_cell: Cell, note: Callable[[str, object], None]
) -> None:
    with plain_cell.serving(slots=2, audit=0.0) as host:
        guests = [host.prepare(toy.A), host.prepare(toy.B)]
        serve(guests, WARM_UP)
        ORDINARY.clear()  # one result per duration that was ever seen, of which a busy machine shows more
        before, objects, blocks = Footprint.now(), count_objects(), sys.getallocatedblocks()
        serve(guests, REQUESTS)
        after = Footprint.now()
        lost = after.lost_since(before, mappings=2)
        assert not lost
        note("resident bytes more", after.resident - before.resident)
        assert after.resident <= before.resident + 2 * MIB
        assert count_objects() <= objects + 50
        ORDINARY.clear()
        assert sys.getallocatedblocks() <= blocks + 8_000
        statistics = host.statistics()
        (pool,) = statistics.pools
        assert statistics.instances == REQUESTS + WARM_UP
        assert (pool.in_use, pool.failed_resets, pool.exhausted) == (0, 0, 0)
        cells.check(host, in_use=0)
        for guest, module in zip(guests, (toy.A, toy.B), strict=True):
            with guest.instantiate() as instance:
                assert instance.memory.read(0, 2 * PAGE) == toy.pristine(module)


def test_a_million_resets_leak_nothing(
    plain_cell: Cell, note: Callable[[str, object], None]
) -> None:
    """In the ordinary profile it is the first fiftieth of them."""
    with plain_cell.serving(slots=2, audit=0.0) as host:
        guest = host.prepare(toy.A)

        def reset(times: int) -> None:
            with guest.instantiate() as instance:
                store, again = instance.function("store"), instance.reset
                for number in range(times):
                    store(number % (2 * PAGE), 255)
                    again()

        reset(WARM_UP)
        before, objects = Footprint.now(), count_objects()
        reset(RESETS)
        after = Footprint.now()
        assert after.descriptors == before.descriptors
        assert (after.images, after.reserved) == (before.images, before.reserved)
        assert after.mappings <= before.mappings + 4  # the interpreter's own memory
        note("resident bytes more", after.resident - before.resident)
        print(f"{plain_cell.host} {plain_cell.backend}: {RESETS} resets,", end=" ")
        print(f"{after.resident - before.resident:+} bytes of RSS,", end=" ")
        print(f"{after.mappings - before.mappings:+} mappings")
        assert after.resident <= before.resident + 2 * MIB
        assert count_objects() <= objects + 50
        assert host.statistics().resets == WARM_UP + RESETS
        with guest.instantiate() as instance:
            assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
