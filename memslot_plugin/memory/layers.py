"""Layers: an image that stores only what differs from another one, and has the rest where that has it.

    parent    |  extent A        |  zeros  |  extent B     |
    changed        |xxxx|                  |xxxx|
    child     |  A |own | A      |  zeros  |own | B        |

The child keeps the parent's backings, not the parent: it is a complete image of its own, and a child
of it refers to those same backings again, so that layers never become a chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from memslot_plugin.memory.image import MAX_EXTENTS, MIN_GAP, Image, Piece, find_extents, joined

Runs = list[tuple[int, int]]
"""(start, end), in ascending order, apart from each other."""


def layered(
    name: str, parent: Image, content: bytes | memoryview, changes: Iterable[tuple[int, int]]
) -> Image | None:
    """An image of `content`, which is `parent` but for the `changes`, (offset, length) in ascending
    order; of the same kind.  None where it would have too many extents, so that a flat one is better.

    The parent has to be held by somebody until this returns.
    """
    changed = [(offset, offset + length) for offset, length in changes]
    own: Runs = []
    for start, end in changed:
        for extent in find_extents(content[start:end]):
            own.append((start + extent.offset, start + extent.offset + extent.length))
    kept = list(_without(parent.pieces, changed))
    own = joined(own, 1)  # what was changed and what was grown may touch
    gap = MIN_GAP
    while len(kept) + len(own) > MAX_EXTENTS:
        gap *= 2
        if gap > 2 * len(content):
            return None
        own = joined(own, gap)
        kept = list(_without(kept, own))
    return type(parent).layered(name, kept, [(start, content[start:end]) for start, end in own])


def _without(pieces: Iterable[Piece], runs: Runs) -> Iterator[Piece]:
    """What is left of the pieces outside of the runs."""
    for offset, length, backing, file_offset in pieces:
        at, end = offset, offset + length
        for start, stop in runs:
            if stop <= at or start >= end:
                continue
            if start > at:
                yield Piece(at, start - at, backing, file_offset + at - offset)
            at = stop
            if at >= end:
                break
        if at < end:
            yield Piece(at, end - at, backing, file_offset + at - offset)
