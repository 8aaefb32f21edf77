"""Resets in the core without Python: the pages that it compares, and the number of its scans."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from memslot_plugin import MemfdImage, Slot
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import ffi, lib
from memslot_plugin.errors import SlotError
from memslot_plugin.memory import reset as resets
from memslot_plugin.memory.adaptive import COMPARE_EVERY
from memslot_plugin.memory.probe import probe
from memslot_plugin.memory.region import Region, State
from memslot_plugin.tests.slots import needs_pagemap

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    needs_pagemap,
    pytest.mark.skipif(not probe().memfd.works, reason="impossible: no memfd"),
]

IMAGE, MEMORY = 16, 200
"""Pages of the image, and of the whole memory."""


@pytest.fixture
def slot() -> Iterator[Slot]:
    made = Slot.create(MEMORY * P)
    with MemfdImage("watched", os.urandom(IMAGE * P)) as image:
        made.instantiate(image, MEMORY * P)
        yield made
        made.destroy()


def once(slot: Slot, reset: Any, *pages: int) -> Any:
    """Write to these pages, as a request does, and reset."""
    for page in pages:
        ctypes.memset(slot.base + page * P + page % P, page % 251 + 1, 3)
    # A busy machine makes scans slow: the reset would count pages as read.
    if slot.history is not None:
        slot.history.limits.unexplained_ns = 1 << 60
    result = slot.reset(reset)
    slot.instantiate(slot.image, MEMORY * P)
    return result


@pytest.mark.parametrize("name", ["pagemap", "auto"])
@pytest.mark.parametrize(("below", "above"), [(2, 0), (2, 39), (2, 40), (2, 150), (0, 100)])
def test_pages_above_the_image_get_a_scan_of_their_own_if_they_are_many(
    slot: Slot, calls: Any, name: str, below: int, above: int
) -> None:
    if not below:  # without an image no page is looked for in a file
        slot.reset(resets.madvise)
        slot.instantiate(None, MEMORY * P)
    reset, pages = resets.choose(name, 1 << 30), [*range(below), *range(IMAGE, IMAGE + above)]
    once(slot, reset, *pages)  # the scan follows the findings of the one before
    assert slot.report.anonymous_pages == above
    for _ in range(10):
        with calls() as made:
            result = once(slot, reset, *pages)
        assert made["pagemap_scan"] == (2 if below and above >= 40 else 1)
        assert slot.report.split_scan == (above >= 40)
        assert slot.report.private_pages == len(pages)
        assert result.dirty_bytes == len(pages) * P
    assert slot.first_difference() is None


@pytest.mark.parametrize(("name", "times"), [("auto", 3), ("pagemap", 0)])
def test_reset_by_auto_compares_now_and_then_and_by_pagemap_never(
    slot: Slot, name: str, times: int
) -> None:
    reset = resets.choose(name, 1 << 30)
    once(slot, reset, 1, 2, 3)
    compared = []
    for _ in range(3 * COMPARE_EVERY):
        once(slot, reset, 1, 2, 3)
        compared.append(slot.report.compared)
    assert sum(compared) == times
    assert (1 in compared[:COMPARE_EVERY]) == (times > 0)


def test_reset_by_auto_that_found_idle_pages_compares_until_they_are_dropped(slot: Slot) -> None:
    reset = resets.choose("auto", 1 << 30)
    once(slot, reset, *range(100))
    for _ in range(COMPARE_EVERY):
        once(slot, reset, 1)
    assert slot.report.compared
    while not (result := once(slot, reset, 1)).reason:
        assert slot.report.compared
        assert result.dirty_bytes == P
    assert result.reason == "pages not written lately"
    assert slot.private_runs() == []


@pytest.mark.parametrize(
    ("split_scan", "explained"), [(0, 1000 + 50 * 30), (1, 2 * 1000 + 20 * 30 + 30 * 10)]
)
def test_unexplained_time_of_a_scan_excludes_private_pages(split_scan: int, explained: int) -> None:
    found = {
        "private_pages": 50,
        "anonymous_pages": 30,
        "scans": 1 + split_scan,
        "split_scan": split_scan,
    }
    prices = {"scan_price": 1000_000, "file_page_price": 30_000, "anonymous_page_price": 10_000}
    report = ffi.new("ms_reset_report *", {**found, "scan_nanoseconds": 9000})
    limits = ffi.new("ms_reset_limits *", prices)
    assert lib.ms_unexplained_ns(report, limits) == 9000 - explained


def test_ordinary_reset_does_not_call_python(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ours = Slot._slow_reset

    def counted(self: Slot, strategy: resets.Reset, answer: int) -> Any:
        asked.append(strategy)
        return ours(self, strategy, answer)

    monkeypatch.setattr(Slot, "_slow_reset", counted)
    first, second = (resets.choose("pagemap", 1 << 30) for _ in range(2))
    for _ in range(3):
        once(slot, first, 1)
    assert asked == [first]
    once(slot, second, 1)
    assert asked == [first, second]
    slot.strategy = None
    once(slot, second, 1)
    assert asked == [first, second, second]
    slot.reset(second)
    with pytest.raises(SlotError, match="only a leased slot can be reset; this one is clean"):
        slot.reset(second)
    del slot.state
    with pytest.raises(AttributeError):
        slot.reset(second)
    slot.state = State.DIRTY


def test_exception_in_the_slow_path_of_a_reset_leaves_the_slot_unknown(slot: Slot) -> None:
    class Wrong(resets.Pagemap):
        def slow_path(self, region: Region, answer: int) -> Any:
            assert region.state is State.UNKNOWN
            if answer == lib.MS_SLOW:
                raise KeyboardInterrupt
            return super().slow_path(region, answer)

    reset = Wrong(8 * P)
    once(slot, reset, 1)
    ctypes.memset(slot.base, 1, 20 * P)  # more than may stay: the slow path
    with pytest.raises(KeyboardInterrupt):
        slot.reset(reset)
    assert slot.state is State.UNKNOWN


def test_cycle_through_a_slot_is_collected() -> None:
    slot = Slot.create(MEMORY * P)
    slot.destroy()
    slot.strategy = type("Cycle", (), {"slot": slot})()
    gone = weakref.ref(slot)
    del slot
    gc.collect()
    assert gone() is None


LARGE = 16384
"""Pages of a memory whose reset takes some milliseconds."""


@pytest.mark.parametrize(
    ("last", "pages", "others"), [(4999, 32, False), (4999, LARGE, True), (5000, LARGE, True)]
)
def test_reset_releases_the_gil_if_the_last_one_was_long_or_many_pages_are_found(
    last: int, pages: int, others: bool
) -> None:
    slot, reset = Slot.create(LARGE * P), resets.choose("pagemap", 1 << 40)
    turns, ended = [0], threading.Event()

    def run() -> None:
        while not ended.is_set():
            turns[0] += 1
            time.sleep(0)  # releases the GIL, which the switch interval below does not demand

    def turns_during_a_reset() -> int:
        slot.instantiate(None, LARGE * P)
        ctypes.memset(slot.base, 1, pages * P)
        slot.report.nanoseconds = last
        before = turns[0]
        slot.reset(reset)
        return turns[0] - before

    turns_during_a_reset()
    interval, other = sys.getswitchinterval(), threading.Thread(target=run)
    sys.setswitchinterval(1000)
    try:
        other.start()
        while not turns[0]:
            time.sleep(0.001)
        for _ in range(20):  # a busy machine may not let the other thread run in time
            if (ran := turns_during_a_reset() > 0) == others:
                break
    finally:
        ended.set()
        other.join()
        sys.setswitchinterval(interval)
    assert ran == others
    slot.destroy()
