"""Probes: functions that change nothing and return a part of the state."""

from __future__ import annotations

from .emit import CODES, END, REFERENCES, code, constant, unsigned
from .opcodes import ADD
from .world import Global, Memory, Signature


def bits_of(each: Global) -> tuple[Signature, bytes]:
    """Return a probe of the bits of a global, or of a null reference."""
    get = (0x23, each.index)
    if each.kind in REFERENCES:
        results, body = ("i32",), code(get, 0xD1)
    elif each.kind == "v128":
        halves = (code(get, 0xFD001D) + bytes([lane]) for lane in range(2))
        results, body = ("i64", "i64"), b"".join(halves)
    elif each.kind in ("i32", "i64"):
        results, body = (each.kind,), code(get)
    else:
        reinterpret, kind = {"f32": (0xBC, "i32"), "f64": (0xBD, "i64")}[each.kind]
        results, body = (kind,), code(get, reinterpret)
    return ((), results), b"\x00" + body + END


def checksum(memory: Memory) -> bytes:
    """Return a probe that sums a memory, eight bytes at a time."""
    kind = memory.address
    compare, shift = (0x54, 0x86) if kind == "i64" else (0x49, 0x74)
    load = b"\x29" + (b"\x43" + unsigned(memory.index) if memory.index else b"\x03") + b"\x00"
    at, end, total = 0, 1, 2
    return code(
        b"\x02\x02" + CODES[kind] + b"\x01\x7e",  # the locals
        *((0x3F, memory.index), constant(kind, 16), shift, (0x21, end)),
        b"\x02\x40\x03\x40",  # block, loop
        *((0x20, at), (0x20, end), compare, 0x45, (0x0D, 1)),
        *((0x20, total), (0x20, at), load, 0x85),
        *(constant("i64", 0x9E3779B97F4A7C15), 0x7E, constant("i64", 29), 0x89, (0x21, total)),
        *((0x20, at), constant(kind, 8), ADD[kind], (0x21, at), (0x0C, 0)),
        *(END, END, (0x20, total), END),
    )
