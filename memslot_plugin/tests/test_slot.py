"""The slot's behaviours with their system calls counted, what a slot refuses, and what it is after a failure.

The numbers in names are those of the design, section 5; behaviours of images are in test_image.py, of pools in
test_pool.py. The bytes of any sequence of steps are compared in test_pool_model.py.
"""

from __future__ import annotations

import ast
import ctypes
import errno
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from memslot_plugin import BytesImage, Image, MemfdImage, Slot, State, _core
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import ffi, lib
from memslot_plugin.errors import (
    MemoryTooLarge,
    SlotError,
    SystemCallError,
    Unsupported,
    UsedAfterClose,
)
from memslot_plugin.probe import pagemap_descriptor
from memslot_plugin.reset import choose, madvise
from memslot_plugin.smaps import mappings
from memslot_plugin.tests.slots import RESERVED, content, expected, fill, needs_pagemap, use

pytestmark = pytest.mark.usefixtures("no_leaks")

MakeImage = Callable[..., Image]


def test_05_slot_over_an_accessible_range_makes_no_call(reservation: int, calls: Any) -> None:
    _core.check(lib.ms_allow(reservation, 4 * P), "allowing")
    with calls() as made:
        slot = Slot(reservation, RESERVED, 4 * P)
    assert made == {}
    slot.check()
    with calls() as made:
        assert not slot.instantiate(None, 4 * P)
    assert made == {}
    slot.destroy()


def test_06_same_image_and_size_make_no_call(
    slot: Slot, make_image: MakeImage, reset: Any, calls: Any
) -> None:
    image = make_image((0, b"x" * P), (40, b"y"))
    slot.instantiate(image, 48 * P)
    for _ in range(3):
        use(slot, reset)
        with calls() as made:
            assert slot.instantiate(image, 48 * P) is False
        assert made == {}


def test_06_image_and_size_change_independently(
    slot: Slot, make_image: MakeImage, calls: Any
) -> None:
    one, other = make_image((0, b"x" * P)), make_image((1, b"y" * P))
    slot.instantiate(one, 8 * P)
    for image, pages, kinds in [
        (one, 16, {"mprotect"}),
        (one, 8, {"mprotect"}),
        (other, 8, {"mmap"}),
        (other, 16, {"mprotect"}),
        (one, 4, {"mmap", "mprotect"}),
    ]:
        use(slot)
        with calls() as made:
            assert slot.instantiate(image, pages * P)
        assert set(made) == kinds, (image, pages)
        slot.check()
        assert content(slot) == expected(image, pages * P)


def test_07_another_image_remaps_the_ranges_of_both_only(
    slot: Slot, make_image: MakeImage, calls: Any
) -> None:
    one = make_image((2, b"1" * 2 * P), (40, b"1"))
    other = make_image((3, b"2" * 2 * P))
    slot.instantiate(one, 50 * P)
    use(slot)
    with calls() as made:
        slot.instantiate(other, 50 * P)
    copied = isinstance(one, BytesImage)
    assert made == {"mmap": len(one.extents) + (0 if copied else len(other.extents))}
    assert content(slot) == expected(other, 50 * P)


def test_07_no_image_after_an_image_leaves_zeros_also_above_the_new_size(
    slot: Slot, make_image: MakeImage, reset: Any
) -> None:
    """CVE-2022-39393: the original left the image of the previous guest."""
    slot.instantiate(make_image((0, b"secret"), (30, b"secret")), 50 * P)
    slot.reset(reset)
    slot.instantiate(None, 4 * P)
    slot.grow(50 * P)
    assert content(slot) == bytes(50 * P)


