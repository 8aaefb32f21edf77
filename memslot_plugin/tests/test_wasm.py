"""Reading and rewriting core modules; modules are put together byte by byte, so no runtime is needed."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memslot_plugin import wasm
from memslot_plugin.errors import InvalidModule
from memslot_plugin.wasm import ImportName, NotUnderstood, SectionId
from memslot_plugin.wasm.binary import Reader, encode_name, unsigned_leb128
from memslot_plugin.wasm.parse import HEADER
from memslot_plugin.wasm.types import MemoryType, read_memory_type

I32, I64, FUNCREF = b"\x7f", b"\x7e", b"\x70"
END = b"\x0b"
MEMORY = (5, b"\x01\x00\x01")  # one memory of at least one page


def signed_leb128(value: int) -> bytes:
    encoded = bytearray()
    while not -64 <= value < 64:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value & 0x7F)
    return bytes(encoded)


def i32(value: int) -> bytes:
    return b"\x41" + signed_leb128(value)


def i64(value: int) -> bytes:
    return b"\x42" + signed_leb128(value)


def section(number: int, payload: bytes) -> bytes:
    return bytes([number]) + unsigned_leb128(len(payload)) + payload


def vector(*entries: bytes) -> bytes:
    return unsigned_leb128(len(entries)) + b"".join(entries)


def custom(name: str, contents: bytes = b"") -> bytes:
    return section(0, encode_name(name) + contents)


def build(*sections: tuple[int, bytes] | bytes) -> bytes:
    return HEADER + b"".join(s if isinstance(s, bytes) else section(*s) for s in sections)


def active(offset: bytes, data: bytes, memory: int = 0) -> bytes:
    head = b"\x00" if memory == 0 else b"\x02" + unsigned_leb128(memory)
    return head + offset + END + unsigned_leb128(len(data)) + data


def passive(data: bytes) -> bytes:
    return b"\x01" + unsigned_leb128(len(data)) + data


def with_data(*segments: bytes) -> bytes:
    return build(MEMORY, (11, vector(*segments)))


def imported_global(value_type: bytes = I32) -> bytes:
    return encode_name("env") + encode_name("base") + b"\x03" + value_type + b"\x00"


EVERYTHING = build(
    custom("first", b"\x01\x02"),
    (1, vector(b"\x60\x00\x00")),
    custom("between"),
    (
        2,
        vector(
            encode_name("env") + encode_name("f") + b"\x00\x00",
            encode_name("env") + encode_name("t") + b"\x01\x70\x00\x01",
            imported_global(),
            encode_name("env") + encode_name("e") + b"\x04\x00\x00",
        ),
    ),
    (3, vector(b"\x00")),
    (4, vector(b"\x70\x01\x01\x02", b"\x40\x00\x63\x70\x00\x01\xd0\x70\x0b")),
    MEMORY,
    (13, vector(b"\x00\x00")),
    (6, vector(b"\x7f\x01" + i32(-1) + END, b"\x7b\x00\xfd\x0c" + bytes(16) + END)),
    (7, vector(encode_name("memory") + b"\x02\x00", encode_name("run") + b"\x00\x01")),
    (8, b"\x01"),
    (9, vector(b"\x00\x41\x00\x0b\x01\x00")),
    (12, b"\x02"),
    (10, vector(b"\x02\x00\x0b")),
    (11, vector(active(i32(8), b"hello"), passive(b"later"))),
    custom("name", b"\x00\x02\x01m"),
)


# What is no module at all


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"\0as", "truncated: 3 bytes"),
        (b"\0asm\x01\0", "truncated: 6 bytes"),
        (b"\x7fELF\0\0\0\0", "starts with 7f 45 4c 46"),
        (b"  (module)", "looks like WebAssembly text"),
        (b"\0asm\x0d\0\x01\0", "a WebAssembly component was given"),
        (b"\0asm\x02\0\0\0", "of WebAssembly version 2, layer 0"),
        (build(MEMORY)[:-1], "its memory section needs 3 bytes and 2 are left"),
        (HEADER + b"\x05", "ends at byte 9, in the middle of the size of its memory section"),
        (HEADER + b"\x05\x83\x80", "in the middle of the size of its memory section"),
        (
            build((1, b"\x01\x60\x00\x00"), (3, b"\x01\x00")),
            r"declares functions \(1\) and has no code",
        ),
        (build(MEMORY, (12, b"\x02")), r"declares data segments \(2\) and has no data section"),
    ],
)
def test_what_is_no_core_module_is_named_together_with_what_is_allowed(
    data: bytes, sentence: str
) -> None:
    with pytest.raises(InvalidModule, match=sentence) as caught:
        wasm.parse(data)
    assert "allowed is a core WebAssembly module in the binary format" in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("length", range(len(EVERYTHING)))
def test_a_module_cut_anywhere_is_invalid_or_a_shorter_module(length: int) -> None:
    try:
        module = wasm.parse(EVERYTHING[:length])
    except InvalidModule:
        return
    boundaries = {0} | {each.end for each in wasm.parse(EVERYTHING).sections}
    assert length == len(HEADER) or length in boundaries
    assert len(module.source) == length


# What is left to the runtime


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (build((14, b"\x00")), "section of the unknown kind 14"),
        (build(MEMORY, MEMORY), "memory section stands twice or in the wrong order"),
        (build(MEMORY, (1, b"\x00")), "type section stands twice or in the wrong order"),
        (build((6, b"\x00"), (13, b"\x00")), "tag section stands twice or in the wrong order"),
        (build((10, b"\x00"), (12, b"\x00")), "data count section stands twice or in"),
        (HEADER + b"\x05\x80\x80\x80\x80\x80\x00", "size of the memory section: an integer has"),
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
        (
            build((11, vector(active(i32(0), b"")))),
            "segment 0 is for memory 0 and the module has 0",
        ),
        (build(MEMORY, (12, b"\x02"), (11, b"\x00")), "declares 2 data segments and has 0"),
    ],
)
def test_what_is_not_understood_is_named_exactly(data: bytes, reason: str) -> None:
    with pytest.raises(NotUnderstood, match=reason) as caught:
        wasm.parse(data)
    assert not isinstance(caught.value, InvalidModule)


@pytest.mark.parametrize("number", [2, 4, 5, 6, 7, 11])
def test_a_lying_count_costs_nothing(number: int) -> None:
    data = build((number, b"\xff\xff\xff\xff\x0f\x00"))
    start = time.process_time()
    with pytest.raises(NotUnderstood):
        wasm.parse(data)
    assert time.process_time() - start < 1


@given(position=st.integers(8, len(EVERYTHING) - 1), value=st.integers(0, 255))
def test_a_changed_byte_never_breaks_the_reader(position: int, value: int) -> None:
    changed = bytearray(EVERYTHING)
    changed[position] = value
    try:
        module = wasm.parse(bytes(changed))
    except (InvalidModule, NotUnderstood):
        return
    assert wasm.rewrite(module) == changed


@given(st.binary(max_size=200))
def test_random_bytes_after_the_header_never_break_the_reader(noise: bytes) -> None:
    with contextlib.suppress(InvalidModule, NotUnderstood):
        wasm.parse(HEADER + noise)


# What is read


def test_everything_that_a_module_declares_is_found() -> None:
    module = wasm.parse(EVERYTHING)
    assert [(str(i.name), i.kind.name, i.index) for i in module.imports] == [
        ("env.f", "FUNCTION", 0),
        ("env.t", "TABLE", 0),
        ("env.base", "GLOBAL", 0),
        ("env.e", "TAG", 0),
    ]
    assert [(e.name, e.kind.name, e.index) for e in module.exports] == [
        ("memory", "MEMORY", 0),
        ("run", "FUNCTION", 1),
    ]
    assert module.memories == (wasm.Memory(0, MemoryType(1, None)),)
    assert [
        (t.index, t.type.element.name, t.type.minimum, t.type.maximum) for t in module.tables
    ] == [
        (0, "(ref null func)", 1, None),
        (1, "(ref null func)", 1, 2),
        (2, "(ref null func)", 1, None),
    ]
    assert [t.initializer and t.initializer.encoded for t in module.tables] == [
        None,
        None,
        b"\xd0\x70\x0b",
    ]
    assert [(g.type.value.name, g.type.mutable, bool(g.imported)) for g in module.globals] == [
        ("i32", False, True),
        ("i32", True, False),
        ("v128", False, False),
    ]
    assert module.globals[1].initializer == wasm.Expression(b"\x41\x7f\x0b", "i32", 0xFFFFFFFF)
    assert module.globals[1].type.value.is_reference is False
    assert module.tables[0].type.element.is_reference is True
    assert (module.type_count, module.function_count, module.tag_count) == (1, 2, 2)
    assert (module.element_segment_count, module.data_count, module.start) == (1, 2, 1)
    assert module.custom_names == ("first", "between", "name")
    assert [(s.active, s.memory, bytes(s.data)) for s in module.data_segments] == [
        (True, 0, b"hello"),
        (False, None, b"later"),
    ]
    data = module.section(SectionId.DATA)
    assert data is not None
    assert EVERYTHING[data.payload : data.end].endswith(b"later")


def test_the_empty_module_declares_nothing() -> None:
    module = wasm.parse(HEADER)
    assert (module.sections, module.memories, module.start) == ((), (), None)


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
def test_memory_types_are_read_and_written_alike(encoded: bytes, expected: MemoryType) -> None:
    assert read_memory_type(Reader(encoded, 0, len(encoded))) == expected
    assert expected.encode() == encoded


def test_a_memory_knows_its_size_in_bytes() -> None:
    assert (MemoryType(2, 3).minimum_bytes, MemoryType(2, 3).maximum_bytes) == (131072, 196608)
    assert MemoryType(2, None, 1, names_page_size=True).minimum_bytes == 2
    assert MemoryType(2, None).maximum_bytes is None
    assert (MemoryType(1, 1).index_type, MemoryType(1, 1, memory64=True).index_type) == (
        "i32",
        "i64",
    )


@given(st.integers(0, 2**64 - 1), st.integers(-(2**63), 2**63 - 1))
def test_integers_come_back_as_they_were_written(unsigned: int, signed: int) -> None:
    encoded = unsigned_leb128(unsigned) + signed_leb128(signed)
    reader = Reader(encoded, 0, len(encoded))
    assert (reader.unsigned(64), reader.signed(64), reader.left) == (unsigned, signed, 0)


@pytest.mark.parametrize("encoded", [b"\x80\x80\x80\x80\x10", b"\x80\x80\x80\x80\x80\x00"])
def test_an_unsigned_integer_of_too_many_bits_is_not_understood(encoded: bytes) -> None:
    with pytest.raises(NotUnderstood, match="more than 32 bits"):
        Reader(encoded, 0, len(encoded)).u32()


@pytest.mark.parametrize("encoded", [b"\x80\x80\x80\x80\x08", b"\xff\xff\xff\xff\xff\x7f"])
def test_a_signed_integer_of_too_many_bits_is_not_understood(encoded: bytes) -> None:
    with pytest.raises(NotUnderstood, match="more than 32 bits"):
        Reader(encoded, 0, len(encoded)).signed(32)


def test_an_integer_written_longer_than_needed_is_understood() -> None:
    assert Reader(b"\x81\x80\x00", 0, 3).u32() == 1


# Offsets

GLOBALS = [
    b"\x7f\x00" + i32(16) + END,  # global 1, after the imported one
    b"\x7f\x01" + i32(16) + END,  # 2, mutable
    b"\x7f\x00\x23\x00\x0b",  # 3, a copy of the imported one
    b"\x7f\x00\x23\x01" + i32(4) + b"\x6c\x0b",  # 4, global 1 times 4
    b"\x7e\x00" + i32(5) + END,  # 5, declared i64 and given an i32
]


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (i32(0), 0),
        (i32(-1), 0xFFFFFFFF),
        (i32(-(2**31)), 0x80000000),
        (i64(-1), 0xFFFFFFFFFFFFFFFF),
        (i32(5) + i32(7) + b"\x6a", 12),
        (i32(5) + i32(7) + b"\x6b", 0xFFFFFFFE),
        (i32(0x10001) + i32(0x10000) + b"\x6c", 0x10000),
        (i64(2**62) + i64(4) + b"\x7e", 0),
        (i64(1) + i64(2) + b"\x7d" + i64(3) + b"\x7c", 2),
        (b"\x23\x01", 16),
        (b"\x23\x04", 64),
        (b"\x23\x01" + i32(1) + b"\x6a", 17),
    ],
)
def test_a_constant_offset_is_evaluated(offset: bytes, value: int) -> None:
    module = wasm.parse(
        build(
            (2, vector(imported_global())),
            MEMORY,
            (6, vector(*GLOBALS)),
            (11, vector(active(offset, b"x"))),
        )
    )
    found = module.data_segments[0].offset
    assert found is not None
    assert (found.value, found.reason, found.encoded) == (value, None, offset + END)


@pytest.mark.parametrize(
    ("offset", "reason"),
    [
        (b"\x23\x00", "is global 0, which is imported"),
        (b"\x23\x02", "is global 2, which is mutable"),
        (b"\x23\x03", "is global 3, whose value is known only when it runs"),
        (b"\x23\x05", "is not a valid constant expression"),
        (b"\x23\x06", "is global 6, which does not exist at this point"),
        (b"\x23\x00" + i32(1) + b"\x6a", "is global 0, which is imported"),
        (b"", "is not a valid constant expression"),
        (i32(1) + i32(2), "is not a valid constant expression"),
        (i32(1) + b"\x6a", "is not a valid constant expression"),
        (i32(1) + i64(2) + b"\x6a", "is not a valid constant expression"),
        (b"\x43\x00\x00\x00\x00", "is made by f32.const"),
        (b"\x44" + bytes(8), "is made by f64.const"),
        (b"\xd0\x70", "is made by ref.null"),
        (b"\xd2\x00", "is made by ref.func"),
        (b"\xfd\x0c" + bytes(16), "is made by v128.const"),
        (i32(1) + b"\xfb\x1c", "is made by ref.i31"),
        (i32(1) + i32(2) + b"\xfb\x08\x00\x02", "is made by array.new_fixed"),
    ],
)
def test_an_offset_that_is_not_constant_says_why(offset: bytes, reason: str) -> None:
    module = wasm.parse(
        build(
            (2, vector(imported_global())),
            MEMORY,
            (6, vector(*GLOBALS)),
            (11, vector(active(offset, b"x"))),
        )
    )
    found = module.data_segments[0].offset
    assert found is not None
    assert (found.value, found.reason, found.encoded) == (None, reason, offset + END)


# Rewriting


def test_nothing_to_rewrite_gives_the_same_object() -> None:
    assert wasm.rewrite(wasm.parse(EVERYTHING)) is EVERYTHING
    empty = with_data(active(i32(3), b""))
    assert wasm.rewrite(wasm.parse(empty), emptied=[0]) is empty


def test_an_emptied_segment_keeps_index_memory_and_offset_and_nothing_else_moves() -> None:
    data = EVERYTHING.replace(
        section(11, vector(active(i32(8), b"hello"), passive(b"later"))),
        section(11, vector(active(i32(8), b""), passive(b"later"))),
    )
    assert wasm.rewrite(wasm.parse(EVERYTHING), emptied=[0]) == data


def test_an_emptied_segment_with_an_offset_that_is_not_constant_goes_to_zero() -> None:
    globals_ = (2, vector(imported_global(), imported_global(I64)))
    memories = (5, vector(b"\x00\x01", b"\x04\x01"))
    data = build(
        globals_,
        memories,
        (11, vector(active(b"\x23\x00", b"a"), active(b"\x23\x01", b"", memory=1))),
    )
    assert wasm.rewrite(wasm.parse(data), emptied={0, 1}) == build(
        globals_, memories, (11, vector(active(i32(0), b""), active(i64(0), b"", memory=1)))
    )


def test_an_emptied_segment_that_nobody_names_is_left_out() -> None:
    count = section(12, unsigned_leb128(5))
    segments = (
        active(i32(8), b"first"),
        passive(b"second"),
        active(i32(-1), b"", memory=0),
        active(b"\x41\x80\x00", b"more bytes than needed"),
        active(i32(9), b"not emptied"),
    )
    data = build(MEMORY, count, (11, vector(*segments)))
    for named, kept in (
        (0, [segments[1], segments[4]]),
        (1, [active(i32(8), b""), segments[1], segments[4]]),
        (3, [active(i32(8), b""), segments[1], segments[2], segments[4]]),
        (None, [active(i32(8), b""), *segments[1:3], active(b"\x41\x80\x00", b""), segments[4]]),
    ):
        rewritten = wasm.rewrite(wasm.parse(data), emptied=[0, 2, 3], named_segments=named)
        after = (MEMORY, section(12, unsigned_leb128(len(kept))), (11, vector(*kept)))
        assert rewritten == build(*after), named
    only = with_data(active(i32(3), b""))
    assert wasm.rewrite(wasm.parse(only), emptied=[0], named_segments=0) == with_data()


@pytest.mark.parametrize(
    "offset",
    [i64(8), i32(8) + i32(1) + b"\x6a", i32(8) + i32(0) + b"\x6b"],
    ids=["another type", "a sum", "a difference"],
)
def test_an_offset_that_a_runtime_may_refuse_is_never_left_out(offset: bytes) -> None:
    data = with_data(active(offset, b"data"))
    rewritten = wasm.rewrite(wasm.parse(data), emptied=[0], named_segments=0)
    assert rewritten == with_data(active(offset, b""))


def test_a_memory_index_that_need_not_be_written_is_never_left_out() -> None:
    flagged = b"\x02\x00" + i32(8) + END
    data = with_data(flagged + unsigned_leb128(4) + b"data")
    rewritten = wasm.rewrite(wasm.parse(data), emptied=[0], named_segments=0)
    assert rewritten == with_data(flagged + b"\x00")


def test_the_memory_becomes_the_last_import() -> None:
    imported = encode_name("host") + encode_name("m") + b"\x02\x00\x01"
    rewritten = wasm.rewrite(wasm.parse(EVERYTHING), import_memory=ImportName("host", "m"))
    before, after = wasm.parse(EVERYTHING), wasm.parse(rewritten)
    section_before, section_after = (
        m.source[s.payload : s.end]
        for m in (before, after)
        if (s := m.section(SectionId.IMPORT)) is not None
    )
    assert section_after == b"\x05" + section_before[1:] + imported
    assert after.section(SectionId.MEMORY) is None
    assert after.memories == (wasm.Memory(0, MemoryType(1, None), ImportName("host", "m")),)
    untouched = [
        [
            m.source[s.start : s.end]
            for s in m.sections
            if s.id not in (SectionId.IMPORT, SectionId.MEMORY)
        ]
        for m in (before, after)
    ]
    assert untouched[0] == untouched[1]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], []),
        ([custom("a")], [custom("b")]),
        ([(1, vector(b"\x60\x00\x00")), custom("a")], [custom("b")]),
    ],
)
def test_an_import_section_is_made_where_it_belongs_and_custom_sections_stay(
    before: list[tuple[int, bytes] | bytes], after: list[tuple[int, bytes] | bytes]
) -> None:
    data = build(*before, (5, b"\x01\x01\x01\x02"), *after)
    expected = build(
        *before, (2, vector(encode_name("host") + encode_name("m") + b"\x02\x01\x01\x02")), *after
    )
    rewritten = wasm.rewrite(wasm.parse(data), import_memory=ImportName("host", "m"))
    assert rewritten == expected


def test_a_missing_section_is_put_before_the_first_that_follows_it_in_the_order() -> None:
    data = build(custom("a"), (3, b"\x00"), custom("b"), MEMORY)
    rewritten = wasm.rewrite(wasm.parse(data), import_memory=ImportName("h", "m"))
    assert rewritten == build(
        custom("a"), (2, vector(b"\x01h\x01m\x02\x00\x01")), (3, b"\x00"), custom("b")
    )


def test_sizes_that_were_written_in_an_unusual_way_stay_so() -> None:
    odd = b"\x03\x81\x80\x00\x00"  # an empty function section whose size takes three bytes
    data = build(odd, MEMORY, (11, vector(active(i32(0), b"x"))))
    assert wasm.rewrite(wasm.parse(data), emptied=[0]) == build(
        odd, MEMORY, (11, vector(active(i32(0), b"")))
    )


def test_minimums_are_raised_in_the_section_or_in_the_import() -> None:
    module = wasm.parse(build((5, vector(b"\x01\x01\x04", b"\x05\x01\x04"))))
    assert wasm.rewrite(module, minimums={1: 3}) == build(
        (5, vector(b"\x01\x01\x04", b"\x05\x03\x04"))
    )
    single = wasm.parse(build(MEMORY))
    assert wasm.rewrite(single, minimums={0: 200}) == build((5, vector(b"\x00\xc8\x01")))
    assert wasm.rewrite(single, minimums={0: 1}) is single.source
    assert wasm.rewrite(single, minimums={0: 2}, import_memory=ImportName("h", "m")) == build(
        (2, vector(b"\x01h\x01m\x02\x00\x02"))
    )


def test_a_page_size_that_is_spelt_out_stays_spelt_out() -> None:
    data = build((5, b"\x01\x08\x01\x10"))
    rewritten = wasm.rewrite(wasm.parse(data), import_memory=ImportName("h", "m"))
    assert rewritten == build((2, vector(b"\x01h\x01m\x02\x08\x01\x10")))


@pytest.mark.parametrize("data", [HEADER, build((5, vector(b"\x00\x01", b"\x00\x01")))])
def test_only_a_single_memory_can_become_an_import(data: bytes) -> None:
    with pytest.raises(NotUnderstood, match="only a single one can become an import"):
        wasm.rewrite(wasm.parse(data), import_memory=ImportName("h", "m"))


def test_an_imported_memory_is_not_imported_again() -> None:
    module = wasm.parse(build((2, vector(b"\x01a\x01b\x02\x00\x01"))))
    with pytest.raises(NotUnderstood, match=r"already an import, a\.b"):
        wasm.rewrite(module, import_memory=ImportName("h", "m"))
    with pytest.raises(ValueError, match="memory 0 is not one that the module defines"):
        wasm.rewrite(module, minimums={0: 2})


@pytest.mark.parametrize(
    ("emptied", "minimums", "sentence"),
    [
        ([2], {}, "data segment 2 does not exist"),
        ([-1], {}, "data segment -1 does not exist"),
        ([1], {}, "data segment 1 is passive"),
        ([], {1: 1}, "memory 1 is not one that the module defines"),
        ([], {0: 0}, "allowed are 1 to any number"),
    ],
)
def test_what_no_module_could_mean_is_a_value_error(
    emptied: list[int], minimums: dict[int, int], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        wasm.rewrite(wasm.parse(EVERYTHING), emptied=emptied, minimums=minimums)


def test_a_minimum_does_not_pass_the_maximum() -> None:
    with pytest.raises(ValueError, match="allowed are 1 to 4"):
        wasm.rewrite(wasm.parse(build((5, b"\x01\x01\x01\x04"))), minimums={0: 5})


@pytest.mark.timing
def test_thirty_megabytes_of_code_are_not_walked() -> None:
    code = unsigned_leb128(1) + unsigned_leb128(30_000_000) + bytes(30_000_000)
    data = build((1, b"\x01\x60\x00\x00"), (3, b"\x01\x00"), MEMORY, (10, code))
    best = min(_seconds(data) for _ in range(5))
    assert best < 0.05


def _seconds(data: bytes) -> float:
    start = time.thread_time()
    wasm.parse(data)
    return time.thread_time() - start
