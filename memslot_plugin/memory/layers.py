"""Layers: an image that stores only what differs from its parent, and refers to the parent's bytes for the rest.

    parent    |  extent A        |  zeros  |  extent B     |
    changed        |xxxx|                  |xxxx|
    child     |  A |own | A      |  zeros  |own | B        |

The child acquires the parent's backings, not the parent: it is a complete image of its own, and a child
of it refers to those same backings again, so that layers never become a chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from memslot_hooks.types import Extent
from memslot_plugin.memory.image import MAX_EXTENTS, MIN_GAP, Image, find_extents, joined

Runs = list[tuple[int, int]]
"""(start, end), in ascending order, apart from each other."""


def layered(
    name: str, parent: Image, content: bytes | memoryview, changes: Iterable[tuple[int, int]]
) -> Image | None:
    """Return an image of `content`, which equals `parent` but for the `changes`, (offset, length) in ascending order.

    Return None if it would have too many extents, so that a flat image is better.  The parent must stay open meanwhile.
    """
    changed = [(offset, offset + length) for offset, length in changes]
    own: Runs = []
    for start, end in changed:
        for extent in find_extents(content[start:end]):
            own.append((start + extent.offset, start + extent.offset + extent.length))
    kept = list(_without(parent.extents, changed))
    own = joined(own, 1)  # what was changed and what was grown may touch
    gap = MIN_GAP
    while len(kept) + len(own) > MAX_EXTENTS:
        gap *= 2
        if gap > 2 * len(content):
            return None
        own = joined(own, gap)
        kept = list(_without(kept, own))
    return type(parent).layered(name, kept, [(start, content[start:end]) for start, end in own])


def _without(extents: Iterable[Extent], runs: Runs) -> Iterator[Extent]:
    """Yield what is left of the extents outside of the runs."""
    for extent in extents:
        at, end = extent.offset, extent.offset + extent.length

        def part(start: int, stop: int, extent: Extent = extent) -> Extent:
            return Extent(
                start, stop - start, extent.file_offset + start - extent.offset, extent.backing
            )

        for start, stop in runs:
            if stop <= at or start >= end:
                continue
            if start > at:
                yield part(at, start)
            at = stop
            if at >= end:
                break
        if at < end:
            yield part(at, end)
