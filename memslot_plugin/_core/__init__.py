"""The C core as Python sees it: ffi, lib, and the page size; counters, injected failures and forks."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from memslot_plugin._core import _fast as _fast  # tells mypy that this is a module
from memslot_plugin._core import _lib as _lib
from memslot_plugin._core.limits import system_call_error

_log = logging.getLogger("memslot.core")

ffi: Any = _lib.ffi
lib: Any = _lib.lib
FastRegion = _fast.Region
"""The base class of a region (region.c)."""
InstanceReset = _fast.InstanceReset
"""The reset in place of one instance on wasmtime (region.c)."""
Export = _fast.Export
"""A function that a guest on wasmtime exports (function.c)."""
read = _fast.read
"""Copy bytes of a wasmtime memory within one entry; returns them, or the flag (`enum ms_wt_flag`) that refused."""

PAGE_SIZE: int = lib.ms_page_size()
"""The host's page in bytes, asked of the kernel (sysconf(3), _SC_PAGESIZE) and never assumed."""

CALLS = (
    "mmap",
    "munmap",
    "mprotect",
    "madvise",
    "memfd_create",
    "ftruncate",
    "pwrite",
    "fcntl",
    "close",
    "open",
    "pagemap_scan",
)
"""The system calls that the core counts, in the order of `enum ms_call` in memslot.h."""


def align_up(byte_size: int, page_size: int = PAGE_SIZE) -> int:
    """Return `byte_size` rounded up to a whole number of host pages."""
    return -(-byte_size // page_size) * page_size


def check(result: int, what: str) -> None:
    """Raise SystemCallError if `result` is a negated errno; `what` was attempted."""
    if result < 0:
        raise system_call_error(-result, what)


def counters() -> dict[str, int]:
    """Return how often the core made each system call since this process began."""
    counts = ffi.new("uint64_t[]", lib.MS_CALLS)
    lib.ms_counters(counts)
    return dict(zip(CALLS, counts, strict=True))


def inject(call: str, *, skip: int = 0, error: int) -> None:
    """Let the (skip + 1)-th next system call of this name fail once with `error`; 0 disarms.  For tests."""
    check(lib.ms_inject(CALLS.index(call), skip, error), "ms_inject")


def _address(name: str) -> int:
    """Return the address of a function or variable of the core, by its name without `ms_`."""
    return int(ffi.cast("uintptr_t", ffi.addressof(lib, f"ms_{name}")))


def install_fast_path(dirty: object, clean: object, result_type: type) -> None:
    """Tell `FastRegion` two states of a slot and the type of a reset's result."""
    names = "reset_fast", "wt_copy", "wt_acquire", "wt_release", "wt_restore", "wt_call"
    _fast.install(*map(_address, names), dirty, clean, result_type)


leaks: Counter[str] = Counter()
"""Ranges and descriptors that the kernel refused to take back."""


def leak(result: int, what: str) -> None:
    """Log and count what stays mapped or open if `result` is a negated errno; nothing is tried again.

    No tenant can reach it: an address range is inaccessible or pristine, and a descriptor is ours.
    """
    if result < 0:
        leaks[what] += 1
        _log.error("leaked %s: %s", what, os.strerror(-result))


_after_fork: list[Callable[[], None]] = []
_catching_up = threading.RLock()
"""Held by the thread of a child that runs the routines; other threads of the child wait for it."""


def after_fork(routine: Callable[[], None]) -> None:
    """Have `routine` run in each child of a fork: at once after os.fork, else at the next `catch_up`."""
    _after_fork.append(routine)


def _run_after_fork() -> None:
    with _catching_up:
        if (forks := lib.ms_forks) != lib.ms_forks_seen:
            for routine in _after_fork:
                routine()
            lib.ms_forks_seen = forks


catch_up = _fast.catch_up
"""Run the routines of `after_fork` in a child that has not run them: a C library's fork(3) tells the core alone.

Call this before a lock is taken, or a mapping used, that may be the parent's.
"""

_fast.watch_forks(_address("forks"), _address("forks_seen"), _run_after_fork)
check(lib.ms_watch_forks(), "watching for forks")
os.register_at_fork(after_in_child=catch_up)
