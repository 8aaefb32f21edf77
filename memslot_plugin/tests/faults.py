"""Failures of the core's system calls: what each may plausibly fail with, and a walk over all of them.

A *life* is a function that uses memslot from beginning to end.  It is run once to count its system calls, and then
once per fault: each call of it x each occurrence x each errno.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from memslot_plugin import _core
from memslot_plugin.tests.profiles import LONG

PLAUSIBLE: dict[str, tuple[int, ...]] = {
    "mmap": (errno.ENOMEM, errno.EAGAIN, errno.EPERM, errno.EACCES, errno.ENFILE, errno.EINVAL),
    "munmap": (errno.ENOMEM, errno.EINVAL, errno.EPERM),
    "mprotect": (errno.ENOMEM, errno.EACCES, errno.EINVAL, errno.EPERM),
    "madvise": (errno.EINVAL, errno.ENOMEM, errno.EAGAIN, errno.EPERM, errno.EFAULT),
    "memfd_create": (
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOSYS,
        errno.EPERM,
        errno.EACCES,
        errno.EINVAL,
    ),
    "ftruncate": (errno.ENOMEM, errno.EFBIG, errno.EINTR, errno.EINVAL, errno.EIO, errno.EPERM),
    "pwrite": (errno.ENOSPC, errno.ENOMEM, errno.EINTR, errno.EFBIG, errno.EIO, errno.EPERM),
    "fcntl": (errno.EPERM, errno.EINVAL, errno.EBUSY, errno.ENOMEM),
    "close": (errno.EIO, errno.EINTR, errno.ENOSPC),
    "pagemap_scan": (errno.ENOTTY, errno.EPERM, errno.EINVAL, errno.ENOMEM, errno.EINTR),
}
"""What the manual pages, a seccomp profile (EPERM, EACCES, ENOSYS) and mseal(2) (EPERM) may answer."""

MADE_AGAIN = {
    ("pwrite", errno.EINTR),
    ("pagemap_scan", errno.EINTR),
    ("memfd_create", errno.EINVAL),  # a kernel that does not know MFD_NOEXEC_SEAL
    ("fcntl", errno.EBUSY),  # somebody holds a page of what is to be sealed
    ("ftruncate", errno.EINVAL),  # of a new memfd, for the core makes both calls at once
}
"""Failures after which the same call is made again, so that nobody hears of them."""


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


@dataclass
class Injection:
    """What became of a fault: whether the life got that far, and what memslot logged."""

    fault: Fault
    hit: bool = False
    logged: list[str] = field(default_factory=list)


class _Keeper(logging.Handler):
    def __init__(self, kept: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(self.format(record))


@contextmanager
def injected(fault: Fault) -> Iterator[Injection]:
    """Arms the fault for a block, and disarms it however the block ends."""
    injection = Injection(fault)
    keeper, log = _Keeper(injection.logged), logging.getLogger("memslot")
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
    """How often each system call is made by a life in which nothing fails: the fewer of two, for the kernel may have
    one made again.
    """
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
    """Every fault of a life that makes so many calls; without `thorough` each occurrence fails with one errno, in
    turn.
    """
    for call, number in made.items():
        errors = PLAUSIBLE[call]
        for skip in range(number):
            for error in errors if thorough else errors[skip % len(errors) :][:1]:
                yield Fault(call, skip, error)
