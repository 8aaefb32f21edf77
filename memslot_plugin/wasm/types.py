"""Types that stand in front of imports, tables, memories and globals, and how they are read.

Only what decides about images and rewriting is taken apart; what is left is kept as it was encoded.
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

_HAS_MAXIMUM, _SHARED, _MEMORY64, _CUSTOM_PAGE = 1, 2, 4, 8


@dataclass(frozen=True, slots=True)
class ValueType:
    """The type of a global, a table's elements or a constant: its name in the text format."""

    name: str

    @property
    def is_reference(self) -> bool:
        """Whether values of it are references, which no saved byte can stand for."""
        return self.name.startswith("(ref ")

    @property
    def is_nullable(self) -> bool:
        """Whether null is a value of it."""
        return self.name.startswith("(ref null ")


@dataclass(frozen=True, slots=True)
class TableType:
    """What a table holds, and its limits in elements."""

    element: ValueType
    minimum: int
    maximum: int | None
    table64: bool

    def encode_limits(self) -> bytes:
        """The limits as the format writes them behind the type of the elements."""
        flags = _MEMORY64 * self.table64
        limits = unsigned_leb128(self.minimum)
        if self.maximum is not None:
            flags |= _HAS_MAXIMUM
            limits += unsigned_leb128(self.maximum)
        return bytes([flags]) + limits


@dataclass(frozen=True, slots=True)
class GlobalType:
    """What a global holds, and whether code may assign to it."""

    value: ValueType
    mutable: bool


@dataclass(frozen=True, slots=True)
class MemoryType:
    """The limits of a linear memory in its own pages, the size of such a page, and its kind.

    `names_page_size` is whether the module spells its page size out, which needs a runtime that
    knows the custom-page-sizes proposal even where it is the usual one.
    """

    minimum_pages: int
    maximum_pages: int | None
    page_size: int = WASM_PAGE
    shared: bool = False
    memory64: bool = False
    names_page_size: bool = False

    @property
    def minimum_bytes(self) -> int:
        """How many bytes the memory has before its first growth."""
        return self.minimum_pages * self.page_size

    @property
    def maximum_bytes(self) -> int | None:
        """How many bytes it may ever have; None where it declares no limit of its own."""
        return None if self.maximum_pages is None else self.maximum_pages * self.page_size

    @property
    def index_type(self) -> str:
        """The type of an address in it."""
        return "i64" if self.memory64 else "i32"

    def encode(self) -> bytes:
        """The type as the format writes it."""
        flags = _SHARED * self.shared | _MEMORY64 * self.memory64
        limits = unsigned_leb128(self.minimum_pages)
        if self.maximum_pages is not None:
            flags |= _HAS_MAXIMUM
            limits += unsigned_leb128(self.maximum_pages)
        if self.names_page_size:
            flags |= _CUSTOM_PAGE
            limits += unsigned_leb128(self.page_size.bit_length() - 1)
        return bytes([flags]) + limits


def read_value_type(reader: Reader) -> ValueType:
    """A value type: a number, a vector, or a reference."""
    code = reader.byte()
    if code in _NUMBERS:
        return ValueType(_NUMBERS[code])
    return _reference_type(reader, code)


def read_reference_type(reader: Reader) -> ValueType:
    """A reference type: one byte for the nullable abstract ones, or spelt out."""
    return _reference_type(reader, reader.byte())


def _reference_type(reader: Reader, code: int) -> ValueType:
    if code in _HEAP_TYPES:
        return ValueType(f"(ref null {_HEAP_TYPES[code]})")
    if code == 0x63:
        return ValueType(f"(ref null {read_heap_type(reader)})")
    if code == 0x64:
        return ValueType(f"(ref {read_heap_type(reader)})")
    raise NotUnderstood(f"the type 0x{code:02x} is not known here")


def read_heap_type(reader: Reader) -> str:
    """What a reference points to: an abstract heap type's name, or the index of a type."""
    code = reader.signed(33)
    if code >= 0:
        return str(code)
    name = _HEAP_TYPES.get(code & 0x7F) if code >= -0x40 else None
    if name is None:
        raise NotUnderstood(f"the heap type {code} is not known here")
    return name


def encode_heap_type(name: str) -> bytes:
    """A heap type by the name that `read_heap_type` gives it, as the format writes it."""
    if name.isdecimal():
        return signed_leb128(int(name))
    return bytes(code for code, known in _HEAP_TYPES.items() if known == name)


def read_table_type(reader: Reader) -> TableType:
    """A table type: the reference type of its elements, then its limits."""
    element = read_reference_type(reader)
    flags = reader.byte()
    if flags & ~(_HAS_MAXIMUM | _MEMORY64):
        raise NotUnderstood(f"a table has limits of the unknown kind 0x{flags:02x}")
    bits = 64 if flags & _MEMORY64 else 32
    minimum = reader.unsigned(bits)
    maximum = reader.unsigned(bits) if flags & _HAS_MAXIMUM else None
    return TableType(element, minimum, maximum, table64=bits == 64)


def read_global_type(reader: Reader) -> GlobalType:
    """A global type: what it holds, then whether it is mutable."""
    value = read_value_type(reader)
    mutability = reader.byte()
    if mutability > 1:
        raise NotUnderstood(f"a global has the unknown mutability 0x{mutability:02x}")
    return GlobalType(value, mutable=mutability == 1)


def read_memory_type(reader: Reader) -> MemoryType:
    """A memory type whose limits are possible; impossible ones are for the runtime to refuse."""
    flags = reader.byte()
    if flags & ~(_HAS_MAXIMUM | _SHARED | _MEMORY64 | _CUSTOM_PAGE):
        raise NotUnderstood(f"a memory has limits of the unknown kind 0x{flags:02x}")
    bits = 64 if flags & _MEMORY64 else 32
    minimum = reader.unsigned(bits)
    maximum = reader.unsigned(bits) if flags & _HAS_MAXIMUM else None
    page_size = WASM_PAGE
    if flags & _CUSTOM_PAGE:
        exponent = reader.u32()
        if exponent not in (0, 16):
            raise NotUnderstood(f"a memory has pages of 2 to the {exponent} bytes")
        page_size = 1 << exponent
    memory = MemoryType(
        minimum,
        maximum,
        page_size,
        shared=bool(flags & _SHARED),
        memory64=bits == 64,
        names_page_size=bool(flags & _CUSTOM_PAGE),
    )
    largest = minimum if maximum is None else maximum
    if minimum > largest or largest * page_size > 1 << bits:
        raise NotUnderstood(
            f"a memory has the impossible limits {minimum} to {maximum} pages of {page_size} bytes"
        )
    if memory.shared and maximum is None:
        raise NotUnderstood("a memory is shared and declares no maximum")
    return memory
