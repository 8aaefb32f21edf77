"""Failures of the core's system calls: the errnos that each may plausibly give, and a walk over all of them.

A *life* is a function that uses memslot from beginning to end.  It is run once to count its system calls, and then
once per fault: each call of it x each occurrence x each errno.
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
"""Answers of the manual pages, of a seccomp profile (EPERM, EACCES, ENOSYS) and of mseal(2) (EPERM)."""

MADE_AGAIN = {
    ("pwrite", errno.EINTR),
    ("pagemap_scan", errno.EINTR),
    ("memfd_create", errno.EINVAL),  # a kernel that does not know MFD_NOEXEC_SEAL
    ("fcntl", errno.EBUSY),  # another holder of a page that is to be sealed
    ("ftruncate", errno.EINVAL),  # of a new memfd, for the core makes both calls at once
}
"""Failures after which the same call is made again, so that no error is raised."""

LEAKING = ("munmap", "close")
"""Calls that give something back: what the kernel refuses to take is logged, counted and leaked."""

DONE_WITHOUT = ("madvise", "open", "pagemap_scan")
"""Calls that some of their callers do without: a reset is done by another one then, and its reason names the call."""


def fail_next_reset(inject: Any, error: int) -> None:
    """Let pages be neither dropped nor mapped over, once."""
    inject("madvise", error=error)
    inject("mmap", error=error)


@dataclass(frozen=True)
class Fault:
    """The (skip + 1)-th call of this name fails with `error`."""

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
    """The outcome of a fault: true in `hit` if the life got that far, and memslot's log."""

    fault: Fault
    hit: bool = False
    logged: list[str] = field(default_factory=list)


@contextmanager
def injected(fault: Fault) -> Iterator[Injection]:
    """Arms the fault for a block, and disarms it however the block ends."""
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
    """Count the system calls of a life in which nothing fails: the fewer of two, for one may be made again."""
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
    """Yield every fault of a life that makes so many calls; not `thorough`, with one errno per occurrence, in turn."""
    for call, number in made.items():
        errors = PLAUSIBLE[call]
        for skip in range(number):
            for error in errors if thorough else errors[skip % len(errors) :][:1]:
                yield Fault(call, skip, error)
