"""The only reader of /proc (proc(5)): this process's mappings, memory and their limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from memslot_plugin.errors import Unsupported


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapping (VMA): addresses, permissions as "rw-p", file offset, and inode (0 for anonymous memory)."""

    start: int
    end: int
    permissions: str
    offset: int
    inode: int


@contextmanager
def _lines(name: str) -> Iterator[BinaryIO]:
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
    """Yield the mappings that overlap `[start, end)`, cut to it, in ascending order.

    The kernel may have merged a range with its neighbours, so a mapping is cut at both edges, and its offset moves
    along.  Raises Unsupported if /proc is not mounted.
    """
    with _lines("maps") as lines:
        for line in lines:
            addresses, permissions, offset, _, inode, *_ = line.split(maxsplit=5)
            low, high = (int(part, 16) for part in addresses.split(b"-"))
            if low < end and start < high:
                cut = max(low, start)
                file_offset = int(offset, 16) + (cut - low if int(inode) else 0)
                yield Mapping(cut, min(high, end), permissions.decode(), file_offset, int(inode))


def map_count() -> int | None:
    """Return the number of mappings of this process, or None if /proc hides it."""
    try:
        with _lines("maps") as lines:
            return sum(1 for _ in lines)
    except Unsupported:
        return None


def max_map_count() -> int | None:
    """Return the kernel's limit on mappings per process (vm.max_map_count), or None if /proc hides it."""
    return sysctl("vm/max_map_count")


def sysctl(name: str) -> int | None:
    """Return the number in /proc/sys/`name`, or None if /proc is missing or masked."""
    try:
        return int(Path("/proc/sys", name).read_bytes())
    except (OSError, ValueError):
        return None


def status_bytes(field: str) -> int:
    """Return a memory field of /proc/self/status, such as "VmRSS", in bytes; raises Unsupported as `mappings` does."""
    found = _bytes_of("status", field)
    if found is None:
        raise LookupError(f"/proc/self/status has no field {field}")
    return found


def private_bytes() -> int:
    """Return the resident bytes that no other process shares, among them copied pages of private file mappings.

    smaps_rollup (Linux 4.14) counts page by page.  The counters of /proc/self/status stand in for it, and lag behind by
    some pages per processor.
    """
    try:
        found = _bytes_of("smaps_rollup", "Anonymous")
    except Unsupported:
        found = None
    return status_bytes("RssAnon") if found is None else found


def _bytes_of(name: str, field: str) -> int | None:
    with _lines(name) as lines:
        for line in lines:
            if line.startswith(f"{field}:".encode()):
                return int(line.split()[1]) * 1024
    return None
