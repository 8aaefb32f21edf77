"""Idle slots, and which of them is handed out next."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memslot_plugin.memory.slot import Slot

STRATEGIES = ("affinity", "next-available", "random")


class Shelf:
    """Idle slots of one shape, and which of them comes next.

    Each idle slot is in `_order` (least recently used first); `_by_affinity` finds the most
    recently returned one of a guest. All operations are O(1) except the random pick and the purge.
    """

    def __init__(self, strategy: str, max_unused_warm: int) -> None:
        self._strategy = strategy
        self._max_unused_warm = max_unused_warm
        self._order: collections.OrderedDict[Slot, None] = collections.OrderedDict()
        self._by_affinity: dict[Hashable, dict[Slot, None]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def listed(self) -> list[Slot]:
        """Every slot on the shelf, the next to go first."""
        return list(self._order)

    def put(self, slot: Slot, *, next_to_go: bool = False) -> None:
        """Lay a slot on the shelf, as the most recently used one or as the next to go."""
        self._order[slot] = None
        if next_to_go:
            self._order.move_to_end(slot, last=False)
        own = self._by_affinity.get(slot.affinity)
        if own is None:
            own = self._by_affinity[slot.affinity] = {}
        own[slot] = None

    def choose(self, affinity: Hashable, can_create: Callable[[], bool]) -> Slot | None:
        """The slot that the strategy would hand out next, or None for "make a new one"; it stays on the shelf."""
        if self._strategy == "affinity":
            own = self._by_affinity.get(affinity)
            if own:
                return next(reversed(own))
            oldest = self.oldest()
            purged = oldest is not None and oldest.affinity is None  # as good as a new one
            if not purged and len(self._order) < self._max_unused_warm and can_create():
                return None
            return oldest
        if not self._order:
            return None
        if self._strategy == "random":
            return random.choice(list(self._order))  # noqa: S311  # spreads wear, guards no secret
        return next(reversed(self._order))

    def latest(self, affinity: Hashable) -> Slot | None:
        """The slot on the shelf that was last used with this affinity."""
        own = self._by_affinity.get(affinity)
        return next(reversed(own)) if own else None

    def oldest(self) -> Slot | None:
        """The least recently used slot on the shelf."""
        return next(iter(self._order)) if self._order else None

    def discard(self, slot: Slot) -> None:
        """Take this slot off the shelf, also one that stands there by half or not at all."""
        self._order.pop(slot, None)
        own = self._by_affinity.get(slot.affinity)
        if own is not None:
            own.pop(slot, None)
            if not own:
                del self._by_affinity[slot.affinity]

    def tidy(self) -> None:
        """After whoever was changing the shelf is gone: no slot stands there by half."""
        slots = self.listed()
        self._order.clear()
        self._by_affinity.clear()
        for slot in slots:
            self.put(slot)
