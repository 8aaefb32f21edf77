"""The footprint by which tests find leaks, without the memory that malloc keeps."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from memslot_plugin import Slot, _core
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import ffi, lib
from memslot_plugin.tests.leaks import ARENA, Footprint

pytestmark = pytest.mark.usefixtures("no_leaks")


def open_a_file() -> Callable[[], object]:
    descriptor = os.open("/dev/zero", os.O_RDONLY)
    return lambda: os.close(descriptor)


@pytest.mark.parametrize(
    ("lose", "named"),
    [
        (lambda: Slot.create(64 * P).destroy, f"{64 * P} more of reserved"),
        (open_a_file, "1 more of /dev/zero"),
    ],
    ids=["slot", "descriptor"],
)
def test_footprint_names_a_leak_until_it_is_given_back(
    lose: Callable[[], Callable[[], object]], named: str
) -> None:
    before = Footprint.now()
    give_back = lose()
    lost = Footprint.now()
    assert lost.lost_since(before) == [named]
    assert before.lost_since(lost) == []
    give_back()
    assert Footprint.now().lost_since(before) == []


def test_footprint_beside_an_arena_counts_the_reservation_alone() -> None:
    base = ffi.new("uintptr_t *")
    _core.check(lib.ms_reserve(3 * ARENA, base), "reserving")
    arena = _core.align_up(base[0], ARENA)
    before = Footprint.now().reserved
    _core.check(lib.ms_allow(arena, P), "allowing")
    assert before - Footprint.now().reserved == ARENA
    _core.check(lib.ms_allow(arena, ARENA), "allowing")
    assert before - Footprint.now().reserved == ARENA
    _core.check(lib.ms_unmap(base[0], 3 * ARENA), "unmapping")
