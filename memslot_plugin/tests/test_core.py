"""The C core: its gate is honest, its loops are exact, and its errors name the limit that lifts them."""

from __future__ import annotations

import ast
import ctypes
import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memslot_plugin import _core
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import ffi, lib
from memslot_plugin.errors import SystemCallError
from memslot_plugin.probe import pagemap_descriptor, probe

pytestmark = pytest.mark.usefixtures("no_leaks")

needs_pagemap = pytest.mark.skipif(
    not probe().pagemap.works, reason=f"impossible: PAGEMAP_SCAN: {probe().pagemap.detail}"
)


@pytest.fixture
def pages() -> Iterator[Callable[[int], int]]:
    """Maps n pages of zeros and returns their address."""
    mapped: list[tuple[int, int]] = []

    def make(count: int) -> int:
        base = ffi.new("uintptr_t *")
        _core.check(lib.ms_reserve(count * P, base), "reserving")
        _core.check(lib.ms_zero(base[0], count * P), "mapping")
        mapped.append((base[0], count * P))
        return int(base[0])

    yield make
    for base, length in mapped:
        _core.check(lib.ms_unmap(base, length), "unmapping")


class Described:
    """What `[base, base + accessible)` has to hold: `view` cut into extents of (offset, length)."""

    def __init__(
        self, base: int, accessible: int, view: bytes = b"", *extents: tuple[int, int]
    ) -> None:
        self._view = ffi.new("uint8_t[]", view or b"\0")
        self.extents = ffi.new("ms_extent[]", len(extents))
        self.pristine = bytearray(accessible)
        packed = 0
        for place, (offset, length) in zip(self.extents, extents, strict=True):
            place.offset, place.length, place.file_offset = offset, length, packed
            place.bytes, place.fd = self._view + packed, -1
            self.pristine[offset : offset + length] = view[packed : packed + length]
            packed += length
        self.c = ffi.new("ms_memory *", (base, accessible, self.extents, len(extents)))
        self.report = ffi.new("ms_reset_report *")

    def __len__(self) -> int:
        return len(self.extents)


# The gate


def test_each_function_counts_the_system_calls_that_it_makes(calls: Any) -> None:
    base = ffi.new("uintptr_t *")
    with calls() as made:
        lib.ms_reserve(4 * P, base)
        lib.ms_zero(base[0], P)
        lib.ms_allow(base[0] + P, P)
        lib.ms_forbid(base[0] + P, P)
        lib.ms_discard(base[0], P)
        lib.ms_cover(base[0], 4 * P)
        lib.ms_unmap(base[0], 4 * P)
    assert made == {"mmap": 3, "mprotect": 2, "madvise": 1, "munmap": 1}


def test_names_of_calls_are_those_of_the_enum() -> None:
    assert len(_core.CALLS) == lib.MS_CALLS
    for place, name in enumerate(_core.CALLS):
        assert getattr(lib, f"MS_{name.upper()}") == place
    assert list(_core.counters()) == list(_core.CALLS)


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_an_injected_failure_hits_one_call_and_then_disarms(
    pages: Callable[[int], int], inject: Any, calls: Any, skip: int
) -> None:
    base = pages(1)
    inject("madvise", skip=skip, error=errno.ENOMEM)
    with calls() as made:
        results = [lib.ms_discard(base, P) for _ in range(6)]
    assert results == [-errno.ENOMEM if turn == skip else 0 for turn in range(6)]
    assert made == {"madvise": 6}


def test_injecting_into_an_unknown_call_is_refused(inject: Any) -> None:
    assert lib.ms_inject(lib.MS_CALLS, 0, errno.EPERM) == -errno.EINVAL
    assert lib.ms_inject(-1, 0, errno.EPERM) == -errno.EINVAL
    with pytest.raises(ValueError, match="not in tuple"):
        inject("reboot", error=errno.EPERM)


def test_a_close_that_fails_has_closed_all_the_same(inject: Any) -> None:
    # close(2): the descriptor is released early, whatever is returned; a second close would hit somebody else's.
    fd = ffi.new("int *")
    assert lib.ms_memfd(b"memslot:test", 1, 0, fd) == 0
    inject("close", error=errno.EIO)
    assert lib.ms_close(fd[0]) == -errno.EIO
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd[0])


