"""The C core: what it offers to Python, and the one place where an errno becomes an exception."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memslot_plugin._core import _lib as _lib  # said to the type checker: it is a module here
from memslot_plugin._core import _watched as _watched
from memslot_plugin.errors import SystemCallError

if TYPE_CHECKING:
    from memslot_hooks.types import ResetResult

ffi: Any = _lib.ffi
lib: Any = _lib.lib
Watched = _watched.Watched
"""What of a slot is written in C (watched.c)."""
read = _watched.read
"""Bytes of a memory of an instance of wasmtime's, within one entry; or the flag that says why not."""

PAGE_SIZE: int = lib.ms_page_size()
"""The host's page in bytes, as the kernel says (sysconf(3), _SC_PAGESIZE); never assumed."""

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
"""The system calls that the core makes, in the order of `enum ms_call`."""


def counters() -> dict[str, int]:
    """How often each system call was made by the core since this process began."""
    counts = ffi.new("uint64_t[]", lib.MS_CALLS)
    lib.ms_counters(counts)
    return dict(zip(CALLS, counts, strict=True))


def inject(call: str, *, skip: int = 0, error: int) -> None:
    """Let the (skip + 1)-th next system call of this name fail once with `error`; 0 disarms.  For
    tests.
    """
    check(lib.ms_inject(CALLS.index(call), skip, error), "ms_inject")


def install_resets(
    dirty: object, clean: object, unknown: object, results: Mapping[int, ResetResult]
) -> None:
    """Tell `Watched` the states of a slot, and the results of ordinary resets by the core's answer."""
    reset, copy = (
        int(ffi.cast("uintptr_t", ffi.addressof(lib, name)))
        for name in ("ms_reset_watched", "ms_wt_copy")
    )
    _watched.install(reset, copy, dirty, clean, unknown, results)


_after_fork: list[Callable[[], None]] = []
_forks_seen = lib.ms_forks
_catching_up = threading.RLock()
"""Held while a child does what it has to do first; another thread of it waits."""


def after_fork(routine: Callable[[], None]) -> None:
    """Have `routine` run in each child of a fork: at once if Python forks, else when `catch_up` is called next."""
    _after_fork.append(routine)


def catch_up() -> None:
    """Do what a child of a fork has to do first, unless it is done: a C library's fork(3) tells the core alone.

    Call it before a lock is taken, or a mapping used, that may be the parent's.
    """
    global _forks_seen  # noqa: PLW0603 - a fact of the process
    if lib.ms_forks != _forks_seen:
        with _catching_up:
            if (forks := lib.ms_forks) != _forks_seen:
                for routine in _after_fork:
                    routine()
                _forks_seen = forks


def align_up(byte_size: int, page_size: int = PAGE_SIZE) -> int:
    """`byte_size` rounded up to a whole number of host pages."""
    return -(-byte_size // page_size) * page_size


def check(result: int, what: str) -> None:
    """Raise SystemCallError if the core answered -errno; `what` says what was attempted, in words
    of the caller.
    """
    if result < 0:
        raise system_call_error(-result, what)


def system_call_error(error: int, what: str) -> SystemCallError:
    """The exception for `error`, with the limit that lifts it, and its value now, where one is
    known.
    """
    knob = _knob(error)
    message = f"{what}: {os.strerror(error)}" + (f" ({knob})" if knob else "")
    return SystemCallError(error, message)


def _knob(error: int) -> str:
    if error == errno.ENOMEM:
        allowed, used = (_or_unknown(count) for count in (max_map_count(), map_count()))
        parts = [f"vm.max_map_count is {allowed} with {used} mappings in use"]
        parts.append(f"RLIMIT_AS (ulimit -v) is {_limit(resource.RLIMIT_AS)}")
        if resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY:
            parts.append(f"RLIMIT_DATA (ulimit -d) is {_limit(resource.RLIMIT_DATA)}")
        overcommit = _read_number("/proc/sys/vm/overcommit_memory")
        if overcommit == 2:
            ratio = _or_unknown(_read_number("/proc/sys/vm/overcommit_ratio"))
            parts.append(
                f"vm.overcommit_memory is 2 and vm.overcommit_ratio {ratio}, which limits what can be committed"
            )
        return "; ".join(parts)
    if error in LIMITS:
        name, which, command = LIMITS[error]
        return f"{name} ({command}) is {_limit(which)}"
    return ""


LIMITS = {
    errno.EMFILE: ("RLIMIT_NOFILE", resource.RLIMIT_NOFILE, "ulimit -n"),
    errno.ENFILE: ("RLIMIT_NOFILE", resource.RLIMIT_NOFILE, "ulimit -n"),
    errno.EFBIG: ("RLIMIT_FSIZE", resource.RLIMIT_FSIZE, "ulimit -f"),  # of images, too
    errno.EAGAIN: (
        "RLIMIT_MEMLOCK",
        resource.RLIMIT_MEMLOCK,
        "ulimit -l",
    ),  # mmap(2) after mlockall(2)
}
"""What lifts an error that one limit of the process causes: its name, and the shell's command for it."""


def _limit(which: int) -> str:
    soft, _ = resource.getrlimit(which)
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def _or_unknown(number: int | None) -> str:
    return "unknown" if number is None else str(number)


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_bytes())
    except (OSError, ValueError):  # /proc may be missing or masked
        return None


def max_map_count() -> int | None:
    """The kernel's limit on mappings per process (proc(5), vm.max_map_count), or None where /proc
    hides it.
    """
    return _read_number("/proc/sys/vm/max_map_count")


def map_count() -> int | None:
    """The number of mappings that this process has now, or None where /proc hides it."""
    try:
        with Path("/proc/self/maps").open("rb") as maps:
            return sum(1 for _ in maps)
    except OSError:  # as above
        return None


check(lib.ms_watch_forks(), "watching for forks")
os.register_at_fork(after_in_child=catch_up)
