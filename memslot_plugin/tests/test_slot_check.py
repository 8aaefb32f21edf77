"""`Slot.check()` finds each breach of the invariant; no private page and no fork escapes a reset."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memslot_plugin import BytesImage, InvariantBroken, MemfdImage, Pool, Slot, State
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import catch_up, lib
from memslot_plugin.memory.extension import ExtensionSlot
from memslot_plugin.memory.probe import pagemap_descriptor, probe
from memslot_plugin.memory.reset import choose
from memslot_plugin.tests.slots import (
    RESERVED,
    Fork,
    content,
    every_fork,
    fill,
    in_child,
    needs_pagemap,
    sparse,
    use,
)

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

IMAGE = sparse(40 * P, (0, b"x" * 2 * P), (30 * P, b"y" * P))
LIBC = ctypes.CDLL(None)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mprotect.argtypes = LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
READ, WRITE, EXECUTE = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
MAP_FIXED = 0x10


@pytest.fixture
def image() -> Iterator[MemfdImage]:
    with MemfdImage("checked", IMAGE) as made:
        yield made


@pytest.fixture
def slot(image: MemfdImage) -> Iterator[Slot]:
    """Return a clean slot: two extents, 32 of 64 pages accessible."""
    made = Slot.create(RESERVED)
    made.instantiate(image, 32 * P)
    use(made)
    yield made
    made.destroy()


def lay(slot: Slot, page: int, pages: int, *, of: int | None = None, **how: int) -> None:
    """Map pages of the slot's image, or of the file `of`."""
    assert isinstance(slot.image, MemfdImage)
    address, fd = slot.base + page * P, slot.image.fd if of is None else of
    flags = MAP_FIXED | how.get("flags", mmap.MAP_PRIVATE)
    offset = how.get("offset", 0)
    assert LIBC.mmap(address, pages * P, READ | WRITE, flags, fd, offset) == address


def lay_foreign_file(slot: Slot, **how: int) -> None:
    fd = os.memfd_create("of equal bytes")
    os.write(fd, bytes(how.get("offset", 0)) + b"x" * 2 * P)
    lay(slot, 0, 2, of=fd, **how)
    os.close(fd)


def protect(slot: Slot, page: int, protection: int) -> None:
    assert LIBC.mprotect(slot.base + page * P, P, protection) == 0


TAMPERED: dict[str, Callable[[Slot], object]] = {
    "the tail became accessible": lambda s: protect(s, 40, READ | WRITE),
    "the first page of the tail became accessible": lambda s: lib.ms_allow(s.base + 32 * P, P),
    "the last accessible page faults": lambda s: lib.ms_forbid(s.base + 31 * P, P),
    "a page became read-only": lambda s: protect(s, 9, READ),
    "a page became executable": lambda s: protect(s, 9, READ | WRITE | EXECUTE),
    "zeros lie over the image": lambda s: lib.ms_zero(s.base, 2 * P),
    "a foreign file of equal bytes": lay_foreign_file,
    "a foreign file, shared": lambda s: lay_foreign_file(s, flags=mmap.MAP_SHARED),
    "a foreign file at another offset": lambda s: lay_foreign_file(s, offset=P),
    "an extent that goes on": lambda s: lay(s, 0, 3),
    "an extent where zeros belong": lambda s: lay(s, 8, 1),
    "a hole at the end": lambda s: lib.ms_unmap(s.base + 63 * P, P),
    "a hole in front": lambda s: lib.ms_unmap(s.base, P),
    "a hole in what is accessible": lambda s: lib.ms_unmap(s.base + 9 * P, P),
}
"""Changes of mappings and not of bytes: a check of a dirty slot finds them too."""


@pytest.mark.parametrize("how", TAMPERED)
def test_check_finds_a_mapping_that_is_not_as_recorded(slot: Slot, how: str) -> None:
    TAMPERED[how](slot)
    for slot.state in (State.CLEAN, State.DIRTY):
        with pytest.raises(InvariantBroken, match=r"of a slot"):
            slot.check()


@pytest.mark.parametrize("kind", [MemfdImage, BytesImage, None])
def test_check_finds_a_written_byte_of_a_clean_slot_only(kind: Any) -> None:
    slot = Slot.create(RESERVED)
    slot.instantiate(kind and kind("checked", IMAGE), 32 * P)
    use(slot)
    write(slot.base + P)
    differs = f"byte {P} of a clean slot differs from {'<' if kind else 'zeros'}"
    with pytest.raises(InvariantBroken, match=differs):
        slot.check()
    slot.state = State.DIRTY
    slot.check()
    slot.destroy()


