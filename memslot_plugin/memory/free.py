"""The free list: clean slots without a lease, and the choice of the one that is handed out next."""

from __future__ import annotations

import collections
import random
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memslot_plugin.memory.slot import Slot

STRATEGIES = ("affinity", "next-available", "random")


class FreeList:
    """Slots of one shape; iterated from the next to go to the most recently used one.

    Each operation is O(1), but a random choice and an iteration.  Not safe for threads: the pool's
    lock protects it.  An exception between two lines leaves a free slot in one of the two containers,
    from which it is handed out like any other.
    """

    def __init__(self, strategy: str, max_unused_warm: int) -> None:
        self._strategy = strategy
        self._max_unused_warm = max_unused_warm
        self._order: collections.OrderedDict[Slot, None] = collections.OrderedDict()
        self._by_affinity: dict[Hashable, dict[Slot, None]] = {}
        """The slots of `_order` by the guest that used them last, its latest one last."""

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Slot]:
        return iter(list(self._order))

    def put(self, slot: Slot, *, next_to_go: bool = False) -> None:
        """Add a slot as the most recently used one, or as the next to go."""
        self._by_affinity.setdefault(slot.affinity, {})[slot] = None
        self._order[slot] = None
        if next_to_go:
            self._order.move_to_end(slot, last=False)

    def take(self, affinity: Hashable, *, room: bool) -> Slot | None:
        """Remove and return the slot that the strategy hands out next, or None for "make a new one".

        `room` is true if a new one can be made.
        """
        slot = self._choose(affinity, room)
        if slot is not None:
            self.discard(slot)
        return slot

    def _choose(self, affinity: Hashable, room: bool) -> Slot | None:
        if self._strategy == "affinity":
            slot = self.latest(affinity) or self.oldest()
            if (
                room
                and slot is not None
                and slot.affinity not in (affinity, None)  # a purged slot is as good as a new one
                and len(self._order) < self._max_unused_warm
            ):
                return None
            return slot
        if not self._order:
            return None
        if self._strategy == "random":
            return random.choice(list(self._order))  # noqa: S311  # spreads wear, guards no secret
        return next(reversed(self._order))

    def latest(self, affinity: Hashable) -> Slot | None:
        """Return the slot that was used last by the guest of this affinity, or None."""
        own = self._by_affinity.get(affinity)
        return next(reversed(own)) if own else None

    def oldest(self) -> Slot | None:
        """Return the least recently used slot, or None."""
        return next(iter(self._order)) if self._order else None

    def discard(self, slot: Slot) -> None:
        """Remove a slot; nothing happens if it is not here."""
        # From its guest's slots first: left there alone by an exception, it would be handed out while it is leased.
        own = self._by_affinity.get(slot.affinity)
        if own is not None:
            own.pop(slot, None)
            if not own:
                del self._by_affinity[slot.affinity]
        self._order.pop(slot, None)
