"""The pool: the choice of a slot, ranges of runtimes, releases and counters. test_pool_model.py compares bytes."""

from __future__ import annotations

import ctypes
import errno
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from memslot_plugin import FakeHost, Image, Pool, Settings, Slot, State, _core
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import lib
from memslot_plugin.errors import InvariantBroken, SlotError, SystemCallError, UsedAfterClose
from memslot_plugin.memory.reset import choose, madvise
from memslot_plugin.tests.faults import fail_next_reset
from memslot_plugin.tests.slots import RESERVED as SLOT
from memslot_plugin.tests.slots import Holder, Runtime, cycle, fill, needs_pagemap

pytestmark = pytest.mark.usefixtures("no_leaks")

RESERVED = 2 * SLOT

Make = Callable[..., Pool]


def test_reservation_of_a_pool_has_guards_around_each_slot(make_pool: Make, calls: Any) -> None:
    pool = make_pool(5, guard=2 * P)
    with calls() as made:
        slots = [pool.lease(None, P, affinity=i) for i in range(5)]
    assert made == {"mmap": 1, "mprotect": 5}
    bases = [slot.base for slot in slots]
    assert {b - a for a, b in itertools.pairwise(bases)} == {RESERVED + 2 * P}
    for slot in slots:
        pool.release(slot)
    with calls() as made:
        pool.close()


def test_affinity_for_a_known_guest_gives_its_last_slot(
    make_pool: Make, image: Image, calls: Any
) -> None:
    pool = make_pool(4)
    first, second = cycle(pool, "a", image), cycle(pool, "b")
    assert first != second
    for _ in range(3):
        with calls() as made:
            assert cycle(pool, "a", image) == first
        assert set(made) == {"madvise"}  # the lease itself makes none
        assert cycle(pool, "b") == second
    now = pool.statistics()
    assert (now.limit, now.in_use, now.idle, now.warm) == (4, 0, 2, 1)
    assert (now.leases, now.remaps, now.affinity_hits) == (8, 2, 6)
    assert (now.created, now.destroyed, now.resets, now.failed_resets) == (2, 0, 8, 0)


def test_affinity_for_a_new_guest_gives_never_used_slots_then_the_least_recently_used(
    make_pool: Make,
) -> None:
    pool = make_pool(3)
    bases = [cycle(pool, guest) for guest in "abc"]
    assert len(set(bases)) == 3
    assert [cycle(pool, guest) for guest in "adea"] == [bases[i] for i in (0, 1, 2, 0)]


def test_affinity_for_a_guest_with_several_slots_gives_the_last_used(make_pool: Make) -> None:
    pool = make_pool(3)
    slots = [pool.lease(None, P, affinity="a") for _ in range(3)]
    for i in (0, 2, 1):
        pool.release(slots[i])
    assert cycle(pool, "a") == slots[1].base


@pytest.mark.parametrize("bound", [0, 1, 2, 10])
def test_unused_warm_slots_of_many_guests_stay_within_their_bound(
    make_pool: Make, image: Image, bound: int
) -> None:
    pool = make_pool(8, max_unused_warm_slots=bound)
    bases = {cycle(pool, guest, image) for guest in range(20)}
    assert len(bases) == max(1, min(bound, 8)) == pool.statistics().warm


