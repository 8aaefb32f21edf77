"""Mappings that a runtime makes and owns, in a pool."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from typing import Any

import pytest

from memslot_hooks.types import HostMapping
from memslot_plugin import Image, Pool, _core
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import ffi, lib
from memslot_plugin.errors import (
    SlotError,
    SystemCallError,
)
from memslot_plugin.tests.slots import RESERVED as SLOT
from memslot_plugin.tests.slots import fill

pytestmark = pytest.mark.usefixtures("no_leaks")

RESERVED = 2 * SLOT

Make = Callable[..., Pool]


# Mappings that a runtime owns


class Runtime:
    """Makes ranges as a runtime does: readable and writable at first, faulting above, unmapped when forgotten."""

    def __init__(self, pages: int = 4, *, shape: object = None) -> None:
        self.pages = pages
        self.shape = shape
        self.live: list[int] = []

    def __call__(self) -> HostMapping:
        base = ffi.new("uintptr_t *")
        _core.check(lib.ms_reserve(RESERVED, base), "reserving")
        _core.check(lib.ms_allow(base[0], self.pages * P), "allowing")
        address = int(base[0])
        self.live.append(address)

        def forget() -> None:
            self.live.remove(address)
            _core.check(lib.ms_unmap(address, RESERVED), "unmapping")

        return HostMapping(address, self.pages * P, RESERVED, self, forget, self.shape)


def test_a_runtimes_range_is_kept_and_handed_out_again(
    make_pool: Make, image: Image, calls: Any
) -> None:
    pool, runtime = make_pool(2), Runtime()
    slot = pool.lease(image, 4 * P, affinity="a", map_host_memory=runtime)
    assert ctypes.string_at(slot.base, 4 * P) == b"x" * 2 * P + bytes(2 * P)
    fill(slot)
    pool.release(slot)
    pool.check()
    with calls() as made:
        assert pool.lease(image, 4 * P, affinity="a", map_host_memory=runtime) is slot
    assert made == {}
    assert len(runtime.live) == 1
    pool.release(slot)
    pool.close()
    assert runtime.live == []


def test_a_range_that_grew_is_retired(make_pool: Make, image: Image) -> None:
    pool, runtime = make_pool(1), Runtime()
    slot = pool.lease(image, 4 * P, affinity="a", map_host_memory=runtime)
    _core.check(lib.ms_allow(slot.base, 8 * P), "growing as a runtime does")
    slot.grow(8 * P)
    fill(slot)
    with pytest.raises(SlotError, match=r"grew this memory .* the slot has to be retired"):
        pool.reset(slot)
    pool.release(slot, retire=True)
    assert runtime.live == []
    again = pool.lease(image, 4 * P, affinity="a", map_host_memory=runtime)
    assert ctypes.string_at(again.base, 4 * P) == b"x" * 2 * P + bytes(2 * P)
    pool.release(again)


def test_ranges_of_another_shape_are_not_handed_out(make_pool: Make) -> None:
    pool, small, large = make_pool(4), Runtime(4, shape="small"), Runtime(8, shape="large")
    for runtime in (small, large, small, large):
        slot = pool.lease(
            None, runtime.pages * P, affinity="a", map_host_memory=runtime, shape=runtime.shape
        )
        assert slot.accessible == runtime.pages * P
        pool.release(slot)
    assert (len(small.live), len(large.live)) == (1, 1)
    with pytest.raises(SlotError, match="the runtime owns this slot's mapping"):
        pool.lease(None, 5 * P, affinity="a", map_host_memory=small, shape="small")
    pool.check()
    assert pool.statistics().in_use == 0


def test_at_the_limit_an_idle_range_of_another_shape_makes_room(make_pool: Make) -> None:
    pool, runtimes = make_pool(2), [Runtime(pages, shape=pages) for pages in (1, 2, 3, 4)]
    for turn in range(12):
        runtime = runtimes[turn % 4]
        slot = pool.lease(
            None, runtime.pages * P, affinity=turn, map_host_memory=runtime, shape=runtime.shape
        )
        fill(slot)
        pool.release(slot)
        assert sum(len(runtime.live) for runtime in runtimes) <= 2
        pool.check()
    assert len(pool._shelves) <= 4


def test_a_runtime_that_cannot_map_loses_no_slot(make_pool: Make) -> None:
    pool = make_pool(1)

    def fail() -> HostMapping:
        raise MemoryError("the runtime has none")

    for _ in range(3):
        with pytest.raises(MemoryError, match="the runtime has none"):
            pool.lease(None, P, affinity="a", map_host_memory=fail)
    slot = pool.lease(None, P, affinity="a")
    pool.release(slot)


def test_a_failed_reset_of_a_runtimes_range_gives_it_back_to_the_runtime(
    make_pool: Make, image: Image, inject: Any
) -> None:
    pool, runtime = make_pool(1), Runtime()
    slot = pool.lease(image, 4 * P, affinity="a", map_host_memory=runtime)
    inject("madvise", error=errno.EINVAL)
    with pytest.raises(SystemCallError):
        pool.release(slot)
    assert runtime.live == []
    slot = pool.lease(image, 4 * P, affinity="a", map_host_memory=runtime)
    pool.release(slot)