@pytest.mark.parametrize(
    "tamper",
    [
        lambda s: lib.ms_resize(s.fd, 30 * P),
        lambda s: lib.ms_zero(s.base + 8 * P, 56 * P),
        lambda s: lib.ms_cover(s.base + 20 * P, P),
        lambda s: lib.ms_map_extension(s.base + 9 * P, 55 * P, s.fd),
    ],
    ids=["longer", "private", "covered", "moved"],
)
def test_check_finds_an_extension_that_is_not_as_recorded(tamper: Callable[[Slot], Any]) -> None:
    slot = ExtensionSlot.create(RESERVED)
    slot.instantiate(None, 8 * P)
    slot.grow(9 * P)
    slot.check()
    tamper(slot)
    with pytest.raises(InvariantBroken):
        slot.check()
    slot.destroy()


def advised(address: int, advice: int) -> object:
    return LIBC.madvise(address, P, advice)  # an older kernel does not know this advice


def write(address: int) -> object:
    return ctypes.memset(address, 1, 1)


POPULATE, PAGEOUT = 23, 21
PRIVATE: dict[str, Callable[[int], object]] = {
    "last byte": lambda at: write(at + P - 1),
    "read first": lambda at: (ctypes.string_at(at, 1), write(at)),
    "populated": lambda at: (advised(at, POPULATE), write(at)),
    "swapped out, if the machine has swap": lambda at: (write(at), advised(at, PAGEOUT)),
}


@needs_pagemap
@pytest.mark.parametrize("reset", ["pagemap", "auto"])
@pytest.mark.parametrize("how", PRIVATE)
def test_scan_for_private_pages_at_any_place_finds_them(
    image: MemfdImage, reset: str, how: str
) -> None:
    """Pages in an extent, at its borders, in the zeros, and in a growth."""
    for page in (0, 1, 2, 17, 29, 30, 31, 32, 47):
        slot = Slot.create(RESERVED)
        slot.instantiate(image, 32 * P)
        slot.grow(48 * P)
        PRIVATE[how](slot.base + page * P)
        slot.reset(choose(reset, 1 << 30))
        slot.check()
        slot.instantiate(image, 48 * P)
        assert slot.first_difference() is None, page
        slot.destroy()


@needs_pagemap
@pytest.mark.parametrize("reset", ["pagemap", "auto"])
@pytest.mark.parametrize(("kind", "kept"), [(MemfdImage, 64), (BytesImage, 64), (BytesImage, 0)])
def test_page_of_an_image_that_became_the_shared_page_of_zeros_is_put_back(
    kind: Any, kept: int, reset: str
) -> None:
    """KSM and the splitting of huge pages do this to pages of zeros (here: a page of no file that is read first)."""
    slot, strategy = Slot.create(RESERVED), choose(reset, kept * P)
    with kind("zeros", IMAGE) as image:
        for _ in range(3):
            slot.instantiate(image, 40 * P)
            for page in (0, 1, 10, 30):
                assert lib.ms_zero(slot.base + page * P, P) == 0
                assert ctypes.string_at(slot.base + page * P, P) == bytes(P)
            assert slot.changes(P) == [(0, 2 * P), (30 * P, P)]
            slot.reset(strategy)
            assert slot.first_difference() is None
            assert slot.report.private_pages == 3  # in the gap between the extents zeros are right
        slot.destroy()


@every_fork
@pytest.mark.parametrize("strategy", ["madvise", "copy", "auto"])
def test_fork_resets_the_childs_own_pages(
    slot: Slot, strategy: str, resources: Any, fork: Fork
) -> None:
    """The parent's pagemap would list the parent's pages: the child's would stay as they are."""
    found, descriptor = probe(), pagemap_descriptor()
    path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
    assert not os.get_inheritable(descriptor)
    slot.instantiate(slot.image, 32 * P)

    def check() -> None:
        assert str(Path(f"/proc/self/fd/{pagemap_descriptor()}").readlink()) != path
        assert path not in resources().descriptors
        use(slot, choose(strategy, 1 << 30))
        catch_up()
        assert probe() is not found

    in_child(check, fork)
    use(slot, choose(strategy, 1 << 30))


@every_fork
def test_fork_gives_the_child_extensions_of_its_own(
    make_pool: Callable[..., Pool], fork: Fork
) -> None:
    """Tenants of two processes would otherwise share a mapped file and its length."""
    pool = make_pool(3, growth="ftruncate")
    leased, idle = (pool.lease(None, 4 * P, affinity=i) for i in range(2))
    pool.release(idle)
    leased.grow(8 * P)
    fill(leased, 0x11)

    def check() -> None:
        assert content(leased) == b"\x11" * 8 * P
        fill(leased, 0x22)
        leased.grow(16 * P)
        other = pool.lease(None, 4 * P, affinity=1)
        other.grow(8 * P)
        assert content(other) == bytes(8 * P)
        fill(other, 0x33)
        for slot in (leased, other):
            pool.release(slot)
        pool.check()

    in_child(check, fork)
    check()
