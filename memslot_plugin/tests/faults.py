"""Failures of the core's system calls: the plausible errnos of each, and a walk over all of them.

A *life* is a function that uses memslot from beginning to end. A first run counts its system calls. A further run per
fault follows: each call x each occurrence x each errno.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from memslot_plugin import _core
from memslot_plugin.tests.profiles import LONG

PLAUSIBLE: dict[str, tuple[int, ...]] = {
    call: tuple(getattr(errno, name) for name in names.split())
    for call, names in {
        "mmap": "ENOMEM EAGAIN EPERM EACCES ENFILE EINVAL",
        "munmap": "ENOMEM EINVAL EPERM",
        "mprotect": "ENOMEM EACCES EINVAL EPERM",
        "madvise": "EINVAL ENOMEM EAGAIN EPERM EFAULT",
        "memfd_create": "EMFILE ENFILE ENOMEM ENOSYS EPERM EACCES EINVAL",
        "ftruncate": "ENOMEM EFBIG EINTR EINVAL EIO EPERM",
        "pwrite": "ENOSPC ENOMEM EINTR EFBIG EIO EPERM",
        "fcntl": "EPERM EINVAL EBUSY ENOMEM",
        "close": "EIO EINTR ENOSPC",
        "open": "EACCES ENOENT EMFILE ENFILE EPERM",
        "pagemap_scan": "ENOTTY EPERM EINVAL ENOMEM EINTR",
    }.items()
}
"""Errnos of the manual pages, of a seccomp profile (EPERM, EACCES, ENOSYS) and of mseal(2) (EPERM)."""

MADE_AGAIN = {
    ("pwrite", errno.EINTR),
    ("pagemap_scan", errno.EINTR),
    ("memfd_create", errno.EINVAL),  # a kernel that does not know MFD_NOEXEC_SEAL
    ("fcntl", errno.EBUSY),  # a page of the file is pinned elsewhere
    ("ftruncate", errno.EINVAL),  # of a new memfd: the core makes both calls at once
}
"""Failures after which the core repeats the call, and no error is raised."""

LEAKING = ("munmap", "close")
"""Calls that give something back. A failure is logged and counted, and the object leaks."""

DONE_WITHOUT = ("madvise", "open", "pagemap_scan")
"""Calls that a reset replaces by another one. The reason of that reset names the call."""


def fail_next_reset(inject: Any, error: int) -> None:
    """Make the next reset fail: its pages are neither dropped nor mapped over."""
    inject("madvise", error=error)
    inject("mmap", error=error)


@dataclass(frozen=True)
class Fault:
    """A failure with `error` of the (skip + 1)-th call of this name."""

    call: str
    skip: int
    error: int

    def __str__(self) -> str:
        return (
            f"{self.call} failed with {errno.errorcode[self.error]} after {self.skip} that did not"
        )

    @property
    def is_made_again(self) -> bool:
        return (self.call, self.error) in MADE_AGAIN

    @property
    def may_be_silent(self) -> bool:
        return self.is_made_again or self.call in DONE_WITHOUT


@dataclass
class Injection:
    """The outcome of a fault. `hit` is true if the life reached it; the log is memslot's."""

    fault: Fault
    hit: bool = False
    logged: list[str] = field(default_factory=list)


@contextmanager
def injected(fault: Fault) -> Iterator[Injection]:
    """Arm a fault for a block."""
    injection = Injection(fault)
    log, keeper = logging.getLogger("memslot"), logging.Handler(logging.WARNING)
    keeper.emit = lambda record: injection.logged.append(keeper.format(record))  # type: ignore[method-assign]
    propagates, log.propagate = log.propagate, False
    log.addHandler(keeper)
    before = _core.counters()[fault.call]
    _core.inject(fault.call, skip=fault.skip, error=fault.error)
    try:
        yield injection
    except BaseException:
        print(fault)
        raise
    finally:
        injection.hit = _core.counters()[fault.call] - before > fault.skip
        _core.inject(fault.call, error=0)
        log.removeHandler(keeper)
        log.propagate = propagates


def calls_of(life: Callable[[], object]) -> dict[str, int]:
    """Count the system calls of a life without faults. Of two runs the fewer: a call may be repeated."""
    fewest: dict[str, int] = {}
    for _ in range(2):
        before = _core.counters()
        life()
        after = _core.counters()
        fewest = {
            call: min(after[call] - before[call], fewest.get(call, after[call])) for call in after
        }
    return fewest


def every(made: dict[str, int], *, thorough: bool = LONG) -> Iterator[Fault]:
    """Yield each fault of a life with these calls. Unless `thorough`, each occurrence gets one errno, in turn."""
    for call, number in made.items():
        errors = PLAUSIBLE[call]
        for skip in range(number):
            for error in errors if thorough else errors[skip % len(errors) :][:1]:
                yield Fault(call, skip, error)
