"""A region: an address range under the core's care, with the image that is mapped into it.

A region knows where its bytes are and how each must look after a reset; `slot` adds the states between.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from memslot_hooks.types import ResetResult
from memslot_plugin._core import PAGE_SIZE, FastRegion, check, ffi, install_fast_path, leak, lib
from memslot_plugin.memory.probe import probe

if TYPE_CHECKING:
    from memslot_plugin.memory.adaptive import History
    from memslot_plugin.memory.image import Image

MAX_RUNS = 256
"""Runs of usually written pages that are remembered; more are rarely worth their system calls."""


class State(enum.Enum):
    """All that is known about the bytes of a region."""

    CLEAN = "clean"
    """`[0, accessible)` equals the image's extents over zeros (zeros without an image)."""
    DIRTY = "dirty"
    """A guest may have written anything to `[0, accessible)`; mappings and protections are as recorded."""
    UNKNOWN = "unknown"
    """A system call or an exception came in between: only that the range is ours is known."""
    DESTROYED = "destroyed"
    """The range is no longer ours."""


# Before Python 3.12 a look-up on an Enum costs as much as ten other look-ups.
CLEAN, DIRTY, UNKNOWN, DESTROYED = State

install_fast_path(DIRTY, CLEAN, ResetResult)


class Reservation:
    """An inaccessible address range that slots are made in; unmapped when the last object that needs it goes.

    Raises SystemCallError; `purpose` ends its sentence.
    """

    __slots__ = ("_range",)

    def __init__(self, length: int, purpose: str) -> None:
        # Owned before the call, and by C code alone: an interrupt right after it, or in `__del__`, loses nothing.
        self._range = ffi.gc(ffi.new("ms_range *", {"length": length}), lib.ms_unmap_once)
        what = f"reserving {length} bytes of address space for {purpose}"
        check(lib.ms_reserve(length, ffi.addressof(self._range, "base")), what)

    @property
    def base(self) -> int:
        """The first address."""
        return int(self._range.base)

    def unmap(self) -> None:
        """Unmap the range, or leak it: what a failed munmap(2) leaves is inaccessible or pristine to all."""
        what = f"{self._range.length} bytes of address space"
        leak(lib.ms_unmap_once(self._range), what)

    def __del__(self) -> None:
        if hasattr(self, "_range"):  # making it may have failed
            self.unmap()


