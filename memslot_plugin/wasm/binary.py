"""The alphabet of the WebAssembly binary format: bytes, LEB128 integers and names, read and written.

A `Reader` never looks past its `end`, allocates nothing on the word of a count, and answers whatever
is malformed with `NotUnderstood`, so that a lying module can neither crash it nor keep it busy.
"""

from __future__ import annotations


class NotUnderstood(ValueError):
    """This module is not one that can be read or rewritten here; `reason` says what was met.

    It decides between two paths and never reaches a user: such a module is left as it was, and the
    runtime, whose word is final, compiles or refuses it.
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
        """How many bytes there are between here and the end."""
        return self.end - self.position

    def byte(self) -> int:
        """The next byte."""
        position = self.position
        if position >= self.end:
            raise NotUnderstood("it ends in the middle of an entry")
        self.position = position + 1
        return self.data[position]

    def take(self, length: int) -> memoryview:
        """The next `length` bytes, not copied."""
        start = self.position
        self.skip(length)
        return memoryview(self.data)[start : self.position]

    def skip(self, length: int) -> None:
        """Step over `length` bytes."""
        if length > self.end - self.position:
            raise NotUnderstood(f"an entry needs {length} bytes and {self.left} are left")
        self.position += length

    def since(self, start: int) -> bytes:
        """The bytes from `start` to here, as they stand in the file."""
        return self.data[start : self.position]

    def unsigned(self, bits: int) -> int:
        """An unsigned LEB128 integer of at most `bits` bits."""
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
        """An index, a count or a size."""
        return self.unsigned(32)

    def signed(self, bits: int) -> int:
        """A signed LEB128 integer of at most `bits` bits."""
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
        """A name: its length and that many bytes of UTF-8."""
        encoded = self.take(self.u32())
        try:
            return str(encoded, "utf-8")
        except UnicodeDecodeError:
            raise NotUnderstood("a name is not UTF-8") from None


def unsigned_leb128(value: int) -> bytes:
    """`value` (not negative) as the shortest unsigned LEB128 integer."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def signed_leb128(value: int) -> bytes:
    """`value` as the shortest signed LEB128 integer."""
    encoded = bytearray()
    while not -0x40 <= value < 0x40:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value & 0x7F)
    return bytes(encoded)


def encode_name(name: str) -> bytes:
    """`name` as the format writes it: its length in bytes, then its UTF-8."""
    encoded = name.encode("utf-8")
    return unsigned_leb128(len(encoded)) + encoded
