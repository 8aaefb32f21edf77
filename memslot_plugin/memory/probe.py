"""What this kernel really does, and what it costs: found out by trying, not from version
numbers.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from memslot_plugin._core import PAGE_SIZE, after_fork, check, ffi, lib
from memslot_plugin._core.proc import map_count, max_map_count
from memslot_plugin.errors import SystemCallError
from memslot_plugin.memory.image import BytesImage, MemfdImage

SEALS = 0x1 | 0x2 | 0x4 | 0x8
"""F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_WRITE (fcntl(2))."""


PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that say nothing about the kernel: what is short now may not be so later."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried: whether it works here, and what was seen."""

    works: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Probe:
    """What this process can do here, found out by trying; limits are as they were at that moment,
    None if unknown.
    """

    page_size: int
    memfd: Finding
    seals: Finding
    dontneed: Finding
    pagemap: Finding
    max_map_count: int | None
    map_count: int | None
    address_space: int | None
    descriptors: int | None


@functools.cache
def probe() -> Probe:
    """Try, once per process and again after a fork, what memslot builds on; see `Probe`.

    Raises SystemCallError where a limit of the moment (descriptors, memory) keeps it from finding out; the next
    call tries again.
    """
    memfd, seals, dontneed = _probe_memfd()
    return Probe(
        page_size=PAGE_SIZE,
        memfd=memfd,
        seals=seals,
        dontneed=dontneed,
        pagemap=_probe_pagemap(memfd.works and seals.works),
        max_map_count=max_map_count(),
        map_count=map_count(),
        address_space=_soft_limit(resource.RLIMIT_AS),
        descriptors=_soft_limit(resource.RLIMIT_NOFILE),
    )


def _soft_limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


_left: list[tuple[int, int]] = []
"""Ranges that could not be unmapped after a trial (address, bytes): the next trial tries again."""


@contextmanager
def _range(pages: int, what_for: str) -> Iterator[int]:
    """The address of so many pages of zeros, for a trial."""
    for _ in range(len(_left)):
        address, length = _left.pop()
        _unmap(address, length, "unmapping pages of an earlier trial")
    length = pages * PAGE_SIZE
    base = ffi.new("uintptr_t *")
    check(lib.ms_reserve(length, base), f"reserving {pages} pages {what_for}")
    address = base[0]
    try:
        check(lib.ms_zero(address, length), f"mapping {pages} pages {what_for}")
        yield address
    finally:
        _unmap(address, length, f"unmapping {pages} pages {what_for}")


def _unmap(address: int, length: int, what: str) -> None:
    failed = lib.ms_unmap(address, length)
    if failed:
        _left.append((address, length))
        check(failed, what)


def _probe_memfd() -> tuple[Finding, Finding, Finding]:
    """Make an image of one page for real, look at its seals, and drop a written page of it."""
    content = b"\x5a" * PAGE_SIZE
    try:
        image = MemfdImage("probe", content)
    except SystemCallError as error:
        if error.errno in PASSING:
            raise
        missing = Finding(False, str(error.strerror))
        untried = Finding(False, "not tried: there is no memfd")
        creating = "creating" in str(error)
        no_memfd = error.errno in (errno.ENOSYS, errno.EPERM, errno.EACCES) and creating
        return missing, untried if no_memfd else missing, _probe_dontneed(None, bytes(PAGE_SIZE))
    with image:
        seals = ffi.new("int *")
        check(lib.ms_seals(image.fd, seals), "reading the seals of the probe's image")
        sealed = (
            Finding(True, "sealed against growing, shrinking, writing and further seals")
            if seals[0] & SEALS == SEALS
            else Finding(False, f"of the seals {SEALS:#x} only {seals[0] & SEALS:#x} took")
        )
        return Finding(True, "memfd_create works"), sealed, _probe_dontneed(image, content)


def _probe_dontneed(image: MemfdImage | None, content: bytes) -> Finding:
    """Write to a private mapping of the image, or to zeros where there can be none, drop it, look."""
    with _range(1, "for the probe") as address:
        if image is not None:
            check(image.lay(address), "mapping the probe's image")
        ctypes.memset(address, 0x11, PAGE_SIZE)
        refused = lib.ms_discard(address, PAGE_SIZE)
        seen = ctypes.string_at(address, PAGE_SIZE)
    what = "zeros" if image is None else "the image's bytes"
    if refused:
        reason = os.strerror(-refused)
        return Finding(False, f"MADV_DONTNEED: {reason}; slots are mapped over instead")
    if seen != content:
        return Finding(False, "MADV_DONTNEED left the old bytes; slots are mapped over instead")
    return Finding(True, f"MADV_DONTNEED brings {what} back")


