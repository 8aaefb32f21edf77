"""A set of objects that are owned elsewhere and have to be found."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

T = TypeVar("T")


class Living(Generic[T]):
    """The living among objects that others own; any thread may add, drop and list them at any time.

    weakref.WeakSet is iterated by code of Python's, and raises RuntimeError if another thread adds meanwhile.
    """

    __slots__ = ("_references",)

    def __init__(self) -> None:
        self._references: set[weakref.ref[T]] = set()

    def add(self, each: T) -> None:
        """Count an object until it goes or is discarded."""
        self._references.add(weakref.ref(each, self._references.discard))

    def discard(self, each: T) -> None:
        """Count it no longer; nothing happens if it is not there."""
        self._references.discard(weakref.ref(each))

    def listed(self) -> list[T]:
        """The living, in no order."""
        # A list, because a tuple is allocated, which may collect, between two looks at the set.
        return [each for found in list(self._references) if (each := found()) is not None]

    def __len__(self) -> int:
        return len(self._references)
