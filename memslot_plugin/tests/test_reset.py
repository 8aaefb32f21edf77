"""The probe finds out what the kernel does, and a reset is chosen by that."""

from __future__ import annotations

import ctypes
import errno
import importlib
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from memslot_plugin import BytesImage, MemfdImage, Slot, Unsupported, _core
from memslot_plugin import reset as resets
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin.errors import SlotError, SystemCallError
from memslot_plugin.probe import Finding, pagemap_descriptor, probe
from memslot_plugin.tests.slots import fill, in_threads, needs_pagemap, use

pytestmark = pytest.mark.usefixtures("no_leaks")

probing = importlib.import_module("memslot_plugin.probe")  # the package exports its function


@pytest.fixture
def fresh_probe() -> Iterator[None]:
    probe.cache_clear()
    yield
    probe.cache_clear()
    probe()


@pytest.fixture
def image() -> Iterator[MemfdImage]:
    with MemfdImage("reset", b"x" * 2 * P) as made:
        yield made


@pytest.fixture
def slot(image: MemfdImage) -> Iterator[Slot]:
    """A leased slot that grew; every byte was written."""
    made = Slot.create(16 * P)
    made.instantiate(image, 8 * P)
    made.grow(10 * P)
    fill(made)
    yield made
    made.destroy()


def pretend(monkeypatch: pytest.MonkeyPatch, **findings: bool) -> None:
    changes: dict[str, Any] = {
        name: Finding(works, "pretended") for name, works in findings.items()
    }
    found = replace(probe(), **changes)
    monkeypatch.setattr(resets, "probe", lambda: found)


# The probe


@pytest.mark.usefixtures("fresh_probe")
@pytest.mark.parametrize(
    ("call", "error", "wrong"),
    [
        *(("memfd_create", error, "memfd") for error in (errno.ENOSYS, errno.EPERM, errno.EACCES)),
        *(("fcntl", error, "memfd") for error in (errno.EPERM, errno.EINVAL)),
        *(("pagemap_scan", error, "pagemap") for error in (errno.ENOTTY, errno.EPERM)),
        *(("madvise", error, "dontneed") for error in (errno.EINVAL, errno.EPERM)),
    ],
)
def test_probe_reports_a_refused_call_as_a_finding_with_its_reason(
    inject: Any, call: str, error: int, wrong: str
) -> None:
    inject(call, error=error)
    finding = getattr(probe(), wrong)
    assert not finding.works
    assert os.strerror(error) in finding.detail
    assert probe() is probe()


@pytest.mark.usefixtures("fresh_probe")
@pytest.mark.parametrize("works", [True, False])
def test_probe_without_a_memfd_tries_dropping_on_zeros(inject: Any, works: bool) -> None:
    inject("memfd_create", error=errno.ENOSYS)
    if not works:
        inject("madvise", error=errno.EINVAL)
    assert probe().dontneed.works == works


@needs_pagemap
def test_probe_tries_the_scan_on_files_on_zeros_and_without_swap(inject: Any) -> None:
    assert probing._probe_pagemap(False).works
    if probe().memfd.works:
        assert probing._probe_pagemap(True).works
    inject("madvise", error=errno.EINVAL)
    assert probing._probe_pagemap(False).works


@needs_pagemap
@pytest.mark.parametrize(
    ("seen", "why"),
    [
        ([[0, 1, 3]], "takes the pages [0, 1, 3] for private where [1, 3] were written"),
        ([[3]], "takes the pages [3] for private where [1, 3] were written"),
        ([[1, 3], [3]], "where [1, 3] were written that may be swapped out"),
        ([None], os.strerror(errno.ENOTTY)),
    ],
    ids=["page of the file", "written page is missed", "swapped page is missed", "no such call"],
)
def test_probe_refuses_a_scan_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, seen: list[list[int] | None], why: str
) -> None:
    answers = iter([([], errno.ENOTTY) if pages is None else (pages, 0) for pages in seen])
    monkeypatch.setattr(probing, "_private_pages", lambda *_: next(answers))
    finding = probing._probe_pagemap(False)
    assert not finding.works
    assert why in finding.detail


TIMES = {
    "empty drop": 1_000,
    "reads": 130_000,
    "again": 2_000,
    "writes": 600_000,
    "rewrites": 88_000,
    "drop": 257_000,
}
"""Measurements of one round of the prices, in this order, with made-up nanoseconds for 256 pages."""


@needs_pagemap
@pytest.mark.parametrize("disturbed", range(len(TIMES)), ids=TIMES)
def test_prices_ignore_a_measurement_that_was_disturbed(
    monkeypatch: pytest.MonkeyPatch, disturbed: int
) -> None:
    """A page that costs nothing would never be given back."""
    calls, times = itertools.count(), list(TIMES.values())

    def measured(call: Callable[[], object]) -> int:
        call()
        place = next(calls)
        return times[place % 6] + 4_000_000 * (place == 2 * 6 + disturbed)

    monkeypatch.setattr(probing, "_nanoseconds", measured)
    found = probing.prices.__wrapped__()
    assert (found.drop_page, found.write_fault, found.read_fault_page) == (1000, 2000, 500)
    assert next(calls) == 5 * 6


