"""A writer of WebAssembly's binary format for test modules.

It shares no code with `memslot_plugin.wasm`, because tests would then not see a mistake in it.
"""

from __future__ import annotations

HEADER = b"\0asm\1\0\0\0"
END = b"\x0b"


def unsigned(value: int, length: int = 0) -> bytes:
    """Return an unsigned LEB128 integer, padded to `length` bytes."""
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
    """Return the content behind its number of bytes."""
    return unsigned(len(content)) + content


def name(text: str) -> bytes:
    """Return a string behind its length."""
    return sized(text.encode())


def vector(*entries: bytes) -> bytes:
    """Return the entries behind their number."""
    return unsigned(len(entries)) + b"".join(entries)


def section(number: int, payload: bytes, length: int = 0) -> bytes:
    """Return a section whose size is padded to `length` bytes."""
    return bytes([number]) + unsigned(len(payload), length) + payload


def custom(text: str, contents: bytes = b"") -> bytes:
    return section(0, name(text) + contents)
