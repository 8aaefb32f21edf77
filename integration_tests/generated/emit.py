"""Types, limits and instructions in WebAssembly's binary format."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from memslot_plugin.tests.encode import END, HEADER, custom, name, section, sized, unsigned, vector
from memslot_plugin.tests.encode import signed as _signed

__all__ = ["END", "HEADER", "custom", "name", "section", "sized", "unsigned", "vector"]

NUMBERS = ("i32", "i64", "f32", "f64")
REFERENCES = ("funcref", "externref")
CODES = {
    **dict(zip(NUMBERS, (b"\x7f", b"\x7e", b"\x7d", b"\x7c"), strict=True)),
    "v128": b"\x7b",
    **dict(zip(REFERENCES, (b"\x70", b"\x6f"), strict=True)),
}

Part = int | bytes | tuple[int, ...]


def function_type(parameters: Iterable[str], results: Iterable[str]) -> bytes:
    sides = (vector(*(CODES[kind] for kind in side)) for side in (parameters, results))
    return b"\x60" + b"".join(sides)


def limits(minimum: int, maximum: int | None, *, wide: bool = False, shared: bool = False) -> bytes:
    flags = (maximum is not None) | (shared << 1) | (wide << 2)
    return bytes([flags]) + unsigned(minimum) + (b"" if maximum is None else unsigned(maximum))


def constant(kind: str, bits: int = 0) -> bytes:
    """Return the instruction that gives these bits; null for a reference."""
    if kind in ("i32", "i64"):
        width = int(kind[1:])
        assert 0 <= bits < 1 << width, (kind, bits)
        return (b"\x41" if width == 32 else b"\x42") + _signed(signed(kind, bits))
    if kind == "f32":
        return b"\x43" + struct.pack("<I", bits)
    if kind == "f64":
        return b"\x44" + struct.pack("<Q", bits)
    if kind == "v128":
        return b"\xfd\x0c" + bits.to_bytes(16, "little")
    return b"\xd0" + CODES[kind]


def signed(kind: str, bits: int) -> int:
    """Return the bits of an integer as a signed number."""
    width = int(kind[1:])
    return bits - (bits >> (width - 1) << width)


def code(*parts: Part) -> bytes:
    """Encode instructions: an opcode, an opcode with unsigned immediates, or raw bytes.

    Opcodes above 0xff stand for a prefix and a number.
    """
    return b"".join(part if isinstance(part, bytes) else _operation(part) for part in parts)


def _operation(part: int | tuple[int, ...]) -> bytes:
    opcode, *immediates = (part,) if isinstance(part, int) else part
    head = bytes([opcode]) if opcode < 0x100 else bytes([opcode >> 16]) + unsigned(opcode & 0xFFFF)
    return head + b"".join(map(unsigned, immediates))
