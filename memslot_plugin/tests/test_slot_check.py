"""`Slot.check()` finds each way in which the invariant can be broken; what a fork or swapping may not break."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memslot_plugin import BytesImage, InvariantBroken, MemfdImage, Slot, State, _core
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import ffi, lib
from memslot_plugin.errors import SystemCallError
from memslot_plugin.probe import pagemap_descriptor, probe
from memslot_plugin.reset import choose, madvise

pytestmark = pytest.mark.usefixtures("no_leaks")

RESERVED = 64 * P
IMAGE = bytearray(40 * P)
IMAGE[: 2 * P] = b"x" * 2 * P
IMAGE[30 * P : 31 * P] = b"y" * P

needs_pagemap = pytest.mark.skipif(
    not probe().pagemap.works, reason=f"impossible: PAGEMAP_SCAN: {probe().pagemap.detail}"
)


@pytest.fixture
def image() -> Iterator[MemfdImage]:
    with MemfdImage("checked", IMAGE) as made:
        yield made


@pytest.fixture
def slot(image: MemfdImage) -> Iterator[Slot]:
    """A clean slot: two extents, 32 of 64 pages accessible."""
    made = Slot.create(RESERVED)
    made.instantiate(image, 32 * P)
    made.reset(madvise)
    made.check()
    yield made
    made.destroy()


def file_of(data: bytes) -> int:
    fd = os.memfd_create("stranger")
    os.write(fd, data)
    return fd


def mapped(address: int, length: int, fd: int, *, offset: int = 0, shared: bool = False) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = 0x10 | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    assert libc.mmap(address, length, protection, flags, fd, offset) == address


def protected(address: int, length: int, protection: int) -> None:
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), protection) == 0


def a_stranger_of_equal_bytes(slot: Slot, *, shared: bool, offset: int = 0) -> None:
    fd = file_of(b"\\0" * offset + b"x" * 2 * P)
    mapped(slot.base, 2 * P, fd, offset=offset, shared=shared)
    os.close(fd)


def extents_swapped(slot: Slot) -> None:
    assert isinstance(slot.image, MemfdImage)
    mapped(slot.base + 30 * P, P, slot.image.fd, offset=0)


def extent_too_long(slot: Slot) -> None:
    assert isinstance(slot.image, MemfdImage)
    mapped(slot.base, 3 * P, slot.image.fd)


def extent_elsewhere_too(slot: Slot) -> None:
    assert isinstance(slot.image, MemfdImage)
    mapped(slot.base + 8 * P, P, slot.image.fd)


READ, WRITE, EXECUTE = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC

TAMPERED: dict[str, Callable[[Slot], object]] = {
    "the tail became accessible": lambda s: protected(s.base + 40 * P, P, READ | WRITE),
    "the tail became readable": lambda s: protected(s.base + 63 * P, P, READ),
    "the first page of the tail became accessible": lambda s: lib.ms_allow(s.base + 32 * P, P),
    "the last accessible page faults": lambda s: lib.ms_forbid(s.base + 31 * P, P),
    "a page became read-only": lambda s: protected(s.base + 9 * P, P, READ),
    "a page became executable": lambda s: protected(s.base + 9 * P, P, READ | WRITE | EXECUTE),
    "zeros lie over the image": lambda s: lib.ms_zero(s.base, 2 * P),
    "zeros lie over one page of the image": lambda s: lib.ms_zero(s.base + P, P),
    "a stranger's file of equal bytes": lambda s: a_stranger_of_equal_bytes(s, shared=False),
    "the same, shared": lambda s: a_stranger_of_equal_bytes(s, shared=True),
    "another offset": lambda s: a_stranger_of_equal_bytes(s, shared=False, offset=P),
    "the wrong extent": extents_swapped,
    "an extent that goes on": extent_too_long,
    "an extent where zeros belong": extent_elsewhere_too,
    "a hole in the tail": lambda s: lib.ms_unmap(s.base + 50 * P, P),
    "a hole at the end": lambda s: lib.ms_unmap(s.base + 63 * P, P),
    "a hole in front": lambda s: lib.ms_unmap(s.base, P),
    "a hole in what is accessible": lambda s: lib.ms_unmap(s.base + 9 * P, P),
}
"""Ways that a dirty slot shows as well: they are about mappings, not about bytes."""


@pytest.mark.parametrize("how", TAMPERED)
@pytest.mark.parametrize("state", [State.CLEAN, State.DIRTY])
def test_check_finds_a_mapping_that_is_not_as_recorded(slot: Slot, how: str, state: State) -> None:
    slot.state = state
    slot.check()
    TAMPERED[how](slot)
    with pytest.raises(InvariantBroken, match=r"of a slot"):
        slot.check()


@pytest.mark.parametrize("where", [0, 2 * P - 1, 2 * P, 29 * P, 30 * P, 31 * P - 1, 32 * P - 1])
def test_check_finds_a_byte_that_was_written(slot: Slot, where: int) -> None:
    ctypes.memset(slot.base + where, 0x5A, 1)
    with pytest.raises(InvariantBroken, match=f"byte {where} of a clean slot differs from <Memfd"):
        slot.check()
    slot.state = State.DIRTY
    slot.check()


@pytest.mark.parametrize("where", [0, P, 30 * P, 32 * P - 1])
def test_check_finds_a_written_byte_without_a_memfd(where: int) -> None:
    for image in (None, BytesImage("copied", IMAGE)):
        slot = Slot.create(RESERVED)
        slot.instantiate(image, 32 * P)
        slot.reset(madvise)
        slot.check()
        ctypes.memset(slot.base + where, 0x5A, 1)
        with pytest.raises(InvariantBroken, match=f"byte {where} of a clean slot"):
            slot.check()
        slot.destroy()


def test_check_finds_an_image_that_was_never_lifted(image: MemfdImage) -> None:
    slot = Slot.create(RESERVED)
    slot.instantiate(None, 32 * P)
    assert image.lay(slot.base) == 0
    with pytest.raises(InvariantBroken, match=r"bytes .* of a slot map"):
        slot.check()
    slot.destroy()


@pytest.mark.parametrize(
    "tamper",
    [
        lambda s: lib.ms_resize(s._extension_fd, 30 * P),
        lambda s: lib.ms_resize(s._extension_fd, 0),
        lambda s: lib.ms_zero(s.base + 8 * P, 56 * P),
        lambda s: lib.ms_cover(s.base + 20 * P, P),
        lambda s: lib.ms_map_shared(s.base + 9 * P, 55 * P, s._extension_fd),
    ],
    ids=["longer", "shorter", "private", "covered", "moved"],
)
def test_check_finds_an_extension_that_is_not_as_recorded(tamper: Callable[[Slot], Any]) -> None:
    slot = Slot.create(RESERVED, growth="ftruncate")
    slot.instantiate(None, 8 * P)
    slot.grow(9 * P)
    slot.check()
    tamper(slot)
    with pytest.raises(InvariantBroken):
        slot.check()
    slot.destroy()


def test_an_audit_finds_what_a_reset_forgot(slot: Slot) -> None:
    slot.audit()
    ctypes.memset(slot.base + 5 * P, 1, 1)
    with pytest.raises(InvariantBroken, match=f"after a reset, byte {5 * P} of a slot differs"):
        slot.audit()
    assert slot.state is State.UNKNOWN
    slot.check()  # nothing is claimed of an unknown slot


def test_nothing_is_claimed_of_a_destroyed_slot(image: MemfdImage) -> None:
    slot = Slot.create(RESERVED)
    slot.destroy()
    slot.check()


# Pages that a scan could miss


@needs_pagemap
@pytest.mark.parametrize("reset", ["pagemap", "auto"])
@pytest.mark.parametrize(
    "make_private",
    [
        lambda address: ctypes.memset(address, 1, P),
        lambda address: ctypes.memset(address + P - 1, 1, 1),
        lambda address: (ctypes.string_at(address, 1), ctypes.memset(address, 1, 1)),
        lambda address: (ctypes.memset(address, 1, 1), ctypes.string_at(address, P)),
        lambda address: (madvised(address, 23), ctypes.memset(address, 1, 1)),
        lambda address: (ctypes.memset(address, 1, 1), madvised(address, 21)),
        lambda address: (ctypes.memset(address, 1, 1), madvised(address, 20)),
        lambda address: (ctypes.memset(address, 1, 1), madvised(address, 12)),
    ],
    ids=["page", "byte", "read first", "read later", "populated", "paged out", "cold", "mergeable"],
)
@pytest.mark.parametrize("page", [0, 1, 2, 17, 29, 30, 31, 32, 47])
def test_a_scan_misses_no_private_page(
    image: MemfdImage, reset: str, make_private: Callable[[int], object], page: int
) -> None:
    """In an extent, at its borders, in the zeros, and in what had grown."""
    slot = Slot.create(RESERVED)
    slot.instantiate(image, 32 * P)
    slot.grow(48 * P)
    make_private(slot.base + page * P)
    slot.reset(choose(reset, 1 << 30))
    slot.check()
    slot.instantiate(image, 48 * P)
    slot.reset(choose("copy", 0))
    assert slot.first_difference() is None
    slot.destroy()


def madvised(address: int, advice: int) -> int:
    """madvise(2) of one page; advice that this kernel does not know changes nothing."""
    answer: int = ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(P), advice)
    return answer


@needs_pagemap
def test_a_page_that_was_swapped_out_is_put_back(image: MemfdImage) -> None:
    if len(Path("/proc/swaps").read_text().splitlines()) < 2:
        pytest.skip("impossible: this machine has no swap")
    slot = Slot.create(RESERVED)
    slot.instantiate(image, 32 * P)
    ctypes.memset(slot.base, 1, 32 * P)
    libc = ctypes.CDLL(None)
    libc.madvise(ctypes.c_void_p(slot.base), ctypes.c_size_t(32 * P), 21)  # MADV_PAGEOUT
    entries = os.pread(pagemap_descriptor(), 32 * 8, slot.base // P * 8)
    if not any(entries[at + 7] & 0x40 for at in range(0, len(entries), 8)):
        slot.destroy()
        pytest.skip("impossible: the kernel swapped nothing out")
    slot.reset(choose("pagemap", 1 << 30))
    slot.check()
    slot.destroy()


# Forks


def in_child(check: Callable[[], object]) -> None:
    """Runs `check` in a forked child, which must not raise."""
    pid = os.fork()
    if not pid:
        try:
            check()
        except BaseException as error:  # noqa: BLE001 - told by the exit status
            os.write(2, f"in the child: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("strategy", ["madvise", "copy", "auto"])
def test_a_child_resets_its_own_pages(image: MemfdImage, strategy: str, resources: Any) -> None:
    """The parent's pagemap descriptor would list the parent's pages, and leave the child's as they are."""
    slot = Slot.create(RESERVED)
    slot.instantiate(image, 32 * P)
    inherited = pagemap_descriptor()
    path = str(Path(f"/proc/self/fd/{inherited}").readlink())

    def check() -> None:
        assert str(Path(f"/proc/self/fd/{pagemap_descriptor()}").readlink()) != path
        assert path not in resources().descriptors
        ctypes.memset(slot.base, 7, 32 * P)
        slot.reset(choose(strategy, 1 << 30))
        slot.check()
        slot.instantiate(image, 40 * P)
        slot.check()

    in_child(check)
    ctypes.memset(slot.base, 8, 32 * P)
    slot.reset(choose(strategy, 1 << 30))
    slot.check()
    slot.destroy()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_shares_no_extension_with_its_parent() -> None:
    """An extension is a file that is mapped shared: without parting, tenants of two processes would meet in it."""
    from memslot_plugin import Pool

    pool = Pool(slots=3, reserved=RESERVED, guard=P, reset=madvise, growth="ftruncate")
    leased, idle = (pool.lease(None, 4 * P, affinity=i) for i in range(2))
    pool.release(idle)
    leased.grow(8 * P)
    ctypes.memset(leased.base, 0x11, 8 * P)

    def check() -> None:
        pool.check()
        assert ctypes.string_at(leased.base, 8 * P) == b"\x11" * 8 * P
        ctypes.memset(leased.base, 0x22, 8 * P)
        leased.grow(16 * P)
        other = pool.lease(None, 4 * P, affinity=1)
        other.grow(8 * P)
        assert ctypes.string_at(other.base, 8 * P) == bytes(8 * P)
        ctypes.memset(other.base, 0x33, 8 * P)
        pool.check()
        pool.release(leased)
        pool.release(other)
        pool.check()
        pool.close()

    in_child(check)
    pool.check()
    assert ctypes.string_at(leased.base, 8 * P) == b"\x11" * 8 * P
    other = pool.lease(None, 4 * P, affinity=1)
    other.grow(8 * P)
    assert ctypes.string_at(other.base, 8 * P) == bytes(8 * P)
    pool.release(other)
    pool.release(leased)
    pool.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("call", ["mmap", "close", "memfd_create", "ftruncate", "pwrite"])
