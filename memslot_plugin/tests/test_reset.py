"""The probe of the kernel, prices, and the choice of a reset."""

from __future__ import annotations

import errno
import importlib
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from memslot_plugin import MemfdImage, Slot, Unsupported
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin.errors import SlotError, SystemCallError
from memslot_plugin.memory import reset as resets
from memslot_plugin.memory.probe import Finding, probe
from memslot_plugin.tests.faults import fail_next_reset
from memslot_plugin.tests.slots import fill, needs_pagemap, use

pytestmark = pytest.mark.usefixtures("no_leaks")

pricing: Any = importlib.import_module("memslot_plugin.memory.prices")
probing = importlib.import_module("memslot_plugin.memory.probe")  # the package exports its function


@pytest.fixture
def fresh_probe() -> Iterator[None]:
    probe.cache_clear()
    yield
    probe.cache_clear()
    probe()


@pytest.fixture
def slot() -> Iterator[Slot]:
    """Return a leased slot that grew, with each byte written."""
    made = Slot.create(16 * P)
    with MemfdImage("reset", b"x" * 2 * P) as image:
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
    ("call", "wrong"),
    [
        ("memfd_create", "memfd"),
        ("fcntl", "memfd"),
        ("pagemap_scan", "pagemap"),
        ("madvise", "dontneed"),
    ],
)
def test_probe_reports_a_refused_call_as_a_finding_with_its_reason(
    inject: Any, call: str, wrong: str
) -> None:
    inject(call, error=errno.EPERM)
    finding = getattr(probe(), wrong)
    assert not finding.works
    assert os.strerror(errno.EPERM) in finding.detail
    assert probe().dontneed.works == (
        call != "madvise"
    )  # without a memfd the probe tries the scan on zeros
    assert probe() is probe()


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


TIMES = (1_000, 130_000, 2_000, 600_000, 88_000, 257_000)
"""Made-up nanoseconds for 256 pages: an empty drop, reads, reads again, writes, writes again, a drop."""


@needs_pagemap
@pytest.mark.parametrize("disturbed", range(len(TIMES)))
def test_prices_ignore_a_measurement_that_was_disturbed(
    monkeypatch: pytest.MonkeyPatch, disturbed: int
) -> None:
    """A page with the price 0 would never be given back."""
    calls = itertools.count()

    def measured(call: Callable[[], object]) -> int:
        call()
        place = next(calls)
        return TIMES[place % 6] + 4_000_000 * (place == 2 * 6 + disturbed)

    monkeypatch.setattr(pricing, "_nanoseconds", measured)
    found = pricing.prices.__wrapped__()
    assert (found.drop_page, found.write_fault, found.read_fault_page) == (1000, 2000, 500)
    assert next(calls) == 5 * 6


# The choice


@pytest.mark.parametrize(
    ("setting", "here", "strategy"),
    [
        ("madvise", {}, "madvise"),
        ("copy", {"dontneed": False, "memfd": False, "pagemap": False}, "copy"),
        ("auto", {"pagemap": False}, "madvise"),
        ("auto", {"pagemap": False, "dontneed": False}, "remap"),
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


def test_copying_reset_within_its_budget_makes_no_call_and_above_it_drops(
    slot: Slot, calls: Any
) -> None:
    slot.reset(resets.madvise)
    for keep, dirty, reason in ((8 * P, 8 * P, ""), (7 * P, None, "keep_resident")):
        slot.instantiate(slot.image, 8 * P)
        with calls() as made:
            result = use(slot, resets.choose("copy", keep))
        assert (result.dirty_bytes, result.reason) == (dirty, reason)
        assert bool(made) == bool(reason)


def test_failed_reset_makes_the_slot_unknown_and_the_next_use_right(
    slot: Slot, inject: Any
) -> None:
    fail_next_reset(inject, errno.EPERM)
    with pytest.raises(SystemCallError, match="mapping over a slot in a reset: Operation not perm"):
        slot.reset(resets.madvise)
    with pytest.raises(SlotError, match="this one is unknown"):
        slot.reset(resets.madvise)
    slot.instantiate(slot.image, 8 * P)
    slot.grow(10 * P)
    assert slot.first_difference() is None
