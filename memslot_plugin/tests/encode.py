"""A writer of WebAssembly's binary format for test modules.

It shares no code with `memslot_plugin.wasm`: a shared mistake would go unseen.
"""

from __future__ import annotations

HEADER = b"\0asm\1\0\0\0"
END = b"\x0b"
I32, I64 = b"\x7f", b"\x7e"
MEMORY = (5, b"\x01\x00\x01")  # one memory of at least one page
TYPE = b"\x01\x60\x00\x00"  # a type section's contents: no parameters and no results


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


def i32(value: int) -> bytes:
    return b"\x41" + signed(value)


def i64(value: int) -> bytes:
    return b"\x42" + signed(value)


def build(*sections: tuple[int, bytes] | bytes) -> bytes:
    return HEADER + b"".join(s if isinstance(s, bytes) else section(*s) for s in sections)


def active(offset: bytes, data: bytes, memory: int = 0) -> bytes:
    head = b"\x00" if memory == 0 else b"\x02" + unsigned(memory)
    return head + offset + END + sized(data)


def passive(data: bytes) -> bytes:
    return b"\x01" + sized(data)


FIRST = active(i32(8), b"first")


def with_data(*segments: bytes) -> bytes:
    return build(MEMORY, (11, vector(*segments)))


def imported_global(value_type: bytes = I32) -> bytes:
    return name("env") + name("base") + b"\x03" + value_type + b"\x00"


IMPORTS = (
    name("env") + name("f") + b"\x00\x00",
    name("env") + name("t") + b"\x01\x70\x00\x01",
    imported_global(),
    name("env") + name("e") + b"\x04\x00\x00",
)
EVERYTHING = build(
    custom("first", b"\x01\x02"),
    (1, TYPE),
    custom("between"),
    (2, vector(*IMPORTS)),
    (3, vector(b"\x00")),
    (4, vector(b"\x70\x01\x01\x02", b"\x40\x00\x63\x70\x00\x01\xd0\x70\x0b")),
    MEMORY,
    (13, vector(b"\x00\x00")),
    (6, vector(b"\x7f\x01" + i32(-1) + END, b"\x7b\x00\xfd\x0c" + bytes(16) + END)),
    (7, vector(name("memory") + b"\x02\x00", name("run") + b"\x00\x01")),
    (8, b"\x01"),
    (9, vector(b"\x00\x41\x00\x0b\x01\x00")),
    (12, b"\x02"),
    (10, vector(b"\x02\x00\x0b")),
    (11, vector(active(i32(8), b"hello"), passive(b"later"))),
    custom("name", b"\x00\x02\x01m"),
)
"""A module with a section of each kind."""