def test_a_slot_that_cannot_part_is_not_used_again(call: str, caplog: Any) -> None:
    from memslot_plugin import Pool

    pool = Pool(slots=2, reserved=RESERVED, guard=P, reset=madvise, growth="ftruncate")
    leased, idle = (pool.lease(None, 4 * P, affinity=i) for i in range(2))
    pool.release(idle)
    leased.grow(8 * P)
    _core.inject(call, error=12)

    def check() -> None:
        _core.inject(call, error=0)
        pool.check()
        other = pool.lease(None, 4 * P, affinity=1)
        other.grow(8 * P)
        assert ctypes.string_at(other.base, 8 * P) == bytes(8 * P)
        pool.release(other)
        pool.release(leased)
        pool.check()
        pool.close()

    in_child(check)
    _core.inject(call, error=0)
    pool.release(leased)
    pool.close()


def test_a_descriptor_of_pagemap_that_cannot_be_opened_is_a_clear_error(child: Any) -> None:
    child(
        """
import errno, resource
from memslot_plugin import MemfdImage, SystemCallError
from memslot_plugin.probe import pagemap_descriptor
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    pagemap_descriptor()
except SystemCallError as error:
    assert error.errno == errno.EMFILE
    assert "opening /proc/self/pagemap" in str(error) and "(ulimit -n) is 3" in str(error)
else:
    raise AssertionError("opened")
"""
    )


def test_a_cover_that_fails_is_told_and_repeated() -> None:
    base = ffi.new("uintptr_t *")
    _core.check(lib.ms_reserve(RESERVED, base), "reserving")
    slot = Slot(base[0], RESERVED)
    slot.instantiate(None, 8 * P)
    _core.inject("mmap", error=12)
    with pytest.raises(SystemCallError, match="covering a slot"):
        slot.destroy()
    assert slot.state is State.UNKNOWN
    slot.destroy()
    assert slot.state.value == "destroyed"
    _core.check(lib.ms_unmap(base[0], RESERVED), "unmapping")
