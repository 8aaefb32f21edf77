"""What a pool refuses and how, and that it gives everything back also after a failure."""

from __future__ import annotations

import ctypes
import errno
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from memslot_plugin import Image, Pool, Slot, State
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin.errors import (
    InUse,
    InvariantBroken,
    PoolExhausted,
    PoolTimeout,
    SettingError,
    SlotError,
    SystemCallError,
    UsedAfterClose,
)
from memslot_plugin.pool import Claim
from memslot_plugin.tests.slots import RESERVED as SLOT
from memslot_plugin.tests.slots import Holder, cycle, fill

pytestmark = pytest.mark.usefixtures("no_leaks")

RESERVED = 2 * SLOT

Make = Callable[..., Pool]


# Refusals


def test_exhausted_says_limit_and_use_and_goes_on_serving(make_pool: Make) -> None:
    pool = make_pool(2)
    slots = [pool.lease(None, P, affinity=i) for i in range(2)]
    with pytest.raises(
        PoolExhausted, match="all 2 slots of the pool are in use; release"
    ) as caught:
        pool.lease(None, P, affinity="c")
    assert (caught.value.limit, caught.value.in_use) == (2, 2)
    assert not isinstance(caught.value, PoolTimeout)
    pool.release(slots[0])
    pool.release(pool.lease(None, P, affinity="c"))
    pool.release(slots[1])
    assert pool.statistics().exhausted == 1


def test_waiting_ends_with_a_timeout_and_not_earlier(make_pool: Make) -> None:
    pool = make_pool(1)
    slot = pool.lease(None, P, affinity="a")
    started = time.monotonic()
    with pytest.raises(PoolTimeout, match=r"stayed in use for 0\.2 s") as caught:
        pool.lease(None, P, affinity="b", timeout=0.2)
    assert time.monotonic() - started >= 0.2
    assert (caught.value.limit, caught.value.in_use) == (1, 1)
    with pytest.raises(PoolExhausted):
        pool.lease(None, P, affinity="b", timeout=-1)
    pool.release(slot)


@pytest.mark.parametrize("give_back", ["release", "abandon", "retire"])
def test_a_waiting_lease_is_woken_by_a_release_in_another_thread(
    make_pool: Make, give_back: str
) -> None:
    pool = make_pool(1)
    holders = [Holder()]
    slot = pool.lease(None, P, affinity="a", holder=holders[0])
    fill(slot)

    def later() -> None:
        time.sleep(0.1)
        if give_back == "abandon":
            holders.clear()
        else:
            pool.release(slot, retire=give_back == "retire")

    thread = threading.Thread(target=later)
    thread.start()
    again = pool.lease(None, P, affinity="b", timeout=30)
    thread.join()
    assert ctypes.string_at(again.base, P) == bytes(P)
    pool.release(again)


def test_abandoned_slots_come_back_at_the_next_call(make_pool: Make, image: Image) -> None:
    pool = make_pool(2)
    holders = [Holder(), Holder()]
    for number in range(2):
        fill(pool.lease(image, 4 * P, affinity=number, holder=holders[number]))
    holders.clear()
    again = pool.lease(None, 4 * P, affinity="a")
    assert ctypes.string_at(again.base, 4 * P) == bytes(4 * P)
    pool.check()
    assert pool.statistics().in_use == 1
    pool.release(again)


def test_a_holder_that_goes_after_its_slot_was_released_takes_it_from_nobody(
    make_pool: Make,
) -> None:
    pool = make_pool(1)
    holder = Holder()
    pool.release(pool.lease(None, P, affinity="a", holder=holder))
    again = pool.lease(None, P, affinity="b")
    fill(again)
    del holder
    assert pool.statistics().in_use == 1
    assert ctypes.string_at(again.base, P) == b"\xaa" * P
    pool.release(again)


