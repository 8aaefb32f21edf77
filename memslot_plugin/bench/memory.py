"""A slot with an image, and a guest's writes and reads without a guest, for the families without a host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from memslot_plugin._core import PAGE_SIZE, ffi, lib
from memslot_plugin._core.limits import system_call_error
from memslot_plugin.bench.runner import CLOCK
from memslot_plugin.memory.image import MemfdImage
from memslot_plugin.memory.pool import Pool
from memslot_plugin.memory.probe import pagemap_descriptor
from memslot_plugin.memory.region import State
from memslot_plugin.memory.reset import Reset, choose
from memslot_plugin.memory.slot import Slot
from memslot_plugin.settings import MIB, fields


def strategy(name: str) -> Reset:
    """Return a reset as the settings' defaults make it."""
    return choose(name, fields()["keep_resident"].default)


def image_of(byte_size: int, seed: int = 0x5A) -> MemfdImage:
    """Return an image without a zero page, so that all of it is in the file."""
    page = bytes([seed]) * (PAGE_SIZE - 8) + b"\x01\x02\x03\x04\x05\x06\x07\x08"
    return MemfdImage("bench", page * (byte_size // PAGE_SIZE))


class Pages:
    """Some pages of a memory; each request writes other bytes into them than the one before."""

    def __init__(self, numbers: Iterable[int]) -> None:
        offsets = [number * PAGE_SIZE for number in numbers]
        self.count = len(offsets)
        self.offsets: Any = ffi.new("size_t[]", offsets or [0])
        self._value = 0

    @classmethod
    def spread(cls, count: int, byte_size: int) -> Pages:
        """Return `count` pages, evenly over a memory, or all pages that it has."""
        there = byte_size // PAGE_SIZE
        count = min(count, there)
        return cls(number * there // count for number in range(count))

    def write(self, base: int) -> None:
        """Write into each page."""
        self._value += 1
        lib.ms_bench_write(base, self.offsets, self.count, self._value)


def pool_of(slots: int, byte_size: int, reset: str = "auto") -> Pool:
    """Return a pool for guests of this size."""
    return Pool(slots=slots, reserved=byte_size, guard=MIB, reset=strategy(reset))


def serve(pool: Pool, image: MemfdImage, byte_size: int, pages: Pages) -> None:
    """Lease a slot, write, and release it."""
    slot = pool.lease(image, byte_size, affinity=image)
    pages.write(slot.base)
    pool.release(slot)


class Guestless:
    """A leased slot with an image, in which the benchmark does what a guest would."""

    def __init__(self, image: MemfdImage, byte_size: int) -> None:
        self.byte_size = byte_size
        self.slot = Slot.create(byte_size, byte_size)
        self.slot.instantiate(image, byte_size)

    def read(self, byte_size: int) -> None:
        """Read a byte of each of the first pages."""
        lib.ms_bench_read(self.slot.base, min(byte_size, self.byte_size))

    def reset(self, reset: Reset) -> float:
        """Return the nanoseconds of a reset as its caller sees it, without what the clock takes.

        The slot is leased again afterwards.
        """
        slot = self.slot
        slot.state = State.DIRTY
        before = CLOCK()
        started = CLOCK()
        slot.reset(reset)
        ended = CLOCK()
        slot.state = State.DIRTY
        return ended - started - (started - before)

    def floor(self, pages: Pages) -> float:
        """Return the nanoseconds of the least that a reset can cost after a write of these pages."""
        answer = lib.ms_bench_floor(
            pagemap_descriptor(), self.slot.memory, pages.offsets, pages.count
        )
        if answer < 0:
            raise system_call_error(-answer, "measuring the floor")
        return float(answer)


@contextmanager
def guestless(image: MemfdImage, byte_size: int) -> Iterator[Guestless]:
    """Yield a slot that is destroyed after the block."""
    made = Guestless(image, byte_size)
    try:
        yield made
    finally:
        made.slot.destroy()
