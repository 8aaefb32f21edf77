"""Descriptors, mappings and threads of this process, before and after a test."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from memslot_hooks import ResetResult
from memslot_plugin._core import PAGE_SIZE

ARENA = 64 << 20
"""Size and alignment in bytes of an arena of malloc on 64-bit machines (HEAP_MAX_SIZE in glibc)."""

SMALLEST = 128 << 10
"""Bytes of the smallest reservation that counts. Guard pages of stacks are smaller."""

OF_A_SANITIZER = range(0x5000_0000_0000, 0x6400_0000_0000)
"""Addresses of the heap of AddressSanitizer's and libubsan's allocator, which changes its size by itself."""

OF_THE_RUNTIME = "tokio-rt-worker"
"""Threads with which wasmtime reads and writes for WASI. It starts them on demand and ends them after 10 idle s."""


@dataclass(frozen=True)
class Footprint:
    """Counts of kernel objects. `reserved` is inaccessible address space in bytes, without malloc's arenas.

    `image_mappings` are those of memslot's memfds; `threads` leaves out those of the runtime.
    """

    descriptors: Counter[str] = field(default_factory=Counter)
    image_mappings: int = 0
    mappings: int = 0
    reserved: int = 0
    threads: int = 0
    resident: int = 0

    @classmethod
    def now(cls) -> Footprint:
        """Collect garbage and measure. Objects that `gc.freeze` froze are not collected."""
        gc.collect()
        maps = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
        threads = _of_each("task", lambda thread: (thread / "comm").read_text().strip())
        return cls(
            descriptors=Counter(_of_each("fd", lambda link: str(link.readlink()))),
            image_mappings=sum("/memfd:memslot" in line for line in maps),
            mappings=len(maps),
            # The guard page of a stack may lie beside a reservation: the kernel lists both as one.
            reserved=sum(length - length % SMALLEST for length in _reserved(maps)),
            threads=sum(name != OF_THE_RUNTIME for name in threads),
            resident=int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE,
        )

    def lost_since(self, before: Footprint, *, mappings: int | None = None) -> list[str]:
        """Return in words the objects that were not there before. `mappings` more mappings are allowed.

        Without that number, mappings and threads are not compared.
        """
        allowed = {"image_mappings": 0, "reserved": 0}
        if mappings is not None:
            allowed |= {"threads": 0, "mappings": mappings}
        more = dict(self.descriptors - before.descriptors)
        for name, number in allowed.items():
            grown = getattr(self, name) - getattr(before, name)
            if grown > number:
                more[name] = grown
        return [f"{count} more of {name}" for name, count in more.items()]


def _reserved(maps: list[str]) -> Iterator[int]:
    """Yield the length of each inaccessible range, without the ends of malloc's arenas.

    An arena is accessible from a multiple of ARENA on, and reserved from there to the next multiple.  A sanitizer's
    allocator has none: a reservation that happens to lie behind its mappings would count now and then.
    """
    has_arenas = True
    low = high = 0  # of the accessible private anonymous mappings before this one, without a gap
    for line in maps:
        addresses, permissions, _, _, inode, *_ = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in addresses.split("-"))
        if inode == "0" and permissions == "---p" and start in OF_A_SANITIZER:
            has_arenas = False  # from here on: addresses go up
        elif inode == "0" and permissions == "---p":
            arena = start - start % ARENA
            if has_arenas and start == high and low <= arena < start:
                start = min(arena + ARENA, end)
            yield end - start
        elif inode == "0" and permissions.endswith("p"):
            low, high = low if start == high else start, end


def _of_each(folder: str, read: Callable[[Path], str]) -> list[str]:
    """Read each entry of /proc/self/FOLDER that has not just ended."""
    found = []
    for entry in Path("/proc/self", folder).iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            found.append(read(entry))
    return found


def count_objects() -> int:
    """Count the objects that the collector tracks, without results of resets, whose number is bounded."""
    return sum(type(each) is not ResetResult for each in gc.get_objects())
