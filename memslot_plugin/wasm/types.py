"""Types of memories, tables, globals and their values, read and written.

Only the parts that decide about images and rewriting are taken apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from memslot_plugin.wasm.binary import NotUnderstood, Reader, signed_leb128, unsigned_leb128

WASM_PAGE = 65536
"""Bytes in a WebAssembly page, unless a memory declares another size."""

_NUMBERS = {0x7F: "i32", 0x7E: "i64", 0x7D: "f32", 0x7C: "f64", 0x7B: "v128"}

_HEAP_TYPES = {
    0x75: "nocont",
    0x74: "noexn",
    0x73: "nofunc",
    0x72: "noextern",
    0x71: "none",
    0x70: "func",
    0x6F: "extern",
    0x6E: "any",
    0x6D: "eq",
    0x6C: "i31",
    0x6B: "struct",
    0x6A: "array",
    0x69: "exn",
    0x68: "cont",
}

_HAS_MAXIMUM, _SHARED, _64_BIT, _CUSTOM_PAGE = 1, 2, 4, 8
"""Flags in front of limits."""


@dataclass(frozen=True, slots=True)
class ValueType:
    """The type of a global, of a table's elements or of a constant: its name in the text format."""

    name: str

    @property
    def is_reference(self) -> bool:
        """True if its values are references, which no saved bits can express."""
        return self.name.startswith("(ref ")

    @property
    def is_nullable(self) -> bool:
        """True if null is one of its values."""
        return self.name.startswith("(ref null ")


@dataclass(frozen=True, slots=True)
class TableType:
    """The type of a table's elements, and its limits in elements."""

    element: ValueType
    minimum: int
    maximum: int | None
    table64: bool

    def encode_limits(self) -> bytes:
        """Return the limits as the format writes them behind the element type."""
        return _encode_limits(_64_BIT * self.table64, self.minimum, self.maximum)


@dataclass(frozen=True, slots=True)
class GlobalType:
    """The type of a global's value; `mutable` is true if code may assign to the global."""

    value: ValueType
    mutable: bool


@dataclass(frozen=True, slots=True)
class MemoryType:
    """The limits of a linear memory in pages of `page_size` bytes, and its kind.

    `names_page_size` is true if the module writes the page size out, even the usual one. Such a
    module needs a runtime with the custom-page-sizes proposal.
    """

    minimum_pages: int
    maximum_pages: int | None
    page_size: int = WASM_PAGE
    shared: bool = False
    memory64: bool = False
    names_page_size: bool = False

    @property
    def minimum_bytes(self) -> int:
        """Bytes of the memory before its first growth."""
        return self.minimum_pages * self.page_size

    @property
    def maximum_bytes(self) -> int | None:
        """The most bytes that the memory may grow to, or None if the module sets no limit."""
        return None if self.maximum_pages is None else self.maximum_pages * self.page_size

    def encode(self) -> bytes:
        """Return the type as the format writes it."""
        flags = _SHARED * self.shared | _64_BIT * self.memory64
        if not self.names_page_size:
            return _encode_limits(flags, self.minimum_pages, self.maximum_pages)
        limits = _encode_limits(flags | _CUSTOM_PAGE, self.minimum_pages, self.maximum_pages)
        return limits + unsigned_leb128(self.page_size.bit_length() - 1)


def read_value_type(reader: Reader) -> ValueType:
    """Read a value type: a number, a vector or a reference."""
    code = reader.byte()
    if code in _NUMBERS:
        return ValueType(_NUMBERS[code])
    if code in _HEAP_TYPES:
        return ValueType(f"(ref null {_HEAP_TYPES[code]})")
    if code == 0x63:
        return ValueType(f"(ref null {read_heap_type(reader)})")
    if code == 0x64:
        return ValueType(f"(ref {read_heap_type(reader)})")
    raise NotUnderstood(f"the type 0x{code:02x} is not known here")


def read_reference_type(reader: Reader) -> ValueType:
    """Read a reference type: one byte for the nullable abstract ones, several for the others."""
    found = read_value_type(reader)
    if not found.is_reference:
        raise NotUnderstood(f"the type {found.name} is no reference")
    return found


def read_heap_type(reader: Reader) -> str:
    """Read the target type of a reference: the name of an abstract heap type, or a type index."""
    code = reader.signed(33)
    if code >= 0:
        return str(code)
    name = _HEAP_TYPES.get(code & 0x7F) if code >= -0x40 else None
    if name is None:
        raise NotUnderstood(f"the heap type {code} is not known here")
    return name


def encode_heap_type(name: str) -> bytes:
    """Return the heap type that `read_heap_type` calls `name`, as the format writes it."""
    if name.isdecimal():
        return signed_leb128(int(name))
    return bytes(code for code, known in _HEAP_TYPES.items() if known == name)


def read_table_limits(reader: Reader, element: ValueType) -> TableType:
    """Read the limits of a table, which stand behind the type of its elements."""
    flags, minimum, maximum = _read_limits(reader, _HAS_MAXIMUM | _64_BIT, "table")
    return TableType(element, minimum, maximum, table64=bool(flags & _64_BIT))


def read_global_type(reader: Reader) -> GlobalType:
    """Read a global type: the type of its value, then the mutability."""
    value = read_value_type(reader)
    mutability = reader.byte()
    if mutability > 1:
        raise NotUnderstood(f"a global has the unknown mutability 0x{mutability:02x}")
    return GlobalType(value, mutable=mutability == 1)


def read_memory_type(reader: Reader) -> MemoryType:
    """Read a memory type. Raise NotUnderstood for impossible limits, which the runtime refuses."""
    known_flags = _HAS_MAXIMUM | _SHARED | _64_BIT | _CUSTOM_PAGE
    flags, minimum, maximum = _read_limits(reader, known_flags, "memory")
    exponent = reader.u32() if flags & _CUSTOM_PAGE else 16
    if exponent not in (0, 16):
        raise NotUnderstood(f"a memory has pages of 2 to the {exponent} bytes")
    memory = MemoryType(
        minimum,
        maximum,
        1 << exponent,
        shared=bool(flags & _SHARED),
        memory64=bool(flags & _64_BIT),
        names_page_size=bool(flags & _CUSTOM_PAGE),
    )
    largest = minimum if maximum is None else maximum
    addresses = 1 << (64 if memory.memory64 else 32)
    if minimum > largest or largest * memory.page_size > addresses:
        raise NotUnderstood(
            f"a memory has the impossible limits {minimum} to {maximum} pages of"
            f" {memory.page_size} bytes"
        )
    if memory.shared and maximum is None:
        raise NotUnderstood("a memory is shared and declares no maximum")
    return memory


def _read_limits(reader: Reader, known_flags: int, what: str) -> tuple[int, int, int | None]:
    flags = reader.byte()
    if flags & ~known_flags:
        raise NotUnderstood(f"a {what} has limits of the unknown kind 0x{flags:02x}")
    bits = 64 if flags & _64_BIT else 32
    minimum = reader.unsigned(bits)
    return flags, minimum, reader.unsigned(bits) if flags & _HAS_MAXIMUM else None


def _encode_limits(flags: int, minimum: int, maximum: int | None) -> bytes:
    if maximum is None:
        return bytes([flags]) + unsigned_leb128(minimum)
    return bytes([flags | _HAS_MAXIMUM]) + unsigned_leb128(minimum) + unsigned_leb128(maximum)
