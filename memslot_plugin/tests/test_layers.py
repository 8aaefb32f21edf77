"""Layered images: stored differences, extents inherited from the parent, and no need of the parent."""

from __future__ import annotations

import ctypes
import dataclasses
import random
import resource
from contextlib import AbstractContextManager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from memslot_hooks.types import Extent
from memslot_plugin import BytesImage, Image, MemfdImage, Slot
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import ffi
from memslot_plugin.memory import layers
from memslot_plugin.memory.image import MAX_EXTENTS, MIN_GAP
from memslot_plugin.memory.probe import probe
from memslot_plugin.memory.reset import choose
from memslot_plugin.tests.profiles import examples
from memslot_plugin.tests.slots import needs_pagemap

PAGES = 256

pytestmark = pytest.mark.usefixtures("no_leaks")


class Live(AbstractContextManager["Live"]):
    """A slot with an image mapped, and the bytes that it must hold."""

    def __init__(self, image: Image, pages: int = PAGES) -> None:
        self.image, self.size = image, pages * P
        self.slot = Slot.create(self.size, self.size)
        self.slot.instantiate(image, self.size)
        self.bytes = bytearray(ctypes.string_at(self.slot.base, self.size))

    def __exit__(self, *_: object) -> None:
        self.slot.destroy()

    def write(self, at: int, data: bytes) -> None:
        ctypes.memmove(self.slot.base + at, data, len(data))
        self.bytes[at : at + len(data)] = data

    def layered(self) -> Image | None:
        held = memoryview(ffi.buffer(ffi.cast("uint8_t *", self.slot.base), self.size))
        return layers.layered("child", self.image, held, self.slot.changes(MIN_GAP))

    def child(self) -> Image:
        made = self.layered()
        assert made is not None
        return made