def test_an_abandoned_slot_that_is_released_too_is_not_taken_from_its_next_owner(
    make_pool: Make,
) -> None:
    pool = make_pool(1)
    holder = Holder()
    slot = pool.lease(None, P, affinity="a", holder=holder)
    del holder
    with pytest.raises(SlotError, match="released before"):
        pool.release(slot)
    again = pool.lease(None, P, affinity="b")
    fill(again)
    pool.statistics()
    assert ctypes.string_at(again.base, P) == b"\xaa" * P
    pool.release(again)


def test_a_lease_that_was_cut_short_before_it_had_a_slot_is_nobodys(make_pool: Make) -> None:
    pool, holder = make_pool(1), Holder()
    claim = Claim(holder, pool._abandoned.append)
    del holder
    assert list(pool._abandoned) == [claim]
    cycle(pool, "a")
    assert not pool._abandoned


def test_an_abandoned_slot_that_cannot_be_reset_is_destroyed_and_logged(
    make_pool: Make, inject: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_pool(1)
    holder = Holder()
    slot = pool.lease(None, P, affinity="a", holder=holder)
    del holder
    inject("madvise", error=errno.ENOMEM)
    with caplog.at_level(logging.ERROR, "memslot"):
        assert cycle(pool, "b") == slot.base
    assert slot.state is State.DESTROYED
    assert pool.statistics().failed_resets == 1
    assert "MADV_DONTNEED" in caplog.text


def test_a_slot_is_released_once_and_to_its_own_pool(make_pool: Make) -> None:
    pool, other = make_pool(), make_pool()
    slot = pool.lease(None, P, affinity="a")
    for call in (other.release, other.reset):
        with pytest.raises(SlotError, match="not leased from this pool"):
            call(slot)
    pool.release(slot)
    for call in (pool.release, pool.reset):
        with pytest.raises(SlotError, match="released before, or belongs elsewhere"):
            call(slot)
    stranger = Slot.create(RESERVED)
    with pytest.raises(SlotError):
        pool.release(stranger)
    stranger.destroy()


def test_a_pool_with_leases_stays_open_and_goes_on_serving(make_pool: Make) -> None:
    pool = make_pool(2)
    slot = pool.lease(None, P, affinity="a")
    with pytest.raises(InUse, match="1 leased slots; release them before closing it"):
        pool.close()
    cycle(pool, "b")
    pool.release(slot)
    pool.close()
    pool.close()


def test_a_closed_pool_is_used_no_more(make_pool: Make, image: Image) -> None:
    pool = make_pool(2)
    cycle(pool, "a", image)
    pool.close()
    with pytest.raises(UsedAfterClose, match="the pool was closed; make a new one"):
        pool.lease(None, P, affinity="a")
    assert pool.purge(image) == 0
    assert pool.statistics().idle == 0
    pool.check()


def test_closing_wakes_who_is_waiting(make_pool: Make) -> None:
    pool = make_pool(1)
    slot = pool.lease(None, P, affinity="a")
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            pool.lease(None, P, affinity="b", timeout=30)
        except UsedAfterClose as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    with pool._lock:  # so that nobody leases between release and close
        del pool._leased[slot]
        pool._retire(slot)
        thread.start()
        time.sleep(0.02)
        pool._closed = True
    thread.join(20)
    pool._closed = False
    assert len(raised) == 1


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
        ({"guard": -RESERVED}, "guard at least 0"),
    ],
)
def test_what_a_pool_cannot_be_is_one_clear_sentence(
    make_pool: Make, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SettingError, match=sentence):
        make_pool(**changes)


def test_more_slots_than_the_map_count_allows_are_refused_before_anything_is_mapped(
    make_pool: Make, calls: Any
) -> None:
    pool = make_pool(1_000_000)
    with (
        calls() as made,
        pytest.raises(
            SettingError,
            match=r"vm.max_map_count is \d+ with \d+ in use; allowed here: at most \d+",
        ),
    ):
        pool.lease(None, P, affinity="a")
    assert made == {}


