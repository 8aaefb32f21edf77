"""The slot's behaviours: those of the original, in its order, with their system calls counted."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from memslot_plugin import BytesImage, Image, Slot, State, _core
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import lib
from memslot_plugin.errors import (
    MemoryTooLarge,
    SlotError,
    Unsupported,
)
from memslot_plugin.reset import madvise
from memslot_plugin.smaps import mappings
from memslot_plugin.tests.slots import RESERVED, content, expected, fill

pytestmark = pytest.mark.usefixtures("no_leaks")


# The fifteen behaviours (those of images are in test_image.py, those of pools in test_pool.py)


def test_04_an_image_of_only_zeros_maps_nothing_and_is_still_an_image(
    slot: Slot, make_image: Callable[..., Image], calls: Any
) -> None:
    zeros = make_image()
    with calls() as made:
        assert slot.instantiate(zeros, 4 * P)
    assert made == {"mprotect": 1}
    slot.check()
    fill(slot)
    slot.reset(madvise)
    slot.check()
    with calls() as made:
        assert not slot.instantiate(zeros, 4 * P)
    assert made == {}
    assert slot.image is zeros


def test_05_a_slot_is_made_over_an_existing_range_with_a_known_accessible_size(
    reservation: int, calls: Any
) -> None:
    _core.check(lib.ms_allow(reservation, 4 * P), "allowing")
    with calls() as made:
        slot = Slot(reservation, RESERVED, 4 * P)
    assert made == {}
    slot.check()
    with calls() as made:
        assert not slot.instantiate(None, 4 * P)
    assert made == {}
    slot.destroy()


def test_06_same_image_and_same_size_make_no_system_call(
    slot: Slot, make_image: Callable[..., Image], reset: Any, calls: Any
) -> None:
    image = make_image((0, b"x" * P), (40, b"y"))
    slot.instantiate(image, 48 * P)
    for _ in range(3):
        fill(slot)
        slot.reset(reset)
        slot.check()
        with calls() as made:
            assert slot.instantiate(image, 48 * P) is False
        assert made == {}
        assert content(slot) == expected(image, 48 * P)


def test_06_image_and_size_are_handled_independently(
    slot: Slot, make_image: Callable[..., Image], calls: Any
) -> None:
    one, other = make_image((0, b"x" * P)), make_image((1, b"y" * P))
    slot.instantiate(one, 8 * P)
    for image, pages, kinds in [
        (one, 16, {"mprotect"}),  # the same image in a larger memory
        (one, 8, {"mprotect"}),  # and in a smaller one
        (other, 8, {"mmap"}),  # another image in a memory of that size
        (other, 16, {"mprotect"}),
        (one, 4, {"mmap", "mprotect"}),
    ]:
        fill(slot)
        slot.reset(madvise)
        slot.check()
        with calls() as made:
            assert slot.instantiate(image, pages * P)
        assert set(made) <= kinds, (image, pages, made)
        assert ("mprotect" in made) == ("mprotect" in kinds)
        slot.check()
        assert content(slot) == expected(image, pages * P)


def test_07_another_image_remaps_that_images_range_only(
    slot: Slot, make_image: Callable[..., Image], calls: Any
) -> None:
    one = make_image((2, b"1" * 2 * P), (40, b"1"))
    other = make_image((3, b"2" * 2 * P))
    slot.instantiate(one, 50 * P)
    fill(slot)
    slot.reset(madvise)
    with calls() as made:
        slot.instantiate(other, 50 * P)
    copied = isinstance(one, BytesImage)
    assert made == {"mmap": len(one.extents) + (0 if copied else len(other.extents))}
    assert content(slot) == expected(other, 50 * P)
    slot.check()


def test_07_no_image_after_an_image_leaves_zeros(
    slot: Slot, make_image: Callable[..., Image], reset: Any
) -> None:
    """CVE-2022-39393: the original once left the image of the guest before."""
    slot.instantiate(make_image((0, b"secret"), (30, b"secret")), 50 * P)
    slot.reset(reset)
    slot.instantiate(None, 50 * P)
    assert content(slot) == bytes(50 * P)
    slot.check()
    slot.reset(reset)
    slot.check()


def test_08_growing_is_one_mprotect_of_the_new_bytes(
    slot: Slot, make_image: Callable[..., Image], calls: Any
) -> None:
    image = make_image((0, b"x" * P))
    slot.instantiate(image, 4 * P)
    for pages in (5, 20, 64):
        before = slot.accessible
        with calls() as made:
            slot.grow(pages * P)
        assert made == {"mprotect": 1}
        slot.check()
        assert content(slot)[before:] == bytes(slot.accessible - before)
        fill(slot)
    with calls() as made:
        slot.grow(64 * P)
    assert made == {}
    with pytest.raises(MemoryTooLarge, match=f"{65 * P} bytes does not fit a slot .* {RESERVED}"):
        slot.grow(65 * P)
    with pytest.raises(SlotError, match="cannot shrink"):
        slot.grow(63 * P)
    slot.reset(madvise)
    slot.check()
    assert slot.accessible == 4 * P


def test_08_shrinking_at_the_next_use_is_one_mprotect_of_the_tail(slot: Slot, calls: Any) -> None:
    slot.instantiate(None, 32 * P)
    fill(slot)
    slot.reset(madvise)
    with calls() as made:
        slot.instantiate(None, 8 * P)
    assert made == {"mprotect": 1}
    slot.check()
    fill(slot)
    slot.reset(madvise)
    slot.instantiate(None, 32 * P)
    assert content(slot) == bytes(32 * P)


def test_09_a_reset_protects_only_what_had_grown(
    slot: Slot, make_image: Callable[..., Image], reset: Any, calls: Any
) -> None:
    image = make_image((1, b"x" * P))
    slot.instantiate(image, 4 * P)
    fill(slot)
    with calls() as made:
        slot.reset(reset)
    assert "mprotect" not in made
    assert "mmap" not in made
    slot.check()
    slot.instantiate(image, 4 * P)
    slot.grow(40 * P)
    fill(slot)
    with calls() as made:
        slot.reset(reset)
    assert made["mprotect"] == 1
    slot.check()
    slot.instantiate(image, 4 * P)
    slot.grow(40 * P)
    assert content(slot) == expected(image, 40 * P)


@pytest.fixture
def extending(reservation: int) -> Iterator[Slot]:
    slot = Slot(reservation, RESERVED, growth="ftruncate")
    yield slot
    slot.destroy()


def test_10_growth_by_ftruncate_maps_once_and_grows_by_ftruncate(
    extending: Slot, make_image: Callable[..., Image], reset: Any, calls: Any
) -> None:
    slot, image = extending, make_image((1, b"x" * P))
    slot.instantiate(image, 4 * P, maximum=40 * P)
    slot.check()
    for _ in range(2):
        for pages in (5, 20, 40):
            with calls() as made:
                slot.grow(pages * P)
            assert made == {"ftruncate": 1}
            slot.check()
        assert content(slot) == expected(image, 40 * P)
        fill(slot)
        with calls() as made:
            slot.reset(reset)
        assert made["ftruncate"] == 1
        assert not {"mprotect", "mmap"} & set(made)
        slot.check()
        with calls() as made:
            assert not slot.instantiate(image, 4 * P, maximum=40 * P)
        assert made == {}
    with pytest.raises(MemoryTooLarge):
        slot.grow(41 * P)


def test_10_the_maximum_bounds_an_ftruncate_slot_also_where_it_is_the_minimum(
    extending: Slot,
) -> None:
    extending.instantiate(None, 4 * P, maximum=4 * P)
    extending.check()
    with pytest.raises(MemoryTooLarge):
        extending.grow(5 * P)
    extending.check()


def test_10_another_size_or_maximum_moves_the_extension(
    extending: Slot, make_image: Callable[..., Image]
) -> None:
    slot, images = extending, [make_image((1, b"x")), None, make_image((3, b"y"))]
    for turn, (pages, maximum) in enumerate(
        [(4, 40), (8, 40), (8, None), (4, 4), (64, 64), (4, 9)]
    ):
        image = images[turn % 3]
        slot.instantiate(image, pages * P, maximum=maximum and maximum * P)
        assert content(slot) == expected(image, pages * P)
        slot.grow((maximum or 64) * P)
        assert content(slot) == expected(image, (maximum or 64) * P)
        fill(slot)
        slot.check()
        slot.reset(madvise)
        slot.check()


def test_10_an_access_past_the_end_of_an_extension_is_a_sigbus(child: Any) -> None:
    child(
        """
