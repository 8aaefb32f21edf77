"""Bytes, LEB128 integers and names of the WebAssembly binary format, read and written.

A `Reader` never looks past its `end`, and it allocates nothing because of a count that the module
claims. Malformed input raises `NotUnderstood`, so a lying module can neither crash the reader nor
keep it busy.
"""

from __future__ import annotations


class NotUnderstood(ValueError):
    """A module that cannot be read or rewritten here; `reason` names the unknown part.

    The caller then leaves the module as it is, and the runtime compiles or refuses it. The embedder
    never sees this exception.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Reader:
    """A position in `data` that moves forward and stops at `end`."""

    __slots__ = ("data", "end", "position")

    def __init__(self, data: bytes, position: int, end: int) -> None:
        self.data = data
        self.position = position
        self.end = end

    @property
    def left(self) -> int:
        """Bytes between the position and the end."""
        return self.end - self.position

    def byte(self) -> int:
        """Read one byte."""
        position = self.position
        if position >= self.end:
            raise NotUnderstood("it ends in the middle of an entry")
        self.position = position + 1
        return self.data[position]

    def take(self, length: int) -> memoryview:
        """Read `length` bytes without copying them."""
        start = self.position
        self.skip(length)
        return memoryview(self.data)[start : self.position]

    def skip(self, length: int) -> None:
        """Step over `length` bytes."""
        if length > self.end - self.position:
            raise NotUnderstood(f"an entry needs {length} bytes and {self.left} are left")
        self.position += length

    def since(self, start: int) -> bytes:
        """Return a copy of the bytes from `start` to the position."""
        return self.data[start : self.position]

    def unsigned(self, bits: int) -> int:
        """Read an unsigned LEB128 integer of at most `bits` bits."""
        byte = self.byte()
        if byte < 0x80:
            return byte
        value, shift = byte & 0x7F, 7
        while byte & 0x80:
            if shift >= bits:
                raise NotUnderstood(f"an integer has more than {bits} bits")
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
        if value >> bits:
            raise NotUnderstood(f"an integer has more than {bits} bits")
        return value

    def u32(self) -> int:
        """Read an index, a count or a size."""
        return self.unsigned(32)

    def signed(self, bits: int) -> int:
        """Read a signed LEB128 integer of at most `bits` bits."""
        value, shift, byte = 0, 0, 0x80
        while byte & 0x80:
            if shift >= bits:
                raise NotUnderstood(f"an integer has more than {bits} bits")
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
        if byte & 0x40:
            value -= 1 << shift
        if not -(1 << (bits - 1)) <= value < 1 << (bits - 1):
            raise NotUnderstood(f"an integer has more than {bits} bits")
        return value

    def name(self) -> str:
        """Read a name: its length and that many bytes of UTF-8."""
        encoded = self.take(self.u32())
        try:
            return str(encoded, "utf-8")
        except UnicodeDecodeError:
            raise NotUnderstood("a name is not UTF-8") from None


def unsigned_leb128(value: int) -> bytes:
    """Return `value` (not negative) as the shortest unsigned LEB128 integer."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def signed_leb128(value: int) -> bytes:
    """Return `value` as the shortest signed LEB128 integer."""
    encoded = bytearray()
    while not -0x40 <= value < 0x40:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value & 0x7F)
    return bytes(encoded)


def encode_name(name: str) -> bytes:
    """Return `name` as the format writes it: its length in bytes, then its UTF-8."""
    encoded = name.encode("utf-8")
    return unsigned_leb128(len(encoded)) + encoded
