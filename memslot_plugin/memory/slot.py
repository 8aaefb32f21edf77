"""A slot: one reserved address range that holds one linear memory at a time.

                base            base + accessible                 base + reserved
                 |  image's extents over zeros |  faults on access       |
                 |  (readable, writable)       |  (or SIGBUS, see below) |

A slot knows no modules and no pool.  Its life: create -> instantiate -> (grow, reset) -> ... ->
destroy.
"""

from __future__ import annotations

import enum
import os
from typing import TYPE_CHECKING, Any

from memslot_hooks.types import HostMapping, ResetResult
from memslot_plugin._core import (
    PAGE_SIZE,
    Watched,
    align_up,
    catch_up,
    check,
    ffi,
    install_resets,
    lib,
)
from memslot_plugin._core.proc import mappings
from memslot_plugin.errors import (
    InvariantBroken,
    MemoryTooLarge,
    MemslotError,
    SlotError,
    Unsupported,
)
from memslot_plugin.memory.backing import fill_memfd
from memslot_plugin.memory.probe import probe
from memslot_plugin.memory.reset import ORDINARY

if TYPE_CHECKING:
    from memslot_plugin.memory.adaptive import History
    from memslot_plugin.memory.image import Image
    from memslot_plugin.memory.reset import Pagemap, Reset


MAX_RUNS = 256
"""How many runs of usually written pages are remembered; more are rarely worth their calls."""


GROWTHS = ("mprotect", "ftruncate")


class State(enum.Enum):
    """What is known about the bytes of a slot."""

    CLEAN = "clean"
    """`[0, accessible)` equals the image's extents over zeros (just zeros without an image)."""
    DIRTY = "dirty"
    """A guest may have written anything to `[0, accessible)`; mappings and protections are still as
    recorded.
    """
    UNKNOWN = "unknown"
    """A system call failed half-way: nothing is known but that the range is ours.  The next use
    maps over it.
    """
    DESTROYED = "destroyed"
    """The range is no longer ours."""


# Before Python 3.12 a look-up on an Enum costs as much as ten others, and a reset has no time for that.
CLEAN, DIRTY, UNKNOWN = State.CLEAN, State.DIRTY, State.UNKNOWN

install_resets(DIRTY, CLEAN, UNKNOWN, ORDINARY)


