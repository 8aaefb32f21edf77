"""The strategies that make a region pristine again, by the names that the setting `reset` has for them.

    madvise   MADV_DONTNEED over the accessible range: always right, and every page touched next time faults again
    pagemap   PAGEMAP_SCAN lists the private pages; each is restored from the image and stays resident
    copy      every page is compared with the image and restored if it differs, or dropped beyond keep_resident
    remap     fresh mappings over everything, for kernels where MADV_DONTNEED does not drop; not a setting
    auto      pagemap, and a flush by madvise once keeping pages has cost as much as the flush (see adaptive.py);
              madvise if the kernel has no PAGEMAP_SCAN

A system call that worked when it was probed may be refused later: a worker that gave up root cannot open its
pagemap, and locked pages (mlockall(2)) cannot be dropped.  The next strategy then does that reset, pagemap ->
madvise -> remap, and its reason names the call that failed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from memslot_hooks.types import ResetResult
from memslot_plugin._core import PAGE_SIZE, ffi, lib
from memslot_plugin._core.limits import system_call_error
from memslot_plugin.errors import Unsupported
from memslot_plugin.memory.adaptive import History
from memslot_plugin.memory.prices import prices
from memslot_plugin.memory.probe import probe
from memslot_plugin.memory.region import Region

NO_LIMIT = 2**63 - 1

Reset = Callable[[Region], ResetResult]
"""Makes the bytes of a region pristine; raises SystemCallError."""


def madvise(region: Region) -> ResetResult:
    """Drop every private page; the next access sees the image again."""
    report = region.report
    failed = lib.ms_reset_discard(region.memory, report)
    if failed:
        return _instead(remap, region, "MADV_DONTNEED", -failed)
    return ResetResult(None, report.nanoseconds, "madvise")


def remap(region: Region) -> ResetResult:
    """Map zeros and the image over everything."""
    report = region.report
    failed = lib.ms_reset_remap(region.memory, report)
    if failed:
        raise system_call_error(-failed, "mapping over a slot in a reset")
    return ResetResult(None, report.nanoseconds, "remap")


def _instead(reset: Reset, region: Region, call: str, error: int) -> ResetResult:
    """Return the result of another strategy, with the latest failure that led to it as its reason."""
    result = reset(region)
    return result if result.reason else result._replace(reason=f"{call}: {os.strerror(error)}")


class Copy:
    """Compare every page with the image and restore what differs.

    Beyond the first `keep_resident` bytes, which may stay in memory, pages are dropped instead.
    """

    def __init__(self, keep_resident: int) -> None:
        self._keep_pages = keep_resident // PAGE_SIZE

    def __call__(self, region: Region) -> ResetResult:
        """Make the region pristine."""
        report = region.report
        failed = lib.ms_reset_copy(region.memory, self._keep_pages, report)
        if failed:
            return _instead(remap, region, "MADV_DONTNEED", -failed)
        if report.dropped_pages:  # dropped without a look: how many were written is unknown
            return ResetResult(None, report.nanoseconds, "copy", "keep_resident")
        return ResetResult(report.dirty_pages * PAGE_SIZE, report.nanoseconds, "copy")


class Pagemap:
    """Restore exactly the private pages, and give back to the kernel what passes `keep_resident` bytes.

    It leaves its limits in the region: as long as they stand, the core resets the region without
    Python, and calls `slow_path` only if that passed a limit or failed.
    """

    def __init__(self, keep_resident: int, discard: Reset = madvise) -> None:
        self._keep_pages = keep_resident // PAGE_SIZE
        self._discard = discard
        self._limits = ffi.new(
            "ms_reset_limits *",
            {
                "keep_pages": self._keep_pages,
                "idle_pages": NO_LIMIT,
                "unexplained_ns": NO_LIMIT,
            },
        )

    def __call__(self, region: Region) -> ResetResult:
        """Make the region pristine."""
        region.set_limits(self, self._limits_for(region))
        return self.slow_path(region, lib.ms_reset_fast(region.core))

    def _limits_for(self, _region: Region) -> Any:
        """Return the limits within which Python need not look at a reset."""
        return self._limits

    def slow_path(self, region: Region, answer: int) -> ResetResult:
        """Return the result of a reset that the core did, or of another one if its system calls failed."""
        if answer < 0:
            return _instead(self._discard, region, "PAGEMAP_SCAN", -answer)
        report = region.report
        pages = report.dirty_pages + report.dropped_pages
        reason = "keep_resident" if report.dropped_pages else ""
        return ResetResult(pages * PAGE_SIZE, report.nanoseconds, "pagemap", reason)


class Auto(Pagemap):
    """The pagemap reset, with a history per region that says when its pages have become too dear to keep.

    At most twice the cost of knowing the future: pages are kept until what keeping them has cost (the
    scan and the comparison of pages that were neither written nor read) reaches what dropping all and
    faulting the needed ones in again costs.
    """

    def __init__(self, keep_resident: int) -> None:
        super().__init__(keep_resident)
        self._prices = prices()

    def _limits_for(self, region: Region) -> Any:
        history = region.history
        if history is None or history.limits.keep_pages != self._keep_pages:
            history = region.history = History(self._prices, self._keep_pages)
        return history.limits

    def slow_path(self, region: Region, answer: int) -> ResetResult:
        """Return the result as any pagemap reset, after a flush if the history says so."""
        result = super().slow_path(region, answer)
        if answer != lib.MS_SLOW:
            return result
        report, history = region.report, region.history
        assert history is not None
        kept = report.private_pages - report.dropped_pages
        unexplained = lib.ms_unexplained_ns(report, history.limits)
        reason = history.observe(kept, report.dirty_pages, unexplained)
        if not reason:
            return result
        flushed = madvise(region)
        return ResetResult(
            result.dirty_bytes, result.nanoseconds + flushed.nanoseconds, "madvise", reason
        )


def choose(strategy: str, keep_resident: int) -> Reset:
    """Return the strategy for a setting auto | madvise | pagemap | copy; Unsupported if this kernel cannot do it.

    `keep_resident` is how many private bytes a slot may keep in memory after a reset by pagemap,
    auto or copy; what was copied of an image stays in any case.
    """
    found = probe()
    discard = madvise if found.dontneed.works else remap
    if strategy == "madvise":
        return discard
    # What passes the budget is dropped by MADV_DONTNEED, so without it there is no budget.
    budget = keep_resident if discard is madvise else sys.maxsize
    if strategy == "copy":
        return Copy(budget)
    if strategy == "pagemap":
        if not found.pagemap.works:
            raise Unsupported(
                f"reset = pagemap is not possible here: {found.pagemap.detail}; allowed: auto, madvise, copy"
            )
        return Pagemap(budget, discard)
    return Auto(keep_resident) if found.pagemap.works and discard is madvise else discard
