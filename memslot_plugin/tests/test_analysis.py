"""The walk over code: every instruction, exact counts, hostile bytes."""

from __future__ import annotations

import dataclasses
import json
import mmap
import random
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memslot_plugin import wasm
from memslot_plugin._core import PAGE_SIZE, align_up, ffi, lib
from memslot_plugin.guest import analysis
from memslot_plugin.guest import verdict as verdicts
from memslot_plugin.guest.analysis import Instruction
from memslot_plugin.tests import instructions
from memslot_plugin.tests.encode import HEADER, section, sized, unsigned, vector
from memslot_plugin.tests.mutations import change_bytes
from memslot_plugin.tests.profiles import examples
from memslot_plugin.wasm import SectionId
from memslot_plugin.wasm.binary import Reader
from memslot_plugin.wasm.module import Section

wasmtime = pytest.importorskip("wasmtime", reason="wasmtime, which assembles and validates")

PREFIXES = {0xFB: 0x20, 0xFC: 0x20, 0xFD: 0x120, 0xFE: 0x60}
"""Prefixes of longer opcodes, each with a limit past its last known opcode."""


@pytest.fixture(scope="module")
def engine() -> Any:
    """Return an engine with every proposal of wasmtime except stack switching, which the walk does not understand."""
    config = wasmtime.Config()
    for name in dir(wasmtime.Config):
        skipped = ("component", "deterministic", "stack_switching")
        if name.startswith("wasm_") and not any(each in name for each in skipped):
            setattr(config, name, True)
    return wasmtime.Engine(config)


def is_valid(engine: Any, module: bytes) -> bool:
    try:
        wasmtime.Module.validate(engine, module)
    except wasmtime.WasmtimeError:
        return False
    return True


def assemble(text: str) -> bytes:
    return bytes(wasmtime.wat2wasm(text))


def report_of(source: str | bytes) -> analysis.CodeReport:
    return analysis.analyse(wasm.parse(assemble(source) if isinstance(source, str) else source))


def code_section(source: bytes) -> Section:
    found = wasm.parse(source).section(SectionId.CODE)
    assert found is not None
    return found


def with_code(source: bytes, code: bytes) -> bytes:
    """Return the module with other contents of its code section."""
    found = code_section(source)
    return source[: found.start] + section(SectionId.CODE, code) + source[found.end :]


def bodies_of(source: bytes) -> list[bytes]:
    found = code_section(source)
    reader = Reader(source, found.payload, found.end)
    return [bytes(reader.take(reader.u32())) for _ in range(reader.u32())]


def minimal(*bodies: bytes) -> bytes:
    """Return a module of functions with these bodies, and one item of each kind that code can name."""
    sections = [
        (1, b"\x01\x60\x00\x00"),
        (3, unsigned(len(bodies)) + bytes(len(bodies))),
        (4, b"\x01\x70\x00\x00"),
        (5, b"\x01\x00\x00"),
        (6, b"\x01\x7f\x01\x41\x00\x0b"),
        (9, b"\x01\x01\x00\x00"),
        (12, b"\x01"),
        (10, vector(*map(sized, bodies))),
        (11, b"\x01\x01\x00"),
    ]
    return HEADER + b"".join(section(*each) for each in sections)