@pytest.mark.parametrize("strategy", ["next-available", "random"])
def test_strategy_without_affinity_gives_the_slot_that_came_back_last_or_any(
    make_pool: Make, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(4, strategy=strategy)
    monkeypatch.setattr(random, "choice", random.Random(7).choice)
    slots = [pool.lease(None, P, affinity="a") for _ in range(4)]
    for slot in slots:
        pool.release(slot)
    found = [cycle(pool, "a") for _ in range(60)]
    assert set(found) == {slot.base for slot in (slots if strategy == "random" else slots[-1:])}


def test_on_demand_slot_without_an_image_makes_no_mprotect(make_pool: Make, calls: Any) -> None:
    pool = make_pool(allocation="on-demand")
    with calls() as made:
        slot = pool.lease(None, 4 * P, affinity="a")
    assert made == {"mmap": 2}
    with calls() as made:
        pool.release(slot)
    assert made == {"munmap": 1}


def test_slot_whose_reset_failed_never_goes_back(make_pool: Make, inject: Any) -> None:
    pool = make_pool(2)
    slot = pool.lease(None, 4 * P, affinity="a")
    fail_next_reset(inject, errno.EINVAL)
    with pytest.raises(SystemCallError, match="mapping over a slot in a reset"):
        pool.release(slot)
    assert slot.state is State.DESTROYED
    now = pool.statistics()
    assert (now.failed_resets, now.destroyed, now.idle, now.limit) == (1, 1, 0, 2)
    for guest in "ab":  # the place is used again
        again = pool.lease(None, 4 * P, affinity=guest)
        assert again is not slot
        pool.release(again)


def test_purge_of_a_closed_image_takes_it_from_unused_slots_now_and_from_leased_ones_at_release(
    make_pool: Make, image: Image
) -> None:
    pool = make_pool(4)
    closed = type(image)("closed", b"y" * P)
    *slots, leased = [pool.lease(closed, 4 * P, affinity=i) for i in range(3)]
    for slot in slots:
        pool.release(slot)
    closed.close()
    assert pool.purge(closed) == 2
    pool.check()
    assert pool.statistics().warm == 0
    fill(leased)
    pool.reset(leased)
    assert ctypes.string_at(leased.base, P) == b"y" * P
    pool.release(leased)
    assert (pool.statistics().warm, pool.statistics().purged) == (0, 3)
    cycle(pool, "new", image)


def test_purged_slot_is_the_next_to_be_leased(make_pool: Make, image: Image) -> None:
    pool = make_pool(2)
    kept = cycle(pool, "a", image)
    with type(image)("closed", b"y" * P) as closed:
        purged = cycle(pool, "b", closed)
    assert pool.purge(closed) == 1
    assert cycle(pool, "c") == purged
    assert cycle(pool, "a", image) == kept


def test_purged_slot_is_leased_before_a_new_one(make_pool: Make, image: Image) -> None:
    pool = make_pool(8)
    for guest in range(4):
        with type(image)("closed", b"y" * P) as closed:
            cycle(pool, guest, closed)
        pool.purge(closed)
    assert pool.statistics().created == 1


def test_audit_compares_every_slot_that_comes_back(make_pool: Make, image: Image) -> None:
    def forgets(slot: Slot) -> Any:
        result = madvise(slot)
        if slot.affinity == "b":
            ctypes.memset(slot.base + 3 * P, 1, 1)
        return result

    pool = make_pool(2, audit=1.0, reset=forgets)
    cycle(pool, "a", image)
    slot = pool.lease(image, 4 * P, affinity="b")
    with pytest.raises(InvariantBroken, match=f"byte {3 * P} of a clean slot differs"):
        pool.release(slot)
    assert slot.state is State.DESTROYED
    now = pool.statistics()
    assert (now.audits, now.failed_resets, now.resets) == (2, 1, 2)


# Ranges that a runtime owns


def lease_of(pool: Pool, runtime: Runtime, image: Image | None = None) -> Slot:
    how = {"map_host_memory": runtime, "shape": runtime.shape}
    return pool.lease(image, runtime.accessible, affinity="a", **how)  # type: ignore[arg-type]


def test_range_of_a_runtime_after_release_is_handed_out_again(
    make_pool: Make, image: Image, calls: Any
) -> None:
    pool, runtime = make_pool(2), Runtime(4 * P, RESERVED)
    slot = lease_of(pool, runtime, image)
    pool.release(slot)
    pool.check()
    with calls() as made:
        assert lease_of(pool, runtime, image) is slot
    assert made == {}
    assert len(runtime.live) == 1
    pool.release(slot)
    pool.close()
    assert runtime.live == []


def test_range_of_a_runtime_without_reset_goes_back_to_it(make_pool: Make, inject: Any) -> None:
    pool, runtime = make_pool(1), Runtime(4 * P, RESERVED)
    slot = lease_of(pool, runtime)
    _core.check(lib.ms_allow(slot.base, 8 * P), "growing as a runtime does")
    slot.grow(8 * P)
    with pytest.raises(SlotError, match=r"grew this memory .* the slot has to be retired"):
        pool.reset(slot)
    pool.release(slot, retire=True)
    assert runtime.live == []
    fail_next_reset(inject, errno.EINVAL)
    with pytest.raises(SystemCallError):
        pool.release(lease_of(pool, runtime))
    assert runtime.live == []


def test_range_of_a_runtime_that_comes_back_without_a_release_is_not_handed_out_again(
    make_pool: Make, caplog: pytest.LogCaptureFixture
) -> None:
    pool, runtime, holder = make_pool(1), Runtime(4 * P, RESERVED), Holder()
    slot = pool.lease(None, 4 * P, affinity="a", map_host_memory=runtime, holder=holder)
    del holder
    assert pool.statistics().in_use == 0
    assert (slot.state, runtime.live) == (State.DESTROYED, [])
    pool.release(lease_of(pool, runtime))
    assert not caplog.records


def test_range_of_a_runtime_is_leased_by_its_shape_and_makes_room_at_the_limit(
    make_pool: Make,
) -> None:
    pool, runtimes = make_pool(2), [Runtime(n * P, RESERVED, shape=n) for n in (1, 2, 3, 4)]
    for runtime in [*runtimes[:2], *runtimes[:2], *runtimes]:
        slot = lease_of(pool, runtime)
        assert slot.accessible == runtime.accessible
        pool.release(slot)
        assert sum(len(runtime.live) for runtime in runtimes) <= 2
        pool.check()
    assert pool.statistics().created == 4
    assert [slot.mapping.shape for slot in pool._inventory.free() if slot.mapping] == [3, 4]
    with pytest.raises(SlotError, match="the runtime owns this slot's mapping"):
        pool.lease(None, 5 * P, affinity="a", map_host_memory=runtimes[0], shape=1)
    assert pool.statistics().in_use == 0


def test_runtime_that_cannot_map_loses_no_slot(make_pool: Make) -> None:
    pool = make_pool(1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            pool.lease(None, P, affinity="a", map_host_memory=lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    cycle(pool, "a")


# Warming: unused slots are made ready before requests come

SIZE = 64 * P


@pytest.fixture
def warmed(make_pool: Make) -> Pool:
    return make_pool(8, reset=choose("auto", 1 << 24), audit=1.0)


@needs_pagemap
def test_warm_slot_of_a_known_guest_holds_the_usually_written_pages(
    warmed: Pool, image: Image, calls: Any
) -> None:
    slot = warmed.lease(image, SIZE, affinity="guest")
    ctypes.memset(slot.base + 3 * P, 7, 37 * P)
    warmed.release(slot)
    usual = slot.private_runs()
    assert warmed.warm(image, SIZE, affinity="guest", count=4) == 4
    warmed.check()
    with calls() as made:
        slots = [warmed.lease(image, SIZE, affinity="guest") for _ in range(4)]
    assert made == {}
    for slot in slots:
        assert slot.private_runs() == usual
        warmed.release(slot)


def test_warming_for_an_unknown_guest_maps_its_image_in_unused_slots_only(
    warmed: Pool, image: Image, calls: Any, make_pool: Make
) -> None:
    leased = [warmed.lease(None, SIZE, affinity="other") for _ in range(6)]
    assert warmed.warm(image, SIZE, affinity="new", count=5) == 2
    now = warmed.statistics()
    assert (now.in_use, now.leases, now.idle) == (6, 6, 2)
    with calls() as made:
        leased.append(warmed.lease(image, SIZE, affinity="new"))
    assert made == {}
    for slot in leased:
        warmed.release(slot)
    assert warmed.warm(image, SIZE, affinity="new", count=9) == 8  # also of those that others used
    warmed.check()
    on_demand = make_pool(2, allocation="on-demand")
    assert on_demand.warm(image, SIZE, affinity="guest", count=2) == 0


def test_guest_warms_its_own_slots_until_it_is_closed(calls: Any) -> None:
    module = bytes.fromhex("0061736d01000000 0503010002 0b0a0100 4180080b03616263")
    with FakeHost(Settings(slots=4)) as host:
        guest = host.prepare(module)
        assert guest.warm(3) == 3
        with calls() as made:
            guest.instantiate().close()
        assert "mmap" not in made
        guest.close()
        with pytest.raises(UsedAfterClose, match="was closed"):
            guest.warm(1)
