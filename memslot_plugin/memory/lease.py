"""Leases of slots, and the queue in which slots come back."""

from __future__ import annotations

import queue
import weakref
from typing import TYPE_CHECKING, Any

from memslot_plugin.errors import SlotError
from memslot_plugin.memory.backing import Holder

if TYPE_CHECKING:
    from memslot_plugin.memory.image import Image
    from memslot_plugin.memory.pool import Pool
    from memslot_plugin.memory.slot import Slot


class SlotLease(weakref.ref[object]):
    """One lease of one slot.  When its holder is collected, C code alone puts the lease into the pool's queue."""

    __slots__ = ("pool", "slot", "unreleased")

    pool: Pool | None
    slot: Slot
    unreleased: list[object]
    """Holds one item until the first release, which pops it: one C call, so only one of two threads gets it.

    A lease that was given no holder has one of its own, kept alive by this item alone.  The pop lets go of it, so the
    lease ends with the release, even if an exception cuts the rest of the release short.
    """


RETURNED = SlotLease(Holder())
"""The lease of a slot that was released, from then until the pool has put it away: `RETURNED()` is None."""
RETURNED.pool, RETURNED.unreleased = None, []


_LONGEST_WAIT = 86_400.0
"""Seconds that one wait may take; a queue raises OverflowError for more than a few centuries."""


class Returns:
    """The queue of a pool: slots that were released, leases whose holder went, images to purge, None to wake a lease.

    `put` is reentrant (queue.SimpleQueue), so that finalizers and signal handlers may call it anywhere.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Slot | SlotLease | Image | None] = queue.SimpleQueue()
        self.put = self._queue.put
        self.take = self._queue.get_nowait
        self.empty = self._queue.empty
        self.waiting = 0
        """Leases that wait.  Changed without a lock: CPython switches threads after a call and at a jump back alone."""

    def next(self) -> Any:
        """Take what came back first; None if nothing did."""
        try:
            return self.take()
        except queue.Empty:  # also if a lease that waits was faster
            return None

    def wait(self, seconds: float) -> Any:
        """Wait until something comes back, and take it; None if nothing did in time, or for a day."""
        self.waiting += 1
        try:
            return self._queue.get(timeout=min(seconds, _LONGEST_WAIT))
        except queue.Empty:
            return None
        finally:
            self.waiting -= 1


def not_leased() -> SlotError:
    """Return the exception for a slot that is not leased."""
    return SlotError(
        "this slot is not leased from this pool: it was released before, or belongs elsewhere"
    )
