"""Warming: unused slots made ready for a guest before its requests come."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from memslot_plugin import FakeHost, MemfdImage, Pool, Settings
from memslot_plugin._core import PAGE_SIZE, counters
from memslot_plugin.errors import UsedAfterClose
from memslot_plugin.probe import probe
from memslot_plugin.reset import choose
from memslot_plugin.smaps import status_bytes

SIZE = 1 << 20
WRITTEN = range(3, 40)
MODULE = bytes.fromhex("0061736d01000000 0503010002 0b0a0100 4180080b03616263")


@pytest.fixture
def image() -> Iterator[MemfdImage]:
    with MemfdImage("warm", b"\1" * (SIZE // 2)) as made:
        yield made


@pytest.fixture
def pool() -> Iterator[Pool]:
    reset = choose("auto", 1 << 24)
    with Pool(slots=8, reserved=1 << 24, guard=1 << 16, reset=reset, audit=1.0) as made:
        yield made
        made.check()


def write(base: int) -> None:
    for page in WRITTEN:
        ctypes.memset(base + page * PAGE_SIZE, 7, 1)


def use(pool: Pool, image: MemfdImage) -> None:
    slot = pool.lease(image, SIZE, affinity="guest")
    write(slot.base)
    pool.release(slot)


@pytest.mark.skipif(not probe().pagemap.works, reason="impossible: no PAGEMAP_SCAN")
def test_warm_slots_hold_the_pages_that_the_guest_usually_writes(
    pool: Pool, image: MemfdImage
) -> None:
    use(pool, image)
    assert pool.warm(image, SIZE, affinity="guest", count=4) == 4
    pool.check()
    before = counters()
    for slot in [pool.lease(image, SIZE, affinity="guest") for _ in range(4)]:
        assert {"mmap", "mprotect"} & {
            name for name in before if counters()[name] != before[name]
        } == set()
        runs = slot.private_runs()
        assert runs == [(WRITTEN.start * PAGE_SIZE, len(WRITTEN) * PAGE_SIZE)]
        assert slot.first_difference() is None
        resident = status_bytes("RssAnon")
        write(slot.base)
        assert status_bytes("RssAnon") - resident < len(WRITTEN) * PAGE_SIZE // 2
        pool.release(slot)


@pytest.mark.skipif(not probe().pagemap.works, reason="impossible: no PAGEMAP_SCAN")
def test_a_guest_of_which_nothing_is_known_gets_its_image_laid(
    pool: Pool, image: MemfdImage
) -> None:
    assert pool.warm(image, SIZE, affinity="new", count=2) == 2
    before = counters()
    slot = pool.lease(image, SIZE, affinity="new")
    assert counters() == before
    assert slot.private_runs() == []
    pool.release(slot)


def test_slots_in_use_are_left_alone_and_fewer_are_no_error(pool: Pool, image: MemfdImage) -> None:
    leased = [pool.lease(image, SIZE, affinity="other") for _ in range(6)]
    assert pool.warm(image, SIZE, affinity="guest", count=5) == 2
    for slot in leased:
        pool.release(slot)
    assert pool.statistics().in_use == 0


def test_on_demand_nothing_can_be_warm(image: MemfdImage) -> None:
    reset = choose("auto", 1 << 24)
    with Pool(slots=2, reserved=1 << 24, guard=0, reset=reset, allocation="on-demand") as pool:
        assert pool.warm(image, SIZE, affinity="guest", count=2) == 0
        pool.check()


def test_warming_hands_nothing_out(pool: Pool, image: MemfdImage) -> None:
    pool.warm(image, SIZE, affinity="guest", count=3)
    statistics = pool.statistics()
    assert (statistics.in_use, statistics.leases, statistics.idle) == (0, 0, 3)


def test_a_guest_warms_its_own_slots() -> None:
    with FakeHost(Settings(slots=4)) as host:
        guest = host.prepare(MODULE)
        assert guest.warm(3) == 3
        before = counters()
        with guest.instantiate() as instance:
            assert counters() == before
            assert instance.memory.read(1024, 3) == b"abc"
        guest.close()
        with pytest.raises(UsedAfterClose, match="was closed"):
            guest.warm(1)
