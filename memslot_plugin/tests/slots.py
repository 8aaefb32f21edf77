"""What the tests of slots share: how large they are, and the bytes that they hold or must hold."""

from __future__ import annotations

import ctypes

from memslot_plugin import Image, Pool, Slot
from memslot_plugin._core import PAGE_SIZE, ffi

RESERVED = 64 * PAGE_SIZE


class Holder:
    """Who holds a lease: when it goes, the slot comes back at the pool's next call."""


def fill(slot: Slot, value: int = 0xAA) -> None:
    ctypes.memset(slot.base, value, slot.accessible)


def content(slot: Slot) -> bytes:
    return ctypes.string_at(slot.base, slot.accessible)


def expected(image: Image | None, length: int) -> bytes:
    """The bytes of a pristine memory: the image's extents over zeros."""
    memory = bytearray(length)
    for i, extent in enumerate(image.extents if image is not None else ()):
        assert image is not None
        stored = bytes(ffi.buffer(image.c_extents[i].bytes, extent.length))
        memory[extent.offset : extent.offset + extent.length] = stored
    return bytes(memory)


def cycle(pool: Pool, guest: object, image: Image | None = None, pages: int = 4) -> int:
    """One lease of a guest: where its slot is."""
    slot = pool.lease(image, pages * PAGE_SIZE, affinity=guest)
    fill(slot)
    pool.release(slot)
    pool.check()
    return slot.base
