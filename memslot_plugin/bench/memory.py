"""A slot with an image, and a guest's writes and reads without a guest: what the families without a host measure on."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from memslot_plugin._core import PAGE_SIZE, check, ffi, lib
from memslot_plugin._core.limits import system_call_error
from memslot_plugin.bench.runner import CLOCK
from memslot_plugin.memory.image import MemfdImage
from memslot_plugin.memory.probe import pagemap_descriptor
from memslot_plugin.memory.reset import Reset, choose
from memslot_plugin.memory.slot import Slot, State
from memslot_plugin.settings import fields

if TYPE_CHECKING:
    from collections.abc import Iterator


def strategy(name: str) -> Reset:
    """A reset as the settings' defaults make it."""
    return choose(name, fields()["keep_resident"].default)


def image_of(byte_size: int, seed: int = 0x5A) -> MemfdImage:
    """An image without a zero page, so that all of it is in the file."""
    page = bytes([seed]) * (PAGE_SIZE - 8) + b"\x01\x02\x03\x04\x05\x06\x07\x08"
    return MemfdImage("bench", page * (byte_size // PAGE_SIZE))


class Pages:
    """Some pages of a memory, by their offsets, and the bytes that a request writes into them: others each time."""

    def __init__(self, numbers: Iterable[int]) -> None:
        offsets = [number * PAGE_SIZE for number in numbers]
        self.count = len(offsets)
        self.offsets: Any = ffi.new("size_t[]", offsets or [0])
        self._value = 0

    @classmethod
    def spread(cls, count: int, byte_size: int) -> Pages:
        """`count` pages, evenly over a memory, or all pages that it has."""
        there = byte_size // PAGE_SIZE
        count = min(count, there)
        return cls(number * there // count for number in range(count))

    def write(self, base: int) -> None:
        """Write into each of them."""
        self._value += 1
        lib.ms_bench_write(base, self.offsets, self.count, self._value)


class Guestless:
    """A leased slot with an image, in which we do what a guest would."""

    def __init__(self, image: MemfdImage, byte_size: int) -> None:
        self.byte_size = byte_size
        self.slot = Slot.create(byte_size, byte_size)
        self.slot.instantiate(image, byte_size)

    def read(self, byte_size: int) -> None:
        """Read a byte of each of the first pages."""
        lib.ms_bench_read(self.slot.base, min(byte_size, self.byte_size))

    def reset(self, reset: Reset) -> float:
        """What a reset costs as its caller sees it, in nanoseconds, without what the clock takes; the slot is leased
        again afterwards.
        """
        slot = self.slot
        slot.state = State.DIRTY
        before = CLOCK()
        started = CLOCK()
        slot.reset(reset)
        ended = CLOCK()
        slot.state = State.DIRTY
        return ended - started - (started - before)

    def floor_by_pagemap(self, pages: Pages) -> float:
        """The least that putting back these pages can cost: the scan, and a copy of exactly them."""
        return _nanoseconds(
            lib.ms_bench_floor_pagemap(
                pagemap_descriptor(), self.slot.memory, pages.offsets, pages.count
            )
        )

    def floor_by_madvise(self) -> float:
        """The least that dropping everything can cost: the bare call."""
        return _nanoseconds(lib.ms_bench_floor_discard(self.slot.memory))

    def floor_by_copy(self, pages: Pages) -> float:
        """The least that comparing everything can cost: a bare comparison, and a copy of exactly these pages."""
        return _nanoseconds(lib.ms_bench_floor_copy(self.slot.memory, pages.offsets, pages.count))

    def drop(self) -> None:
        """Nothing is resident any more, and no lesson learned."""
        check(lib.ms_discard(self.slot.base, self.byte_size), "emptying a slot")
        self.slot.history = self.slot.watcher = None


@contextmanager
def guestless(image: MemfdImage, byte_size: int) -> Iterator[Guestless]:
    """One that is gone after the block."""
    made = Guestless(image, byte_size)
    try:
        yield made
    finally:
        made.slot.destroy()


def _nanoseconds(answer: int) -> float:
    if answer < 0:
        raise system_call_error(-answer, "measuring the floor")
    return float(answer)
