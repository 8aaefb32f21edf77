"""What a host does while this process runs out of something and afterwards, told as JSON.

usage: python -m integration_tests.exhausted HOST BACKEND WHAT LEFT ...

WHAT is a key of `WAYS`; each LEFT is how much of it is left, and one round of attempts is made for each.
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
from memslot_plugin._core import PAGE_SIZE, max_map_count
from memslot_plugin.smaps import status_bytes

from . import cells, toy
from .leaks import Footprint
from .toy import PAGE

C = ctypes.CDLL(None, use_errno=True)
C.mmap.restype = ctypes.c_void_p
C.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
C.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
C.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
NORESERVE = 0x4000


@contextmanager
def limited(which: int, soft: int) -> Iterator[None]:
    """Lowers a soft limit of this process for a block."""
    before = resource.getrlimit(which)
    resource.setrlimit(which, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


@contextmanager
def descriptors(left: int) -> Iterator[None]:
    """The limit is on the number, so every free one below it is taken first."""
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
    """Every second page of a range gets another protection, until the kernel allows no further mapping."""
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


def address_space(left: int) -> Any:
    return limited(resource.RLIMIT_AS, status_bytes("VmSize") + left)


def data(left: int) -> Any:
    return limited(resource.RLIMIT_DATA, status_bytes("VmData") + left)


def file_size(left: int) -> Any:
    return limited(resource.RLIMIT_FSIZE, left)


WAYS: dict[str, Callable[[int], Any]] = {
    "descriptors": descriptors,
    "mappings": mappings,
    "address_space": address_space,
    "data": data,
    "file_size": file_size,
}


KILLED = ("wasmer", "mappings")
"""Where the runtime itself panics, poisons its own lock and ends the process if it has to compile."""


class Round:
    """Attempts of everything that takes something of the kernel; each error is kept, and nothing else may happen."""

    def __init__(self, host: memslot.Host, guest: memslot.Guest, *, compiles: bool) -> None:
        self.host = host
        self.guest = guest
        self.compiles = compiles
        self.errors: list[str] = []
        self.done: list[str] = []

    def attempt(self, name: str, step: Callable[[], Any]) -> Any:
        try:
            result = step()
        except memslot.MemslotError as error:
            self.errors.append(f"{name}: {type(error).__name__}: {error}")
            return None
        self.done.append(name)
        return result

    def run(self) -> None:
        instance = self.attempt("instantiate", self.guest.instantiate)
        if instance is not None:
            self.serve(instance)
        if not self.compiles:
            return
        other = self.attempt("prepare", lambda: self.host.prepare(toy.B))
        if other is not None:
            instance = self.attempt("instantiate another", other.instantiate)
            if instance is not None:
                assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.B)
                self.attempt("close another", instance.close)
            self.attempt("close the guest", other.close)

    def serve(self, instance: memslot.Instance) -> None:
        assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
        instance.call("fill", 0, 2 * PAGE, 0xEE)
        grown = instance.call("grow", 6)
        assert instance.memory.byte_size == (2 if grown == -1 else 8) * PAGE
        self.errors += ["grow: -1"] * (grown == -1)
        taken = self.attempt("snapshot", instance.snapshot) if self.compiles else None
        if taken is not None:
            self.attempt("close the snapshot", taken.close)
        self.attempt("reset", instance.reset)
        if not instance.closed:
            assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
            instance.call("fill", 0, 2 * PAGE, 0xEE)
        self.attempt("close", instance.close)


def serve_two(guest: memslot.Guest) -> None:
    """Two instances at once, in every slot that there is, which have seen other tenants."""
    with guest.instantiate() as first, guest.instantiate() as second:
        for instance in (first, second):
            assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
            instance.call("fill", 0, 2 * PAGE, 0xEE)


def tell(name: str, backend: str, way: str, amounts: list[int]) -> dict[str, Any]:
    """The rounds, each of which must leave the host serving and the process as it was."""
    cell = cells.Cell(name, backend)
    rounds = []
    with cell.open(slots=2, reserved="64MiB", guard="64KiB", bounds_checks="code") as host:
        guest = host.prepare(toy.A)
        serve_two(guest)
        for left in amounts:
            before = Footprint.now()
            attempts = Round(host, guest, compiles=(name, way) != KILLED)
            with WAYS[way](left):
                attempts.run()
            gc.collect()
            cells.check(host, in_use=0)
            serve_two(guest)
            lost = Footprint.now().lost_since(before, mappings=16)
            rounds.append(
                {"left": left, "errors": attempts.errors, "done": attempts.done, "lost": lost}
            )
    return {"rounds": rounds, "limits": [pool.limit for pool in host.plugins.statistics()]}


if __name__ == "__main__":
    name, backend, way, *amounts = sys.argv[1:]
    print(json.dumps(tell(name, backend, way, [int(left) for left in amounts])))