class Region(FastRegion):
    """The range `[base, base + reserved)`, of which `[0, accessible)` is readable and writable.

    All sizes are bytes and multiples of the host page.  `base`, `accessible` and `initial` (what is
    accessible after a reset) are stored once, in the core's struct, which `memory` and `report` show.
    `state` is for the slot to change, and `history` for the strategy `auto`.
    """

    __slots__ = (
        "__weakref__",
        "core",
        "history",
        "image",
        "limits",
        "memory",
        "report",
        "reserved",
    )

    def __init__(self, base: int, reserved: int, accessible: int = 0) -> None:
        self.state = CLEAN
        self.base = base
        self.reserved = reserved
        self.accessible = self.initial = accessible
        self.image: Image | None = None
        self.history: History | None = None
        self.limits: Any = None
        """The ms_reset_limits that the core has the address of, kept alive."""
        self.core = ffi.cast("ms_slot *", self.address)
        self.memory = ffi.addressof(self.core, "memory")
        self.report = ffi.addressof(self.core, "report")

    def set_limits(self, strategy: object, limits: Any) -> None:
        """Let the core reset this region without Python for `strategy`, within `limits`, an ms_reset_limits."""
        self.core.limits = self.limits = limits
        self.strategy = strategy

    def set_image(self, image: Image | None) -> None:
        """Record which image is mapped here, and tell the old and the new one."""
        if image is not None:
            image.acquire(self)
        before, self.image = self.image, image
        self.memory.extents = ffi.NULL if image is None else image.c_extents
        self.memory.count = 0 if image is None else image.c_count
        self.memory.copied = image is not None and image.copied
        if before is not None:
            before.release(self)

    def set_accessible(self, accessible: int) -> None:
        """Change the protection of the difference only: one mprotect(2), or none if there is none."""
        if accessible > self.accessible:
            check(
                lib.ms_allow(self.base + self.accessible, accessible - self.accessible),
                f"making {accessible} bytes of a slot accessible",
            )
        elif accessible < self.accessible:
            check(
                lib.ms_forbid(self.base + accessible, self.accessible - accessible),
                f"making all but {accessible} bytes of a slot inaccessible",
            )
        self.accessible = accessible

    def cover(self) -> None:
        """Map inaccessible memory over the whole range: nothing of what was there remains."""
        check(lib.ms_cover(self.base, self.reserved), "covering a slot")
        self.set_image(None)
        self.accessible = self.initial = 0

    def mapped_at(self, at: int) -> tuple[int, str, int, int]:
        """Return what must be mapped at byte `at`, and up to which byte: its end, permissions, inode, file offset."""
        if at >= self.accessible:
            return self.reserved, "---p", 0, 0
        if self.image is not None and not self.image.copied:
            for extent in self.image.extents:
                if at < extent.offset:
                    return extent.offset, "rw-p", 0, 0
                if at < (end := extent.offset + extent.length):
                    inode = extent.backing.inode
                    return end, "rw-p", inode, extent.file_offset + at - extent.offset
        return self.accessible, "rw-p", 0, 0

    # -- what the pages hold

    def private_runs(self) -> list[tuple[int, int]] | None:
        """Return (offset, length) of the runs of private pages, or None if the kernel cannot list them."""
        listed = self._list_private(MAX_RUNS)
        if listed is None:
            return None
        runs, count = listed
        return [(runs[i].offset, runs[i].length) for i in range(min(count, MAX_RUNS))]

    def changes(self, min_gap: int) -> list[tuple[int, int]]:
        """Return (offset, length) of the runs of pages that differ from the image and the zeros around it.

        Runs with less than `min_gap` bytes between them are joined.  If the kernel lists private pages
        this takes time in proportion to them, else to all accessible pages.
        """
        accessible = self.memory.accessible
        runs, count = ffi.new("ms_extent[]", [{"offset": 0, "length": accessible}]), 1
        if self.image is not None and not self.image.copied:
            capacity = MAX_RUNS
            while (listed := self._list_private(capacity)) is not None and listed[1] > capacity:
                capacity = listed[1]
            runs, count = (runs, count) if listed is None else listed
        found = ffi.new("ms_extent[]", accessible // (PAGE_SIZE + min_gap) + 1)
        length = lib.ms_find_changes(self.memory, runs, count, min_gap, found, len(found))
        return [(found[i].offset, found[i].length) for i in range(length)]

    def _list_private(self, capacity: int) -> tuple[Any, int] | None:
        """Return the first `capacity` runs of private pages and the number of all runs, or None as `private_runs`."""
        if not probe().pagemap.works or (pagemap := lib.ms_pagemap()) < 0:
            return None
        runs = ffi.new("ms_extent[]", capacity)
        failed = lib.ms_list_private(pagemap, self.memory, runs, capacity, self.report)
        return None if failed else (runs, int(self.report.runs))

    def populate(self, runs: list[tuple[int, int]]) -> None:
        """Make these runs private and resident ahead of their page faults, without changing a byte."""
        end = self.memory.accessible
        inside = [
            {"offset": at, "length": min(length, end - at)} for at, length in runs if at < end
        ]
        check(
            lib.ms_populate(self.base, ffi.new("ms_extent[]", inside), len(inside)),
            "populating a slot (MADV_POPULATE_WRITE, Linux 5.14)",
        )

    def first_difference(self) -> int | None:
        """Return the offset of the first byte of `[0, accessible)` that is not pristine, or None."""
        found = lib.ms_first_difference(self.memory)
        return None if found < 0 else int(found)