def bytes_of(image: Image, pages: int = PAGES) -> bytes:
    """Return the bytes in a slot of this image, and check the slot over resets of each kind."""
    slot = Slot.create(pages * P, pages * P)
    slot.instantiate(image, pages * P)
    slot.check()
    found = ctypes.string_at(slot.base, pages * P)
    for strategy in ("madvise", "copy", *(["pagemap"] if probe().pagemap.works else [])):
        for at in range(0, pages * P, 7 * P):
            ctypes.memset(slot.base + at + 3, 0xEE, P // 2)
        slot.reset(choose(strategy, 8 * P))
        slot.check()
        slot.audit()
        slot.instantiate(image, pages * P)
    slot.destroy()
    return found


def extents_of(image: Image) -> list[tuple[int, int]]:
    """Return the first page and the number of pages of each extent."""
    return [(each.offset // P, each.length // P) for each in image.extents]


# Pages of the parent, pages that its instance writes, (stored, inherited) pages of the child, its extents.
CHILDREN: dict[str, Any] = {
    "pages that differ": (100, [(40 * P + 5, b"x")], (1, 99), [(0, 40), (40, 1), (41, 59)]),
    "nothing, and a page is private by now": (3, [(0, b"p")], (0, 3), [(0, 3)]),
    "pages that became zeros": (100, [(20 * P, bytes(40 * P))], (0, 60), [(0, 20), (60, 40)]),
    "all, as the parent is only zeros": (0, [(9 * P, b"x")], (1, 0), [(9, 1)]),
}


@pytest.mark.parametrize("name", CHILDREN)
def test_child_stores_only_what_differs_and_needs_no_parent(kind: Any, name: str) -> None:
    pages, writes, (stored, inherited), extents = CHILDREN[name]
    parent = kind("parent", b"p" * pages * P)
    with Live(parent) as live:
        for at, data in writes:
            live.write(at, data)
        child = live.child()
    parent.close()
    assert (child.stored_bytes, child.inherited_bytes) == (stored * P, inherited * P)
    assert extents_of(child) == extents
    assert bytes_of(child) == live.bytes
    child.close()


def test_parents_file_goes_with_the_last_image_that_has_extents_in_it(resources: Any) -> None:
    before = resources()
    with MemfdImage("parent", b"p" * 8 * P) as parent, Live(parent) as live:
        live.write(0, b"x")
        child = live.child()
    held = resources()
    assert sum(held.descriptors.values()) == sum(before.descriptors.values()) + 2
    assert held.image_mappings == before.image_mappings + 2
    child.close()
    assert resources().lost_since(before) == []


def test_extents_that_touch_in_memory_and_in_their_file_are_joined() -> None:
    with MemfdImage("first", b"x" * 8 * P) as first:
        backing = first.extents[0].backing
        places = [(0, 2, 0), (2, 1, 2), (3, 1, 0)]  # pages: offset, length, offset in the file
        extents = [Extent(at * P, n * P, there * P, backing) for at, n, there in places]
        image = MemfdImage.of_extents("made", extents)
        assert extents_of(image) == [(0, 3), (3, 1)]
        assert bytes_of(image) == b"x" * 4 * P + bytes((PAGES - 4) * P)
        image.close()


def test_too_many_extents_are_joined_and_then_flattened(kind: Any) -> None:
    with kind("parent", b"p" * PAGES * P) as parent, Live(parent) as live:
        for page in range(0, 18 * 9, 18):
            live.write(page * P, b"x")
        child = live.child()
        assert len(child.extents) <= MAX_EXTENTS
        assert child.stored_bytes > 9 * P, "pages of the parent between two of its own"
        assert bytes_of(child) == live.bytes
        child.close()
    pages = 19 * MAX_EXTENTS
    runs = b"".join(b"p" + bytes(18 * P - 1) for _ in range(MAX_EXTENTS))
    with kind("full", runs) as parent, Live(parent, pages) as live:
        assert len(parent.extents) == MAX_EXTENTS
        live.write((pages - 1) * P, b"x")
        assert live.layered() is None


@pytest.mark.parametrize("works", [pytest.param(True, marks=needs_pagemap), False])
def test_changes_found_without_the_list_of_the_kernel_equal_those_with_it(
    kind: Any, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not works:
        broken = type(probe().pagemap)(False, "told so")
        changed = dataclasses.replace(probe(), pagemap=broken)
        monkeypatch.setattr("memslot_plugin.memory.region.probe", lambda: changed)
    with kind("parent", b"p" * 100 * P) as parent, Live(parent) as live:
        for page in (3, 5, 60, 150, 255):
            live.write(page * P + page, b"x")
        ctypes.string_at(live.slot.base, PAGES * P)  # pages that were only read
        assert live.slot.changes(P) == [(page * P, P) for page in (3, 5, 60, 150, 255)]
        assert live.slot.changes(3 * P)[0] == (3 * P, 3 * P)


def test_private_runs_beyond_the_first_list_are_all_found() -> None:
    pages = 2048
    with MemfdImage("parent", b"p" * P) as parent, Live(parent, pages) as live:
        for page in range(0, pages, 2):
            live.write(page * P, b"x")
        assert len(live.slot.changes(P)) == pages // 2


@needs_pagemap
def test_layer_when_made_faults_as_many_pages_as_were_written() -> None:
    pages = 64 * 64

    def faults(written: int) -> int:
        with Live(parent, pages) as live:
            live.slot.reset(choose("madvise", 0))
            live.slot.instantiate(parent, pages * P)
            for page in range(0, written * 20, 20):
                live.write(page * P, b"x")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            child = live.layered()
            found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        if child is not None:
            child.close()
        return found

    with MemfdImage("parent", b"p" * pages * P) as parent:
        faults(1)
        few, many = faults(2), faults(200)
        # Reading the whole slot would take at least a fault per 16 pages.
        assert few < pages / 16 / 8 < many, (few, many)


@hypothesis_settings(max_examples=examples(6))
@given(seed=st.integers(0, 2**32))
def test_layer_of_any_generation_holds_the_bytes_of_its_instance(seed: int) -> None:
    rng = random.Random(seed)
    kind = rng.choice([MemfdImage, BytesImage])
    content = bytearray(PAGES * P)
    for _ in range(rng.randrange(6)):
        at, length = rng.randrange(PAGES), rng.randrange(1, 60)
        content[at * P : (at + length) * P] = rng.randbytes(1) * (min(length, PAGES - at) * P)
    image: Image = kind("first", bytes(content))
    for _ in range(rng.randrange(1, 5)):
        with image, Live(image) as live:
            for _ in range(rng.randrange(12)):
                page, length = rng.randrange(PAGES), rng.choice([1, 1, 2, 30])
                what = rng.choice([b"\0", b"x", b"y"])
                live.write(page * P, what * (min(length, PAGES - page) * P))
            child = live.layered()
            live.slot.check()
        image = kind("flat", bytes(live.bytes)) if child is None else child
        assert bytes_of(image) == live.bytes
        assert len(image.extents) <= MAX_EXTENTS
        assert image.stored_bytes + image.inherited_bytes == sum(e.length for e in image.extents)
    image.close()
