"""The price of the kernel's work here, measured: what a reset's choices cost."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

from memslot_plugin._core import PAGE_SIZE, check, ffi, lib
from memslot_plugin.memory.image import BytesImage, MemfdImage
from memslot_plugin.memory.probe import pagemap_descriptor, probe, trial_range


@dataclass(frozen=True, slots=True)
class Prices:
    """Nanoseconds per page, and per scan of an empty range; `scan_anonymous_page` holds if no file is mapped."""

    scan: float
    scan_page: float
    scan_anonymous_page: float
    compare_page: float
    drop_page: float
    write_fault: float
    read_fault_page: float


@functools.cache
def prices() -> Prices:
    """Measure once per process, in a few ms; the least of each time in five rounds counts."""
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
    with image, trial_range(pages, "to measure prices") as address:
        check(image.map(address), "mapping an image to measure prices")
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