def test_08_growing_is_one_mprotect_of_the_new_bytes(
    slot: Slot, make_image: MakeImage, calls: Any
) -> None:
    slot.instantiate(make_image((0, b"x" * P)), 4 * P)
    for pages, number in ((5, 1), (20, 1), (64, 1), (64, 0)):
        with calls() as made:
            slot.grow(pages * P)
        assert made == ({"mprotect": 1} if number else {})
        slot.check()
    with pytest.raises(MemoryTooLarge, match=f"{65 * P} bytes does not fit a slot .* {RESERVED}"):
        slot.grow(65 * P)
    with pytest.raises(SlotError, match="cannot shrink"):
        slot.grow(63 * P)
    use(slot)
    assert slot.accessible == 4 * P


def test_08_shrinking_at_the_next_use_is_one_mprotect_of_the_tail(slot: Slot, calls: Any) -> None:
    slot.instantiate(None, 32 * P)
    use(slot)
    with calls() as made:
        slot.instantiate(None, 8 * P)
    assert made == {"mprotect": 1}
    slot.check()


def test_09_reset_protects_only_a_memory_that_grew(
    slot: Slot, make_image: MakeImage, reset: Any, calls: Any
) -> None:
    image = make_image((1, b"x" * P))
    for grown in (False, True):
        slot.instantiate(image, 4 * P)
        if grown:
            slot.grow(40 * P)
        with calls() as made:
            use(slot, reset)
        assert made.get("mprotect", 0) == grown
        assert "mmap" not in made


@pytest.fixture
def extending(reservation: int) -> Iterator[Slot]:
    slot = Slot(reservation, RESERVED, growth="ftruncate")
    yield slot
    slot.destroy()


