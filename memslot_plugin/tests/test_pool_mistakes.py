"""Refusals of a pool, and failures after which it gives everything back."""

from __future__ import annotations

import errno
import inspect
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import HostMapping
from memslot_plugin import Image, Pool, Slot
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin.memory.free import FreeList
from memslot_plugin.memory.inventory import Inventory
from memslot_plugin.memory.lease import SlotLease
from memslot_plugin.memory.reset import madvise
from memslot_plugin.tests.faults import fail_next_reset
from memslot_plugin.tests.slots import RESERVED as SLOT
from memslot_plugin.tests.slots import (
    Fork,
    Holder,
    Runtime,
    content,
    cycle,
    every_fork,
    fill,
    in_child,
)

pytestmark = pytest.mark.usefixtures("no_leaks")

RESERVED = 2 * SLOT

Make = Callable[..., Pool]


@pytest.fixture
def pool(make_pool: Make) -> Pool:
    """Return a pool of one slot."""
    return make_pool(1)


def lease(pool: Pool, guest: object = "a", **how: Any) -> Slot:
    return pool.lease(None, P, affinity=guest, **how)


def test_exhausted_pool_names_limit_and_use_and_goes_on_serving(pool: Pool) -> None:
    slot = lease(pool)
    with pytest.raises(
        memslot.PoolExhausted, match="all 1 slots of the pool are in use; release"
    ) as caught:
        lease(pool)
    assert (caught.value.limit, caught.value.in_use) == (1, 1)
    assert not isinstance(caught.value, memslot.PoolTimeout)
    started = time.monotonic()
    with pytest.raises(memslot.PoolTimeout, match=r"stayed in use for 0\.05 s") as late:
        lease(pool, timeout=0.05)
    assert time.monotonic() - started >= 0.05
    assert (late.value.limit, late.value.in_use) == (1, 1)
    with pytest.raises(memslot.PoolExhausted):
        lease(pool, timeout=-1)
    pool.release(slot)
    pool.release(lease(pool))
    assert pool.statistics().exhausted == 3


@pytest.mark.parametrize("timeout", [1e10, math.inf])
def test_lease_that_waits_longer_than_a_clock_counts_is_served(pool: Pool, timeout: float) -> None:
    releases = threading.Timer(0.05, pool.release, [lease(pool)])
    releases.start()
    pool.release(lease(pool, timeout=timeout))
    releases.join()