import ctypes, os, signal
from memslot_plugin import Slot
from memslot_plugin._core import PAGE_SIZE as P
slot = Slot.create(64 * P, growth="ftruncate")
slot.instantiate(None, P, maximum=32 * P)
slot.grow(2 * P)
def touch(page):
    pid = os.fork()
    if not pid:
        ctypes.memset(slot.base + page * P, 1, 1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert [touch(page) for page in (0, 1)] == [0, 0]
# The child has an extension of its own since the fork, which is as long as its parent's.
assert [touch(page) for page in (2, 31)] == [-signal.SIGBUS] * 2
assert touch(32) == -signal.SIGSEGV
"""
    )


def test_10_growth_by_ftruncate_is_impossible_in_a_mapping_of_the_runtimes() -> None:
    with pytest.raises(Unsupported, match="the runtime owns the mapping"):
        Slot(64 * P, RESERVED, mapping=object(), growth="ftruncate")  # type: ignore[arg-type]


def test_11_destroying_a_slot_inside_a_reservation_covers_it(
    reservation: int, make_image: Callable[..., Image], calls: Any
) -> None:
    slot = Slot(reservation, RESERVED)
    slot.instantiate(make_image((0, b"x" * P)), 8 * P)
    fill(slot)
    with calls() as made:
        slot.destroy()
        slot.destroy()
    assert made == {"mmap": 1}
    assert slot.state is State.DESTROYED
    found = list(mappings(reservation, reservation + RESERVED))
    assert [(m.permissions, m.inode) for m in found] == [("---p", 0)]
    assert found[0].end - found[0].start == RESERVED  # nothing else can be mapped there
    again = Slot(reservation, RESERVED)
    again.instantiate(None, 8 * P)
    assert content(again) == bytes(8 * P)
    again.destroy()


def test_11_a_slot_of_its_own_is_unmapped(make_image: Callable[..., Image], calls: Any) -> None:
    slot = Slot.create(RESERVED, P, guard=4 * P)
    slot.instantiate(make_image((0, b"x")), P)
    with calls() as made:
        slot.destroy()
    assert made == {"munmap": 1}
    assert not list(mappings(slot.base, slot.base + RESERVED + 4 * P))


def test_13_a_slot_of_its_own_has_the_right_size_from_the_start(calls: Any) -> None:
    with calls() as made:
        slot = Slot.create(RESERVED, 8 * P)
        slot.instantiate(None, 8 * P)
    assert made == {"mmap": 2}
    slot.check()
    fill(slot)
    slot.destroy()


# The kernel's side of the central ones


def test_the_kernel_saw_exactly_these_calls(strace: Any) -> None:
    source = """
import ctypes
from memslot_plugin import MemfdImage, Slot
from memslot_plugin._core import PAGE_SIZE as P, ffi, lib
from memslot_plugin.reset import madvise
base = ffi.new("uintptr_t *")
lib.ms_reserve(192 * P, base)
one, other = MemfdImage("one", b"1" * 2 * P), MemfdImage("other", bytes(20 * P) + b"2")
slot = Slot(base[0] + 64 * P, 64 * P)
extending = Slot(base[0] + 128 * P, 64 * P, growth="ftruncate")
def use(slot):
    ctypes.memset(slot.base, 7, slot.accessible)
    slot.reset(madvise)
slot.instantiate(one, 8 * P)
use(slot)
mark("same"); slot.instantiate(one, 8 * P)
mark("grow"); slot.grow(24 * P)
mark("reset grown"); slot.reset(madvise)
mark("other"); slot.instantiate(other, 24 * P)
mark("reset"); use(slot)
mark("shrink"); slot.instantiate(None, 4 * P)
mark(""); slot.reset(madvise)
mark("destroy"); slot.destroy()
mark("extend"); extending.instantiate(None, 4 * P, maximum=32 * P)
mark("extension grows"); extending.grow(9 * P)
mark("extension is reset"); use(extending)
mark("end")
print([slot.base, P])
"""
    traced = ("mmap", "mprotect", "madvise", "munmap", "ftruncate")
    printed, sections = strace(source, *traced)
    base, page = ast.literal_eval(printed)
    seen = {
        name: [
            (call.name, (call.address - base) / page, call.length / page)
            for call in calls
            if base - 64 * page <= call.address < base + 128 * page
        ]
        for name, calls in sections.items()
    }
    assert seen["same"] == []
    assert seen["grow"] == [("mprotect", 8, 16)]
    assert seen["reset grown"] == [("madvise", 0, 24), ("mprotect", 8, 16)]
    assert seen["other"] == [("mmap", 0, 2), ("mprotect", 8, 16), ("mmap", 20, 1)]
    assert seen["reset"] == [("madvise", 0, 24)]
    assert seen["shrink"] == [("mmap", 20, 1), ("mprotect", 4, 20)]
    assert seen["destroy"] == [("mmap", 0, 64)]
    (cover,) = (call.line for call in sections["destroy"] if call.address == base)
    for flag in ("PROT_NONE", "MAP_PRIVATE", "MAP_FIXED", "MAP_ANONYMOUS", "MAP_NORESERVE"):
        assert flag in cover
    assert seen["extend"] == [("mprotect", 64, 4), ("mmap", 68, 28)]
    assert seen["extension grows"] == []
    assert [call.line for call in sections["extension grows"] if call.name == "ftruncate"]
    assert seen["extension is reset"] == [("madvise", 64, 4)]