def test_counters_agree_with_strace(strace: Any) -> None:
    """The counters are kept by the code that is being measured: here the kernel's side is asked too."""
    source = """
from memslot_plugin import MemfdImage, Pool, _core
from memslot_plugin.reset import choose
P, reset = _core.PAGE_SIZE, choose("madvise", 0)
before = _core.counters()
mark("begin")
image = MemfdImage("m", b"x" * P)
with Pool(slots=2, reserved=64 * P, guard=P, reset=reset) as pool:
    slot = pool.lease(image, 4 * P, affinity=1)
    ranges = [(slot.base - 128 * P, slot.base + 128 * P), (image.backings[0].address, image.backings[0].address + P)]
    slot.grow(8 * P)
    pool.release(slot)
    pool.release(pool.lease(None, 2 * P, affinity=2))
image.close()
mark("end")
after = _core.counters()
print([{name: after[name] - before[name] for name in after}, ranges])
"""
    traced = ("mmap", "munmap", "mprotect", "madvise", "memfd_create", "ftruncate", "pwrite64")
    printed, sections = strace(source, *traced, "fcntl")
    counted, ranges = ast.literal_eval(printed)
    for call in (*traced, "fcntl"):
        seen = [line for line in sections["begin"] if line.name == call]
        if call in ("mmap", "munmap", "mprotect", "madvise"):  # Python's allocator uses them too
            seen = [line for line in seen if any(a <= line.address < b for a, b in ranges)]
        elif call == "fcntl":
            seen = [line for line in seen if "SEALS" in line.line]
        assert len(seen) == counted[call.removesuffix("64")], (call, seen)
        assert seen


def test_a_range_that_wraps_or_is_odd_is_the_kernels_to_refuse(pages: Callable[[int], int]) -> None:
    base = pages(2)
    assert lib.ms_allow(base + 1, P) == -errno.EINVAL
    assert lib.ms_discard(base + 1, P) == -errno.EINVAL
    assert lib.ms_unmap(base + 1, P) == -errno.EINVAL
    assert lib.ms_cover(base + 1, P) == -errno.EINVAL
    assert lib.ms_close(-1) == -errno.EBADF
    assert lib.ms_seal(-1) == -errno.EBADF
    memory = Described(base, P)
    assert lib.ms_reset_pagemap(-1, memory.c, 0, memory.report) == -errno.EBADF


# Address ranges


def test_a_reservation_faults_until_it_is_allowed(child: Any) -> None:
    child(
        """
import os, signal
from memslot_plugin._core import PAGE_SIZE as P, ffi, lib
base = ffi.new("uintptr_t *")
assert lib.ms_reserve(4 * P, base) == 0
def touch(offset):
    pid = os.fork()
    if not pid:
        ffi.cast("uint8_t *", base[0])[offset] = 1
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert touch(0) == touch(4 * P - 1) == -signal.SIGSEGV
assert lib.ms_allow(base[0] + P, P) == 0
assert touch(P) == touch(2 * P - 1) == 0
assert touch(P - 1) == touch(2 * P) == -signal.SIGSEGV
assert lib.ms_zero(base[0] + 2 * P, P) == 0 and touch(2 * P) == 0
assert lib.ms_forbid(base[0], 4 * P) == 0 and touch(P) == touch(2 * P) == -signal.SIGSEGV
""",
    )


def test_a_cover_loses_the_bytes_and_keeps_the_range(pages: Callable[[int], int]) -> None:
    # A cover-up with invalid flags (MAP_PRIVATE forgotten) fails, and the old bytes stay there to be read.
    base = pages(3)
    ctypes.memset(base, 0x77, 3 * P)
    assert lib.ms_cover(base + P, P) == 0
    assert lib.ms_allow(base + P, P) == 0
    assert ctypes.string_at(base, 3 * P) == b"\x77" * P + bytes(P) + b"\x77" * P


# Images


def test_a_memfd_of_impossible_length_leaves_no_descriptor(inject: Any) -> None:
    fd = ffi.new("int *", -7)
    inject("ftruncate", error=errno.EFBIG)
    assert lib.ms_memfd(b"memslot:test", 1, P, fd) == -errno.EFBIG
    assert fd[0] == -7


def test_writing_goes_on_after_an_interruption(inject: Any) -> None:
    fd = ffi.new("int *")
    assert lib.ms_memfd(b"memslot:test", 1, 3 * P, fd) == 0
    inject("pwrite", error=errno.EINTR)
    data = os.urandom(P + 17)
    assert lib.ms_write(fd[0], data, len(data), P - 5) == 0
    assert os.pread(fd[0], 3 * P, 0) == bytes(P - 5) + data + bytes(P - 12)
    assert lib.ms_close(fd[0]) == 0