def test_10_growth_by_ftruncate_maps_once_and_grows_by_ftruncate(
    extending: Slot, make_image: MakeImage, reset: Any, calls: Any
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
        with calls() as made:
            use(slot, reset)
        assert made["ftruncate"] == 1
        assert not {"mprotect", "mmap"} & set(made)
        with calls() as made:
            assert not slot.instantiate(image, 4 * P, maximum=40 * P)
        assert made == {}
    with pytest.raises(MemoryTooLarge):
        slot.grow(41 * P)


def test_10_maximum_bounds_an_ftruncate_slot_also_if_it_is_the_minimum(extending: Slot) -> None:
    extending.instantiate(None, 4 * P, maximum=4 * P)
    with pytest.raises(MemoryTooLarge):
        extending.grow(5 * P)
    extending.check()


def test_10_access_past_the_end_of_an_extension_is_a_sigbus(child: Any) -> None:
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


def test_11_destroying_inside_a_reservation_covers_it(
    reservation: int, make_image: MakeImage, calls: Any
) -> None:
    slot = Slot(reservation, RESERVED)
    slot.instantiate(make_image((0, b"x" * P)), 8 * P)
    with calls() as made:
        slot.destroy()
        slot.destroy()
    assert made == {"mmap": 1}
    assert slot.state is State.DESTROYED
    slot.check()
    (found,) = mappings(reservation, reservation + RESERVED)
    assert (found.permissions, found.inode) == ("---p", 0)


def test_11_destroying_a_slot_of_its_own_unmaps_it(make_image: MakeImage, calls: Any) -> None:
    slot = Slot.create(RESERVED, P, guard=4 * P)
    slot.instantiate(make_image((0, b"x")), P)
    with calls() as made:
        slot.destroy()
    assert made == {"munmap": 1}
    assert not list(mappings(slot.base, slot.base + RESERVED + 4 * P))


def test_13_slot_of_its_own_has_the_right_size_from_the_start(calls: Any) -> None:
    with calls() as made:
        slot = Slot.create(RESERVED, 8 * P)
        slot.instantiate(None, 8 * P)
    assert made == {"mmap": 2}
    slot.check()
    slot.destroy()


# The kernel's side


def test_kernel_sees_exactly_the_counted_calls_in_their_ranges(strace: Any) -> None:
    source = """
import ctypes
from memslot_plugin import MemfdImage, Pool, Slot, _core
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
mark("pool")
before = _core.counters()
image = MemfdImage("m", b"x" * P)
with Pool(slots=2, reserved=64 * P, guard=P, reset=madvise) as pool:
    leased = pool.lease(image, 4 * P, affinity=1)
    ranges = [(leased.base - 128 * P, leased.base + 128 * P),
              (image.backings[0].address, image.backings[0].address + P)]
    leased.grow(8 * P)
    pool.release(leased)
    pool.release(pool.lease(None, 2 * P, affinity=2))
image.close()
mark("end")
print([slot.base, P, {name: n - before[name] for name, n in _core.counters().items()}, ranges])
"""
    by_address = ("mmap", "mprotect", "madvise", "munmap")
    others = ("memfd_create", "ftruncate", "pwrite64", "fcntl")
    printed, sections = strace(source, *by_address, *others)
    base, page, counted, ranges = ast.literal_eval(printed)
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
    # The counters are kept by the measured code: compare them with the kernel's record of the pool's life.
    for name in (*by_address, *others):
        of_pool = [
            call
            for call in sections["pool"]
            if call.name == name
            and (name not in by_address or any(a <= call.address < b for a, b in ranges))
            and (name != "fcntl" or "SEALS" in call.line)
        ]
        assert len(of_pool) == counted[name.removesuffix("64")] > 0, (name, of_pool)


# Sizes, and resets of little


@pytest.mark.parametrize("byte_size", [1, P - 1, P + 1, 3 * P + 17])
def test_size_between_pages_is_rounded_up(slot: Slot, byte_size: int, calls: Any) -> None:
    assert slot.instantiate(None, byte_size)
    assert slot.accessible == _core.align_up(byte_size)
    use(slot)
    with calls() as made:
        assert slot.instantiate(None, byte_size) is False
    assert made == {}
    slot.grow(byte_size + P + 1)
    slot.check()


def test_reset_of_an_empty_memory_makes_no_call(slot: Slot, reset: Any, calls: Any) -> None:
    slot.instantiate(None, 0)
    with calls() as made:
        slot.reset(reset)
    assert made == {}
    slot.instantiate(None, 0)
    slot.grow(4 * P)
    use(slot, reset)
    assert slot.accessible == 0


def test_reset_counts_the_bytes_that_it_restored(slot: Slot, reset: Any) -> None:
    slot.instantiate(None, 8 * P)
    for page in (0, 1, 5):
        ctypes.memset(slot.base + page * P, 9, 1)
    result = slot.reset(reset)
    assert result.dirty_bytes == (None if result.strategy == "madvise" else 3 * P)
    assert result.nanoseconds > 0
    slot.instantiate(None, 8 * P)
    assert slot.reset(choose("copy", 1 << 30)).dirty_bytes == 0


def test_image_is_told_from_an_earlier_one_with_the_same_descriptor_number(slot: Slot) -> None:
    numbers = set()
    for byte in (b"1", b"2"):
        with MemfdImage("reused", byte * P) as image:
            numbers.add(image.fd)
            slot.instantiate(image, P)
            assert content(slot) == byte * P
            use(slot)
            slot.purge()
    assert len(numbers) == 1


@needs_pagemap
def test_purge_gives_back_resident_pages_also_of_a_grown_memory(make_image: MakeImage) -> None:
    slot = Slot.create(RESERVED)
    slot.instantiate(make_image((0, b"x" * P)), 32 * P)
    slot.grow(RESERVED)
    use(slot, choose("copy", 1 << 30))
    report = ffi.new("ms_reset_report *")
    kept = []
    for step in (lambda: None, slot.purge):
        step()
        lib.ms_count_private(pagemap_descriptor(), slot.base, RESERVED, report)
        kept.append(report.private_pages)
    assert kept == [64, 0]
    slot.check()
    slot.destroy()


# Refusals


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Slot(P + 1, RESERVED), "multiples of the host page"),
        (lambda: Slot(P, RESERVED + 1), "multiples of the host page"),
        (lambda: Slot(P, RESERVED, 1), "multiples of the host page"),
        (lambda: Slot(P, RESERVED, RESERVED + P), "accessible <= reserved"),
        (lambda: Slot(P, RESERVED, -P), "accessible <= reserved"),
        (lambda: Slot(P, RESERVED, growth="magic"), "not 'magic'"),
        (lambda: Slot.create(RESERVED, -P), f"byte_size -{P}"),
        (lambda: Slot.create(-P), f"reserved -{P}"),
        (lambda: Slot.create(RESERVED, guard=-P), f"guard -{P}"),
        (lambda: Slot.create(RESERVED, growth="magic"), "growth 'magic'"),
        (lambda: Slot.create(P, 2 * P), f"{2 * P} bytes does not fit a slot of {P} bytes"),
        (
            lambda: Slot(64 * P, RESERVED, mapping=object(), growth="ftruncate"),  # type: ignore[arg-type]
            "the runtime owns the mapping",
        ),
    ],
)
def test_impossible_slot_is_refused_before_any_call(
    make: Callable[[], Slot], sentence: str, calls: Any
) -> None:
    error = (SlotError, MemoryTooLarge, Unsupported)
    with calls() as made, pytest.raises(error, match=sentence):
        make()
    assert made == {}


