"""Probes: functions that change nothing and tell a part of the state."""

from __future__ import annotations

from collections.abc import Sequence

from . import emit
from .emit import END, REFERENCES, constant, operation
from .world import Global, Memory, Signature


def bits_of(each: Global) -> tuple[Signature, bytes]:
    """A function that tells a global's bits, or whether a reference is null."""
    get = b"\x00" + operation(0x23, each.index)
    if each.kind in REFERENCES:
        return ((), ("i32",)), get + operation(0xD1) + END
    if each.kind == "v128":
        halves = (
            get
            + operation(0xFD001D)
            + b"\x00"
            + operation(0x23, each.index)
            + operation(0xFD001D)
            + b"\x01"
        )
        return ((), ("i64", "i64")), halves + END
    if each.kind in ("i32", "i64"):
        return ((), (each.kind,)), get + END
    code, kind = {"f32": (0xBC, "i32"), "f64": (0xBD, "i64")}[each.kind]
    return ((), (kind,)), get + operation(code) + END


def checksum(memory: Memory) -> bytes:
    """A function that goes through all of a memory, eight bytes at a time."""
    wide = memory.address == "i64"
    add, compare, shift = (0x7C, 0x54, 0x86) if wide else (0x6A, 0x49, 0x74)
    argument = b"\x43" + emit.unsigned(memory.index) if memory.index else b"\x03"
    at, end, total = 0, 1, 2
    parts: Sequence[bytes] = (
        b"\x02" + b"\x02" + emit.CODES[memory.address] + b"\x01\x7e",
        operation(0x3F, memory.index)
        + constant(memory.address, 16)
        + operation(shift)
        + operation(0x21, end),
        b"\x02\x40\x03\x40",
        operation(0x20, at)
        + operation(0x20, end)
        + operation(compare)
        + operation(0x45)
        + operation(0x0D, 1),
        operation(0x20, total)
        + operation(0x20, at)
        + b"\x29"
        + argument
        + b"\x00"
        + operation(0x85),
        constant("i64", 0x9E3779B97F4A7C15)
        + operation(0x7E)
        + constant("i64", 29)
        + operation(0x89),
        operation(0x21, total),
        operation(0x20, at) + constant(memory.address, 8) + operation(add) + operation(0x21, at),
        operation(0x0C, 0) + END + END + operation(0x20, total) + END,
    )
    return b"".join(parts)
