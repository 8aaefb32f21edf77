"""A process that runs out of each of `WAYS` in turn. It prints as JSON the errors of a host meanwhile and afterwards.

usage: python -m integration_tests.exhausted HOST BACKEND EVERY

Each way has amounts that remain. Each EVERY-th amount gets a round of attempts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import memslot_plugin as memslot
from memslot_plugin._core import PAGE_SIZE
from memslot_plugin._core.proc import max_map_count, status_bytes
from memslot_plugin.tests.leaks import Footprint

from . import cells, toy
from .toy import PAGE

C = ctypes.CDLL(None, use_errno=True)
C.mmap.restype = ctypes.c_void_p
C.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
C.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
C.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
NORESERVE = 0x4000


@contextmanager
def limited(which: int, soft: int) -> Iterator[None]:
    """Lower a soft limit of this process for a block."""
    before = resource.getrlimit(which)
    resource.setrlimit(which, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


@contextmanager
def descriptors(left: int) -> Iterator[None]:
    """Leave this many descriptors. The limit is on the number, so that each free one below it is taken first."""
    taken = [os.open(os.devnull, os.O_RDONLY)]
    while taken[-1] < 200:
        taken.append(os.open(os.devnull, os.O_RDONLY))
    with limited(resource.RLIMIT_NOFILE, 200):
        for descriptor in taken[-left - 1 :]:
            os.close(descriptor)
        yield
    for descriptor in taken[: len(taken) - left - 1]:
        os.close(descriptor)


@contextmanager
def mappings(left: int) -> Iterator[None]:
    """Change the protection of each second page of a range, until the kernel allows no further mapping."""
    allowed = max_map_count()
    assert allowed is not None
    length = 2 * allowed * PAGE_SIZE
    base = C.mmap(None, length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE, -1, 0)
    try:
        for page in range(1, 2 * allowed, 2):
            if C.mprotect(base + page * PAGE_SIZE, PAGE_SIZE, mmap.PROT_READ):
                break
        else:
            raise AssertionError("there is no limit on mappings")
        # Giving two pages their protection back gives four or two mappings back.
        for again in range(page - 2, page - 2 - 2 * left, -2):
            C.mprotect(base + again * PAGE_SIZE, PAGE_SIZE, 0)
        yield
    finally:
        C.munmap(base, length)


WAYS: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "descriptors": (descriptors, (0, 1, 2)),
    "mappings": (mappings, (0, 1, 2, 3, 5, 8, 64)),
    "address_space": (
        lambda left: limited(resource.RLIMIT_AS, status_bytes("VmSize") + left),
        (0, 1_000_000, 3_000_000, 70_000_000, 600_000_000),
    ),
    "data": (
        lambda left: limited(resource.RLIMIT_DATA, status_bytes("VmData") + left),
        (0, 100_000, 400_000, 1_000_000, 100_000_000),
    ),
    "file_size": (lambda left: limited(resource.RLIMIT_FSIZE, left), (0, 4096, 200_000)),
}
"""Amounts in bytes or in objects. The last one is enough."""


KILLED = ("wasmer", "mappings")
"""Ways in which the runtime panics, poisons its lock and ends the process if it has to compile."""


class Attempts(list[str]):
    """Errors of attempts that take something of the kernel. Each has to be an error of memslot."""

    def attempt(self, name: str, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except memslot.MemslotError as error:
            self.append(f"{name}: {type(error).__name__}: {error}")
            return None

    def run(self, host: memslot.Host, guest: memslot.Guest, *, compiles: bool) -> None:
        if instance := self.attempt("instantiate", guest.instantiate):
            arrive(instance)
            grown = instance.call("grow", 6)
            assert instance.memory.byte_size == (2 if grown == -1 else 8) * PAGE
            self += ["grow: -1"] * (grown == -1)
            if compiles and (taken := self.attempt("snapshot", instance.snapshot)):
                self.attempt("close the snapshot", taken.close)
            self.attempt("reset", instance.reset)
            if not instance.closed:
                arrive(instance)
            self.attempt("close", instance.close)
        if compiles and (other := self.attempt("prepare", lambda: host.prepare(toy.B))):
            if instance := self.attempt("instantiate another", other.instantiate):
                assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.B)
                self.attempt("close another", instance.close)
            self.attempt("close the guest", other.close)


def arrive(instance: memslot.Instance) -> None:
    assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
    instance.call("fill", 0, 2 * PAGE, 0xEE)


def serve_two(guest: memslot.Guest) -> None:
    """Use two instances at once, in all slots, after other tenants."""
    with guest.instantiate() as first, guest.instantiate() as second:
        arrive(first)
        arrive(second)


def tell(name: str, backend: str, every: int) -> dict[str, Any]:
    """Run the rounds. Each must leave the host serving and the process as it was."""
    told: dict[str, Any] = {way: [] for way in WAYS}
    with descriptors(0):
        try:
            memslot.probe()
        except memslot.SystemCallError as error:
            told["probe"] = str(error)
    # The probe must not remember a shortage of the moment.
    assert memslot.probe().memfd.works
    assert memslot.probe().pagemap.works
    cell = cells.Cell(name, backend)
    with cell.open(slots=2, reserved="64MiB", guard="64KiB", bounds_checks="code") as host:
        guest = host.prepare(toy.A)
        serve_two(guest)
        for way, (running_out, amounts) in WAYS.items():
            for left in amounts[::every]:
                before = Footprint.now()
                errors = Attempts()
                with running_out(left):
                    errors.run(host, guest, compiles=(name, way) != KILLED)
                gc.collect()
                cells.check(host, in_use=0)
                serve_two(guest)
                lost = Footprint.now().lost_since(before, mappings=16)
                assert not lost, f"{way}, {left} left: {lost}"
                told[way].append(errors)
        assert [pool.limit for pool in host.plugins.statistics()] == [2]
    return told


if __name__ == "__main__":
    print(json.dumps(tell(*sys.argv[1:3], int(sys.argv[3]))))
