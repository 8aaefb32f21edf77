"""The known bugs of this technique, what a slot refuses, and what it is after a failed reset."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memslot_plugin import Image, MemfdImage, Slot, State, _core
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin.errors import (
    MemoryTooLarge,
    SlotError,
    SystemCallError,
    UsedAfterClose,
)
from memslot_plugin.reset import choose, madvise, remap
from memslot_plugin.smaps import mappings
from memslot_plugin.tests.slots import RESERVED, content, expected, fill

pytestmark = pytest.mark.usefixtures("no_leaks")


# Known bugs of this technique


def test_a_stale_image_never_shows_again_in_a_memory_that_grows_over_it(
    slot: Slot, make_image: Callable[..., Image], reset: Any
) -> None:
    """The old image lay where the next guest has no memory yet."""
    slot.instantiate(make_image((10, b"old" * P)), 20 * P)
    slot.reset(reset)
    slot.instantiate(None, 4 * P)
    slot.check()
    slot.grow(40 * P)
    assert content(slot) == bytes(40 * P)
    slot.reset(reset)
    slot.check()


def test_a_shrunken_slot_faults_from_its_new_end_on(slot: Slot) -> None:
    slot.instantiate(None, 32 * P)
    slot.reset(madvise)
    slot.instantiate(None, 3 * P)
    borders = [
        (m.start - slot.base, m.end - slot.base, m.permissions)
        for m in mappings(slot.base, slot.base + RESERVED)
    ]
    assert borders[0] == (0, 3 * P, "rw-p")
    assert {permissions for _, _, permissions in borders[1:]} == {"---p"}
    assert borders[-1][1] == RESERVED


def test_descriptor_numbers_are_reused_and_mean_nothing(slot: Slot) -> None:
    first = MemfdImage("first", b"1" * P)
    number = first.fd
    slot.instantiate(first, P)
    slot.reset(madvise)
    slot.purge()
    first.close()
    second = MemfdImage("second", b"2" * P)
    assert second.fd == number
    slot.instantiate(second, P)
    assert content(slot) == b"2" * P
    slot.check()
    slot.reset(madvise)
    slot.purge()
    second.close()


@pytest.mark.parametrize("byte_size", [1, P - 1, P + 1, 3 * P + 17])
def test_sizes_that_are_no_multiple_of_the_page_are_rounded_up(
    slot: Slot, make_image: Callable[..., Image], byte_size: int, calls: Any
) -> None:
    image = make_image((0, b"x"))
    assert slot.instantiate(image, byte_size)
    assert slot.accessible == _core.align_up(byte_size)
    slot.check()
    fill(slot)
    slot.reset(madvise)
    with calls() as made:
        assert slot.instantiate(image, byte_size) is False
    assert made == {}
    slot.grow(byte_size + P + 1)
    slot.check()
    slot.reset(madvise)
    assert content(slot) == expected(image, _core.align_up(byte_size))


def test_a_purged_slot_gives_back_what_resets_kept_resident(
    make_image: Callable[..., Image],
) -> None:
    slot, image = Slot.create(4096 * P), make_image((0, b"x" * P))
    slot.instantiate(image, 2048 * P)
    slot.grow(4096 * P)
    fill(slot)
    slot.reset(choose("copy", 1 << 30))
    slot.check()
    slot.purge()
    slot.check()
    with Path("/proc/self/smaps").open() as smaps:
        inside, private = False, 0
        for line in smaps:
            head = line.split()[0]
            if "-" in head and not head.endswith(":"):
                low, high = (int(part, 16) for part in head.split("-"))
                inside = slot.base <= low and high <= slot.base + 4096 * P
            elif inside and line.startswith("Private_Dirty:"):
                private += int(line.split()[1]) * 1024
    slot.destroy()
    assert private == 0


# Refusals


@pytest.mark.parametrize(
    ("base", "reserved", "accessible"),
    [
        (P + 1, RESERVED, 0),
        (P, RESERVED + 1, 0),
        (P, RESERVED, 1),
        (P, RESERVED, RESERVED + P),
        (P, RESERVED, -P),
    ],
)
def test_a_range_that_is_not_of_whole_pages_is_refused(
    base: int, reserved: int, accessible: int
) -> None:
    with pytest.raises(SlotError, match="multiples of the host page"):
        Slot(base, reserved, accessible)


@pytest.mark.parametrize("byte_size", [-1, -P, -RESERVED])
def test_a_negative_size_does_not_reach_the_neighbour(
    slot: Slot, calls: Any, byte_size: int
) -> None:
    with calls() as made, pytest.raises(SlotError, match="cannot have -"):
        slot.instantiate(None, byte_size)
    with calls() as made_too, pytest.raises(SlotError):
        Slot.create(RESERVED, byte_size)
    assert made == made_too == {}
    slot.check()


@pytest.mark.parametrize("changes", [{"reserved": -P}, {"guard": -P}, {"growth": "magic"}])
def test_what_a_slot_cannot_be_is_refused_before_anything_is_mapped(
    changes: dict[str, Any], calls: Any
) -> None:
    with calls() as made, pytest.raises(SlotError):
        Slot.create(**{"reserved": RESERVED, **changes})
    assert made == {}
    with pytest.raises(SlotError):
        Slot(P, RESERVED, growth="magic")


def test_each_state_allows_its_own_steps_only(slot: Slot) -> None:
    with pytest.raises(SlotError, match="only a leased slot can grow; this one is clean"):
        slot.grow(P)
    with pytest.raises(SlotError, match="only a leased slot can be reset; this one is clean"):
        slot.reset(madvise)
    slot.instantiate(None, P)
    with pytest.raises(SlotError, match="this one is dirty"):
        slot.instantiate(None, P)
    with pytest.raises(SlotError, match="only an unused slot can be purged; this one is dirty"):
        slot.purge()
    slot.destroy()
    for step in (lambda: slot.instantiate(None, P), slot.purge, lambda: slot.grow(P)):
        with pytest.raises(SlotError, match="this one is destroyed"):
            step()
    with pytest.raises(SlotError, match="this one is destroyed"):
        slot.reset(madvise)


def test_what_does_not_fit_is_refused_and_the_slot_stays_clean(
    slot: Slot, make_image: Callable[..., Image], calls: Any
) -> None:
    image = make_image((9, b"x"))
    closed = make_image((0, b"y"))
    closed.close()
    with calls() as made:
        with pytest.raises(MemoryTooLarge, match=f"does not fit a slot of {RESERVED} bytes"):
            slot.instantiate(None, RESERVED + 1)
        with pytest.raises(MemoryTooLarge, match=f"image of {10 * P} bytes does not fit a memory"):
            slot.instantiate(image, 9 * P)
        with pytest.raises(UsedAfterClose):
            slot.instantiate(closed, P)
        with pytest.raises(MemoryTooLarge):
            Slot.create(P, 2 * P)
    assert made == {}
    assert slot.state is State.CLEAN
    slot.check()


def test_a_reset_that_fails_leaves_a_slot_that_the_next_use_maps_over(
    slot: Slot, make_image: Callable[..., Image], inject: Any
) -> None:
    image = make_image((0, b"x" * P))
    slot.instantiate(image, 4 * P)
    slot.grow(8 * P)
    fill(slot)
    inject("madvise", error=errno.ENOMEM)
    with pytest.raises(SystemCallError, match=r"MADV_DONTNEED in a reset: .*vm\.max_map_count"):
        slot.reset(madvise)
    assert slot.state.value == "unknown"
    with pytest.raises(SlotError, match="this one is unknown"):
        slot.reset(madvise)
    slot.instantiate(image, 4 * P)
    slot.check()
    assert content(slot) == expected(image, 4 * P)
    slot.grow(8 * P)
    assert content(slot) == expected(image, 8 * P)


def test_remapping_resets_where_madvise_cannot_be_trusted(
    slot: Slot, make_image: Callable[..., Image]
) -> None:
    image = make_image((0, b"x" * P), (30, b"y"))
    slot.instantiate(image, 40 * P)
    slot.grow(50 * P)
    fill(slot)
    assert slot.reset(remap).strategy == "remap"
    slot.check()
    slot.instantiate(image, 40 * P)
    assert content(slot) == expected(image, 40 * P)
    slot.grow(50 * P)
    assert content(slot) == expected(image, 50 * P)


def test_a_reset_of_nothing_makes_no_system_call(slot: Slot, reset: Any, calls: Any) -> None:
    slot.instantiate(None, 0)
    with calls() as made:
        slot.reset(reset)
    assert made == {}
    slot.check()
    slot.instantiate(None, 0)
    slot.grow(4 * P)
    fill(slot)
    slot.reset(reset)
    slot.check()
    assert slot.accessible == 0


def test_a_reset_counts_the_bytes_that_it_put_back(slot: Slot, reset: Any) -> None:
    slot.instantiate(None, 8 * P)
    for page in (0, 1, 5):
        ctypes.memset(slot.base + page * P, 9, 1)
    result = slot.reset(reset)
    if result.dirty_bytes is None:
        assert result.strategy == "madvise"
    else:
        assert result.dirty_bytes == 3 * P
    assert result.nanoseconds > 0
    slot.instantiate(None, 8 * P)
    assert slot.reset(choose("copy", 1 << 30)).dirty_bytes == 0