# Every instruction


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One or more instructions as a body encodes them."""

    text: str
    data: bytes
    count: int


TEXTS = [*instructions.PLAIN, *instructions.STRUCTURED, *instructions.LEGACY]
HEXADECIMAL = {**instructions.STRUCTURED, **instructions.LEGACY}
CATALOGUE = assemble(instructions.module(TEXTS))
LOCALS = b"\x01\x01\x7f"
ENCODED = [
    Encoded(text, body[4:-2], len(HEXADECIMAL[text].split()) if text in HEXADECIMAL else 1)
    for text, body in zip(TEXTS, bodies_of(CATALOGUE), strict=True)
]
RUNNABLE = [each for each in ENCODED if each.text not in instructions.LEGACY]
REVERSIBLE = ("memory.grow", "global.set", "memory.atomic.wait", "memory.atomic.notify")
"""Instructions that the walk looks for and that cost no reset in place."""
IMPORTED = 1
"""Number of functions that the catalogue imports."""


def opcodes(encoded: Encoded) -> set[str]:
    """Return the opcodes in hexadecimal, with four digits behind a prefix."""
    if encoded.text in HEXADECIMAL:
        found = HEXADECIMAL[encoded.text].split()
        return {each if len(each) == 2 else each[:2] + each[2:].zfill(4) for each in found}
    first = encoded.data[0]
    if first not in PREFIXES:
        return {f"{first:02x}"}
    return {f"{first:02x}{Reader(encoded.data, 1, len(encoded.data)).u32():04x}"}


def sought(text: str) -> list[str]:
    """Return the name of the instruction in reports if the walk looks for it."""
    name = text.split(maxsplit=1)[0]
    name = "memory.atomic.wait" if name.startswith("memory.atomic.wait") else name
    return [name] if name in tuple(Instruction) else []


def skeleton(functions: int) -> bytes:
    """Return the preamble and this many functions whose code the caller replaces."""
    return assemble(f"(module {instructions.PREAMBLE} {'(func (data.drop $d)) ' * functions})")


ONE = skeleton(1)


def with_one_body(body: bytes) -> bytes:
    return with_code(ONE, vector(sized(body)))


def test_every_instruction_of_the_catalogue_is_stepped_over_exactly(engine: Any) -> None:
    for encoded in ENCODED:
        body = LOCALS + b"\x00" + encoded.data + b"\x00\x0b"
        source = with_one_body(body)
        report = report_of(source)
        where = (1, 1, IMPORTED, source.index(body) + 4)
        assert report.not_understood is None, encoded
        assert report.instructions == encoded.count + 3, encoded
        found = [dataclasses.astuple(each) for each in report.occurrences]
        assert found == [(name, *where) for name in sought(encoded.text)], encoded
        verdict = verdicts.judge(wasm.parse(source), report)
        costs = [name for name in sought(encoded.text) if name not in REVERSIBLE]
        said = [f"The code has {name} in function 1, at byte 0x{where[-1]:x}" for name in costs]
        assert [reason.split(";")[0] for reason in verdict.reasons] == said, encoded
        assert is_valid(engine, source) == (encoded.text not in instructions.LEGACY), encoded


def test_catalogue_of_instructions_has_each_one_that_the_walk_looks_for() -> None:
    assert {name for each in ENCODED for name in sought(each.text)} == {*Instruction}
    assert len(Instruction) == lib.MS_CODE_KINDS


def test_opcode_is_known_exactly_if_the_catalogue_has_it(engine: Any) -> None:
    candidates = [
        (f"{opcode:02x}", f"0x{opcode:02x}", bytes([opcode]))
        for opcode in range(256)
        if opcode not in PREFIXES
    ] + [
        (f"{prefix:02x}{code:04x}", f"0x{prefix:02x} {code}", bytes([prefix]) + unsigned(code))
        for prefix, end in PREFIXES.items()
        for code in [*range(end), 1 << 14, (1 << 32) - 1]
    ]
    known = set()
    for name, said, data in candidates:
        answer = report_of(minimal(b"\x00" + data + bytes(30))).not_understood or ""
        if "is not known here" not in answer:
            known.add(name)
        else:
            assert answer.startswith(f"The opcode {said} is not known here (at byte ")
            for zeros in range(24):  # as many bytes as its immediates may have
                body = LOCALS + b"\x00" + data + bytes(zeros)
                assert not is_valid(engine, with_one_body(body + b"\x00\x0b"))
    assert known == set().union(*map(opcodes, ENCODED))


@given(st.data())
@settings(max_examples=examples(15))
def test_instructions_in_any_order_and_nesting_are_counted_one_by_one(
    engine: Any, data: st.DataObject
) -> None:
    bodies, counted = [], 0
    sites: list[tuple[str, int, int]] = []  # instruction, number of the body, offset in it
    for number in range(data.draw(st.integers(1, 4))):
        body, depth = bytearray(LOCALS), 0
        for each in data.draw(st.lists(st.sampled_from([None, *RUNNABLE]), max_size=40)):
            body += b"\x00"  # unreachable: any operands are valid then
            if each is None:  # another block around the rest
                body += b"\x02\x40"
                depth += 1
                counted += 2
                continue
            sites += [(name, number, len(body)) for name in sought(each.text)]
            body += each.data
            counted += 1 + each.count
            if depth and data.draw(st.booleans()):
                body += b"\x00\x0b"
                depth -= 1
                counted += 2
        bodies.append(bytes(body + b"\x00" + b"\x0b" * (depth + 1)))
        counted += depth + 2
    source = with_code(skeleton(len(bodies)), vector(*map(sized, bodies)))
    assert is_valid(engine, source)
    module = wasm.parse(source)
    report = analysis.analyse(module)
    assert (report.not_understood, report.instructions) == (None, counted)
    assert report.bodies == len(bodies)
    ends = accumulate(map(len, map(sized, bodies)), initial=source.index(sized(bodies[0])))
    starts = [end - len(body) for end, body in zip(list(ends)[1:], bodies, strict=True)]
    placed = [(name, IMPORTED + number, starts[number] + at) for name, number, at in sites]
    assert {each.instruction: dataclasses.astuple(each)[1:] for each in report.occurrences} == {
        name: summed([site for site in placed if site[0] == name]) for name, _, _ in placed
    }


def summed(sites: Sequence[tuple[str, int, int]]) -> tuple[int, int, int, int]:
    """Return the number of sites, the number of their functions, and the place of the first."""
    _, function, offset = sites[0]
    return len(sites), len({each for _, each, _ in sites}), function, offset


# The report


MARKING = f"""(module {instructions.PREAMBLE}
  (func (global.set $h (i64.const 1)) (drop (memory.grow $o (i32.const 1))))
  (func (memory.init $c (i32.const 0) (i32.const 0) (i32.const 0)) (data.drop $d))
  (func (table.init $u $y (i32.const 0) (i32.const 0) (i32.const 0)) (elem.drop $x))
  (func (table.copy $t $u (i32.const 0) (i32.const 0) (i32.const 0)) (data.drop $d)))"""


def test_index_that_code_uses_is_reported_under_its_use() -> None:
    report = report_of(MARKING)
    assert report.globals_set == (1,)
    assert (report.data_used, report.data_dropped) == ((1,), (0,))
    assert (report.elements_used, report.elements_dropped) == ((1,), (0,))
    drop = report.occurrence("data.drop")
    assert drop is not None
    assert (drop.count, drop.functions, drop.first_function) == (2, 2, 2)
    assert report.occurrence("table.set") is None
    json.dumps(dataclasses.asdict(report))


def test_module_without_code_has_an_empty_report() -> None:
    report = report_of("(module (memory 1))")
    assert (report.bodies, report.instructions, report.not_understood) == (0, 0, None)


# Bytes that are no code

LIE = b"\xff\xff\xff\xff\x0f"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"\x00\x0c", "The opcode 0x0c is cut off at byte {2}, in function 1."),
        (b"\x00\x01", "The code is cut off at byte {3}, in function 1."),
        (b"\x00", "The code is cut off at byte {2}, in function 1."),
        (b"\x00\x01\x27\x0b", "The opcode 0x27 is not known here (at byte {3}, in function 1)."),
        (b"\x00\xfd\x9a\x01\x0b", "The opcode 0xfd 154 is not known here (at byte {2},"),
        (b"\x00\x02\x62\x0b\x0b", "The opcode 0x02 names a type that is not known here (at"),
        (b"\x01\x01\x65\x0b", "The code names a type that is not known here (at byte {1},"),
        (b"\x00\x28\x20\x00\x0b", "The opcode 0x28 has flags that are not known here (at byte"),
        (b"\x00\x1f\x40\x01\x04\x00\x0b", "The opcode 0x1f has flags that are not known here"),
        (b"\x00\x20\x80\x80\x80\x80\x80\x00\x0b", "The opcode 0x20 has an integer of too many"),
        (b"\x00\x24\x01\x0b", "The opcode 0x24 has an index that does not exist (at byte {2},"),
        (b"\x00\x0b\x0b", "The code is followed by bytes that belong to nothing (at byte {3},"),
    ],
)
def test_code_that_is_not_understood_is_named_with_its_place(body: bytes, sentence: str) -> None:
    source = minimal(b"\x00\x0b", body)
    start = source.index(sized(b"\x00\x0b") + sized(body)) + 3
    for number in range(1, 4):  # {1} is where the body begins
        sentence = sentence.replace(f"{{{number}}}", str(start + number))
    said = report_of(source).not_understood
    assert said is not None
    assert said.startswith(sentence)


def test_functions_without_a_body_are_not_understood() -> None:
    source = minimal(b"\x00\x0b", b"\x00\x0b")
    source = with_code(source, b"\x01\x02\x00\x0b")
    assert report_of(source).not_understood == "2 functions are declared and 1 have code."
    source = with_code(source, b"\x02\x02\x00\x0b\x02\x00\x0b\x00")
    assert "bytes that belong to nothing" in str(report_of(source).not_understood)


def test_lying_number_of_segments_allocates_nothing() -> None:
    source = minimal(b"\x00\x0b").replace(b"\x09\x04\x01\x01\x00\x00", b"\x09\x05" + LIE)
    tracemalloc.start()
    assert report_of(source).elements_used == ()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("opener", ["0240", "0340", "0440", "0640", "1f4000"])
def test_block_in_a_million_blocks_is_counted(opener: str) -> None:
    deep = 1_000_000
    report = report_of(minimal(b"\x00" + bytes.fromhex(opener) * deep + b"\x0b" * (deep + 1)))
    assert (report.not_understood, report.instructions) == (None, 2 * deep + 1)


@pytest.fixture(scope="module")
def fault() -> Callable[[bytes], int]:
    """Return a function that walks a code section in front of an unmapped page, where a read too far is fatal."""
    pages = align_up(len(CATALOGUE) + 64)
    memory = mmap.mmap(-1, pages + PAGE_SIZE)
    end = int(ffi.cast("uintptr_t", ffi.from_buffer(memory))) + pages
    assert lib.ms_forbid(end, PAGE_SIZE) == 0

    def answer(code: bytes) -> int:
        memory[pages - len(code) : pages] = code
        report, marks = ffi.new("ms_code_report *"), ffi.new("ms_code_marks *")
        space = ffi.new("uint8_t[]", 4)
        for name in ("globals", "tables", "memories", "data", "elements"):
            part = getattr(marks, name)
            part.marks, part.count = space, 4
        start = ffi.cast("uint8_t *", end - len(code))
        lib.ms_analyse_code(start, 0, len(code), marks, report)
        return int(report.fault)

    return answer


def test_code_section_that_is_cut_at_any_byte_is_not_understood(
    fault: Callable[[bytes], int],
) -> None:
    found = code_section(CATALOGUE)
    code = CATALOGUE[found.payload : found.end]
    assert fault(code) == lib.MS_CODE_UNDERSTOOD
    assert all(fault(code[:end]) for end in range(len(code)))


def test_body_that_is_cut_at_any_byte_is_not_understood(fault: Callable[[bytes], int]) -> None:
    for encoded in ENCODED:
        body = LOCALS + b"\x00" + encoded.data + b"\x00\x0b"
        for end in range(1, len(body)):
            assert fault(vector(sized(body[:end]))), (encoded, end)


@pytest.mark.parametrize(
    "body",
    [LIE, b"\x00\x0e" + LIE, b"\x00\x1c" + LIE, b"\x00\x1f\x40" + LIE],
    ids=["locals", "labels", "value types", "catch clauses"],
)
def test_lying_count_in_a_body_ends_with_the_bytes(
    fault: Callable[[bytes], int], body: bytes
) -> None:
    """Each round of a loop must read a byte, so that the end of the bytes ends the loop."""
    assert fault(vector(sized(body))) == lib.MS_CODE_CUT


# Compared with a runtime


@given(st.lists(st.sampled_from(RUNNABLE), min_size=1, max_size=8), st.integers(0, 2**64))
@settings(max_examples=examples(300))
def test_code_that_a_runtime_accepts_is_understood(
    engine: Any, chosen: list[Encoded], seed: int
) -> None:
    rng = random.Random(seed)
    body = LOCALS + b"".join(b"\x00" + each.data for each in chosen) + b"\x00\x0b"
    for _ in range(rng.choice((1, 1, 2, 3))):
        body = change_bytes(rng, body)
    source = with_one_body(body)
    report = report_of(source)
    if is_valid(engine, source):
        assert (report.not_understood, report.bodies) == (None, 1)


def test_integer_is_understood_as_long_as_a_runtime_allows(engine: Any) -> None:
    """Include an offset of ten bytes into a 32-bit memory, and a long opcode behind a prefix."""
    long32, long64 = b"\x80\x80\x80\x80\x00", b"\x80" * 9 + b"\x00"
    parts = (
        *(b"\x41", long32, b"\x28\x82\x80\x80\x80\x00", long64, b"\x1a"),
        *(b"\x42", long64, b"\x1a"),
        *(b"\xfc\x89\x80\x80\x80\x00", long32),
        *(b"\x41\x00\x24", long32, b"\x0b"),
    )
    source = with_one_body(LOCALS + b"".join(parts))
    assert is_valid(engine, source)
    report = report_of(source)
    assert (report.not_understood, report.data_dropped) == (None, (0,))
    assert report.globals_set == (0,)
