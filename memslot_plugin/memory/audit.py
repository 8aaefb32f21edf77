"""The invariant of a slot, checked against the kernel's list of mappings and against the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memslot_plugin._core.proc import mappings
from memslot_plugin.errors import InvariantBroken
from memslot_plugin.memory.region import DESTROYED, UNKNOWN

if TYPE_CHECKING:
    from memslot_plugin.memory.region import Region


def check_mappings(region: Region, *, foreign: bool = False) -> None:
    """Compare /proc/self/maps with what must be mapped; InvariantBroken with the first difference.

    Nothing is known of an unknown or destroyed region, and so nothing is checked.  `foreign`: anonymous
    parts were mapped by a runtime, and only their permissions are compared.
    """
    if region.state is DESTROYED or region.state is UNKNOWN:
        return
    at = 0
    for mapping in mappings(region.base, region.base + region.reserved):
        if mapping.start - region.base != at:
            break
        piece_end, *expected = region.mapped_at(at)
        at = mapping.end - region.base
        found = [mapping.permissions, mapping.inode, mapping.offset if mapping.inode else 0]
        if foreign and not expected[1]:
            found[1:] = expected[1:]
        if found != expected or at > piece_end:
            raise InvariantBroken(
                f"bytes [{mapping.start - region.base}, {at}) of a slot map {found} (permissions, inode,"
                f" offset) and not {expected} up to byte {piece_end}: {region!r}"
            )
    if at != region.reserved:
        raise InvariantBroken(
            f"nothing is mapped at byte {at} of a slot: another mapping could fall there: {region!r}"
        )


def check_bytes(region: Region) -> None:
    """Compare all accessible bytes with the image; InvariantBroken, and unknown, if one differs."""
    difference = region.first_difference()
    if difference is not None:
        region.state = UNKNOWN
        raise InvariantBroken(
            f"byte {difference} of a clean slot differs from {region.image or 'zeros'}"
        )
