"""The probe takes for granted what it has seen, and nothing else."""

from __future__ import annotations

import errno
import importlib
import itertools
from collections.abc import Callable

import pytest

from memslot_plugin._core import lib

probing = importlib.import_module(
    "memslot_plugin.probe"
)  # the package shows its function by that name
works = probing.probe().pagemap.works
needs_scan = pytest.mark.skipif(not works, reason="impossible: there is no PAGEMAP_SCAN here")


@needs_scan
@pytest.mark.parametrize("with_image", [True, False])
def test_the_scan_is_tried_on_files_and_on_zeros(with_image: bool) -> None:
    if with_image and not probing.probe().memfd.works:
        pytest.skip("impossible: there is no memfd here")
    assert probing._probe_pagemap(with_image).works


@needs_scan
@pytest.mark.parametrize(
    ("seen", "why"),
    [
        ([[0, 1, 3]], "takes the pages [0, 1, 3] for private where [1, 3] were written"),
        ([[3]], "takes the pages [3] for private where [1, 3] were written"),
        ([[1, 3], [3]], "where [1, 3] were written that may be swapped out"),
    ],
    ids=["the file's own page", "a page of the image is missed", "a swapped page is missed"],
)
def test_a_scan_that_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, seen: list[list[int]], why: str
) -> None:
    answers = iter(seen)
    monkeypatch.setattr(probing, "_private_pages", lambda *_: (next(answers), 0))
    finding = probing._probe_pagemap(False)
    assert not finding.works
    assert finding.detail.endswith(why)


@needs_scan
def test_a_machine_that_swaps_nothing_out_is_no_matter() -> None:
    lib.ms_inject(lib.MS_MADVISE, 0, errno.EINVAL)
    try:
        assert probing._probe_pagemap(False).works
    finally:
        lib.ms_inject(lib.MS_MADVISE, 0, 0)


@needs_scan
def test_a_scan_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_private_pages", lambda *_: ([], errno.ENOTTY))
    assert "Inappropriate ioctl" in probing._probe_pagemap(False).detail


TIMES = ["empty drop", "reads", "again", "writes", "rewrites", "drop"]
"""What a round of the prices measures, in this order."""


@needs_scan
@pytest.mark.parametrize("disturbed", range(len(TIMES)), ids=TIMES)
def test_a_disturbance_makes_nothing_free(monkeypatch: pytest.MonkeyPatch, disturbed: int) -> None:
    """A page that costs nothing would never be given back."""
    measure, calls = probing._nanoseconds, itertools.count()

    def with_a_tick(call: Callable[[], object]) -> int:
        place = next(calls)
        return int(measure(call)) + 4_000_000 * (place == 2 * len(TIMES) + disturbed)

    monkeypatch.setattr(probing, "_nanoseconds", with_a_tick)
    found = probing.prices.__wrapped__()
    assert min(found.drop_page, found.write_fault, found.read_fault_page) > 1
    assert next(calls) == 5 * len(TIMES)