def _probe_pagemap(with_image: bool) -> Finding:
    """Read and write pages, half of them of an image where there can be one, and ask the kernel which are private;
    again when they may have been swapped out.
    """
    try:
        pagemap = pagemap_descriptor()
    except SystemCallError as error:
        if error.errno in PASSING:
            raise
        why = " (the process changed its user: prctl(2), PR_SET_DUMPABLE)"
        return Finding(False, f"{error.strerror}{why if error.errno == errno.EACCES else ''}")
    content = b"\x5a" * (2 * PAGE_SIZE)
    image = MemfdImage("probe", content) if with_image else BytesImage("probe", b"")
    with image, _range(4, "for the probe") as address:
        check(image.lay(address), "mapping the probe's image")
        for page in (0, 2):
            ctypes.string_at(address + page * PAGE_SIZE, PAGE_SIZE)
        written = [1, 3]
        for page in written:
            ctypes.memset(address + page * PAGE_SIZE, 1, 1)
        for where in ("", " that may be swapped out"):
            found, failed = _private_pages(pagemap, address, 4)
            if failed:
                return Finding(
                    False, f"PAGEMAP_SCAN: {os.strerror(failed)} (Linux has it since 6.7)"
                )
            if found != written:
                return Finding(
                    False,
                    f"PAGEMAP_SCAN takes the pages {found} for private where {written} were written{where}",
                )
            lib.ms_page_out(address, 4 * PAGE_SIZE)  # swap may be missing, or refused: no matter
    return Finding(True, "PAGEMAP_SCAN lists private pages")


def _private_pages(pagemap: int, address: int, pages: int) -> tuple[list[int], int]:
    """The numbers of the private ones among so many pages, and an errno or 0."""
    runs, report = ffi.new("ms_extent[]", pages), ffi.new("ms_reset_report *")
    memory = ffi.new("ms_memory *", {"base": address, "accessible": pages * PAGE_SIZE})
    failed = lib.ms_list_private(pagemap, memory, runs, pages, report)
    found = [
        (run.offset + at) // PAGE_SIZE
        for run in runs[0 : report.runs]
        for at in range(0, run.length, PAGE_SIZE)
    ]
    return found, -failed


def pagemap_descriptor() -> int:
    """A descriptor of this process's /proc/self/pagemap; raises SystemCallError."""
    descriptor = int(lib.ms_pagemap())
    check(descriptor, "opening /proc/self/pagemap")
    return descriptor


after_fork(probe.cache_clear)


@dataclass(frozen=True, slots=True)
class Prices:
    """What the kernel's work costs here, in nanoseconds: per page, and per scan of an empty
    range.  `scan_plain_page` is where no file is mapped.
    """

    scan: float
    scan_page: float
    scan_plain_page: float
    compare_page: float
    drop_page: float
    write_fault: float
    read_fault_page: float


@functools.cache
def prices() -> Prices:
    """Measure, once per process (a few ms), what a reset's choices cost; the least of each time in five
    rounds.
    """
    pages = 256
    report = ffi.new("ms_reset_report *")
    length = pages * PAGE_SIZE
    found = probe()
    # Where no image can be mapped, memory is zeros at first, and that is what is measured.
    image = (
        MemfdImage("prices", b"\x5a" * length)
        if found.memfd.works and found.seals.works
        else BytesImage("prices", b"")
    )
    with image, _range(pages, "to measure prices") as address:
        check(image.lay(address), "mapping an image to measure prices")
        memory = ffi.new(
            "ms_memory *",
            {
                "base": address,
                "accessible": length,
                "extents": image.c_extents,
                "count": image.c_count,
            },
        )
        pagemap = pagemap_descriptor()

        def reset() -> None:
            check(lib.ms_reset_pagemap(pagemap, memory, pages, report), "PAGEMAP_SCAN")

        def drop() -> None:
            check(lib.ms_discard(address, length), "MADV_DONTNEED")

        rounds = []
        for _ in range(5):
            drop()
            empty_drop = _nanoseconds(drop)
            reset()
            reset()  # the first after a drop finds cold page tables
            empty_scan = report.scan_nanoseconds
            reads = _nanoseconds(lambda: ctypes.string_at(address, length))
            again = _nanoseconds(lambda: ctypes.string_at(address, length))
            drop()
            writes = _nanoseconds(lambda: ctypes.memset(address, 1, length))
            rewrites = _nanoseconds(lambda: ctypes.memset(address, 2, length))
            reset()
            reset()  # every page is private and equal to the image now: scan and comparison alone
            scan, everything = report.scan_nanoseconds, report.nanoseconds
            memory.count = 0
            reset()  # as if no file were mapped
            memory.count = image.c_count
            unmapped = report.scan_nanoseconds
            compared = everything - scan
            dropped = _nanoseconds(drop)
            rounds.append(
                (
                    empty_scan,
                    scan,
                    unmapped,
                    compared,
                    empty_drop,
                    dropped,
                    rewrites,
                    writes,
                    again,
                    reads,
                )
            )

    # The best of each time before anything is subtracted: a disturbance makes a time longer, and a difference of two
    # shorter too.
    best = [min(column) for column in zip(*rounds, strict=True)]
    empty_scan, scan, unmapped, compared, empty_drop, dropped, rewrites, writes, again, reads = best

    def per_page(whole: int, empty: int) -> float:
        return max(whole - empty, 1) / pages

    return Prices(
        float(empty_scan),
        per_page(scan, empty_scan),
        per_page(unmapped, empty_scan),
        per_page(compared, 0),
        per_page(dropped, empty_drop),
        per_page(writes, rewrites),
        per_page(reads, again),
    )


def _nanoseconds(call: Callable[[], object]) -> int:
    started = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - started
