"""The system calls that really work here, found out by trying and not from version numbers."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from memslot_plugin._core import PAGE_SIZE, after_fork, check, ffi, leak, lib
from memslot_plugin._core.proc import map_count, max_map_count
from memslot_plugin.errors import SystemCallError
from memslot_plugin.memory.image import BytesImage, MemfdImage

SEALS = 0x1 | 0x2 | 0x4 | 0x8
"""F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_WRITE (fcntl(2))."""


PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors that say nothing about the kernel: what is short now may not be so later."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one trial: `works` is true if it did, and `detail` tells what was seen."""

    works: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Probe:
    """The findings for this process; limits are as they were at that moment, None if unknown."""

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
    """Try what memslot builds on, once per process and again after a fork.

    Raises SystemCallError if a limit of the moment (descriptors, memory) prevents a trial; the next
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


@contextmanager
def trial_range(pages: int, purpose: str) -> Iterator[int]:
    """Map so many pages of zeros for a trial, and yield their address."""
    length = pages * PAGE_SIZE
    base = ffi.new("uintptr_t *")
    check(lib.ms_reserve(length, base), f"reserving {pages} pages {purpose}")
    address = base[0]
    try:
        check(lib.ms_zero(address, length), f"mapping {pages} pages {purpose}")
        yield address
    finally:
        leak(lib.ms_unmap(address, length), f"{pages} pages {purpose}")


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
    """Write to a private mapping of the image, or to zeros without one; drop the page and look."""
    with trial_range(1, "for the probe") as address:
        if image is not None:
            check(image.map(address), "mapping the probe's image")
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
    """Read and write pages, half of them of an image if possible, and ask the kernel which are private.

    Ask again when the pages may have been swapped out.
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
    with image, trial_range(4, "for the probe") as address:
        check(image.map(address), "mapping the probe's image")
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
    """Return the numbers of the private ones among so many pages, and an errno or 0."""
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
    """Return a descriptor of this process's /proc/self/pagemap; raises SystemCallError."""
    descriptor = int(lib.ms_pagemap())
    check(descriptor, "opening /proc/self/pagemap")
    return descriptor


after_fork(probe.cache_clear)
