"""Rewriting of core modules: each change, to the byte, and the changes that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from memslot_plugin import wasm
from memslot_plugin.tests.encode import (
    END,
    EVERYTHING,
    FIRST,
    I64,
    IMPORTS,
    MEMORY,
    TYPE,
    active,
    build,
    custom,
    i32,
    i64,
    imported_global,
    passive,
    section,
    sized,
    unsigned,
    vector,
    with_data,
)
from memslot_plugin.wasm import ImportName
from memslot_plugin.wasm.types import MemoryType, ValueType


def test_module_with_nothing_to_rewrite_stays_the_same_object() -> None:
    assert wasm.rewrite(wasm.parse(EVERYTHING)) is EVERYTHING
    empty = with_data(active(i32(3), b""))
    assert wasm.rewrite(wasm.parse(empty), emptied=[0]) is empty
    single = build(MEMORY)
    assert wasm.rewrite(wasm.parse(single), memory_types={0: MemoryType(1, None)}) is single


EMPTIED = {"emptied": [0]}
UNNAMED: dict[str, Any] = {"emptied": [0], "named_segments": 0}
IMPORTED = {"import_memory": ImportName("h", "m")}
BASES = (2, vector(imported_global(), imported_global(I64)))
TWO = (5, vector(b"\x00\x01", b"\x04\x01"))
BOUNDED = (5, vector(b"\x01\x01\x02"))
ODD = b"\x03\x81\x80\x00\x00"  # an empty function section whose size takes three bytes
SECOND, THIRD = passive(b"second"), active(i32(-1), b"")
FOURTH, FIFTH = active(b"\x41\x80\x00", b"more than needed"), active(i32(9), b"not emptied")
EMPTY_FIRST, EMPTY_FOURTH = active(i32(8), b""), active(b"\x41\x80\x00", b"")


def counted(*segments: bytes) -> bytes:
    return build(MEMORY, section(12, unsigned(len(segments))), (11, vector(*segments)))


def pages(index: int, minimum: int, maximum: int | None = None) -> dict[str, Any]:
    return {"memory_types": {index: MemoryType(minimum, maximum)}}


FEW = wasm.TableType(ValueType("(ref null func)"), 1, 7, table64=False)


def imported(limits: bytes) -> tuple[int, bytes]:
    """Return an import section that imports one memory."""
    return 2, vector(b"\x01h\x01m\x02" + limits)


REWRITINGS: dict[str, tuple[bytes, dict[str, Any], bytes]] = {
    "emptied segment keeps its place": (
        EVERYTHING,
        EMPTIED,
        EVERYTHING.replace(b"\x05hello", b"\x00").replace(b"\x0b\x12\x02", b"\x0b\x0d\x02"),
    ),
    "emptied segment whose offset is a sum goes to zero": (
        with_data(active(i32(8) + i32(1) + b"\x6a", b"a")),
        EMPTIED,
        with_data(active(i32(0), b"")),
    ),
    "emptied segment whose offset is not constant goes to zero": (
        build(BASES, TWO, (11, vector(active(b"\x23\x00", b"a"), active(b"\x23\x01", b"", 1)))),
        {"emptied": [0, 1]},
        build(BASES, TWO, (11, vector(active(i32(0), b""), active(i64(0), b"", 1)))),
    ),
    **{
        f"segments that code may name stay: {named}": (
            counted(FIRST, SECOND, THIRD, FOURTH, FIFTH),
            {"emptied": [0, 2, 3], "named_segments": named},
            counted(*rest),
        )
        for named, rest in (
            (0, [SECOND, FIFTH]),
            (1, [EMPTY_FIRST, SECOND, FIFTH]),
            (3, [EMPTY_FIRST, SECOND, THIRD, FIFTH]),
            (None, [EMPTY_FIRST, SECOND, THIRD, EMPTY_FOURTH, FIFTH]),
        )
    },
    "only segment is left out": (with_data(active(i32(3), b"")), UNNAMED, with_data()),
    **{
        f"segment that a runtime may refuse stays, with {what}": (
            with_data(head + sized(b"data")),
            UNNAMED,
            with_data(head + sized(b"")),
        )
        for what, head in (
            ("an offset of another type", b"\x00" + i64(8) + END),
            ("a memory index that need not be written", b"\x02\x00" + i32(8) + END),
        )
    },
    "memory becomes the last import": (
        EVERYTHING,
        IMPORTED,
        EVERYTHING.replace(section(*MEMORY), b"").replace(
            section(2, vector(*IMPORTS)),
            section(2, vector(*IMPORTS, b"\x01h\x01m\x02\x00\x01")),
        ),
    ),
    **{
        f"import section is made {where}": (
            build(*before, *after, BOUNDED),
            IMPORTED,
            build(*before, imported(b"\x01\x01\x02"), *after),
        )
        for where, before, after in (
            ("alone", [], []),
            ("behind the types", [section(1, TYPE), custom("a")], []),
            ("before functions", [custom("a")], [section(3, b"\x00"), custom("b")]),
        )
    },
    "size that was written in an unusual way stays so": (
        build(ODD, MEMORY, (11, vector(FIRST))),
        EMPTIED,
        build(ODD, MEMORY, (11, vector(EMPTY_FIRST))),
    ),
    "minimum is raised and takes more bytes": (
        build((5, vector(b"\x01\x01\x04", b"\x05\x01\xc9\x01"))),
        {"memory_types": {1: MemoryType(200, 201, memory64=True)}},
        build((5, vector(b"\x01\x01\x04", b"\x05\xc8\x01\xc9\x01"))),
    ),
    "maximum of a memory is lowered": (
        build((5, vector(b"\x00\x01", b"\x01\x01\xc9\x01"))),
        {"memory_types": {0: MemoryType(1, 7), 1: MemoryType(1, 9)}},
        build((5, vector(b"\x01\x01\x07", b"\x01\x01\x09"))),
    ),
    "maximum of a table is lowered, and its element type and initial value stay": (
        build((4, vector(b"\x70\x01\x01\x02", b"\x40\x00\x63\x70\x00\x01\xd0\x70\x0b"))),
        {"table_types": {1: FEW}},
        build((4, vector(b"\x70\x01\x01\x02", b"\x40\x00\x63\x70\x01\x01\x07\xd0\x70\x0b"))),
    ),
    "page size stays spelt out": (
        build((5, b"\x01\x08\x01\x10")),
        IMPORTED,
        build(imported(b"\x08\x01\x10")),
    ),
}


@pytest.mark.parametrize(("before", "options", "after"), REWRITINGS.values(), ids=REWRITINGS)
def test_module_after_a_rewriting_has_exactly_the_expected_bytes(
    before: bytes, options: dict[str, Any], after: bytes
) -> None:
    assert wasm.rewrite(wasm.parse(before), **options) == after


@pytest.mark.parametrize(
    ("before", "options", "sentence"),
    [
        (build(), IMPORTED, "only the single memory of a module"),
        (build(TWO), IMPORTED, "only the single memory of a module"),
        (
            build(imported(b"\x00\x01")),
            IMPORTED,
            "only the single memory of a module, defined there",
        ),
        (build(imported(b"\x00\x01")), pages(0, 2), "memory 0 is not one that the module defines"),
        (EVERYTHING, pages(1, 1), "memory 1 is not one that the module defines"),
        (EVERYTHING, pages(0, 0), "allowed are 1 to any number"),
        (build(BOUNDED), pages(0, 3, 2), "allowed are 1 to 2"),
        (EVERYTHING, {"table_types": {0: FEW}}, "table 0 is not one that the module defines"),
        (EVERYTHING, {"table_types": {3: FEW}}, "table 3 is not one that the module defines"),
        (EVERYTHING, {"emptied": [2]}, "data segment 2 does not exist"),
        (EVERYTHING, {"emptied": [-1]}, "data segment -1 does not exist"),
        (EVERYTHING, {"emptied": [1]}, "data segment 1 is passive"),
    ],
)
def test_rewriting_that_is_impossible_is_refused(
    before: bytes, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        wasm.rewrite(wasm.parse(before), **options)
