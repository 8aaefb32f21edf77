"""What this process holds of the kernel's: descriptors, mappings and threads, before and after."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from memslot_plugin._core import PAGE_SIZE

MIB = 1 << 20
ARENA = 64 * MIB
"""Address space that malloc reserves for a thread's arena, and keeps."""

OF_THE_RUNTIME = "tokio-rt-worker"
"""Threads with which wasmtime reads and writes for WASI: it starts them when it needs them, for the whole process, and
ends them when they were idle for ten seconds.
"""


@dataclass(frozen=True)
class Footprint:
    """`reserved` is address space (bytes) that nobody can access, in ranges that are no arena of malloc's;
    `images` are mappings of our memfds, `mappings` all of them; `threads` leaves out those of the runtime.
    """

    descriptors: Counter[str] = field(default_factory=Counter)
    images: int = 0
    mappings: int = 0
    reserved: int = 0
    threads: int = 0
    resident: int = 0

    @classmethod
    def now(cls) -> Footprint:
        """Without garbage, unless something frozen by `gc.freeze` is part of it."""
        gc.collect()
        images = mappings = reserved = 0
        for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
            addresses, permissions, _, _, inode, *path = line.split(maxsplit=5)
            start, end = (int(part, 16) for part in addresses.split("-"))
            mappings += 1
            images += bool(path) and path[0].startswith("/memfd:memslot")
            if permissions.startswith("---") and inode == "0" and end - start > ARENA:
                reserved += end - start
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            descriptors=Counter(_descriptors()),
            images=images,
            mappings=mappings,
            reserved=reserved,
            threads=sum(name != OF_THE_RUNTIME for name in _threads()),
            resident=resident_pages * PAGE_SIZE,
        )

    def lost_since(self, before: Footprint, *, mappings: int) -> list[str]:
        """What is there now and was not before, in words; `mappings` more of them are allowed."""
        lost = [
            f"{count} more of {name}"
            for name, count in (self.descriptors - before.descriptors).items()
        ]
        if self.images > before.images:
            lost.append(f"{self.images - before.images} more mappings of images")
        if self.reserved > before.reserved:
            lost.append(f"{self.reserved - before.reserved} more bytes of reserved address space")
        if self.threads > before.threads:
            lost.append(f"{self.threads - before.threads} more threads")
        if self.mappings > before.mappings + mappings:
            lost.append(f"{self.mappings - before.mappings} more mappings")
        return lost


def _threads() -> list[str]:
    names = []
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            names.append((thread / "comm").read_text().strip())
    return names


def _descriptors() -> list[str]:
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that listed them
            names.append(str(link.readlink()))
    return names
