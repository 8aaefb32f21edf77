"""System calls that are refused after the probe: another way resets the slot and says why, and no slot is lost."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from memslot_plugin import Image, Pool
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin.memory.reset import choose
from memslot_plugin.tests.slots import content, expected, fill, in_child, needs_pagemap

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

Make = Callable[..., Pool]
MCL_CURRENT, MCL_ONFAULT = 1, 4


def serve(pool: Pool, image: Image) -> None:
    """Serve a request that looks for bytes of another tenant and leaves its own."""
    slot = pool.lease(image, 8 * P, affinity="a")
    assert content(slot) == expected(image, 8 * P)
    fill(slot)
    pool.release(slot)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(("open", "pagemap", "madvise: PAGEMAP_SCAN"), marks=needs_pagemap),
        pytest.param(("pagemap_scan", "pagemap", "madvise: PAGEMAP_SCAN"), marks=needs_pagemap),
        pytest.param(("pagemap_scan", "auto", "madvise: PAGEMAP_SCAN"), marks=needs_pagemap),
        ("madvise", "madvise", "remap: MADV_DONTNEED"),
        ("madvise", "copy", "remap: MADV_DONTNEED"),
    ],
    ids="-".join,
)
def test_call_refused_after_the_probe_is_replaced_by_another(
    make_pool: Make, image: Image, inject: Any, case: tuple[str, ...]
) -> None:
    refused, strategy, instead = case
    pool = make_pool(1, reset=choose(strategy, 0))
    serve(pool, image)

    def check() -> None:
        inject(refused, error=errno.EACCES)
        for _ in range(2):
            serve(pool, image)
        now = pool.statistics()
        assert now.resets_by[f"{instead}: {os.strerror(errno.EACCES)}"] == 1
        assert (now.failed_resets, now.destroyed) == (0, 0)
        pool.check()

    in_child(check)  # the child opens a pagemap of its own


@needs_pagemap
def test_pagemap_refused_after_the_probe_changes_are_found_and_warming_has_no_model(
    make_pool: Make, image: Image, inject: Any
) -> None:
    pool = make_pool(1)
    slot = pool.lease(image, 8 * P, affinity="a")
    ctypes.memset(slot.base + 5 * P, 1, 1)

    def check() -> None:
        inject("open", error=errno.EACCES)
        assert slot.changes(P) == [(5 * P, P)]
        inject("open", error=errno.EACCES)
        assert slot.private_runs() is None

    in_child(check)
    pool.release(slot)


@pytest.mark.parametrize("strategy", ["madvise", "copy", "auto"])
def test_pages_locked_after_the_probe_are_put_back_and_no_slot_is_destroyed(
    make_pool: Make, make_image: Callable[..., Image], strategy: str
) -> None:
    """MADV_DONTNEED of locked pages fails with EINVAL (madvise(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(MCL_CURRENT | MCL_ONFAULT):
        pytest.skip(f"impossible: mlockall: {os.strerror(ctypes.get_errno())}")
    libc.munlockall()
    pool = make_pool(1, reset=choose(strategy, P))
    image, other = make_image((0, b"x" * 2 * P), pages=2), make_image((4, b"y"), pages=5)
    serve(pool, image)

    def check() -> None:
        assert libc.mlockall(MCL_CURRENT | MCL_ONFAULT) == 0
        for each in (image, image, other, image):
            serve(pool, each)
        assert libc.mlockall(MCL_CURRENT | MCL_ONFAULT) == 0
        assert pool.purge(image) == 1
        serve(pool, other)
        now = pool.statistics()
        assert "remap: MADV_DONTNEED: Invalid argument" in now.resets_by
        assert (now.failed_resets, now.destroyed) == (0, 0)
        pool.check()

    in_child(check)
