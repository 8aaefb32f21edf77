"""Steps of a slot with their system calls counted, and refused steps.

test_pool_model.py compares the bytes of any sequence of steps; test_faults.py fails each call.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memslot_plugin import Image, MemfdImage, Slot, State, _core
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import ffi, lib
from memslot_plugin._core.proc import mappings
from memslot_plugin.errors import MemoryTooLarge, SlotError, Unsupported, UsedAfterClose
from memslot_plugin.memory.backing import Mapped
from memslot_plugin.memory.extension import ExtensionSlot
from memslot_plugin.memory.probe import pagemap_descriptor
from memslot_plugin.memory.region import Reservation
from memslot_plugin.memory.reset import choose, madvise
from memslot_plugin.tests.leaks import Footprint
from memslot_plugin.tests.slots import RESERVED, content, expected, needs_pagemap, use
from memslot_plugin.tests.tracing import trace

pytestmark = pytest.mark.usefixtures("no_leaks")

MakeImage = Callable[..., Image]
Step = Callable[[Slot, Image, Image], object]

COSTS: dict[str, tuple[Step, int, int, int]] = {
    "06 same image and size": (lambda slot, one, _: slot.instantiate(one, 50 * P), 0, 0, 0),
    "06 same image, larger": (lambda slot, one, _: slot.instantiate(one, 60 * P), 0, 0, 1),
    "06 same image, smaller": (lambda slot, one, _: slot.instantiate(one, 45 * P), 0, 0, 1),
    "07 another image": (lambda slot, _, other: slot.instantiate(other, 50 * P), 2, 1, 0),
    "07 another, smaller": (lambda slot, _, other: slot.instantiate(other, 5 * P), 2, 1, 1),
    "07 no image": (lambda slot, *_: slot.instantiate(None, 50 * P), 2, 0, 0),
    "11 destroyed": (lambda slot, *_: slot.destroy(), 1, 0, 0),
}
"""Steps from a clean slot with an image of two extents of 50 pages, and their numbers of calls.

The numbers count mmap, further mmap unless images are copied, and mprotect. CVE-2022-39393 was an image that stayed in
a slot without one.
"""


@pytest.mark.parametrize("step", COSTS)
def test_step_from_a_clean_slot_makes_its_calls_only(
    slot: Slot, make_image: MakeImage, reset: Any, calls: Any, step: str
) -> None:
    one, other = make_image((2, b"1" * 2 * P), (40, b"1")), make_image((3, b"2" * 2 * P))
    do, mapped, laid, protected = COSTS[step]
    slot.instantiate(one, 50 * P)
    use(slot, reset)
    with calls() as made:
        do(slot, one, other)
    mapped += 0 if one.copied else laid
    assert {"mmap": 0, "mprotect": 0, **made} == {"mmap": mapped, "mprotect": protected}
    slot.check()
    if slot.state is State.DESTROYED:
        (found,) = mappings(slot.base, slot.base + RESERVED)
        assert (found.permissions, found.inode) == ("---p", 0)
    else:
        assert content(slot) == expected(slot.image, slot.accessible)


def test_slot_over_an_accessible_range_makes_no_call(reservation: int, calls: Any) -> None:
    _core.check(lib.ms_allow(reservation, 4 * P), "allowing")
    with calls() as made:
        slot = Slot(reservation, RESERVED, 4 * P)
        assert not slot.instantiate(None, 4 * P)
    assert made == {}
    slot.check()
    slot.destroy()


def test_growth_within_a_slot_makes_one_mprotect_and_its_reset_one_more(
    slot: Slot, make_image: MakeImage, reset: Any, calls: Any
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
    for protected in (1, 0):
        with calls() as made:
            use(slot, reset)
        assert made.get("mprotect", 0) == protected
        assert "mmap" not in made
        assert slot.accessible == 4 * P
        slot.instantiate(slot.image, 4 * P)


def test_wrong_strategy_does_not_reset_a_slot_that_grew_in_its_file(reservation: int) -> None:
    slot: Any = ExtensionSlot(reservation, RESERVED)
    slot.instantiate(None, P, maximum=2 * P)
    slot.grow(2 * P)
    with pytest.raises(TypeError):
        slot.reset(None)
    assert slot.state is State.UNKNOWN
    slot.destroy()


@pytest.mark.parametrize("maximum", [4, 40])
def test_growth_by_ftruncate_maps_once_and_then_grows_the_file_to_the_maximum(
    reservation: int, make_image: MakeImage, reset: Any, calls: Any, maximum: int
) -> None:
    slot, image = ExtensionSlot(reservation, RESERVED), make_image((1, b"x" * P))
    slot.instantiate(image, 4 * P, maximum=maximum * P)
    for _ in range(2):
        for pages in (5, 20, 40) if maximum == 40 else ():
            with calls() as made:
                slot.grow(pages * P)
            assert made == {"ftruncate": 1}
            slot.check()
            # MFD_NOEXEC_SEAL was asked for, which sysctl vm.memfd_noexec=2 demands.
            assert not os.fstat(slot.fd).st_mode & 0o111
        with pytest.raises(MemoryTooLarge):
            slot.grow((maximum + 1) * P)
        with calls() as made:
            use(slot, reset)
            assert not slot.instantiate(image, 4 * P, maximum=maximum * P)
        assert made.get("ftruncate", 0) == (maximum == 40)
        assert not {"mprotect", "mmap"} & set(made)
    slot.destroy()


def test_access_past_the_end_of_an_extension_raises_sigbus(child: Any) -> None:
    child(
        """
import ctypes, os, signal
from memslot_plugin.memory.extension import ExtensionSlot
from memslot_plugin._core import PAGE_SIZE as P
slot = ExtensionSlot.create(64 * P)
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


