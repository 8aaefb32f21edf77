"""A slot: one region that holds one linear memory at a time, and the states between two of them.

            base            base + accessible                 base + reserved
             |  image's extents over zeros |  faults on access       |
             |  (readable, writable)       |                         |

Slot -> instantiate -> (grow, reset) ... -> instantiate ... -> destroy
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from memslot_hooks.types import HostMapping, ResetResult
from memslot_plugin._core import PAGE_SIZE, align_up, check, lib
from memslot_plugin.errors import InvariantBroken, MemoryTooLarge, MemslotError, SlotError
from memslot_plugin.memory import audit
from memslot_plugin.memory.region import CLEAN, DESTROYED, DIRTY, UNKNOWN, Region, Reservation

if TYPE_CHECKING:
    from typing_extensions import Self

    from memslot_plugin.memory.image import Image
    from memslot_plugin.memory.reset import Reset


NOT_TRIED: int = lib.MS_NOT_TRIED


class Slot(Region):
    """One reserved address range and its state.

    Invariant, proven by `audit.check` and test_pool_model: *if the slot is not dirty, bytes
    `[0, accessible)` equal the image's extents over zeros, and `[accessible, reserved)` faults.*
    Nothing is ever repaired in place: whatever fails half-way leaves the slot unknown, and the next
    `instantiate` maps over the whole range before it uses it.

    `mapping` is set if a runtime owns the range: protections are then the runtime's to change, and
    such a slot is never mapped over, only destroyed.  `affinity`, `lease`, `place` and `shape` (of the requests that
    the slot can serve) belong to the pool.
    """

    __slots__ = (
        "affinity",
        "failed_resets",
        "hits",
        "lease",
        "mapping",
        "place",
        "remaps",
        "resets_by",
        "shape",
        "within",
    )

    def __init__(
        self,
        base: int,
        reserved: int,
        accessible: int = 0,
        *,
        mapping: HostMapping | None = None,
        within: Reservation | None = None,
    ) -> None:
        """Take over a range of which `[0, accessible)` is readable and writable zeros and the rest faults.

        `within` is the reservation that the range is part of, kept for as long as this slot.
        """
        if (
            base % PAGE_SIZE
            or reserved % PAGE_SIZE
            or accessible % PAGE_SIZE
            or not 0 <= accessible <= reserved
        ):
            raise SlotError(
                f"a slot needs multiples of the host page ({PAGE_SIZE} bytes) with accessible <= reserved,"
                f" not base {base:#x}, reserved {reserved}, accessible {accessible}"
            )
        super().__init__(base, reserved, accessible)
        self.mapping = mapping
        self.within = within
        self.affinity: object = None
        self.lease: Any = None
        self.place = 0
        self.shape: Any = None
        self.hits = self.remaps = self.failed_resets = 0
        self.resets_by: Counter[str] = Counter()
        """Resets on the slow path, by strategy and reason."""

    @classmethod
    def create(cls, reserved: int, byte_size: int = 0, *, guard: int = 0) -> Self:
        """Make a slot in a reservation of its own, which `destroy` unmaps.

        `byte_size` bytes are accessible at once, so that a memory without an image needs no mprotect(2);
        `guard` more bytes always fault.
        """
        if min(reserved, byte_size, guard) < 0:
            raise SlotError(
                f"a slot needs sizes from 0 on, not reserved {reserved}, byte_size {byte_size}, guard {guard}"
            )
        reserved, accessible, guard = align_up(reserved), align_up(byte_size), align_up(guard)
        if accessible > reserved:
            raise MemoryTooLarge(
                f"a memory of {byte_size} bytes does not fit a slot of {reserved} bytes"
            )
        within = Reservation(reserved + guard, "a slot")
        if accessible:
            check(lib.ms_zero(within.base, accessible), f"mapping {accessible} bytes for a slot")
        return cls(within.base, reserved, accessible, within=within)

    # -- the orders of business

    def instantiate(
        self,
        image: Image | None,
        byte_size: int,
        *,
        maximum: int | None = None,  # noqa: ARG002 - for an ExtensionSlot
    ) -> bool:
        """From clean or unknown to dirty: map `image`, make `[0, byte_size)` accessible; False if no call was needed.

        Image and size are handled independently of each other.  `maximum` (bytes) bounds what the memory
        will grow to.  Raises SlotError for a dirty or destroyed slot, MemoryTooLarge, UsedAfterClose,
        SystemCallError (the slot is unknown then).
        """
        if (
            self.state is CLEAN
            and image is self.image
            and (image is None or not image.closed)
            and byte_size == self.accessible  # which is the initial size of a clean slot
        ):
            self.state = DIRTY
            return False
        accessible = self._checked(image, byte_size)
        if accessible != byte_size:  # again: in whole pages the fast path may take it
            return self.instantiate(image, accessible)
        if self.state is UNKNOWN:
            self.cover()
        self.state = UNKNOWN  # until every call below has succeeded
        if self.image is not None and self.image is not image:
            check(self.image.unmap(self.base), "removing an image from a slot")
            self.set_image(None)
        self.set_accessible(accessible)
        self.initial = accessible
        if image is not None and image is not self.image:
            self.set_image(image)
            # Again: another thread may have closed the image before the slot acquired it.  Closed later, it keeps its
            # bytes until the slot releases it.
            image.require_open()
            check(image.map(self.base), f"mapping the image of {image.name} onto a slot")
        self.state = DIRTY
        return True

    def _checked(self, image: Image | None, byte_size: int) -> int:
        """Return `byte_size` in whole pages if this slot can hold such a memory now; raise what `instantiate` does."""
        if self.state is DIRTY or self.state is DESTROYED:
            raise SlotError(
                f"a slot can be instantiated when it is clean or unknown; this one is {self.state.value}"
            )
        if byte_size < 0:  # rounded and added to the base it would be an address below the slot
            raise SlotError(f"a memory cannot have {byte_size} bytes")
        accessible = align_up(byte_size)
        if accessible > self.reserved:
            raise MemoryTooLarge(
                f"a memory of {byte_size} bytes does not fit a slot of {self.reserved} bytes"
            )
        if image is not None:
            image.require_open()
            if image.byte_size > accessible:
                raise MemoryTooLarge(
                    f"an image of {image.byte_size} bytes does not fit a memory of {byte_size} bytes"
                )
        if self.mapping is not None and accessible != self.accessible:
            raise SlotError(
                f"the runtime owns this slot's mapping of {self.accessible} bytes and cannot make it {accessible}"
            )
        return accessible

    def grow(self, byte_size: int) -> None:
        """Make `[0, byte_size)` accessible: one mprotect(2) of the new bytes, nothing is mapped.

        Raises MemoryTooLarge beyond the reservation, SlotError if not dirty (not leased) or if it
        would shrink, SystemCallError; the memory keeps its size and stays usable then.
        """
        if self.state is not DIRTY:
            raise SlotError(f"only a leased slot can grow; this one is {self.state.value}")
        accessible = align_up(byte_size)
        if accessible < self.accessible:
            raise SlotError(
                f"a linear memory cannot shrink: {self.accessible} bytes are accessible, {byte_size} were asked for"
            )
        if accessible > self.growable:
            raise MemoryTooLarge(
                f"a memory of {byte_size} bytes does not fit a slot that can grow to {self.growable} bytes"
            )
        if accessible == self.accessible:
            return
        # Unknown meanwhile: an exception between the call and its record would hide the new bytes from a reset.
        self.state = UNKNOWN
        failed = self._extend(accessible)
        self.state = DIRTY
        check(failed, f"growing a slot to {byte_size} bytes")

    @property
    def growable(self) -> int:
        """Bytes that this slot can grow to."""
        return self.reserved

    def _extend(self, accessible: int) -> int:
        """Make all of `[0, accessible)` accessible, and record it; 0 or -errno, with nothing changed."""
        failed = 0
        if self.mapping is None:  # otherwise the runtime has done it, and this is its report
            failed = int(lib.ms_allow(self.base + self.accessible, accessible - self.accessible))
        if not failed:
            self.accessible = accessible
        return failed

    def _slow_reset(self, strategy: Reset, answer: int) -> ResetResult:
        """Reset from dirty to clean if the core may not do it alone, or finish what it answered `answer` to."""
        if self.state is not DIRTY:
            raise SlotError(f"only a leased slot can be reset; this one is {self.state.value}")
        if self.mapping is not None and self.accessible != self.initial:
            raise SlotError(
                f"the runtime grew this memory from {self.initial} to {self.accessible} bytes and cannot shrink it;"
                " the slot has to be retired"
            )
        self.state = UNKNOWN
        try:
            result = strategy(self) if answer == NOT_TRIED else strategy.slow_path(self, answer)  # type: ignore[attr-defined]
            self._shrink()
        except MemslotError:
            self.failed_resets += 1
            raise
        self.state = CLEAN
        self.resets_by[
            f"{result.strategy}: {result.reason}" if result.reason else result.strategy
        ] += 1
        return result

    def _shrink(self) -> None:
        """Take back what the memory grew by."""
        if self.accessible > self.initial:
            self.set_accessible(self.initial)

    def purge(self) -> None:
        """From clean or unknown to clean without an image: give back the memory of the image and of written pages."""
        if self.state is DIRTY or self.state is DESTROYED:
            raise SlotError(f"only an unused slot can be purged; this one is {self.state.value}")
        if self.state is UNKNOWN:
            self.cover()
        elif self.image is not None:
            self.state = UNKNOWN
            check(self.image.unmap(self.base), "removing an image from a slot")
            # All that is reserved: resets keep pages resident, those of a grown memory lie above what is accessible.
            failed = lib.ms_discard(self.base, self.reserved)
            # Locked pages cannot be dropped (mlockall(2)), but mapped over.
            if failed and self.accessible:
                failed = lib.ms_zero(self.base, self.accessible)
            check(failed, "purging a slot")
            self.set_image(None)
            self.state = CLEAN

    def cover(self) -> None:
        """From any state but destroyed to clean, with nothing accessible: map over the whole range."""
        if self.mapping is not None:
            raise SlotError(
                "a runtime owns this slot's mapping: it cannot be covered, only retired"
            )
        self.state = UNKNOWN
        super().cover()
        self.state = CLEAN

    def destroy(self) -> None:
        """From any state to destroyed.

        A slot inside a larger reservation is covered with inaccessible memory, so that nothing else
        can be mapped there while guards and neighbours still count on it; a slot of its own is
        unmapped; a runtime's mapping is left to the runtime.  Raises SystemCallError if covering
        fails: the slot is unknown then.
        """
        if self.state is DESTROYED:
            return
        self.state = UNKNOWN
        if self.mapping is not None:
            self.mapping.forget()
        elif self.within is not None and self.within.base == self.base:
            self.within.unmap()
        else:
            self.cover()
        self.forget()

    def forget(self) -> None:
        """From any state to destroyed without a system call: a larger range is unmapped as a whole."""
        self.state = DESTROYED
        self.set_image(None)

    def check(self) -> None:
        """Check the invariant against /proc/self/maps and, if the slot is not dirty, against the image.

        Reads all accessible bytes: for tests and audits.  Raises InvariantBroken with the first difference.
        """
        audit.check_mappings(self, foreign=self.mapping is not None)
        if self.state is CLEAN:
            audit.check_bytes(self)

    def audit(self) -> None:
        """Compare a clean slot with its image byte by byte; InvariantBroken, and unknown, if they differ."""
        try:
            audit.check_bytes(self)
        except InvariantBroken:
            self.failed_resets += 1
            raise

    def counts(self) -> dict[str, int]:
        """Return the slot's counters; those of resets begin with a star."""
        resets = Counter({f"*{how}": number for how, number in self.resets_by.items()})
        resets["*pagemap"] += self.fast_resets
        return {
            "hits": self.hits,
            "remaps": self.remaps,
            "failed_resets": self.failed_resets,
            **resets,
        }

    def privatise(self) -> None:
        """In a forked child: stop sharing with the parent what a guest here could change there; nothing as a rule."""

    def __repr__(self) -> str:
        return f"<Slot {self.state.value} at {self.base:#x}: {self.accessible} of {self.reserved} bytes, {self.image}>"
