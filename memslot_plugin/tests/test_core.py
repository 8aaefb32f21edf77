"""The C core: its gate for system calls, its scans and copies, and errors that name the limit."""

from __future__ import annotations

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
from memslot_plugin._core import ffi, lib, limits, proc
from memslot_plugin.errors import SystemCallError
from memslot_plugin.memory.probe import pagemap_descriptor
from memslot_plugin.tests.slots import in_child, needs_pagemap, sparse

pytestmark = pytest.mark.usefixtures("no_leaks")

Pages = Callable[[int], int]


@pytest.fixture
def pages() -> Iterator[Pages]:
    """Map n pages of zeros and return their address."""
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
    """Contents of `[base, base + accessible)`: `view` cut into extents of (offset, length)."""

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
        lib.ms_copy_extents(base, self.extents, len(extents))

    def reset(self, kept: int) -> int:
        return int(lib.ms_reset_pagemap(pagemap_descriptor(), self.c, kept, self.report))


def test_injection_into_an_unknown_call_is_refused(inject: Any) -> None:
    for call in (lib.MS_CALLS, -1):
        assert lib.ms_inject(call, 0, errno.EPERM) == -errno.EINVAL
    with pytest.raises(ValueError, match="not in tuple"):
        inject("reboot", error=errno.EPERM)


def test_close_that_fails_releases_the_descriptor_all_the_same(inject: Any) -> None:
    # close(2) releases the descriptor even if it fails: a second close would hit another owner's.
    fd = ffi.new("int *")
    assert lib.ms_memfd(b"memslot:test", 1, 0, fd) == 0
    inject("close", error=errno.EIO)
    assert lib.ms_close(fd[0]) == -errno.EIO
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd[0])


def extents_by_definition(content: bytes, gap: int) -> list[tuple[int, int, int]]:
    """Return the pages with a byte that is not zero, joined over short gaps, as (offset, length, file offset)."""
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
def test_extents_of_any_bytes_equal_their_definition(
    written: list[tuple[int, bytes]], cut: int, gap: int, capacity: int
) -> None:
    content = sparse(42 * P, *((page * P, data) for page, data in written))
    del content[len(content) - cut :]
    expected = extents_by_definition(bytes(content), gap * P)
    found = ffi.new("ms_extent[]", capacity + 1)
    found[capacity].offset = 12345  # must not be written
    source = ffi.from_buffer("uint8_t[]", content)
    count = lib.ms_find_extents(source, len(content), P, gap * P, found, capacity)
    assert count == len(expected)
    kept = min(count, capacity)
    # The last extent that fits may lack the runs that are joined to it later.
    assert [(e.offset, e.length, e.file_offset) for e in found[0:kept]] == expected[:kept]
    assert found[capacity].offset == 12345


@pytest.mark.parametrize(
    "where", [0, P, 2 * P - 1, 2 * P, 4 * P - 1, 4 * P, 6 * P, 7 * P, 8 * P - 1]
)
def test_first_difference_at_any_border_is_found(pages: Pages, where: int) -> None:
    base = pages(8)
    memory = Described(base, 8 * P, os.urandom(3 * P), (2 * P, 2 * P), (6 * P, P))
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


@needs_pagemap
@pytest.mark.parametrize("kept", [0, 1, 700, 10_000, 2**64 - 1])
def test_reset_restores_more_runs_than_one_scan_lists(pages: Pages, calls: Any, kept: int) -> None:
    runs = 1300
    base = pages(2 * runs)
    view = b"" if kept < 2**63 else os.urandom(5 * P)  # only mapped images may be dropped
    memory = Described(base, 2 * runs * P, view, *([(1198 * P, 5 * P)] if view else []))
    for run in range(runs):
        ctypes.memset(base + 2 * run * P, 0xEE, P)
    with calls() as made:
        result = memory.reset(kept)
    report = memory.report
    assert result == report.dirty_pages + report.dropped_pages
    assert lib.ms_first_difference(memory.c) == -1
    # Every other page of the five was written again; the others are private all the same.
    private = runs + (2 if view else 0)
    assert report.private_pages == private
    assert report.dropped_pages == max(private - kept, 0)
    assert report.dirty_pages == min(runs, kept)
    assert made["pagemap_scan"] >= 3
    assert lib.ms_list_private(pagemap_descriptor(), memory.c, ffi.NULL, 0, report) == 0
    assert report.private_pages == min(private, kept)