class Slot(Watched):
    """One reserved address range and its state.

    Invariant, checked by `check()`: *if the slot is not dirty, bytes `[0, accessible)` equal the
    image's extents over zeros, and `[accessible, reserved)` faults.*  Nothing is ever repaired in
    place: after a failed system call the state is unknown, and the next `instantiate` covers the
    whole range before it uses it.

    All sizes are bytes.  `accessible` is what the memory's size needs, rounded up to host pages.
    `mapping` is set where a runtime owns the range: such a slot never changes protections, because
    the runtime does.

    `growth` is "mprotect" (growing changes the protection of the new bytes) or "ftruncate" (the
    range above the initial size maps a per-slot file, growing makes the file longer, an access past
    its end raises SIGBUS: for hosts that check bounds in code only).
    """

    __slots__ = (
        "__weakref__",
        "_extension",
        "_extension_length",
        "_guard",
        "_own",
        "accessible",
        "affinity",
        "base",
        "core",
        "growth",
        "history",
        "image",
        "initial",
        "limits",
        "mapping",
        "memory",
        "report",
        "reserved",
        "within",
    )

    def __init__(
        self,
        base: int,
        reserved: int,
        accessible: int = 0,
        *,
        mapping: HostMapping | None = None,
        growth: str = "mprotect",
    ) -> None:
        """Take over an existing range of which `[0, accessible)` is readable and writable zeros and
        the rest faults.
        """
        if (
            base % PAGE_SIZE
            or reserved % PAGE_SIZE
            or accessible % PAGE_SIZE
            or not 0 <= accessible <= reserved
            or growth not in GROWTHS
        ):
            raise SlotError(
                f"a slot needs multiples of the host page ({PAGE_SIZE} bytes) with accessible <= reserved,"
                f" not base {base:#x}, reserved {reserved}, accessible {accessible},"
                f" and growth {' or '.join(GROWTHS)}, not {growth!r}"
            )
        if mapping is not None and growth != "mprotect":
            raise Unsupported(
                "growth by ftruncate is impossible where the runtime owns the mapping and grows it itself"
            )
        self.base = base
        self.reserved = reserved
        self.accessible = accessible
        self.initial = accessible
        self.image: Image | None = None
        self.state = CLEAN
        self.mapping = mapping
        self.growth = growth
        self.affinity: object = None
        self.history: History | None = None
        self.watcher: Pagemap | None = None
        """The strategy for which the core may reset this slot without asking, within `limits`."""
        self.limits: Any = None
        """What the core knows by its address alone, kept alive."""
        self.core = ffi.new("ms_slot *", [{"base": base, "accessible": accessible}])
        self.address = int(ffi.cast("uintptr_t", self.core))
        self.memory = ffi.addressof(self.core, "memory")  # these two live as long as the core does
        self.report = ffi.addressof(self.core, "report")
        self._guard = 0
        self._own: Any = None
        """Where the address of a reservation of its own stands; None where the range is part of another's."""
        self._extension = ffi.new("int *", -1)
        """Where its extension's descriptor stands, or -1."""
        self.within: object = None
        """The larger reservation that it is part of, which has to outlive it; None for a range of the caller's."""
        self._extension_length = 0

    @classmethod
    def create(
        cls, reserved: int, byte_size: int = 0, *, guard: int = 0, growth: str = "mprotect"
    ) -> Slot:
        """A slot over a reservation of its own, with `byte_size` bytes accessible at once, so that
        a memory without an image costs no mprotect, and `guard` more bytes that always fault.
        `destroy` unmaps it.
        """
        if min(reserved, byte_size, guard) < 0 or growth not in GROWTHS:
            raise SlotError(
                f"a slot needs sizes from 0 on and growth {' or '.join(GROWTHS)}, not reserved {reserved},"
                f" byte_size {byte_size}, guard {guard}, growth {growth!r}"
            )
        reserved, accessible, guard = align_up(reserved), align_up(byte_size), align_up(guard)
        if accessible > reserved:
            raise MemoryTooLarge(
                f"a memory of {byte_size} bytes does not fit a slot of {reserved} bytes"
            )
        base = ffi.new("uintptr_t *")
        try:
            check(
                lib.ms_reserve(reserved + guard, base),
                f"reserving {reserved + guard} bytes of address space for a slot",
            )
            if accessible:
                check(lib.ms_zero(base[0], accessible), f"mapping {accessible} bytes for a slot")
            slot = cls(base[0], reserved, accessible, growth=growth)
            slot._guard = guard
            slot._own = base
        except BaseException:
            lib.ms_unmap_held(base, reserved + guard)
            raise
        return slot

    # -- the four orders of business

    def instantiate(
        self, image: Image | None, byte_size: int, *, maximum: int | None = None
    ) -> bool:
        """From clean or unknown to dirty: lay `image` and make `[0, byte_size)` accessible.

        With the image and the size that the slot already has, no system call is made and the answer
        is False.  Image and size are handled independently of each other.  `maximum` (bytes) bounds
        the growth of an ftruncate slot.  Raises SlotError for a dirty or destroyed slot,
        MemoryTooLarge, SystemCallError (the slot is unknown then).
        """
        if (
            self.state is CLEAN
            and image is self.image
            and (image is None or not image.closed)
            and byte_size == self.initial == self.accessible
            and (self.growth == "mprotect" or self._extension_covers(maximum))
        ):
            self.state = DIRTY
            return False
        if self.state is State.DIRTY or self.state is State.DESTROYED:
            raise SlotError(
                f"a slot can be instantiated when it is clean or unknown; this one is {self.state.value}"
            )
        if byte_size < 0:  # rounded and added to the base it would be an address below the slot
            raise SlotError(f"a memory cannot have {byte_size} bytes")
        accessible = align_up(byte_size)
        if accessible != byte_size:  # the same size when rounded is the same size
            return self.instantiate(image, accessible, maximum=maximum)
        if accessible > self.reserved:
            raise MemoryTooLarge(
                f"a memory of {byte_size} bytes does not fit a slot of {self.reserved} bytes"
            )
        if image is not None:
            image.require_open()
        if image is not None and image.byte_size > accessible:
            raise MemoryTooLarge(
                f"an image of {image.byte_size} bytes does not fit a memory of {byte_size} bytes"
            )
        if self.mapping is not None and accessible != self.accessible:
            raise SlotError(
                f"the runtime owns this slot's mapping of {self.accessible} bytes and cannot make it {accessible}"
            )
        if self.state is State.UNKNOWN:
            self._cover()
        self.state = State.UNKNOWN  # until every call below has succeeded
        if self.image is not None and self.image is not image:
            check(self.image.lift(self.base), "removing an image from a slot")
            self._hold(None)
        if self._extension_length and not (
            accessible == self.initial and self._extension_covers(maximum)
        ):
            self._drop_extension()
        self._set_accessible(accessible)
        self.initial = accessible
        if image is not None and self.image is None:
            self._hold(image)
            image.require_open()  # again: once it is held, closing it on another thread waits for us
            check(image.lay(self.base), f"laying the image of {image.name} onto a slot")
        if self.growth == "ftruncate" and not self._extension_length:
            self._map_extension(maximum)
        self.state = State.DIRTY
        return True

    def grow(self, byte_size: int) -> None:
        """Make `[0, byte_size)` accessible; nothing is mapped, only the new bytes' protection
        changes.

        Raises MemoryTooLarge beyond the reservation, SlotError if not dirty (not leased) or if it
        would shrink, SystemCallError (the memory keeps its size and stays usable: mprotect(2) and
        ftruncate(2) are all or nothing here).
        """
        if self.state is not State.DIRTY:
            raise SlotError(f"only a leased slot can grow; this one is {self.state.value}")
        accessible = align_up(byte_size)
        if accessible < self.accessible:
            raise SlotError(
                f"a linear memory cannot shrink: {self.accessible} bytes are accessible, {byte_size} were asked for"
            )
        limit = self.reserved
        if self._extension_length:
            catch_up()  # otherwise the parent's memory would grow
        if self.growth == "ftruncate":
            limit = self.initial + self._extension_length
        if accessible > limit:
            raise MemoryTooLarge(
                f"a memory of {byte_size} bytes does not fit a slot that can grow to {limit} bytes"
            )
        if accessible == self.accessible:
            return
        self.watcher = None
        self.state = (
            UNKNOWN  # an exception between the call and its record would hide the new bytes
        )
        failed = 0
        if self.mapping is not None:
            self._record(accessible)  # a report: the runtime has done it
        elif self._extension_length:
            failed = lib.ms_resize(self._extension_fd, accessible - self.initial)
            if not failed:
                self.accessible = accessible  # the core resets what lies below the extension only
        else:
            failed = lib.ms_allow(self.base + self.accessible, accessible - self.accessible)
            if not failed:
                self._record(accessible)
        self.state = DIRTY
        check(failed, f"growing a slot to {byte_size} bytes")

    def _reset(self, strategy: Reset) -> ResetResult:
        """`reset`, where the core may not do it without asking: `Watched`, our base, does all others."""
        if self.state is not DIRTY:
            raise SlotError(f"only a leased slot can be reset; this one is {self.state.value}")
        if self.mapping is not None and self.accessible != self.initial:
            raise SlotError(
                f"the runtime grew this memory from {self.initial} to {self.accessible} bytes and cannot shrink it;"
                " the slot has to be retired"
            )
        if self._extension_length:
            catch_up()  # otherwise the parent's memory would shrink
        self.state = UNKNOWN
        result = strategy(self)
        if self.accessible > self.initial:
            if self._extension_length:
                check(lib.ms_resize(self._extension_fd, 0), "emptying a slot's extension")
                self.accessible = self.initial
            else:
                self._set_accessible(self.initial)
        self.state = CLEAN
        return result

    def private_runs(self) -> list[tuple[int, int]] | None:
        """(offset, length) of the runs of private pages, or None where the kernel cannot list
        them.
        """
        listed = self._list_private(MAX_RUNS)
        if listed is None:
            return None
        runs, count = listed
        return [(runs[i].offset, runs[i].length) for i in range(min(count, MAX_RUNS))]

    def changes(self, min_gap: int) -> list[tuple[int, int]]:
        """(offset, length) of the runs of pages that differ from the image and the zeros around it,
        those with less than `min_gap` bytes between them as one.  Memory that grew in a file of its
        own, or unnoticed, is not among them.

        Where the kernel lists private pages this takes the time of those alone, elsewhere of all.
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
        """The first `capacity` runs of private pages, and how many there are in all; None where the kernel cannot
        list them, or will not any more.
        """
        if not probe().pagemap.works or (pagemap := lib.ms_pagemap()) < 0:
            return None
        runs = ffi.new("ms_extent[]", capacity)
        failed = lib.ms_list_private(pagemap, self.memory, runs, capacity, self.report)
        return None if failed else (runs, int(self.report.runs))

    def populate(self, runs: list[tuple[int, int]]) -> None:
        """Make these runs private and resident without changing a byte, ahead of their faults."""
        end = self.memory.accessible
        inside = [
            {"offset": at, "length": min(length, end - at)} for at, length in runs if at < end
        ]
        check(
            lib.ms_populate(self.base, ffi.new("ms_extent[]", inside), len(inside)),
            "populating a slot (MADV_POPULATE_WRITE, Linux 5.14)",
        )

    def purge(self) -> None:
        """From clean to clean without an image: give back what the image holds.  An unknown slot is
        covered whole.
        """
        if self.state is State.DIRTY or self.state is State.DESTROYED:
            raise SlotError(f"only an unused slot can be purged; this one is {self.state.value}")
        if self.state is State.UNKNOWN:
            self._cover()
        elif self.image is not None:
            self.state = State.UNKNOWN
            check(self.image.lift(self.base), "removing an image from a slot")
            # Resets keep pages resident, and those of a grown memory lie behind what is accessible now.
            failed = lib.ms_discard(self.base, self.reserved)
            # Locked pages cannot be dropped; those that are not mapped over here are zeros.
            if failed:
                failed = lib.ms_zero(self.base, self.accessible) if self.accessible else 0
            check(failed, "purging a slot")
            self._hold(None)
            self.state = State.CLEAN

    def destroy(self) -> None:
        """From any state to destroyed; twice is a no-op.

        A slot inside a larger reservation is covered with inaccessible memory, so that nothing else
        can be mapped there while guards and neighbours still count on it; a slot of its own is
        unmapped; a runtime's mapping is left to the runtime.
        """
        if self.state is State.DESTROYED:
            return
        if self.mapping is not None:
            self.state = State.UNKNOWN  # as below
            self.mapping.forget()
            self.forget()
            return
        if self._own is not None:
            self.state = State.UNKNOWN  # also if it fails: destroying it again tries again
            check(lib.ms_unmap_held(self._own, self.reserved + self._guard), "unmapping a slot")
        else:
            self._cover()
        self.forget()

    def forget(self) -> None:
        """From any state to destroyed without a system call: the range was or will be unmapped as
        part of a larger one.
        """
        self.state = State.DESTROYED
        try:
            self._close_extension()
        finally:
            self._hold(None)

    def __del__(self) -> None:
        # Whoever made it was interrupted before anybody held it.
        if hasattr(self, "_extension_length"):
            lib.ms_close_held(self._extension)
            if self._own is not None:
                lib.ms_unmap_held(self._own, self.reserved + self._guard)

    # -- the invariant

    def check(self) -> None:
        """Compare the slot with the kernel's view of it (/proc/self/maps) and, if not dirty, with
        its image.

        Raises InvariantBroken with the first difference.  Reads all accessible bytes: for tests and
        audits.
        """
        if self.state is State.DESTROYED or self.state is State.UNKNOWN:
            return
        if self._extension_length:
            file_size = os.fstat(self._extension_fd).st_size
            if file_size != self.accessible - self.initial:
                raise InvariantBroken(
                    f"a slot's extension has {file_size} bytes, not {self.accessible - self.initial}"
                )
        at = 0
        for mapping in mappings(self.base, self.base + self.reserved):
            if mapping.start - self.base != at:
                break
            piece_end, *expected = self._expected(at)
            at = mapping.end - self.base
            found = [mapping.permissions, mapping.inode, mapping.offset if mapping.inode else 0]
            if self.mapping is not None and not expected[1]:
                found[1:] = expected[1:]  # what a runtime's memory is made of is its own business
            if found != expected or at > piece_end:
                raise InvariantBroken(
                    f"bytes [{mapping.start - self.base}, {at}) of a slot map {found} (permissions, inode,"
                    f" offset) and not {expected} up to byte {piece_end}: {self!r}"
                )
        if at != self.reserved:
            raise InvariantBroken(
                f"nothing is mapped at byte {at} of a slot: somebody else's mapping could fall there"
            )
        if self.state is State.CLEAN:
            difference = self.first_difference()
            if difference is not None:
                raise InvariantBroken(
                    f"byte {difference} of a clean slot differs from {self.image or 'zeros'}"
                )

    def audit(self) -> None:
        """Compare a clean slot with its image byte by byte; InvariantBroken, and unknown, if they
        differ.
        """
        difference = self.first_difference()
        if difference is not None:
            self.state = State.UNKNOWN
            raise InvariantBroken(
                f"after a reset, byte {difference} of a slot differs from {self.image or 'zeros'};"
                " the slot is destroyed"
            )

    def first_difference(self) -> int | None:
        """The offset of the first byte of `[0, accessible)` that is not as the image says, or
        None.
        """
        found = lib.ms_first_difference(self.memory)
        return None if found < 0 else int(found)

    def _expected(self, at: int) -> tuple[int, str, int, int]:
        """What has to be mapped at byte `at`, and up to which byte: permissions, inode and file offset there."""
        private_end = self.initial if self._extension_length else self.accessible
        extension_end = private_end + self._extension_length
        if at >= extension_end:
            return self.reserved, "---p", 0, 0
        if at >= private_end:
            inode = os.fstat(self._extension_fd).st_ino
            return extension_end, "rw-p", inode, at - private_end
        if self.image is not None and not self.image.copied:
            for offset, length, backing, file_offset in self.image.pieces:
                if at < offset:
                    return offset, "rw-p", 0, 0
                if at < (end := offset + length):
                    return end, "rw-p", backing.inode, file_offset + at - offset
        return private_end, "rw-p", 0, 0

    # -- the system calls behind them

    def _hold(self, image: Image | None) -> None:
        """Record which image lies here, and tell both the old and the new one."""
        if image is not None:
            image.acquire(self)
        failure = None
        if self.image is not None:
            try:
                self.image.release(self)
            except MemslotError as error:  # it has, and could not give back what it held
                failure = error
        self.image = image
        self.memory.extents = ffi.NULL if image is None else image.c_extents
        self.memory.count = 0 if image is None else image.c_count
        self.memory.copied = image is not None and image.copied
        if failure is not None:
            raise failure

    def _record(self, accessible: int) -> None:
        """Note how much is accessible, here and for the core."""
        self.accessible = accessible
        self.memory.accessible = accessible

    def _set_accessible(self, accessible: int) -> None:
        """Change the protection of the difference only, and nothing if there is none."""
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
        self._record(accessible)

    def _cover(self) -> None:
        """From unknown to clean: map inaccessible memory over all of it."""
        if self.mapping is not None:
            raise SlotError(
                "a runtime owns this slot's mapping: it cannot be covered, only retired"
            )
        self.state = State.UNKNOWN
        check(lib.ms_cover(self.base, self.reserved), "covering a slot")
        self._close_extension()
        self._hold(None)
        self._record(0)
        self.initial = 0
        self.state = State.CLEAN

    # -- growth by ftruncate

    def _extension_covers(self, maximum: int | None) -> bool:
        wanted = self._wanted_extension(self.initial, maximum)
        return self._extension_length == wanted

    def _wanted_extension(self, initial: int, maximum: int | None) -> int:
        limit = self.reserved if maximum is None else min(align_up(maximum), self.reserved)
        return max(limit - initial, 0)

    def _map_extension(self, maximum: int | None) -> None:
        """Map an empty file of the slot's own above the initial size, to the maximum, once."""
        length = self._wanted_extension(self.initial, maximum)
        if not length:
            return
        if self._extension_fd < 0:
            fill_memfd(self._extension, "extension", 0, "a slot's extension")
        check(
            lib.ms_map_extension(self.base + self.initial, length, self._extension_fd),
            "mapping a slot's extension",
        )
        self._extension_length = length

    @property
    def _extension_fd(self) -> int:
        """The extension's file, or -1."""
        return int(self._extension[0])

    def _drop_extension(self) -> None:
        """Cover the extension's range; the file stays for the next one."""
        if self._extension_length:
            check(
                lib.ms_cover(self.base + self.initial, self._extension_length),
                "covering a slot's extension",
            )
            self._extension_length = 0

    def part(self) -> None:
        """In a forked child: let go of the extension's file, which the parent's guest goes on using.

        What a dirty slot has in it is copied to a file of its own.  Raises SystemCallError: the slot is unknown
        then.
        """
        if self._extension_fd < 0 or self.state is State.UNKNOWN:
            return
        state, self.state = self.state, State.UNKNOWN
        length, grown = self._extension_length, self.accessible - self.initial
        written = bytes(ffi.buffer(ffi.cast("uint8_t *", self.base + self.initial), grown))
        self._drop_extension()
        self._close_extension()
        if state is State.DIRTY and length:
            self._map_extension(self.initial + length)
            check(lib.ms_resize(self._extension_fd, grown), "sizing a slot's extension")
            what = "copying a slot's extension"
            check(lib.ms_write(self._extension_fd, written, grown, 0), what)
        self.state = state

    def _close_extension(self) -> None:
        self._extension_length = 0
        check(lib.ms_close_held(self._extension), "closing a slot's extension")

    def __repr__(self) -> str:
        return f"<Slot {self.state.value} at {self.base:#x}: {self.accessible} of {self.reserved} bytes, {self.image}>"
