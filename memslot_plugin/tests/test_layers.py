"""Layered images: they store what differs, have the rest from their parent, and need no parent any more."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import random
import resource
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from memslot_plugin import BytesImage, Image, MemfdImage, Slot, layers
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import ffi, lib
from memslot_plugin.image import MAX_EXTENTS, MIN_GAP, Piece
from memslot_plugin.probe import probe
from memslot_plugin.reset import choose
from memslot_plugin.tests.profiles import examples

PAGES = 256

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(params=[MemfdImage, BytesImage], ids=lambda kind: kind.kind)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


class Live:
    """A slot in which an image lies, and what its bytes should be."""

    def __init__(self, image: Image, pages: int = PAGES) -> None:
        self.slot = Slot.create(pages * P, pages * P)
        self.slot.instantiate(image, pages * P)
        self.bytes = bytearray(ctypes.string_at(self.slot.base, pages * P))

    def write(self, at: int, data: bytes) -> None:
        ctypes.memmove(self.slot.base + at, data, len(data))
        self.bytes[at : at + len(data)] = data

    def child(self, name: str = "child") -> Image | None:
        held = memoryview(ffi.buffer(ffi.cast("uint8_t *", self.slot.base), self.slot.accessible))
        assert self.slot.image is not None
        return layers.layered(name, self.slot.image, held, self.slot.changes(MIN_GAP))

    def end(self) -> None:
        self.slot.destroy()


def bytes_of(image: Image, pages: int = PAGES) -> bytes:
    """What a guest finds in a slot of this image, which is sound and stays so over resets of each kind."""
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


def test_a_child_stores_the_pages_that_differ(kind: Any) -> None:
    with kind("parent", b"p" * 100 * P) as parent:
        live = Live(parent)
        live.write(40 * P + 5, b"x")
        live.write(200 * P, b"y")
        child = live.child()
        assert child is not None
        assert child.stored_bytes == 2 * P
        assert child.inherited_bytes == 99 * P
        assert [(e.offset // P, e.length // P) for e in child.extents] == [
            (0, 40),
            (40, 1),
            (41, 59),
            (200, 1),
        ]
        assert bytes_of(child) == live.bytes
        live.end()
        child.close()


def test_a_child_needs_no_parent(kind: Any) -> None:
    parent = kind("parent", b"p" * 100 * P)
    live = Live(parent)
    live.write(40 * P, b"x" * 2 * P)
    child = live.child()
    assert child is not None
    live.end()
    parent.close()
    assert bytes_of(child) == live.bytes
    child.close()


def test_the_parents_file_goes_with_the_last_image_that_has_extents_in_it(resources: Any) -> None:
    before = resources()
    parent = MemfdImage("parent", b"p" * 8 * P)
    live = Live(parent)
    live.write(0, b"x")
    child = live.child()
    assert child is not None
    live.end()
    parent.close()
    held = resources()
    assert sum(held.descriptors.values()) == sum(before.descriptors.values()) + 2
    assert held.image_mappings == before.image_mappings + 2
    child.close()
    resources().assert_left_nothing(before)


def test_a_child_that_changed_nothing_stores_nothing(kind: Any) -> None:
    with kind("parent", b"p" * 3 * P) as parent:
        live = Live(parent)
        live.write(0, b"p")  # private by now, and the same
        child = live.child()
        assert child is not None
        assert (child.stored_bytes, child.inherited_bytes) == (0, 3 * P)
        assert bytes_of(child) == live.bytes
        live.end()
        child.close()


def test_changes_that_touch_are_one_extent(kind: Any) -> None:
    with kind("parent", b"p" * 3 * P) as parent:
        live = Live(parent)
        live.write(0, b"x" * 8 * P)
        held = bytes(live.bytes)
        child = layers.layered("child", parent, held, [(0, 4 * P), (4 * P, 4 * P)])
        assert child is not None
        assert [(e.offset, e.length) for e in child.extents] == [(0, 8 * P)]
        assert bytes_of(child) == live.bytes
        live.end()
        child.close()


def test_pieces_that_touch_in_memory_and_in_their_file_are_one_extent() -> None:
    with MemfdImage("first", b"x" * 8 * P) as first:
        backing = first.backings[0]
        pieces = [
            Piece(0, 2 * P, backing, 0),
            Piece(2 * P, P, backing, 2 * P),
            Piece(3 * P, P, backing, 0),
        ]
        image = MemfdImage.of_pieces("made", pieces)
        assert [(e.offset // P, e.length // P) for e in image.extents] == [(0, 3), (3, 1)]
        assert bytes_of(image) == b"x" * 4 * P + bytes((PAGES - 4) * P)
        image.close()


def test_pages_that_became_zeros_are_in_no_file(kind: Any) -> None:
    with kind("parent", b"p" * 100 * P) as parent:
        live = Live(parent)
        live.write(20 * P, bytes(40 * P))
        child = live.child()
        assert child is not None
        assert child.stored_bytes == 0
        assert [(e.offset // P, e.length // P) for e in child.extents] == [(0, 20), (60, 40)]
        assert bytes_of(child) == live.bytes
        live.end()
        child.close()


def test_the_child_of_an_image_of_zeros_is_all_its_own(kind: Any) -> None:
    with kind("zeros", b"") as parent:
        live = Live(parent)
        live.write(9 * P, b"x")
        child = live.child()
        assert child is not None
        assert (child.stored_bytes, child.inherited_bytes) == (P, 0)
        assert bytes_of(child) == live.bytes
        live.end()
        child.close()


def test_layers_never_become_a_chain(kind: Any, resources: Any) -> None:
    image: Image = kind("first", b"0" * 64 * P)
    before = sum(resources().descriptors.values())
    for generation in range(1, 40):
        live = Live(image)
        live.write(generation * P, b"%d" % generation)
        child = live.child()
        live.end()
        image.close()
        if child is None:  # too many extents: what a snapshot does then
            child = kind("flat", bytes(live.bytes))
        image = child
        assert len(image.extents) <= MAX_EXTENTS
        assert bytes_of(image) == live.bytes
    opened = sum(resources().descriptors.values()) - before
    assert opened <= MAX_EXTENTS
    image.close()


def test_too_many_extents_are_joined_and_then_flattened(kind: Any) -> None:
    with kind("parent", b"p" * PAGES * P) as parent:
        live = Live(parent)
        for page in range(0, 18 * 9, 18):
            live.write(page * P, b"x")
        child = live.child()
        assert child is not None
        assert len(child.extents) <= MAX_EXTENTS
        assert child.stored_bytes > 9 * P, "pages of the parent between two of its own"
        assert bytes_of(child) == live.bytes
        child.close()
        live.end()
    runs = b"".join(b"p" + bytes(18 * P - 1) for _ in range(MAX_EXTENTS))
    with kind("full", runs) as parent:
        assert len(parent.extents) == MAX_EXTENTS
        pages = 19 * MAX_EXTENTS
        live = Live(parent, pages)
        live.write((pages - 1) * P, b"x")
        assert live.child() is None
        live.end()


def test_slots_know_which_file_each_extent_has() -> None:
    with MemfdImage("parent", b"p" * 8 * P) as parent:
        live = Live(parent)
        live.write(2 * P, b"x")
        child = live.child()
        live.end()
        assert child is not None
        slot = Slot.create(PAGES * P, PAGES * P)
        slot.instantiate(child, PAGES * P)
        slot.check()
        # The right bytes, and the wrong file.
        other = MemfdImage("other", bytes(live.bytes[2 * P : 3 * P]))
        lib.ms_map_extents(slot.base + 2 * P, other.c_extents, 1)
        with pytest.raises(Exception, match=r"map .*inode"):
            slot.check()
        slot.destroy()
        other.close()
        child.close()


@pytest.mark.parametrize("works", [True, False])
def test_changes_are_the_same_with_and_without_the_kernels_list(
    kind: Any, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if works and not probe().pagemap.works:
        pytest.skip(f"impossible: PAGEMAP_SCAN: {probe().pagemap.detail}")
    if not works:
        broken = type(probe().pagemap)(False, "told so")
        changed = dataclasses.replace(probe(), pagemap=broken)
        monkeypatch.setattr("memslot_plugin.slot.probe", lambda: changed)
    with kind("parent", b"p" * 100 * P) as parent:
        live = Live(parent)
        for page in (3, 5, 60, 150, 255):
            live.write(page * P + page, b"x")
        ctypes.string_at(live.slot.base, PAGES * P)  # pages that were only read
        assert live.slot.changes(P) == [(page * P, P) for page in (3, 5, 60, 150, 255)]
        assert live.slot.changes(3 * P)[0] == (3 * P, 3 * P)
        live.end()


def test_more_private_runs_than_are_asked_for_at_first_are_all_found() -> None:
    pages = 2048
    with MemfdImage("parent", b"p" * P) as parent:
        live = Live(parent, pages)
        for page in range(0, pages, 2):
            live.write(page * P, b"x")
        assert len(live.slot.changes(P)) == pages // 2
        live.end()


@pytest.mark.skipif(
    not probe().pagemap.works, reason=f"impossible: PAGEMAP_SCAN: {probe().pagemap.detail}"
)
def test_what_it_takes_follows_the_pages_written() -> None:
    pages = 64 * 256  # 64 MiB where a page has 4 KiB

    def faults(written: int) -> int:
        live = Live(parent, pages)
        live.slot.reset(choose("madvise", 0))
        live.slot.instantiate(parent, pages * P)
        for page in range(0, written * 20, 20):
            live.write(page * P, b"x")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        child = live.child()
        found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        live.end()
        if child is not None:
            child.close()
        return found

    with MemfdImage("parent", os.urandom(pages * P)) as parent:
        faults(1)
        few, many = faults(4), faults(400)
        # Reading all of the slot would take a fault for each 16 pages, at the best.
        assert few < pages / 16 / 8 < many, (few, many)


@hypothesis_settings(max_examples=examples(25))
@given(seed=st.integers(0, 2**32))
def test_generations_of_children_hold_what_their_instances_held(seed: int) -> None:
    rng = random.Random(seed)
    kind = rng.choice([MemfdImage, BytesImage])
    content = bytearray(PAGES * P)
    for _ in range(rng.randrange(6)):
        at, length = rng.randrange(PAGES), rng.randrange(1, 60)
        content[at * P : (at + length) * P] = rng.randbytes(1) * (
            len(content[at * P : (at + length) * P])
        )
    image: Image = kind("first", bytes(content))
    for _ in range(rng.randrange(1, 5)):
        live = Live(image)
        for _ in range(rng.randrange(12)):
            page, length = rng.randrange(PAGES), rng.choice([1, 1, 2, 30])
            what = rng.choice([b"\0", b"x", b"y"])
            live.write(page * P, what * (min(length, PAGES - page) * P))
        child = live.child()
        live.slot.check()
        live.end()
        image.close()
        image = kind("flat", bytes(live.bytes)) if child is None else child
        assert bytes_of(image) == live.bytes
        assert len(image.extents) <= MAX_EXTENTS
        assert image.stored_bytes + image.inherited_bytes == sum(e.length for e in image.extents)
    image.close()