def test_finalizers_that_an_interrupt_cuts_short_leave_no_mapping_and_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    before = Footprint.now()
    slot, image = ExtensionSlot.create(RESERVED, 4 * P), MemfdImage("dropped", b"x" * P)
    slot.instantiate(image, 4 * P, maximum=8 * P)
    for kind, name in ((Reservation, "unmap"), (ExtensionSlot, "_close_file"), (Mapped, "_free")):
        monkeypatch.setattr(kind, name, interrupted)
    heard: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda each: heard.append(each.exc_type))
    del slot, image
    lost = Footprint.now().lost_since(before)
    assert heard == [KeyboardInterrupt] * 3
    assert not lost


@pytest.mark.parametrize("byte_size", [0, 1, 3 * P + 17])
def test_size_is_rounded_up_to_pages_and_no_bytes_are_reset_by_no_call(
    slot: Slot, byte_size: int, reset: Any, calls: Any
) -> None:
    slot.instantiate(None, byte_size)
    assert slot.accessible == _core.align_up(byte_size)
    with calls() as made:
        slot.reset(reset)
        assert slot.instantiate(None, byte_size) is False
    assert byte_size or made == {}
    slot.grow(byte_size + P + 1)
    slot.check()


@needs_pagemap
def test_purge_discards_pages_of_a_grown_memory(slot: Slot, make_image: MakeImage) -> None:
    slot.instantiate(make_image((0, b"x" * P)), 32 * P)
    slot.grow(RESERVED)
    use(slot, choose("copy", 1 << 30))
    report = ffi.new("ms_reset_report *")
    for kept in (64, 0):
        lib.ms_list_private(
            pagemap_descriptor(), ffi.new("ms_memory *", (slot.base, RESERVED)), ffi.NULL, 0, report
        )
        assert report.private_pages == kept
        slot.purge()


def test_system_calls_of_a_pool_as_seen_by_strace_equal_the_counters(tmp_path: Path) -> None:
    source = """
import ctypes
from memslot_plugin import MemfdImage, Pool, Slot, _core
from memslot_plugin._core import PAGE_SIZE as P, ffi, lib
from memslot_plugin.memory.extension import ExtensionSlot
from memslot_plugin.memory.reset import madvise
base = ffi.new("uintptr_t *")
lib.ms_reserve(192 * P, base)
one, other = MemfdImage("one", b"1" * 2 * P), MemfdImage("other", bytes(20 * P) + b"2")
slot = Slot(base[0] + 64 * P, 64 * P)
extending = ExtensionSlot(base[0] + 128 * P, 64 * P)
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
slot.reset(madvise)
mark("destroy"); slot.destroy()
mark("extend"); extending.instantiate(None, 4 * P, maximum=32 * P)
mark("pool")
before = _core.counters()
image = MemfdImage("m", b"x" * P)
with Pool(slots=2, reserved=64 * P, guard=P, reset=madvise) as pool:
    leased = pool.lease(image, 4 * P, affinity=1)
    ranges = [(leased.base - 128 * P, leased.base + 128 * P),
              (image.extents[0].backing.address, image.extents[0].backing.address + P)]
    leased.grow(8 * P)
    pool.release(leased)
    pool.release(pool.lease(None, 2 * P, affinity=2))
image.close()
mark("end")
print([slot.base, P, {name: n - before[name] for name, n in _core.counters().items()}, ranges])
"""
    by_address = ("mmap", "mprotect", "madvise", "munmap")
    others = ("memfd_create", "ftruncate", "pwrite64", "fcntl")
    printed, sections = trace(source, calls=by_address + others, log=tmp_path / "log")
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
    assert seen["shrink"] == [("mmap", 20, 1), ("mprotect", 4, 20), ("madvise", 0, 4)]
    assert seen["destroy"] == [("mmap", 0, 64)]
    (cover,) = (call.line for call in sections["destroy"] if call.address == base)
    for flag in ("PROT_NONE", "MAP_PRIVATE", "MAP_FIXED", "MAP_ANONYMOUS", "MAP_NORESERVE"):
        assert flag in cover
    assert seen["extend"] == [("mprotect", 64, 4), ("mmap", 68, 28)]
    # The measured code keeps the counters: compare them with the record of the kernel.
    for name in (*by_address, *others):
        of_pool = [
            call
            for call in sections["pool"]
            if call.name == name
            and (name not in by_address or any(a <= call.address < b for a, b in ranges))
            and (name != "fcntl" or "SEALS" in call.line)
        ]
        assert len(of_pool) == counted[name.removesuffix("64")] > 0, (name, of_pool)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Slot(P, RESERVED + 1), "multiples of the host page"),
        (lambda: Slot(P, RESERVED, RESERVED + P), "accessible <= reserved"),
        (lambda: Slot.create(RESERVED, -P), f"byte_size -{P}"),
        (lambda: Slot.create(-P), f"reserved -{P}"),
        (lambda: Slot.create(RESERVED, guard=-P), f"guard -{P}"),
        (lambda: Slot.create(P, 2 * P), f"{2 * P} bytes does not fit a slot of {P} bytes"),
        (
            lambda: ExtensionSlot(64 * P, RESERVED, mapping=object()),
            "the runtime owns the mapping",
        ),
    ],
)
def test_impossible_slot_is_refused(make: Callable[[], Slot], sentence: str, calls: Any) -> None:
    error = (SlotError, MemoryTooLarge, Unsupported)
    with calls() as made, pytest.raises(error, match=sentence):
        make()
    assert made == {}


def test_step_that_its_state_does_not_allow_is_refused(slot: Slot) -> None:
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