def test_too_little_address_space_names_the_knob(child: Any) -> None:
    child(
        """
import resource
from memslot_plugin import Pool, SystemCallError
from memslot_plugin.reset import madvise
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
for allocation in ("pooling", "on-demand"):
    pool = Pool(slots=16, reserved=4 << 30, guard=0, reset=madvise, allocation=allocation)
    for _ in range(2):
        try:
            pool.lease(None, 65536, affinity=1)
        except SystemCallError as error:
            assert "RLIMIT_AS (ulimit -v) is 2147483648" in str(error), error
            assert "reserving" in str(error)
        else:
            raise AssertionError("leased")
    assert pool.statistics().in_use == 0
    pool.close()
small = Pool(slots=4, reserved=1 << 20, guard=65536, reset=madvise)
small.release(small.lease(None, 65536, affinity=1))
small.close()
"""
    )


# Failures of giving back


@pytest.mark.parametrize("allocation", ["pooling", "on-demand"])
def test_a_slot_that_cannot_be_destroyed_now_is_destroyed_later(
    make_pool: Make, image: Image, inject: Any, allocation: str, caplog: pytest.LogCaptureFixture
) -> None:
    pool = make_pool(1, allocation=allocation)
    slot = pool.lease(image, 4 * P, affinity="a")
    fill(slot)
    inject("mmap" if allocation == "pooling" else "munmap", error=errno.ENOMEM)
    with caplog.at_level(logging.ERROR, "memslot"):
        pool.release(slot, retire=True)
    assert "could not be destroyed" in caplog.text
    assert pool.statistics().limit == (0 if allocation == "pooling" else 1)
    pool.check()
    again = pool.lease(None, 4 * P, affinity="b")
    assert ctypes.string_at(again.base, 4 * P) == bytes(4 * P)
    pool.check()
    pool.release(again)
    assert pool.statistics().limit == 1


@pytest.mark.parametrize("allocation", ["pooling", "on-demand"])
def test_what_closing_could_not_give_back_is_given_back_by_closing_again(
    make_pool: Make, image: Image, inject: Any, allocation: str
) -> None:
    pool = make_pool(2, allocation=allocation)
    slots = [pool.lease(image, 4 * P, affinity=i) for i in range(2)]
    if allocation == "on-demand":
        inject("munmap", error=errno.ENOMEM)
    for slot in slots:
        pool.release(slot)
    inject("munmap", error=errno.ENOMEM)
    with pytest.raises(SystemCallError, match="unmapping"):
        pool.close()
    with pytest.raises(UsedAfterClose):
        pool.lease(None, P, affinity="a")
    pool.close()


def test_closing_goes_on_after_one_slot_failed(make_pool: Make, inject: Any) -> None:
    pool = make_pool(3, growth="ftruncate")
    slots = [pool.lease(None, P, affinity=i) for i in range(3)]
    for slot in slots:
        pool.release(slot)
    inject("close", skip=1, error=errno.EIO)
    with pytest.raises(SystemCallError, match="closing a slot's extension"):
        pool.close()
    pool.close()


def test_check_finds_a_slot_that_two_hold_and_one_that_nobody_holds(make_pool: Make) -> None:
    pool = make_pool(2)
    slot = pool.lease(None, P, affinity="a")
    pool._unused_places.append(slot.base)
    with pytest.raises(InvariantBroken, match="places are accounted for"):
        pool.check()
    pool._unused_places[:] = []
    with pytest.raises(InvariantBroken, match="1 places are accounted for, but the pool has 2"):
        pool.check()
    pool._unused_places.append(slot.base + RESERVED + P)
    pool.check()
    pool.release(slot)
    slot.state = State.UNKNOWN
    with pytest.raises(InvariantBroken, match="an idle slot is unknown"):
        pool.check()
    slot.state = State.CLEAN