def test_lease_interrupted_with_a_new_slot_gives_no_place_to_two(
    make_pool: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(2)
    take = pool._inventory.take

    def interrupted(*wanted: Any) -> None:
        take(*wanted)
        raise KeyboardInterrupt

    monkeypatch.setattr(pool._inventory, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lease(pool)
    monkeypatch.undo()
    pool.check()
    first, second = lease(pool, "b"), lease(pool, "c")
    assert first.base != second.base
    pool.release(first)
    pool.release(second)


def test_dropped_slot_whose_reset_fails_is_logged_without_its_frames(
    pool: Pool, inject: Any, caplog: pytest.LogCaptureFixture
) -> None:
    holder = Holder()
    fill(lease(pool, holder=holder))
    fail_next_reset(inject, errno.ENOMEM)
    del holder
    pool.release(lease(pool))
    (record,) = caplog.records
    assert "dropped could not be reset" in record.message
    assert [type(each) for each in record.args or ()] == [str]


def test_purge_interrupted_retires_the_slot(
    make_pool: Make, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(2)
    pool.release(pool.lease(image, image.byte_size, affinity="a"))

    def interrupted(slot: Slot) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Slot, "purge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.purge(image)
    monkeypatch.undo()
    pool.check()
    assert (pool.statistics().idle, pool.statistics().in_use) == (1, 0)
    cycle(pool, "b")


@pytest.mark.parametrize("event", ["release", "retire", "take back", "abandon", "close"])
def test_waiting_lease_is_woken_by_another_thread(pool: Pool, event: str) -> None:
    holders = [Holder()]
    slot = lease(pool, holder=holders[0])

    def later() -> None:
        while not pool._returns.waiting:
            time.sleep(0.001)
        if event == "abandon":
            holders.clear()
        elif event == "take back":
            holders.clear()
            pool.statistics()
        elif event == "close":
            with pool._lock:  # no other lease may begin between release and close
                pool.release(slot)
                pool._closed = True
        else:
            pool.release(slot, retire=event == "retire")

    thread = threading.Thread(target=later)
    started = time.monotonic()
    thread.start()
    if event == "close":
        with pytest.raises(memslot.UsedAfterClose):
            lease(pool, "b", timeout=30)
    else:
        pool.release(lease(pool, "b", timeout=30))
    assert time.monotonic() - started < 30, "it was not woken"
    thread.join()
    pool._closed = False


@pytest.mark.parametrize("released", ["before its holder went", "after its holder went"])
def test_slot_given_back_is_not_taken_from_its_next_owner(pool: Pool, released: str) -> None:
    holder = Holder()
    slot = lease(pool, holder=holder)
    if released.startswith("before"):
        pool.release(slot)
        again = lease(pool, "b")
        del holder
    else:
        del holder
        with pytest.raises(memslot.SlotError, match="released before"):
            pool.release(slot)
        again = lease(pool, "b")
    fill(again)
    assert pool.statistics().in_use == 1
    assert content(again) == b"\xaa" * P
    pool.release(again)


def test_lease_interrupted_before_it_had_a_slot_is_dropped(pool: Pool) -> None:
    holder = Holder()
    lease = SlotLease(holder, pool._returns.put)
    del holder
    assert not pool._returns.empty()
    del lease
    cycle(pool, "a")
    assert pool._returns.empty()


def test_pool_that_a_finalizer_interrupts_takes_a_slot_back_and_refuses_what_would_wait(
    make_pool: Make, image: Image
) -> None:
    pool = make_pool(2)
    slot = pool.lease(image, image.byte_size, affinity="a")
    cycle(pool, "b", image)
    refused = (
        lambda: lease(pool),
        lambda: pool.warm(image, image.byte_size, affinity="a", count=1),
        pool.check,
        pool.close,
    )
    with pool._lock:  # as a collection of garbage or a signal finds it
        fill(slot)
        pool.release(slot)
        assert pool.purge(image) == 0
        assert pool.statistics().in_use == 1
        for call in refused:
            with pytest.raises(memslot.InUse, match="while its own thread was changing the pool"):
                call()
    now = pool.statistics()
    assert (now.in_use, now.idle, now.purged, now.warm) == (0, 2, 2, 0)
    pool.check()


def test_slot_is_released_once_and_to_its_own_pool(make_pool: Make) -> None:
    pool, other = make_pool(), make_pool()
    slot = lease(pool)
    for call in (other.release, other.reset):
        with pytest.raises(memslot.SlotError, match="not leased from this pool"):
            call(slot)
    pool.release(slot)
    for call in (pool.release, pool.reset):
        with pytest.raises(memslot.SlotError, match="released before, or belongs elsewhere"):
            call(slot)


def test_pool_with_leases_stays_open_and_a_closed_one_leases_nothing(
    make_pool: Make, image: Image
) -> None:
    pool = make_pool(2)
    slot = lease(pool)
    with pytest.raises(memslot.InUse, match="1 leased slots; release them before closing it"):
        pool.close()
    cycle(pool, "b", image)
    pool.release(slot)
    pool.close()
    pool.close()
    with pytest.raises(memslot.UsedAfterClose, match="the pool was closed; make a new one"):
        lease(pool)
    assert pool.purge(image) == 0
    assert pool.statistics().idle == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"slots": 0}, "slots must be at least 1, not 0"),
        ({"strategy": "best"}, "strategy must be one of affinity, next-available, random"),
        ({"allocation": "never"}, "allocation must be pooling or on-demand, not 'never'"),
        ({"growth": "magic"}, "growth must be one of mprotect, ftruncate, not 'magic'"),
        ({"reserved": 0}, "reserved must be at least 1"),
        ({"audit": 1.5}, "audit must be from 0 to 1, not 1.5"),
        ({"audit": math.nan}, "audit must be from 0 to 1, not nan"),
        ({"max_unused_warm_slots": -1}, "max_unused_warm_slots must be at least 0, not -1"),
        ({"guard": -RESERVED}, "guard must be at least 0 bytes"),
    ],
)
def test_invalid_pool_is_refused(make_pool: Make, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(memslot.SettingError, match=sentence):
        make_pool(**changes)


def test_more_slots_than_the_map_count_allows_are_refused(make_pool: Make, calls: Any) -> None:
    pool = make_pool(1_000_000)
    sentence = r"vm.max_map_count is \d+ with \d+ in use; allowed here: at most \d+"
    with calls() as made, pytest.raises(memslot.SettingError, match=sentence):
        lease(pool)
    assert made == {}


def test_check_of_a_pool_with_wrong_places_finds_them_and_lost_ones_come_back(
    make_pool: Make,
) -> None:
    pool = make_pool(2)
    slot = lease(pool)
    inventory: Inventory = pool._inventory
    inventory._make_free(slot)
    with pytest.raises(memslot.InvariantBroken, match="place 0 of a pool has 2 owners"):
        pool.check()
    (free,) = inventory._free.values()
    free.discard(slot)
    fill(slot)
    slot.lease = None  # as if an exception had come in the middle: neither free nor held
    slots = [lease(pool, guest) for guest in "bc"]
    assert [content(each) for each in slots] == [bytes(P)] * 2
    assert slot not in slots
    for each in slots:
        pool.release(each)
    pool.check()


def test_slot_whose_holder_goes_during_its_reset_is_not_handed_out_meanwhile(
    make_pool: Make,
) -> None:
    holders = [Holder()]

    def drops(region: Any) -> Any:
        holders.clear()
        with pytest.raises(memslot.PoolExhausted):
            lease(small, "b")
        return madvise(region)

    small = make_pool(1, reset=drops)
    small.release(lease(small, holder=holders[0]))
    cycle(small, "b")


def at_line(function: Callable[..., Any], sentence: str, act: Callable[[], object]) -> Any:
    """Return a trace function that calls `act` once, when `function` comes to the line that has `sentence`."""
    lines, first = inspect.getsourcelines(function)
    (number,) = (first + i for i, line in enumerate(lines) if sentence in line)

    def trace(frame: FrameType, _event: str, _argument: object) -> Any:
        if frame.f_code is function.__code__ and frame.f_lineno == number:
            sys.settrace(None)
            act()
        return trace

    return trace


def interrupt() -> None:
    raise KeyboardInterrupt


def test_second_release_takes_nothing_from_the_next_lease_in_the_middle(pool: Pool) -> None:
    slot = lease(pool)
    others: list[Slot] = []

    def hand_over() -> None:
        pool.release(slot)
        others.append(lease(pool, "b"))

    sys.settrace(at_line(Pool.release, "lease.unreleased.pop()", hand_over))
    try:
        with pytest.raises(memslot.SlotError, match="released before"):
            pool.release(slot)
    finally:
        sys.settrace(None)
    with pytest.raises(memslot.PoolExhausted):
        lease(pool, "c")
    pool.release(others[0])


def test_slot_without_a_holder_comes_back_though_its_release_is_interrupted(pool: Pool) -> None:
    def release_and_lease(slot: Slot) -> None:
        pool.release(slot)
        pool.release(lease(pool, "b"))

    for function, sentence in (
        (Pool.release, "result = _RETIRED"),
        (Pool._take, "isinstance(returned, Slot)"),
        (Inventory.put_away, "slot.lease = None"),
    ):
        slot = lease(pool)
        sys.settrace(at_line(function, sentence, interrupt))
        try:
            with pytest.raises(KeyboardInterrupt):
                release_and_lease(slot)
        finally:
            sys.settrace(None)
        cycle(pool, "c")


def test_lost_slot_is_found_by_the_lease_that_would_fail_without_it(pool: Pool) -> None:
    slot = lease(pool)
    pool.release(slot)
    pool.statistics()
    (free,) = pool._inventory._free.values()
    free.discard(slot)  # as if an exception had come in the middle: clean, neither free nor held
    assert lease(pool, "b") is slot
    pool.release(slot)


def test_slot_that_is_on_half_a_free_list_is_not_leased_to_two(pool: Pool) -> None:
    with memslot.MemfdImage("guest", b"x" * P) as image:
        slot = pool.lease(image, P, affinity="a")
        pool.release(slot)
        pool.statistics()
    (free,) = pool._inventory._free.values()
    del free._order[slot]  # as if an exception had come between the two lines of FreeList.put
    pool.check()
    pool.check()
    slot = lease(pool, "b")
    with pytest.raises(memslot.PoolExhausted):
        lease(pool, "a")
    pool.release(slot)


def test_slot_that_comes_back_is_not_handed_on_to_a_guest_of_another_shape(pool: Pool) -> None:
    runtimes = [Runtime(pages * P, SLOT, shape=pages) for pages in (1, 2)]
    for runtime in (*runtimes, None, runtimes[0]):
        shape = None if runtime is None else runtime.shape
        pages = 2 if runtime is runtimes[1] else 1
        slot = pool.lease(None, pages * P, affinity="a", map_host_memory=runtime, shape=shape)
        assert (slot.mapping and slot.mapping.shape) == shape
        pool.release(slot)


def test_mapping_that_its_runtime_cannot_forget_does_not_keep_its_place(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    runtime, forgotten = Runtime(P, SLOT, shape="a"), []

    def mapping() -> HostMapping:
        made = runtime()
        forgotten.append(made.forget)

        def fails() -> None:
            raise OSError("the runtime keeps it")

        return replace(made, forget=fails)

    with memslot.MemfdImage("guest", b"x" * P) as image:
        how: Any = {"affinity": "a", "map_host_memory": mapping, "shape": "a"}
        pool.release(pool.lease(image, P, **how), retire=True)
        pool.release(pool.lease(image, P, **how))
        cycle(pool, "b")
        assert not image._slots
    assert "could not be destroyed: the runtime keeps it" in caplog.text
    for forget in forgotten:
        forget()


def test_mapping_of_a_runtime_whose_holder_went_without_a_release_is_not_handed_on(
    pool: Pool,
) -> None:
    """The runtime may have grown it unseen, and the embedder may have objects that reach it."""
    runtime = Runtime(P, SLOT, shape="a")
    how: Any = {"affinity": "a", "map_host_memory": runtime, "shape": "a"}
    holder = Holder()
    pool.lease(None, P, holder=holder, **how)
    del holder
    pool.release(pool.lease(None, P, **how))
    assert (pool.statistics().created, pool.statistics().destroyed) == (2, 1)


@every_fork
def test_child_that_is_forked_while_its_thread_changes_the_pool_leases_no_slot_twice(
    pool: Pool, fork: Fork
) -> None:
    pool.release(lease(pool, "b"))
    pool.statistics()
    forked: list[bool] = []

    def refused() -> None:
        with pytest.raises(memslot.InUse):
            lease(pool, "b")

    def in_the_middle() -> None:
        in_child(refused, fork)
        forked.append(True)

    sys.settrace(at_line(FreeList.discard, "own = self._by_affinity", in_the_middle))
    try:
        slot = lease(pool)
    finally:
        sys.settrace(None)
    assert forked
    pool.release(slot)


@pytest.mark.parametrize("found", ["handed on", "settled", "reclaimed"])
def test_memory_that_is_used_after_an_interrupted_reset_and_dropped_shows_nothing(
    pool: Pool, found: str
) -> None:
    holder = Holder()
    slot = lease(pool, holder=holder)
    sys.settrace(at_line(Pool.reset, "slot.state = DIRTY", interrupt))
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.reset(slot)
    finally:
        sys.settrace(None)
    fill(slot)
    del holder
    if found == "settled":
        pool.statistics()
    elif found == "reclaimed":
        pool._returns.next()  # as if an exception had come before it was settled
    assert content(lease(pool)) == bytes(P)
    pool.release(next(pool._inventory.slots()))
