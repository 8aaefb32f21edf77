"""WebAssembly's binary format, written: the bytes of which test modules are made.

Apart from `memslot_plugin.wasm` on purpose: a mistake there would otherwise be the same one here.
"""

from __future__ import annotations

HEADER = b"\0asm\1\0\0\0"
END = b"\x0b"


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


def sized(content: bytes) -> bytes:
    """Bytes behind their number."""
    return unsigned(len(content)) + content


def name(text: str) -> bytes:
    """A string behind its length."""
    return sized(text.encode())


def vector(*entries: bytes) -> bytes:
    """Entries behind their number."""
    return unsigned(len(entries)) + b"".join(entries)


def section(number: int, payload: bytes, length: int = 0) -> bytes:
    """A section; `length` bytes are taken to write its size."""
    return bytes([number]) + unsigned(len(payload), length) + payload


def custom(text: str, contents: bytes = b"") -> bytes:
    return section(0, name(text) + contents)
