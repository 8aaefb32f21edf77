"""The pool: who gets which slot, what comes back, and what is counted."""

from __future__ import annotations

import ctypes
import errno
import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from memslot_plugin import Image, MemfdImage, Pool, Slot, State
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin.errors import (
    InvariantBroken,
    MemoryTooLarge,
    SlotError,
    SystemCallError,
)
from memslot_plugin.reset import madvise
from memslot_plugin.tests.slots import RESERVED as SLOT
from memslot_plugin.tests.slots import Holder, cycle, fill

pytestmark = pytest.mark.usefixtures("no_leaks")

RESERVED = 2 * SLOT

Make = Callable[..., Pool]


# Behaviour 12: one reservation, three strategies


def test_12_one_reservation_holds_all_slots_with_guards_around_each(
    make_pool: Make, calls: Any
) -> None:
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
    assert made == {
        "munmap": 1
    }  # behaviour 11: when the whole reservation goes, one munmap does it


def test_12_affinity_gives_a_guest_the_slot_it_used_last(
    make_pool: Make, image: Image, calls: Any
) -> None:
    pool = make_pool(4)
    first, second = cycle(pool, "a", image), cycle(pool, "b")
    assert first != second
    for _ in range(3):
        with calls() as made:
            assert cycle(pool, "a", image) == first
        assert set(made) == {"madvise"}  # behaviour 6: the lease itself makes none
        assert cycle(pool, "b") == second
    assert pool.statistics().affinity_hits == 6


def test_12_affinity_takes_never_used_slots_first_and_then_the_least_recently_used(
    make_pool: Make,
) -> None:
    pool = make_pool(3)
    bases = [cycle(pool, guest) for guest in "abc"]
    assert len(set(bases)) == 3
    cycle(pool, "a")
    assert cycle(pool, "d") == bases[1]
    assert cycle(pool, "e") == bases[2]
    assert cycle(pool, "a") == bases[0]


@pytest.mark.parametrize("bound", [0, 1, 2, 10])
def test_12_unused_warm_slots_are_bounded(make_pool: Make, image: Image, bound: int) -> None:
    pool = make_pool(8, max_unused_warm_slots=bound)
    bases = {cycle(pool, guest, image) for guest in range(20)}
    assert len(bases) == max(1, min(bound, 8))
    assert pool.statistics().warm == len(bases)


def test_12_next_available_gives_the_slot_that_came_back_last(make_pool: Make) -> None:
    pool = make_pool(4, strategy="next-available")
    slots = [pool.lease(None, P, affinity=i) for i in range(3)]
    for slot in slots:
        pool.release(slot)
    again = [pool.lease(None, P, affinity=i) for i in range(3)]
    assert [slot.base for slot in again] == [slot.base for slot in reversed(slots)]
    for slot in again:
        pool.release(slot)


