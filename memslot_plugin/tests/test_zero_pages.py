"""Pages of an image that a guest filled with zeros, and that the kernel turned into its shared page of zeros."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memslot_plugin import BytesImage, MemfdImage, Slot
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import ffi, lib
from memslot_plugin.memory.probe import pagemap_descriptor
from memslot_plugin.memory.reset import choose
from memslot_plugin.tests.slots import needs_pagemap

pytestmark = [pytest.mark.usefixtures("no_leaks"), needs_pagemap]

HUGE = 2 << 20
IMAGE = bytes(range(1, 129)) * (3 * HUGE // 128)
HUGEPAGE, COLD, COLLAPSE, MERGEABLE = 14, 20, 25, 12

every_reset = pytest.mark.parametrize("reset", ["pagemap", "auto"])


def advise(address: int, length: int, advice: int) -> None:
    """Call madvise(2), and skip the test if the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice):
        pytest.skip(f"impossible: madvise {advice}: {os.strerror(ctypes.get_errno())}")


def is_private(address: int) -> bool:
    """Return True unless the page is the shared page of zeros."""
    report = ffi.new("ms_reset_report *")
    assert (
        lib.ms_list_private(
            pagemap_descriptor(), ffi.new("ms_memory *", (address, P)), ffi.NULL, 0, report
        )
        == 0
    )
    return bool(report.private_pages)


def assert_reset_puts_back(slot: Slot, reset: str) -> None:
    slot.reset(choose(reset, 1 << 30))
    assert slot.first_difference() is None


@every_reset
def test_page_of_a_copied_image_that_a_split_made_zero_is_put_back(reset: str) -> None:
    """Since Linux 6.12 a split of a huge page maps the shared page of zeros for its zeros."""
    slot = Slot.create(3 * HUGE)
    with BytesImage("split", IMAGE) as image:
        slot.instantiate(image, 3 * HUGE)
        start = -(-slot.base // HUGE) * HUGE
        advise(start, HUGE, HUGEPAGE)
        advise(start, HUGE, COLLAPSE)
        ctypes.memset(start + 5 * P, 0, P)
        advise(start + 100 * P, P, COLD)
        if is_private(start + 5 * P):
            pytest.skip("impossible: this kernel keeps pages of zeros when it splits a huge one")
        assert_reset_puts_back(slot, reset)
        slot.destroy()


@contextmanager
def merging() -> Iterator[None]:
    """Let the kernel merge equal pages; those of zeros become the shared page."""
    wanted = {"use_zero_pages": "1", "pages_to_scan": "10000", "sleep_millisecs": "1", "run": "1"}
    folder = Path("/sys/kernel/mm/ksm")
    before = {}
    try:
        for name, value in wanted.items():
            before[name] = (folder / name).read_text()
            (folder / name).write_text(value)
    except OSError as error:
        pytest.skip(f"impossible: {error}")
    try:
        yield
    finally:
        for name, value in before.items():
            (folder / name).write_text(value)


@pytest.mark.gate
@every_reset
def test_page_of_a_mapped_image_that_merging_made_zero_is_put_back(reset: str) -> None:
    slot = Slot.create(64 * P)
    with MemfdImage("merged", IMAGE[: 32 * P]) as image, merging():
        slot.instantiate(image, 64 * P)
        advise(slot.base, 64 * P, MERGEABLE)
        ctypes.memset(slot.base + 5 * P, 0, P)
        deadline = time.monotonic() + 30
        while is_private(slot.base + 5 * P):
            assert time.monotonic() < deadline, "the kernel merges nothing"
            time.sleep(0.01)
        assert_reset_puts_back(slot, reset)
        slot.destroy()