# The choice


@pytest.mark.parametrize(
    ("setting", "here", "strategy"),
    [
        ("madvise", {}, "madvise"),
        ("copy", {}, "copy"),
        ("copy", {"dontneed": False, "memfd": False, "pagemap": False}, "copy"),
        ("auto", {"pagemap": False}, "madvise"),
        ("auto", {"pagemap": False, "dontneed": False}, "remap"),
        ("auto", {"pagemap": True, "dontneed": False}, "remap"),
        ("madvise", {"dontneed": False}, "remap"),
        ("madvise", {"dontneed": False, "memfd": False}, "remap"),
        pytest.param("pagemap", {"dontneed": False}, "pagemap", marks=needs_pagemap),
    ],
)
def test_setting_becomes_a_strategy_that_the_kernel_can_do(
    monkeypatch: Any, slot: Slot, calls: Any, *, setting: str, here: dict[str, bool], strategy: str
) -> None:
    pretend(monkeypatch, **here)
    with calls() as made:
        assert use(slot, resets.choose(setting, 0)).strategy == strategy
    assert here.get("dontneed", True) or "madvise" not in made


def test_pagemap_without_the_system_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, pagemap=False)
    sentence = "reset = pagemap is not possible here: pretended; allowed: auto, madvise, copy"
    with pytest.raises(Unsupported, match=re.escape(sentence)):
        resets.choose("pagemap", 0)


def test_copy_makes_no_call_within_its_budget_and_drops_above_it(slot: Slot, calls: Any) -> None:
    slot.reset(resets.madvise)
    for keep, dirty, reason in ((8 * P, 8 * P, ""), (7 * P, None, "keep_resident")):
        slot.instantiate(slot.image, 8 * P)
        with calls() as made:
            result = use(slot, resets.choose("copy", keep))
        assert (result.dirty_bytes, result.reason) == (dirty, reason)
        assert bool(made) == bool(reason)


@pytest.mark.parametrize(
    ("setting", "keep", "call", "named"),
    [
        ("madvise", 0, "madvise", "MADV_DONTNEED"),
        ("copy", 0, "madvise", "MADV_DONTNEED"),
        pytest.param("pagemap", 1 << 30, "pagemap_scan", "PAGEMAP_SCAN", marks=needs_pagemap),
    ],
)
def test_failed_reset_makes_the_slot_unknown_and_the_next_use_right(
    slot: Slot, inject: Any, *, setting: str, keep: int, call: str, named: str
) -> None:
    inject(call, error=errno.EPERM)
    with pytest.raises(SystemCallError, match=f"{named} in a reset: Operation not permitted"):
        slot.reset(resets.choose(setting, keep))
    with pytest.raises(SlotError, match="this one is unknown"):
        slot.reset(resets.madvise)
    slot.instantiate(slot.image, 8 * P)
    slot.grow(10 * P)
    assert slot.first_difference() is None


@needs_pagemap
@pytest.mark.parametrize("kind", [MemfdImage, BytesImage, None])
@pytest.mark.parametrize("first", [0, 1, 40])
@pytest.mark.parametrize("keep", [0, P, 3 * P, 1 << 30])
@pytest.mark.parametrize("setting", ["pagemap", "auto", "copy"])
def test_pages_above_the_budget_are_dropped(kind: Any, first: int, keep: int, setting: str) -> None:
    """Pages that were copied from an image are kept: they would not come back."""
    image = kind("kept", bytes(first * P) + b"x" * 2 * P) if kind else None
    slot = Slot.create(128 * P)
    slot.instantiate(image, 64 * P)
    for _ in range(3):
        use(slot, resets.choose(setting, keep))
        report = _core.ffi.new("ms_reset_report *")
        counted = _core.lib.ms_count_private(pagemap_descriptor(), slot.base, 64 * P, report)
        assert counted == 0
        assert report.private_pages <= keep // P + 2 * (kind is BytesImage)
        slot.instantiate(image, 64 * P)
    slot.destroy()


@needs_pagemap
def test_resets_in_many_threads_report_their_own_numbers() -> None:
    """A report that all threads shared would tell the numbers of another slot."""
    reset = resets.choose("auto", 1 << 30)
    wrong: list[tuple[int, int | None]] = []

    def work(pages: int) -> None:
        slot = Slot.create(1024 * P)
        for _ in range(30):
            slot.instantiate(None, 1024 * P)
            for page in range(pages):
                ctypes.memset(slot.base + page * P, 1, 1)
            found = slot.reset(reset).dirty_bytes
            if found != pages * P:
                wrong.append((pages, found))
        slot.destroy()

    in_threads(work, (1, 300, 700, 5))
    assert not wrong
