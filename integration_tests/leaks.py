"""The kernel's objects that this process holds, before and after: descriptors, mappings and threads."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
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
    """`reserved` is address space (bytes) that nothing can access, in ranges that are no arena of malloc's;
    `images` are mappings of memslot's memfds, `mappings` all of them; `threads` leaves out those of the runtime.
    """

    descriptors: Counter[str] = field(default_factory=Counter)
    images: int = 0
    mappings: int = 0
    reserved: int = 0
    threads: int = 0
    resident: int = 0

    @classmethod
    def now(cls) -> Footprint:
        """Collect garbage, and measure; what `gc.freeze` froze is not collected."""
        gc.collect()
        images = mappings = reserved = 0
        for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
            addresses, permissions, _, _, inode, *path = line.split(maxsplit=5)
            start, end = (int(part, 16) for part in addresses.split("-"))
            mappings += 1
            images += bool(path) and path[0].startswith("/memfd:memslot")
            if permissions.startswith("---") and inode == "0" and end - start > ARENA:
                reserved += end - start
        threads = _of_each("task", lambda thread: (thread / "comm").read_text().strip())
        return cls(
            descriptors=Counter(_of_each("fd", lambda link: str(link.readlink()))),
            images=images,
            mappings=mappings,
            reserved=reserved,
            threads=sum(name != OF_THE_RUNTIME for name in threads),
            resident=int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE,
        )

    def lost_since(self, before: Footprint, *, mappings: int) -> list[str]:
        """Return what was not there before, in words; `mappings` more of them are allowed."""
        more = dict(self.descriptors - before.descriptors)
        for name, allowed in {
            "images": 0,
            "reserved": 0,
            "threads": 0,
            "mappings": mappings,
        }.items():
            grown = getattr(self, name) - getattr(before, name)
            if grown > allowed:
                more[name] = grown
        return [f"{count} more of {name}" for name, count in more.items()]


def _of_each(folder: str, read: Callable[[Path], str]) -> list[str]:
    """Read each entry of /proc/self/FOLDER that has not just ended."""
    found = []
    for entry in Path("/proc/self", folder).iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            found.append(read(entry))
    return found
