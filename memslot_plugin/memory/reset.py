"""The ways in which a slot's memory is made pristine again, by the names that the setting `reset` has for them.

    madvise   MADV_DONTNEED over the accessible range: always right, and every page touched next time
              faults again
    pagemap   PAGEMAP_SCAN lists the private pages, each is put back from the image and stays
              resident
    copy      every page is compared with the image and put back if it differs, or dropped beyond keep_resident
    remap     fresh mappings over everything: where MADV_DONTNEED is not what it says
    auto      pagemap, and a flush by madvise when keeping pages has cost as much as a flush would
              (see adaptive.py); madvise where the kernel has no PAGEMAP_SCAN

remap is nothing to choose: it takes the place of madvise where that does not work.

A call that worked when it was probed may be refused later: a worker that gave up root cannot open its pagemap, and
locked pages (mlockall(2)) cannot be dropped.  Such a reset is done by the next way, and its reason says which call
failed: pagemap -> madvise -> remap.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from memslot_hooks.types import ResetResult
from memslot_plugin._core import PAGE_SIZE, ffi, lib
from memslot_plugin._core.limits import system_call_error
from memslot_plugin.errors import Unsupported
from memslot_plugin.memory.adaptive import History
from memslot_plugin.memory.probe import prices, probe

if TYPE_CHECKING:
    from memslot_plugin.memory.slot import Slot

NO_LIMIT = 2**63 - 1

SLOW: int = lib.MS_SLOW
"""What the core answers where a reset was not an ordinary one."""

TICK = 32
"""Nanoseconds by which the core counts the time of an ordinary reset."""

MOST_RESULTS = 4096

watched = lib.ms_reset_fast

Reset = Callable[["Slot"], ResetResult]
"""Makes the bytes of a slot pristine; raises SystemCallError."""


def madvise(slot: Slot) -> ResetResult:
    """Drop every private page; the next access sees the image again."""
    report = slot.report
    failed = lib.ms_reset_discard(slot.memory, report)
    if failed:
        return _instead(remap, slot, "MADV_DONTNEED", -failed)
    return ResetResult(None, report.nanoseconds, "madvise")


def remap(slot: Slot) -> ResetResult:
    """Map zeros and the image over everything."""
    report = slot.report
    failed = lib.ms_reset_remap(slot.memory, report)
    if failed:
        raise system_call_error(-failed, "mapping over a slot in a reset")
    return ResetResult(None, report.nanoseconds, "remap")


def _instead(reset: Reset, slot: Slot, call: str, error: int) -> ResetResult:
    """The result of another reset, with the last failure that led to it for a reason."""
    result = reset(slot)
    return result if result.reason else result._replace(reason=f"{call}: {os.strerror(error)}")


class Copy:
    """Compare every page with the image and put back what differs; beyond the first `keep_resident` bytes, which may
    stay in memory, drop pages instead.
    """

    def __init__(self, keep_resident: int) -> None:
        self._keep_pages = keep_resident // PAGE_SIZE

    def __call__(self, slot: Slot) -> ResetResult:
        """From dirty to pristine."""
        report = slot.report
        failed = lib.ms_reset_copy(slot.memory, self._keep_pages, report)
        if failed:
            return _instead(remap, slot, "MADV_DONTNEED", -failed)
        if report.dropped_pages:  # written or not, nobody has looked
            return ResetResult(None, report.nanoseconds, "copy", "keep_resident")
        return ResetResult(report.dirty_pages * PAGE_SIZE, report.nanoseconds, "copy")


class Ordinary(dict[int, ResetResult]):
    """The results of ordinary resets by pagemap, by the core's answer: most come again, and to look one up costs a
    tenth of making it.
    """

    def __missing__(self, answer: int) -> ResetResult:
        """Make it, and forget all where they are too many."""
        if len(self) >= MOST_RESULTS:
            self.clear()
        made = ResetResult((answer >> 32) * PAGE_SIZE, (answer & 0xFFFF_FFFF) * TICK, "pagemap")
        self[answer] = made
        return made


ORDINARY = Ordinary()


class Pagemap:
    """A reset that puts back exactly the private pages, and gives back to the kernel what passes
    `keep_resident` bytes.

    It leaves a note in the slot, its `watcher` and `limits`: while they stand, the slot has the core
    do the next reset without asking, and asks `settle` only if that was no ordinary one.
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

    def __call__(self, slot: Slot) -> ResetResult:
        """From dirty to pristine; a grown memory keeps its size, and gets no note."""
        slot.core.limits = slot.limits = self._limits_for(slot)
        if slot.accessible == slot.initial:
            slot.watcher = self
        answer = watched(slot.core)
        return ORDINARY[answer] if answer < SLOW else self.settle(slot, answer)

    def _limits_for(self, _slot: Slot) -> Any:
        """What an ordinary reset of this slot is."""
        return self._limits

    def settle(self, slot: Slot, answer: int) -> ResetResult:
        """The result of a reset that was not ordinary, or of the one in its place; raises SystemCallError."""
        if answer > SLOW:
            return _instead(self._discard, slot, "PAGEMAP_SCAN", answer - SLOW)
        report = slot.report
        pages = report.dirty_pages + report.dropped_pages
        reason = "keep_resident" if report.dropped_pages else ""
        return ResetResult(pages * PAGE_SIZE, report.nanoseconds, "pagemap", reason)


class Auto(Pagemap):
    """The pagemap reset, with a history per slot that says when keeping its pages has become too
    dear.

    At most twice the cost of knowing the future: pages are kept until what keeping them has cost
    (the scan and the comparison of pages that nobody wrote or read) reaches what dropping all and
    faulting the needed ones in again costs.
    """

    def __init__(self, keep_resident: int) -> None:
        super().__init__(keep_resident)
        self._prices = prices()

    def _limits_for(self, slot: Slot) -> Any:
        history = slot.history
        if history is None or history.limits.keep_pages != self._keep_pages:
            history = slot.history = History(self._prices, self._keep_pages)
        return history.limits

    def settle(self, slot: Slot, answer: int) -> ResetResult:
        """The same, or a flush where the history says so."""
        result = super().settle(slot, answer)
        if answer > SLOW:
            return result
        report, history = slot.report, slot.history
        assert history is not None
        kept = report.private_pages - report.dropped_pages
        spare = lib.ms_unexplained_ns(report, history.limits)
        reason = history.observe(kept, report.dirty_pages, spare)
        if not reason:
            return result
        flushed = madvise(slot)
        return ResetResult(
            result.dirty_bytes, result.nanoseconds + flushed.nanoseconds, "madvise", reason
        )


def choose(strategy: str, keep_resident: int) -> Reset:
    """The reset for a setting auto | madvise | pagemap | copy; raises Unsupported if this kernel
    cannot do it.

    `keep_resident` is how many private bytes a slot may keep in memory after a reset by pagemap,
    auto or copy; what was copied of an image stays in any case.
    """
    found = probe()
    discard = madvise if found.dontneed.works else remap
    if strategy == "madvise":
        return discard
    # What passes the budget is dropped, which takes a MADV_DONTNEED that does it.
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
