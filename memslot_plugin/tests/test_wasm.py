"""Reading core modules that are put together byte by byte, without a runtime."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memslot_plugin import wasm
from memslot_plugin.errors import InvalidModule
from memslot_plugin.tests.encode import (
    END,
    EVERYTHING,
    FIRST,
    HEADER,
    MEMORY,
    TYPE,
    active,
    build,
    i32,
    i64,
    imported_global,
    name,
    signed,
    sized,
    unsigned,
    vector,
)
from memslot_plugin.wasm import NotUnderstood, SectionId
from memslot_plugin.wasm.binary import Reader, unsigned_leb128
from memslot_plugin.wasm.module import Expression
from memslot_plugin.wasm.types import MemoryType, read_memory_type


def calls_of(action: Callable[[], object]) -> int:
    """Count the functions of Python and C that an action calls: a busy machine does not change the number."""
    calls = Counter[str]()

    def count(frame: Any, event: str, argument: Any) -> None:
        calls[event] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(before)
    return calls["call"] + calls["c_call"]


# Bytes that are no module


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "starts with nothing"),
        (b"\0as", "starts with 00 61 73 and not with 00 61 73 6d 01 00 00 00"),
        (b"\0asm\x01\0", "starts with 00 61 73 6d 01 00 and not"),
        (b"\x7fELF\0\0\0\0", "starts with 7f 45 4c 46"),
        (b"  (module)", "looks like WebAssembly text"),
        (b"\0asm\x0d\0\x01\0", "a WebAssembly component was given"),
        (b"\0asm\x02\0\0\0", "starts with 00 61 73 6d 02 00 00 00"),
    ],
)
def test_bytes_that_are_no_core_module_are_named_together_with_what_is_allowed(
    data: bytes, sentence: str
) -> None:
    with pytest.raises(InvalidModule, match=sentence) as caught:
        wasm.parse(data)
    assert "allowed is a core WebAssembly module in the binary format" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_module_that_is_cut_at_any_byte_is_refused_or_a_shorter_module() -> None:
    boundaries = {len(HEADER), *(each.end for each in wasm.parse(EVERYTHING).sections)}
    read = set()
    for length in range(len(EVERYTHING)):
        try:
            wasm.parse(EVERYTHING[:length])
            read.add(length)
        except (InvalidModule, NotUnderstood):
            pass
    assert read < boundaries
    assert len(HEADER) in read


# Sections that are left to the runtime


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (build((14, b"\x00")), "section of the unknown kind 14"),
        (build(MEMORY, MEMORY), "memory section stands twice or in the wrong order"),
        (build(MEMORY, (1, b"\x00")), "type section stands twice or in the wrong order"),
        (build((10, b"\x00"), (12, b"\x00")), "data count section stands twice or in"),
        (HEADER + b"\x05\x80\x80\x80\x80\x80\x00", "memory section is cut off: an integer has"),
        (build(MEMORY)[:-1], "memory section is cut off: an entry needs 3 bytes and 2 are left"),
        (HEADER + b"\x05\x83\x80", "memory section is cut off: it ends in the middle"),
        (build(MEMORY, (12, b"\x02")), "declares 2 data segments and has 0"),
        (build((5, b"\x01\x00\x01\x00")), "1 bytes are left after its last entry"),
        (build((5, b"\x02\x00\x01")), "memory section is not understood: it ends in the middle"),
        (build((5, b"\x01\x10\x01")), "limits of the unknown kind 0x10"),
        (build((5, b"\x01\x08\x01\x05")), "pages of 2 to the 5 bytes"),
        (build((5, b"\x01\x01\x02\x01")), "impossible limits 2 to 1 pages"),
        (build((5, b"\x01\x00\x81\x80\x04")), "impossible limits 65537 to None"),
        (build((5, b"\x01\x02\x01")), "shared and declares no maximum"),
        (build((4, b"\x01\x70\x02\x01")), "table has limits of the unknown kind 0x02"),
        (build((4, b"\x01\x40\x01\x70\x00\x01")), "unknown prefix 0x40 0x01"),
        (build((4, b"\x01\x65\x00\x01")), "type 0x65 is not known"),
        (build((4, b"\x01\x63\x40\x00\x01")), "heap type -64 is not known"),
        (build((6, vector(b"\x7f\x02" + i32(0) + END))), "unknown mutability 0x02"),
        (build((6, vector(b"\x7f\x00\x20\x00\x0b"))), "unknown operator 0x20"),
        (build((6, vector(b"\x7b\x00\xfd\x0d" + END))), "unknown operator 0xfd"),
        (build((6, vector(b"\x7f\x00\x41\x80"))), "ends in the middle"),
        (build((2, vector(b"\x00\x00\x05\x00"))), "unknown kind 5"),
        (build((2, vector(b"\x00\x00\x04\x01\x00"))), "unknown attribute 1"),
        (build((2, vector(b"\x01\xff\x00\x00\x00"))), "a name is not UTF-8"),
        (build((7, vector(b"\x7fab\x00\x00"))), "an entry needs 127 bytes and 4 are left"),
        (build((0, b"\x05ab")), "custom section is not understood"),
        (build(MEMORY, (11, b"\x01\x03")), "segment 0 is of the unknown kind 3"),
        (build((11, vector(FIRST))), "segment 0 is for memory 0 and the module has 0"),
        (build(MEMORY, (12, b"\x02"), (11, b"\x00")), "declares 2 data segments and has 0"),
    ],
)
def test_section_that_is_not_understood_is_named_exactly(data: bytes, reason: str) -> None:
    with pytest.raises(NotUnderstood, match=reason) as caught:
        wasm.parse(data)
    assert not isinstance(caught.value, InvalidModule)


@pytest.mark.parametrize("number", [2, 4, 5, 6, 7, 11])
def test_section_with_a_lying_count_costs_no_work(number: int) -> None:
    def refused() -> None:
        with pytest.raises(NotUnderstood):
            wasm.parse(build((number, b"\xff\xff\xff\xff\x0f\x00")))

    assert calls_of(refused) < 300


def test_body_of_any_length_costs_as_little_work_as_a_short_one() -> None:
    def module(length: int) -> bytes:
        code = vector(sized(bytes(length)))
        return build((1, TYPE), (3, b"\x01\x00"), MEMORY, (10, code))

    short, long = module(1000), module(1_000_000)
    assert calls_of(lambda: wasm.parse(long)) <= calls_of(lambda: wasm.parse(short)) + 2


# Reading


def test_module_with_everything_is_read_completely() -> None:
    module = wasm.parse(EVERYTHING)
    said = [f"{each.name} {each.kind.name}" for each in module.imports]
    assert said == ["env.f FUNCTION", "env.t TABLE", "env.base GLOBAL", "env.e TAG"]
    said = [f"{each.name} {each.kind.name} {each.index}" for each in module.exports]
    assert said == ["memory MEMORY 0", "run FUNCTION 1"]
    assert module.memories == [wasm.Memory(0, MemoryType(1, None))]
    tables = [(each.type.minimum, each.type.maximum) for each in module.tables]
    assert tables == [(1, None), (1, 2), (1, None)]
    assert [each.index for each in module.tables] == [0, 1, 2]
    assert {each.type.element.name for each in module.tables} == {"(ref null func)"}
    initializers = [each.initializer and each.initializer.encoded for each in module.tables]
    assert initializers == [None, None, b"\xd0\x70\x0b"]
    types = [(each.type.value.name, each.type.mutable) for each in module.globals]
    assert types == [("i32", False), ("i32", True), ("v128", False)]
    assert [bool(each.imported) for each in module.globals] == [True, False, False]
    assert module.globals[1].initializer == Expression(b"\x41\x7f\x0b", "i32", 0xFFFFFFFF)
    assert module.globals[1].type.value.is_reference is False
    assert module.tables[0].type.element.is_reference is True
    assert (module.function_count, module.imported_function_count) == (2, 1)
    assert (module.element_segment_count, module.data_count, module.start) == (1, 2, 1)
    segments = [(each.memory, bytes(each.data)) for each in module.data_segments]
    assert segments == [(0, b"hello"), (None, b"later")]
    data = module.section(SectionId.DATA)
    assert data is not None
    assert EVERYTHING[data.payload : data.end].endswith(b"later")


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        (b"\x00\x01", MemoryType(1, None)),
        (b"\x01\x00\x10", MemoryType(0, 16)),
        (b"\x03\x01\x02", MemoryType(1, 2, shared=True)),
        (b"\x04\x01", MemoryType(1, None, memory64=True)),
        (b"\x05\x01\x80\x80\x80\x80\x80\x20", MemoryType(1, 1 << 40, memory64=True)),
        (b"\x08\x07\x00", MemoryType(7, None, 1, names_page_size=True)),
        (b"\x08\x07\x10", MemoryType(7, None, names_page_size=True)),
    ],
)
def test_memory_type_is_read_and_written_alike(encoded: bytes, expected: MemoryType) -> None:
    assert read_memory_type(Reader(encoded, 0, len(encoded))) == expected
    assert expected.encode() == encoded


def test_memory_type_of_any_limits_has_its_size_in_bytes() -> None:
    assert (MemoryType(2, 3).minimum_bytes, MemoryType(2, 3).maximum_bytes) == (131072, 196608)
    assert MemoryType(2, None, 1, names_page_size=True).minimum_bytes == 2
    assert MemoryType(2, None).maximum_bytes is None


@given(st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1))
def test_integer_is_read_as_it_was_written(positive: int, either: int) -> None:
    assert unsigned_leb128(positive) == unsigned(positive)
    encoded = unsigned(positive) + signed(either)
    reader = Reader(encoded, 0, len(encoded))
    assert (reader.unsigned(64), reader.signed(64), reader.left) == (positive, either, 0)
    assert Reader(b"\x81\x80\x00", 0, 3).u32() == 1  # longer than needed


def test_integer_of_too_many_bits_is_not_understood() -> None:
    for encoded in (b"\x80\x80\x80\x80\x10", b"\x80\x80\x80\x80\x80\x00"):
        with pytest.raises(NotUnderstood, match="more than 32 bits"):
            Reader(encoded, 0, len(encoded)).u32()
    for encoded in (b"\x80\x80\x80\x80\x08", b"\xff\xff\xff\xff\xff\x7f"):
        with pytest.raises(NotUnderstood, match="more than 32 bits"):
            Reader(encoded, 0, len(encoded)).signed(32)


# Offsets

GLOBALS = [
    b"\x7f\x00" + i32(16) + END,  # global 1, after the imported one
    b"\x7f\x01" + i32(16) + END,  # 2, mutable
    b"\x7f\x00\x23\x00\x0b",  # 3, a copy of the imported one
    b"\x7f\x00\x23\x01" + i32(4) + b"\x6c\x0b",  # 4, global 1 times 4
    b"\x7e\x00" + i32(5) + END,  # 5, declared i64 and given an i32
]


def read_offset(offset: bytes) -> Expression:
    globals_ = (6, vector(*GLOBALS))
    data = (11, vector(active(offset, b"x")))
    module = wasm.parse(build((2, vector(imported_global())), MEMORY, globals_, data))
    found = module.data_segments[0].offset
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (i32(0), 0),
        (i32(-1), 0xFFFFFFFF),
        (i32(-(2**31)), 0x80000000),
        (i64(-1), 0xFFFFFFFFFFFFFFFF),
        (i32(5) + i32(7) + b"\x6a", "is not a single constant"),
        (i64(1) + i64(2) + b"\x7d" + i64(3) + b"\x7c", "is not a single constant"),
        (b"\x23\x01", 16),
        (b"\x23\x04", "is global 4, whose value is known only when it runs"),
        (b"\x23\x01" + i32(1) + b"\x6a", "is not a single constant"),
        (b"\x23\x00", "is global 0, which is imported"),
        (b"\x23\x02", "is global 2, which is mutable"),
        (b"\x23\x03", "is global 3, whose value is known only when it runs"),
        (b"\x23\x05", "is not a valid constant expression"),
        (b"\x23\x06", "is global 6, which does not exist at this point"),
        (b"\x23\x00" + i32(1) + b"\x6a", "is not a single constant"),
        (b"", "is not a single constant"),
        (b"\x6a", "is not a single constant"),
        (i32(1) + i32(2), "is not a single constant"),
        (b"\x43\x01\x00\xa0\x7f", 0x7FA00001),
        (b"\x44" + bytes(7) + b"\x80", 1 << 63),
        (b"\xd0\x70", "is a reference"),
        (b"\xd2\x00", "is a reference"),
        (b"\xfd\x0c\x02" + bytes(15), 2),
        (b"\xfb\x01\x00", "is a reference"),
        (i32(1) + b"\xfb\x1c", "is not a single constant"),
        (i32(1) + i32(2) + b"\xfb\x08\x00\x02", "is not a single constant"),
    ],
)
def test_offset_has_a_value_or_says_why_it_is_not_constant(
    offset: bytes, expected: int | str
) -> None:
    value, reason = (None, expected) if isinstance(expected, str) else (expected, None)
    found = read_offset(offset)
    assert (found.value, found.reason, found.encoded) == (value, reason, offset + END)


def test_exported_functions_imported_and_defined_have_their_types():
    types = vector(b"\x60\x00\x00", b"\x60\x02\x7f\x7c\x02\x7e\x70")
    imports = vector(name("env") + name("f") + b"\x00\x01")
    exports = vector(name("g") + b"\x00\x01", name("f") + b"\x00\x00", name("m") + b"\x02\x00")
    code = vector(sized(b"\x00\x0b"))
    module = wasm.parse(
        build((1, types), (2, imports), (3, b"\x01\x00"), MEMORY, (7, exports), (10, code))
    )
    found = wasm.exported_functions(module)
    assert list(found) == ["g", "f"]
    assert found["g"] == wasm.FunctionType((), ())
    assert found["f"] == wasm.FunctionType(("i32", "f64"), ("i64", "(ref null func)"))
    assert [str(each) for each in found.values()] == ["()", "(i32, f64) -> i64, (ref null func)"]


@pytest.mark.parametrize(
    "types",
    [
        b"\x01\x5f\x00",  # a struct type
        b"\x02\x5f\x00\x60\x00\x00",  # a function type behind it would be type 1
        b"\x01\x60\x01\x00",  # a parameter of no known type
        b"\x00",
    ],
)
def test_exported_function_whose_type_is_not_understood_has_none(types):
    exports = vector(name("f") + b"\x00\x00", name("missing") + b"\x00\x07")
    code = vector(sized(b"\x00\x0b"))
    module = wasm.parse(build((1, types), (3, b"\x01\x00"), (7, exports), (10, code)))
    assert wasm.exported_functions(module) == {"f": None, "missing": None}