def model_extents(content: bytes, gap: int) -> list[tuple[int, int, int]]:
    """The same from the definition: pages that are not all zero, joined over short gaps."""
    runs: list[list[int]] = []
    for at in range(0, len(content), P):
        if any(content[at : at + P]):
            if runs and at - runs[-1][1] < gap:
                runs[-1][1] = at + P
            else:
                runs.append([at, at + P])
    packed, found = 0, []
    for start, end in runs:
        found.append((start, end - start, packed))
        packed += end - start
    return found


sparse_content = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from([b"", b"\1", bytes(P - 1) + b"\2", b"\3" * P])),
    max_size=12,
)


@given(
    written=sparse_content, cut=st.integers(0, P), gap=st.integers(1, 9), capacity=st.integers(0, 9)
)
def test_extents_are_those_of_the_definition(
    written: list[tuple[int, bytes]], cut: int, gap: int, capacity: int
) -> None:
    content = bytearray(42 * P)
    for page, data in written:
        content[page * P : page * P + len(data)] = data
    del content[len(content) - cut :]
    expected = model_extents(bytes(content), gap * P)
    found = ffi.new("ms_extent[]", capacity + 1)
    found[capacity].offset = 12345  # must not be written
    source = ffi.from_buffer("uint8_t[]", content)
    count = lib.ms_find_extents(source, len(content), P, gap * P, found, capacity)
    assert count == len(expected)
    kept = min(count, capacity)
    # The last one that fits may have been reported before later runs were joined to it, never after.
    assert [(e.offset, e.length, e.file_offset) for e in found[0:kept]] == expected[:kept]
    assert found[capacity].offset == 12345


def test_only_zeros_have_no_extents() -> None:
    for length in (0, 1, P - 1, P, P + 1, 100 * P):
        source = ffi.from_buffer("uint8_t[]", bytearray(length))
        assert lib.ms_find_extents(source, length, P, P, ffi.new("ms_extent[]", 1), 1) == 0


# Comparing and resetting


@pytest.mark.parametrize(
    "where", [0, P, 2 * P - 1, 2 * P, 4 * P - 1, 4 * P, 6 * P, 7 * P, 8 * P - 1]
)
def test_the_first_difference_is_found_at_every_border(
    pages: Callable[[int], int], where: int
) -> None:
    base = pages(8)
    memory = Described(base, 8 * P, os.urandom(3 * P), (2 * P, 2 * P), (6 * P, P))
    lib.ms_copy_extents(base, memory.extents, len(memory))
    assert ctypes.string_at(base, 8 * P) == memory.pristine
    assert lib.ms_first_difference(memory.c) == -1
    ctypes.memset(base + where, memory.pristine[where] ^ 0x80, 1)
    assert lib.ms_first_difference(memory.c) == where
    memory.c.accessible = where
    assert lib.ms_first_difference(memory.c) == -1
    memory.c.accessible = 8 * P
    assert lib.ms_reset_copy(memory.c, 8, memory.report) == 0
    assert memory.report.dirty_pages == 1
    assert lib.ms_first_difference(memory.c) == -1


@pytest.mark.parametrize("kept", [0, 1, 700, 10_000, 2**64 - 1])
@needs_pagemap
def test_a_pagemap_reset_puts_back_more_runs_than_one_scan_lists(
    pages: Callable[[int], int], calls: Any, kept: int
) -> None:
    runs = 1300
    base = pages(2 * runs)
    view = b"" if kept < 2**63 else os.urandom(5 * P)  # only what is mapped may be dropped
    extents = [(1198 * P, 5 * P)] if view else []
    memory = Described(base, 2 * runs * P, view, *extents)
    lib.ms_copy_extents(base, memory.extents, len(memory))
    for run in range(runs):
        ctypes.memset(base + 2 * run * P, 0xEE, P)
    with calls() as made:
        result = lib.ms_reset_pagemap(pagemap_descriptor(), memory.c, kept, memory.report)
    assert result == memory.report.dirty_pages + memory.report.dropped_pages
    assert ctypes.string_at(base, 2 * runs * P) == memory.pristine
    assert lib.ms_first_difference(memory.c) == -1
    # Of the five pages of the extent every other one was written again, the rest are private all the same.
    private = runs + (2 if view else 0)
    assert memory.report.private_pages == private
    assert memory.report.dropped_pages == max(private - kept, 0)
    assert memory.report.dirty_pages == min(runs, kept)
    assert made["pagemap_scan"] >= 3
    assert lib.ms_count_private(pagemap_descriptor(), base, 2 * runs * P, memory.report) == 0
    assert memory.report.private_pages == min(private, kept)