def test_state_allows_its_own_steps_only(slot: Slot) -> None:
    steps: dict[str, Callable[[], object]] = {
        "grow": lambda: slot.grow(P),
        "reset": lambda: slot.reset(madvise),
        "instantiated": lambda: slot.instantiate(None, P),
        "purged": slot.purge,
    }
    for prepare, state, refused in [
        (lambda: None, "clean", ["grow", "reset"]),
        (lambda: slot.instantiate(None, P), "dirty", ["instantiated", "purged"]),
        (slot.destroy, "destroyed", steps),
    ]:
        prepare()
        for step in refused:
            with pytest.raises(SlotError, match=f"{step}.*this one is {state}"):
                steps[step]()


def test_memory_that_does_not_fit_is_refused_and_leaves_the_slot_clean(
    slot: Slot, make_image: MakeImage, calls: Any
) -> None:
    image, closed = make_image((9, b"x")), make_image((0, b"y"))
    closed.close()
    with calls() as made:
        for size in (-1, -P, -RESERVED):
            with pytest.raises(SlotError, match="cannot have -"):
                slot.instantiate(None, size)
        with pytest.raises(MemoryTooLarge, match=f"does not fit a slot of {RESERVED} bytes"):
            slot.instantiate(None, RESERVED + 1)
        with pytest.raises(MemoryTooLarge, match=f"image of {10 * P} bytes does not fit a memory"):
            slot.instantiate(image, 9 * P)
        with pytest.raises(UsedAfterClose):
            slot.instantiate(closed, P)
    assert made == {}
    assert slot.state is State.CLEAN


# Failures


def test_failed_reset_leaves_a_slot_that_the_next_use_maps_over(
    slot: Slot, make_image: MakeImage, inject: Any
) -> None:
    image = make_image((0, b"x" * P))
    slot.instantiate(image, 4 * P)
    slot.grow(8 * P)
    fill(slot)
    inject("madvise", error=errno.ENOMEM)
    with pytest.raises(SystemCallError, match=r"MADV_DONTNEED in a reset: .*vm\.max_map_count"):
        slot.reset(madvise)
    with pytest.raises(SlotError, match="this one is unknown"):
        slot.reset(madvise)
    slot.instantiate(image, 4 * P)
    slot.grow(8 * P)
    slot.check()
    assert content(slot) == expected(image, 8 * P)


def test_failed_cover_is_told_and_repeated(reservation: int, inject: Any) -> None:
    slot = Slot(reservation, RESERVED)
    slot.instantiate(None, 8 * P)
    inject("mmap", error=errno.ENOMEM)
    with pytest.raises(SystemCallError, match="covering a slot"):
        slot.destroy()
    assert slot.state is State.UNKNOWN
    slot.destroy()
    assert slot.state.value == "destroyed"
