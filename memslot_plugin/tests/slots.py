"""Helpers for tests of slots and pools: the bytes of a memory, children, and counted system calls."""

from __future__ import annotations

import ctypes
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

import pytest

from memslot_hooks import HostMapping
from memslot_plugin import Image, Pool, Settings, Slot, _core, probe
from memslot_plugin._core import PAGE_SIZE, ffi, lib
from memslot_plugin.memory.reset import madvise

RESERVED = 64 * PAGE_SIZE

needs_pagemap = pytest.mark.skipif(
    not probe().pagemap.works, reason=f"impossible: PAGEMAP_SCAN: {probe().pagemap.detail}"
)

EVERY_RESET = [
    pytest.param(name, marks=[needs_pagemap] * (name == "pagemap"))
    for name in get_args(get_type_hints(Settings)["reset"])
]
"""The reset strategies that the setting `reset` allows."""


Fork = Callable[[], int]
foreign_fork: Fork = ctypes.PyDLL(None).fork
"""A fork behind the back of Python, as a C library makes it."""

every_fork = pytest.mark.parametrize("fork", [os.fork, foreign_fork], ids=["python", "foreign"])


def in_child(check: Callable[[], object], fork: Fork = os.fork) -> None:
    """Run `check` in a forked child, which must not raise."""
    pid = fork()
    if not pid:
        try:
            check()
        except BaseException:  # noqa: BLE001 - the exit status reports it
            os.write(2, f"in the child: {traceback.format_exc()}\n".encode())
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class Holder:
    """The holder of a lease. After its end the slot comes back at the next call of the pool."""


def sparse(length: int, *runs: tuple[int, bytes]) -> bytearray:
    """Return zeros with runs of (offset, bytes) written over them, in order."""
    content = bytearray(length)
    for offset, data in runs:
        content[offset : offset + len(data)] = data
    return content


def fill(slot: Slot, value: int = 0xAA) -> None:
    ctypes.memset(slot.base, value, slot.accessible)


def use(slot: Slot, reset: Any = madvise) -> Any:
    """Write every byte, reset and check the slot; return the reset's result."""
    fill(slot)
    result = slot.reset(reset)
    slot.check()
    return result


def content(slot: Slot) -> bytes:
    return ctypes.string_at(slot.base, slot.accessible)


def expected(image: Image | None, length: int) -> bytes:
    """Return the bytes of a pristine memory: the image's extents over zeros."""
    memory = bytearray(length)
    for i, extent in enumerate(image.extents if image is not None else ()):
        assert image is not None
        stored = bytes(ffi.buffer(image.c_extents[i].bytes, extent.length))
        memory[extent.offset : extent.offset + extent.length] = stored
    return bytes(memory)


def cycle(pool: Pool, guest: object, image: Image | None = None, pages: int = 4) -> int:
    """Lease a slot to a guest, write to it and release it; return its address."""
    slot = pool.lease(image, pages * PAGE_SIZE, affinity=guest)
    fill(slot)
    pool.release(slot)
    pool.check()
    return slot.base


class Runtime:
    """A runtime that maps ranges: accessible at first, faulting above, unmapped when forgotten."""

    def __init__(self, accessible: int, reserved: int, *, shape: object = None) -> None:
        self.accessible, self.reserved, self.shape = accessible, reserved, shape
        self.live: list[int] = []

    def __call__(self) -> HostMapping:
        base = ffi.new("uintptr_t *")
        _core.check(lib.ms_reserve(self.reserved, base), "reserving")
        address = int(base[0])
        _core.check(lib.ms_allow(address, self.accessible), "allowing")
        self.live.append(address)

        def forget() -> None:
            self.live.remove(address)
            _core.check(lib.ms_unmap(address, self.reserved), "unmapping")

        return HostMapping(address, self.accessible, self.reserved, self, forget, self.shape)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Yield a dictionary that gets the core's system calls by name when the block ends."""
    made: dict[str, int] = {}
    before = _core.counters()
    yield made
    after = _core.counters()
    made.update({name: n - before[name] for name, n in after.items() if n != before[name]})