@needs_pagemap
@pytest.mark.parametrize("at", range(7))
def test_scan_that_fails_at_any_turn_returns_its_error(pages: Pages, inject: Any, at: int) -> None:
    base = pages(3000)
    memory = Described(base, 3000 * P)
    for page in range(0, 3000, 2):
        ctypes.memset(base + page * P, 1, 1)
    inject("pagemap_scan", skip=at, error=errno.EPERM)
    assert memory.reset(10_000) == (-errno.EPERM if at < 6 else 1500)
    inject("pagemap_scan", skip=0, error=errno.EINTR)
    assert memory.reset(10_000) == (1500 - 256 * at if at < 6 else 0)  # 256 runs at a time
    assert lib.ms_first_difference(memory.c) == -1


@pytest.mark.parametrize(
    ("error", "knob"),
    [
        (errno.ENOMEM, r"vm.max_map_count is .* mappings in use.* RLIMIT_AS \(ulimit -v\) is "),
        (errno.ENFILE, r"RLIMIT_NOFILE \(ulimit -n\) is "),
        (errno.EFBIG, r"RLIMIT_FSIZE \(ulimit -f\) is "),
        (errno.EAGAIN, r"RLIMIT_MEMLOCK \(ulimit -l\) is "),
        (errno.EPERM, ""),
    ],
)
def test_error_of_a_system_call_names_the_attempt_and_the_limit(error: int, knob: str) -> None:
    with pytest.raises(SystemCallError, match=f"trying: {os.strerror(error)}.*{knob}") as caught:
        _core.check(-error, "trying")
    assert caught.value.errno == error


@pytest.mark.parametrize("limit", [resource.RLIM_INFINITY, 2**40])
def test_error_under_a_data_limit_names_it(monkeypatch: Any, limit: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    said = str(limits.system_call_error(errno.ENOMEM, "x"))
    assert ("(ulimit -d)" in said) == (f"(ulimit -d) is {2**40}" in said) == (limit == 2**40)


def test_pagemap_that_cannot_be_opened_names_the_limit(inject: Any) -> None:
    def check() -> None:
        inject("open", error=errno.EMFILE)
        sentence = r"opening /proc/self/pagemap: .*RLIMIT_NOFILE \(ulimit -n\) is "
        with pytest.raises(SystemCallError, match=sentence):
            pagemap_descriptor()

    in_child(check)  # which opens its own


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("mmap failed to allocate 0x5000 bytes; Cannot allocate memory (os error 12)", 12),
        ('SystemCall(Os { code: 24, kind: Other, message: "Too many open files" })', 24),
        ("unknown import: env.code has not been defined", None),
        ("the guest says: os error 12", None),
    ],
)
def test_errno_in_the_text_of_a_runtime_becomes_the_same_exception(
    text: str, number: int | None
) -> None:
    found = limits.errno_in_text(text, "compiling x")
    assert (None if found is None else found.errno) == number
    assert found is None or str(found).startswith(f"[Errno {number}] compiling x: {text}: ")


def test_map_count_when_read_equals_the_count_of_the_kernel() -> None:
    lines = len(Path("/proc/self/maps").read_bytes().splitlines())
    assert abs((proc.map_count() or 0) - lines) <= 4
    assert proc.max_map_count() == int(Path("/proc/sys/vm/max_map_count").read_text())
