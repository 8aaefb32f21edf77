"""The footprint by which tests find what was left behind, without what malloc keeps for itself."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from memslot_plugin import MemfdImage, Slot, _core
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import ffi, lib
from memslot_plugin.tests.leaks import ARENA, Footprint

pytestmark = pytest.mark.usefixtures("no_leaks")


def opened() -> Callable[[], object]:
    descriptor = os.open("/dev/zero", os.O_RDONLY)
    return lambda: os.close(descriptor)


def laid() -> Callable[[], object]:
    """Leave a slot with an image, which has a mapping there and one of its own."""
    slot, image = Slot.create(64 * P, 64 * P), MemfdImage("laid", b"x")
    slot.instantiate(image, 64 * P)
    image.close()
    return slot.destroy


@pytest.mark.parametrize(
    ("lose", "named"),
    [
        (lambda: Slot.create(64 * P).destroy, f"{64 * P} more of reserved"),
        (opened, "1 more of /dev/zero"),
        (laid, "2 more of image_mappings"),
    ],
    ids=["slot", "descriptor", "image"],
)
def test_footprint_names_what_was_lost_and_nothing_once_it_was_given_back(
    lose: Callable[[], Callable[[], object]], named: str
) -> None:
    before = Footprint.now()
    give_back = lose()
    lost = Footprint.now()
    assert named in lost.lost_since(before)
    assert before.lost_since(lost) == []
    give_back()
    assert Footprint.now().lost_since(before) == []


def test_footprint_counts_no_arena_but_what_is_reserved_behind_it() -> None:
    base = ffi.new("uintptr_t *")
    _core.check(lib.ms_reserve(3 * ARENA, base), "reserving")
    arena = _core.align_up(base[0], ARENA)
    before = Footprint.now().reserved
    _core.check(lib.ms_allow(arena, P), "allowing")
    assert before - Footprint.now().reserved == ARENA
    _core.check(lib.ms_allow(arena, ARENA), "allowing")
    assert before - Footprint.now().reserved == ARENA
    _core.check(lib.ms_unmap(base[0], 3 * ARENA), "unmapping")
