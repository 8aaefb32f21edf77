"""WebAssembly's binary format, written: the bytes of which the generated modules are made.

Apart from `memslot_plugin.wasm` on purpose: a mistake there would otherwise be the same one here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

HEADER = b"\0asm\1\0\0\0"
END = b"\x0b"

CODES = {
    "i32": b"\x7f",
    "i64": b"\x7e",
    "f32": b"\x7d",
    "f64": b"\x7c",
    "v128": b"\x7b",
    "funcref": b"\x70",
    "externref": b"\x6f",
}
NUMBERS = ("i32", "i64", "f32", "f64")
REFERENCES = ("funcref", "externref")


def unsigned(value: int, length: int = 0) -> bytes:
    """An unsigned LEB128 integer, in `length` bytes if that is more than it needs."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    while len(out) < length:
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


def signed(value: int) -> bytes:
    out = bytearray()
    while not -64 <= value < 64:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value & 0x7F)
    return bytes(out)


def name(text: str) -> bytes:
    encoded = text.encode()
    return unsigned(len(encoded)) + encoded


def vector(entries: Iterable[bytes]) -> bytes:
    listed = list(entries)
    return unsigned(len(listed)) + b"".join(listed)


def section(number: int, payload: bytes, length: int = 0) -> bytes:
    """A section; `length` bytes are taken to write its size."""
    return bytes([number]) + unsigned(len(payload), length) + payload


def function_type(parameters: Iterable[str], results: Iterable[str]) -> bytes:
    return b"\x60" + vector(CODES[t] for t in parameters) + vector(CODES[t] for t in results)


def limits(minimum: int, maximum: int | None, *, wide: bool = False, shared: bool = False) -> bytes:
    flags = (maximum is not None) | (shared << 1) | (wide << 2)
    return bytes([flags]) + unsigned(minimum) + (b"" if maximum is None else unsigned(maximum))


def constant(kind: str, bits: int) -> bytes:
    """The instruction that gives these bits; null for a reference."""
    if kind in ("i32", "i64"):
        width = int(kind[1:])
        assert 0 <= bits < 1 << width, (kind, bits)
        value = bits - (bits >> (width - 1) << width)
        return (b"\x41" if width == 32 else b"\x42") + signed(value)
    if kind == "f32":
        return b"\x43" + struct.pack("<I", bits)
    if kind == "f64":
        return b"\x44" + struct.pack("<Q", bits)
    if kind == "v128":
        return b"\xfd\x0c" + bits.to_bytes(16, "little")
    return b"\xd0" + CODES[kind]


def operation(code: int, *immediates: int) -> bytes:
    """An opcode, of which those above 0xff stand for a prefix and a number, and unsigned immediates."""
    head = bytes([code]) if code < 0x100 else bytes([code >> 16]) + unsigned(code & 0xFFFF)
    return head + b"".join(map(unsigned, immediates))