def test_12_random_gives_any(make_pool: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(4, strategy="random")
    monkeypatch.setattr(random, "choice", random.Random(7).choice)
    slots = [pool.lease(None, P, affinity="a") for _ in range(4)]
    for slot in slots:
        pool.release(slot)
    assert {cycle(pool, "a") for _ in range(60)} == {slot.base for slot in slots}


@pytest.mark.parametrize("strategy", ["affinity", "next-available", "random"])
@pytest.mark.parametrize("allocation", ["pooling", "on-demand"])
def test_12_whatever_the_strategy_every_lease_is_pristine(
    make_pool: Make, image: Image, strategy: str, allocation: str
) -> None:
    pool = make_pool(3, strategy=strategy, allocation=allocation, max_unused_warm_slots=2)
    order = random.Random(strategy)
    leased: list[Slot] = []
    for _ in range(200):
        if leased and (len(leased) == 3 or order.random() < 0.5):
            pool.release(leased.pop(order.randrange(len(leased))))
        else:
            picture = order.choice([None, image])
            slot = pool.lease(picture, order.choice([2, 5, 9]) * P, affinity=order.choice("abcd"))
            start = b"x" * 2 * P if picture else b""
            bytes_now = ctypes.string_at(slot.base, slot.accessible)
            assert bytes_now == start + bytes(slot.accessible - len(start))
            fill(slot)
            leased.append(slot)
    pool.check()
    for slot in leased:
        pool.release(slot)


# Behaviour 13: on demand


def test_13_on_demand_costs_no_mprotect_without_an_image(make_pool: Make, calls: Any) -> None:
    pool = make_pool(allocation="on-demand")
    with calls() as made:
        slot = pool.lease(None, 4 * P, affinity="a")
    assert made == {"mmap": 2}
    fill(slot)
    with calls() as made:
        pool.release(slot)
    assert made == {"munmap": 1}
    assert pool.statistics().idle == 0


def test_13_an_on_demand_lease_that_fails_keeps_nothing(make_pool: Make, image: Image) -> None:
    pool = make_pool(allocation="on-demand")
    with pytest.raises(MemoryTooLarge):
        pool.lease(image, P, affinity="a")
    with pytest.raises(MemoryTooLarge):
        pool.lease(None, RESERVED + P, affinity="a")
    with pytest.raises(SlotError):
        pool.lease(None, -P, affinity="a")
    assert pool.statistics().idle == pool.statistics().in_use == 0


# Behaviours 14 and 15


@pytest.mark.parametrize("allocation", ["pooling", "on-demand"])
def test_14_a_slot_whose_reset_failed_never_goes_back(
    make_pool: Make, image: Image, inject: Any, allocation: str
) -> None:
    pool = make_pool(2, allocation=allocation)
    slot = pool.lease(image, 4 * P, affinity="a")
    fill(slot)
    inject("madvise", error=errno.EINVAL)
    if allocation == "pooling":
        with pytest.raises(SystemCallError, match="MADV_DONTNEED in a reset"):
            pool.release(slot)
        assert pool.statistics().failed_resets == 1
    else:
        pool.release(slot)  # nothing is reset that is unmapped
    assert slot.state is State.DESTROYED
    statistics = pool.statistics()
    assert (statistics.destroyed, statistics.idle, statistics.limit) == (1, 0, 2)
    for guest in "ab":  # its place is used again, and covered first
        again = pool.lease(None, 4 * P, affinity=guest)
        assert ctypes.string_at(again.base, 4 * P) == bytes(4 * P)
        assert again is not slot
        pool.release(again)


def test_14_a_failed_reset_in_place_retires_the_slot_at_release(
    make_pool: Make, inject: Any
) -> None:
    pool = make_pool(1)
    slot = pool.lease(None, 4 * P, affinity="a")
    fill(slot)
    inject("madvise", error=errno.EINVAL)
    with pytest.raises(SystemCallError):
        pool.reset(slot)
    pool.check()
    assert pool.release(slot).strategy == "retired"  # it was told when it happened
    statistics = pool.statistics()
    assert (statistics.failed_resets, statistics.destroyed, statistics.in_use) == (1, 1, 0)
    cycle(pool, "b")


def test_15_images_of_a_closed_guest_are_purged_from_unused_slots(
    make_pool: Make, image: Image, resources: Any
) -> None:
    pool = make_pool(4)
    before = resources()
    kind: Any = type(image)
    with kind("closed", b"y" * P) as closed:
        slots = [pool.lease(closed, 4 * P, affinity=i) for i in range(3)]
        for slot in slots[:2]:
            pool.release(slot)
        closed.close()
        assert pool.purge(closed) == 2
        pool.check()
        assert pool.statistics().warm == 0
        fill(slots[2])
        pool.reset(slots[2])  # a leased one keeps it until it comes back
        assert ctypes.string_at(slots[2].base, P) == b"y" * P
        pool.release(slots[2])
        assert (pool.statistics().warm, pool.statistics().purged) == (0, 3)
        assert resources().image_mappings == before.image_mappings
        assert resources().descriptors == before.descriptors
    cycle(pool, "new", image)


def test_15_memfds_of_dropped_guests_are_not_kept_alive(make_pool: Make, resources: Any) -> None:
    pool = make_pool(4)
    cycle(pool, "warm up")
    before = resources()
    for guest in range(30):
        with MemfdImage(f"guest {guest}", b"z" * P) as image:
            cycle(pool, guest, image)
            image.close()
            pool.purge(image)
        now = resources()
        assert now.image_mappings == before.image_mappings
        assert now.descriptors == before.descriptors
    assert pool.statistics().idle <= 4


def test_15_a_purge_that_fails_retires_the_slot(make_pool: Make, image: Image, inject: Any) -> None:
    pool = make_pool(2)
    cycle(pool, "a", image)
    inject("mmap", error=errno.ENOMEM)
    assert pool.purge(image) == 1
    statistics = pool.statistics()
    assert (statistics.destroyed, statistics.idle) == (1, 0)
    pool.check()


# Statistics and threads


def test_statistics_are_what_happened(make_pool: Make, image: Image) -> None:
    pool = make_pool(3)
    for _ in range(3):
        cycle(pool, "a", image)
    slot = pool.lease(image, 4 * P, affinity="a")
    pool.reset(slot)
    now = pool.statistics()
    assert (now.limit, now.in_use, now.idle, now.warm) == (3, 1, 0, 0)
    assert (now.leases, now.remaps, now.affinity_hits) == (4, 1, 3)
    assert (now.created, now.destroyed, now.resets, now.failed_resets) == (1, 0, 4, 0)
    pool.release(slot)
    assert pool.statistics().warm == 1


def test_an_audit_compares_every_slot_that_comes_back(make_pool: Make, image: Image) -> None:
    def forgets(slot: Slot) -> Any:
        result = madvise(slot)
        if slot.affinity == "b":
            ctypes.memset(slot.base + 3 * P, 1, 1)
        return result

    pool = make_pool(2, audit=1.0, reset=forgets)
    cycle(pool, "a", image)
    slot = pool.lease(image, 4 * P, affinity="b")
    with pytest.raises(InvariantBroken, match=f"byte {3 * P} of a slot differs"):
        pool.release(slot)
    assert slot.state is State.DESTROYED
    now = pool.statistics()
    assert (now.audits, now.failed_resets, now.resets) == (2, 1, 1)


@pytest.mark.parametrize("strategy", ["affinity", "next-available", "random"])
@pytest.mark.parametrize("allocation", ["pooling", "on-demand"])
def test_threads_that_lease_and_release_at_random_never_meet(
    make_pool: Make, image: Image, strategy: str, allocation: str
) -> None:
    pool = make_pool(3, strategy=strategy, allocation=allocation)
    wrong: list[str] = []
    start = b"x" * 2 * P

    def work(number: int) -> None:
        order = random.Random(number)
        for _ in range(40):
            picture = order.choice([None, image])
            pages = order.choice([2, 4, 7])
            holder = Holder()
            slot = pool.lease(
                picture, pages * P, affinity=order.choice("ab"), timeout=60, holder=holder
            )
            expected = (start if picture else bytes(2 * P)) + bytes((pages - 2) * P)
            if ctypes.string_at(slot.base, pages * P) != expected:
                wrong.append("a lease was not pristine")
            ctypes.memset(slot.base, number, pages * P)
            if order.random() < 0.3:
                time.sleep(0)
            if ctypes.string_at(slot.base, pages * P) != bytes([number]) * pages * P:
                wrong.append("somebody else wrote here")
            if order.random() < 0.3:
                pool.reset(slot)
            if order.random() < 0.1:
                del holder
            else:
                pool.release(slot, retire=order.random() < 0.1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.statistics().in_use == 0
    assert pool.statistics().leases == 6 * 40
