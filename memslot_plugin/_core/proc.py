"""The kernel's view of this process's mappings: /proc/self/maps, status and smaps_rollup, read (proc(5))."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from memslot_plugin.errors import Unsupported


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapping (VMA): addresses, permissions as "rw-p", file offset and inode (0 for anonymous
    memory).
    """

    start: int
    end: int
    permissions: str
    offset: int
    inode: int


@contextmanager
def _lines(name: str) -> Iterator[BinaryIO]:
    """A file of /proc/self.  As bytes: a codec is imported at its first use, and a child whose parent forked while
    another thread imported it would wait for ever.
    """
    path = Path("/proc/self", name)
    try:
        opened = path.open("rb")
    except OSError as error:
        raise Unsupported(
            f"{path} cannot be read ({error.strerror}), and nothing else tells what this process has mapped;"
            " mount proc"
        ) from None
    with opened:
        yield opened


def mappings(start: int, end: int) -> Iterator[Mapping]:
    """The mappings that overlap `[start, end)`, clipped to it, in ascending order.

    The kernel may have merged a range with its neighbour, so a mapping is cut at the edges of what
    was asked for (its offset moves along).  Raises Unsupported where /proc is not mounted.
    """
    with _lines("maps") as lines:
        for line in lines:
            addresses, permissions, offset, _, inode, *_ = line.split(maxsplit=5)
            low, high = (int(part, 16) for part in addresses.split(b"-"))
            if low < end and start < high:
                cut = max(low, start)
                file_offset = int(offset, 16) + (cut - low if int(inode) else 0)
                yield Mapping(cut, min(high, end), permissions.decode(), file_offset, int(inode))


def status_bytes(field: str) -> int:
    """A memory field of /proc/self/status, for example "VmRSS" or "RssAnon", in bytes; raises Unsupported as above."""
    with _lines("status") as lines:
        for line in lines:
            if line.startswith(f"{field}:".encode()):
                return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no field {field}")


def private_bytes() -> int:
    """Resident memory that this process shares with nobody, among it the copied pages of private mappings of a file.

    smaps_rollup (Linux 4.14) counts page by page; the counters of /proc/self/status, which stand in for it, are late by
    some pages per processor.
    """
    try:
        with _lines("smaps_rollup") as lines:
            for line in lines:
                if line.startswith(b"Anonymous:"):
                    return int(line.split()[1]) * 1024
    except Unsupported:
        pass
    return status_bytes("RssAnon")