@needs_pagemap
@pytest.mark.parametrize("at", range(7))
def test_a_scan_that_fails_at_any_turn_says_so(
    pages: Callable[[int], int], inject: Any, at: int
) -> None:
    base = pages(3000)
    memory = Described(base, 3000 * P)
    for page in range(0, 3000, 2):
        ctypes.memset(base + page * P, 1, 1)
    inject("pagemap_scan", skip=at, error=errno.EPERM)
    result = lib.ms_reset_pagemap(pagemap_descriptor(), memory.c, 10_000, memory.report)
    assert result == (-errno.EPERM if at < 6 else 1500)
    inject("pagemap_scan", skip=0, error=errno.EINTR)
    left = lib.ms_reset_pagemap(pagemap_descriptor(), memory.c, 10_000, memory.report)
    assert left == (1500 - 256 * at if at < 6 else 0)  # 256 runs are listed at once
    assert lib.ms_first_difference(memory.c) == -1


@needs_pagemap
def test_a_drop_that_fails_is_told(pages: Callable[[int], int], inject: Any) -> None:
    memory = Described(pages(4), 4 * P)
    ctypes.memset(memory.c.base, 1, 4 * P)
    inject("madvise", error=errno.EINVAL)
    result = lib.ms_reset_pagemap(pagemap_descriptor(), memory.c, 1, memory.report)
    assert result == -errno.EINVAL


@needs_pagemap
def test_reading_makes_no_page_private(pages: Callable[[int], int]) -> None:
    base = pages(64)
    ctypes.string_at(base, 64 * P)
    ctypes.memset(base + 7 * P, 1, 2 * P)
    report = ffi.new("ms_reset_report *")
    assert lib.ms_count_private(pagemap_descriptor(), base, 64 * P, report) == 0
    assert (report.private_pages, report.runs) == (2, 1)
    assert ctypes.string_at(base + 7 * P, 1) == b"\1"


# Errors


def test_an_errno_becomes_one_exception_that_says_what_was_attempted() -> None:
    with pytest.raises(
        SystemCallError, match="mapping the moon: Operation not permitted"
    ) as caught:
        _core.check(-errno.EPERM, "mapping the moon")
    assert caught.value.errno == errno.EPERM
    _core.check(0, "nothing")
    _core.check(5, "nothing")


@pytest.mark.parametrize(
    ("error", "knobs"),
    [
        (errno.ENOMEM, ["vm.max_map_count is ", " mappings in use", "RLIMIT_AS (ulimit -v) is "]),
        (errno.EMFILE, ["RLIMIT_NOFILE (ulimit -n) is "]),
        (errno.ENFILE, ["RLIMIT_NOFILE (ulimit -n) is "]),
        (errno.EFBIG, ["RLIMIT_FSIZE (ulimit -f) is "]),
        (errno.EAGAIN, ["RLIMIT_MEMLOCK (ulimit -l) is "]),
    ],
)
def test_an_error_names_the_limit_that_lifts_it(error: int, knobs: list[str]) -> None:
    message = str(_core.system_call_error(error, "trying"))
    assert os.strerror(error) in message
    for knob in knobs:
        assert knob in message


def test_limits_are_read_when_the_error_happens(child: Any) -> None:
    child(
        """
import errno, resource
from memslot_plugin import _core
resource.setrlimit(resource.RLIMIT_NOFILE, (77, 77))
assert "(ulimit -n) is 77" in str(_core.system_call_error(errno.EMFILE, "x"))
assert "(ulimit -d)" not in str(_core.system_call_error(errno.ENOMEM, "x"))
resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))
assert "(ulimit -d) is 4294967296" in str(_core.system_call_error(errno.ENOMEM, "x"))
resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
assert "(ulimit -v) is 8589934592" in str(_core.system_call_error(errno.ENOMEM, "x"))
"""
    )


def test_the_map_count_is_the_kernels() -> None:
    lines = len(Path("/proc/self/maps").read_bytes().splitlines())
    assert abs((_core.map_count() or 0) - lines) <= 4
    assert _core.max_map_count() == int(Path("/proc/sys/vm/max_map_count").read_text())


@pytest.mark.parametrize(
    ("size", "page", "up"), [(0, 4096, 0), (1, 4096, 4096), (4096, 4096, 4096)]
)
def test_sizes_are_rounded_up_to_pages(size: int, page: int, up: int) -> None:
    assert _core.align_up(size, page) == up
    assert _core.align_up(65537, 65536) == 131072
    assert resource.getpagesize() == P
    assert _core.align_up(P + 1) == 2 * P
