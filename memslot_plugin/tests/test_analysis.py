"""The walk over code: every instruction, exact counts, hostile bytes; and what the verdict is worth."""

from __future__ import annotations

import dataclasses
import json
import mmap
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memslot_plugin import analysis, wasm
from memslot_plugin._core import PAGE_SIZE, ffi, lib
from memslot_plugin.analysis import Instruction
from memslot_plugin.tests import instructions
from memslot_plugin.tests.profiles import examples
from memslot_plugin.wasm import ExternKind, SectionId
from memslot_plugin.wasm.binary import Reader, unsigned_leb128
from memslot_plugin.wasm.parse import HEADER

wasmtime = pytest.importorskip("wasmtime", reason="wasmtime, which assembles and validates")

PREFIXES = {0xFB: 0x20, 0xFC: 0x20, 0xFD: 0x120, 0xFE: 0x60}
"""The opcodes that go on, and up to where their tables are looked at: past the last one known."""


@pytest.fixture(scope="module")
def engine() -> Any:
    """Everything that wasmtime can be told to run, but stack switching, which is not provable."""
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


def with_code(source: bytes, code: bytes) -> bytes:
    """The module with other contents of its code section."""
    section = wasm.parse(source).section(SectionId.CODE)
    assert section is not None
    head = bytes([SectionId.CODE]) + unsigned_leb128(len(code))
    return source[: section.start] + head + code + source[section.end :]


def bodies_of(source: bytes) -> Iterator[bytes]:
    section = wasm.parse(source).section(SectionId.CODE)
    assert section is not None
    reader = Reader(source, section.payload, section.end)
    for _ in range(reader.u32()):
        yield bytes(reader.take(reader.u32()))


def minimal(*bodies: bytes) -> bytes:
    """Functions without parameters with these bodies, and a thing of each kind that code names."""
    count = unsigned_leb128(len(bodies))
    code = count + b"".join(unsigned_leb128(len(body)) + body for body in bodies)
    sections = [
        (1, b"\x01\x60\x00\x00"),
        (3, count + bytes(len(bodies))),
        (4, b"\x01\x70\x00\x00"),
        (5, b"\x01\x00\x00"),
        (6, b"\x01\x7f\x01\x41\x00\x0b"),
        (9, b"\x01\x01\x00\x00"),
        (12, b"\x01"),
        (10, code),
        (11, b"\x01\x01\x00"),
    ]
    return HEADER + b"".join(bytes([n]) + unsigned_leb128(len(p)) + p for n, p in sections)


# Every instruction


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An instruction, or several, as they stand in a body."""

    text: str
    data: bytes
    count: int


TEXTS = [*instructions.PLAIN, *instructions.STRUCTURED, *instructions.LEGACY]
HEXADECIMAL = {**instructions.STRUCTURED, **instructions.LEGACY}
CATALOGUE = assemble(
    f"(module {instructions.PREAMBLE}"
    + "".join(f"(func (local i32) unreachable {text} unreachable)" for text in TEXTS)
    + ")"
)
LOCALS = b"\x01\x01\x7f"
ENCODED = [
    Encoded(text, body[4:-2], len(HEXADECIMAL[text].split()) if text in HEXADECIMAL else 1)
    for text, body in zip(TEXTS, bodies_of(CATALOGUE), strict=True)
]
RUNNABLE = [each for each in ENCODED if each.text not in instructions.LEGACY]
IMPORTED = 1
"""How many functions the catalogue imports."""


def opcodes(encoded: Encoded) -> set[str]:
    """The opcodes in it, in hexadecimal, what follows a prefix as four digits."""
    if encoded.text in HEXADECIMAL:
        return {
            each if len(each) == 2 else each[:2] + each[2:].zfill(4)
            for each in HEXADECIMAL[encoded.text].split()
        }
    first = encoded.data[0]
    if first not in PREFIXES:
        return {f"{first:02x}"}
    return {f"{first:02x}{Reader(encoded.data, 1, len(encoded.data)).u32():04x}"}


@pytest.mark.parametrize("encoded", ENCODED, ids=lambda encoded: encoded.text)
def test_every_instruction_is_stepped_over_exactly(engine: Any, encoded: Encoded) -> None:
    body = LOCALS + b"\x00" + encoded.data + b"\x00\x0b"
    source = with_one_body(body)
    report = report_of(source)
    assert report.not_understood is None
    assert report.instructions == encoded.count + 3
    assert [(each.instruction, each.count) for each in report.occurrences] == sought(encoded.text)
    assert all(
        (each.first_function, each.first_offset) == (IMPORTED, source.index(body) + 4)
        for each in report.occurrences
    )
    assert is_valid(engine, source) == (encoded.text not in instructions.LEGACY)


def sought(text: str) -> list[tuple[str, int]]:
    name = text.split(maxsplit=1)[0]
    name = "memory.atomic.wait" if name.startswith("memory.atomic.wait") else name
    return [(name, 1)] if name in tuple(Instruction) else []


def skeleton(functions: int) -> bytes:
    """The preamble and this many functions, whose code is to be replaced."""
    return assemble(f"(module {instructions.PREAMBLE} {'(func (data.drop $d)) ' * functions})")


ONE = skeleton(1)


def with_one_body(body: bytes) -> bytes:
    return with_code(ONE, b"\x01" + unsigned_leb128(len(body)) + body)


def test_every_instruction_looked_for_occurs_in_the_catalogue() -> None:
    found = {name for each in ENCODED for name, _ in sought(each.text)}
    assert found == {each.value for each in Instruction}
    assert len(Instruction) == lib.MS_CODE_KINDS


def test_exactly_the_opcodes_that_were_assembled_are_known(engine: Any) -> None:
    candidates = [
        (f"{opcode:02x}", f"0x{opcode:02x}", bytes([opcode]))
        for opcode in range(256)
        if opcode not in PREFIXES
    ]
    candidates += [
        (
            f"{prefix:02x}{code:04x}",
            f"0x{prefix:02x} {code}",
            bytes([prefix]) + unsigned_leb128(code),
        )
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
            for zeros in range(24):  # whatever its immediates may be
                body = LOCALS + b"\x00" + data + bytes(zeros)
                assert not is_valid(engine, with_one_body(body + b"\x00\x0b"))
    assert known == set().union(*map(opcodes, ENCODED))


@given(st.data())
@settings(max_examples=examples(60))
def test_instructions_in_any_order_and_nesting_are_counted_one_by_one(
    engine: Any, data: st.DataObject
) -> None:
    bodies, counted, expected = [], 0, Counter[str]()
    first: dict[str, tuple[int, int]] = {}
    functions: dict[str, set[int]] = {}
    for number in range(data.draw(st.integers(1, 4))):
        body = bytearray(LOCALS)
        depth = 0
        for each in data.draw(st.lists(st.sampled_from([None, *RUNNABLE]), max_size=40)):
            if each is None:  # another block around what comes
                body += b"\x00\x02\x40"  # unreachable: whatever lies on the stack is gone
                depth += 1
                counted += 2
                continue
            body += b"\x00"
            for name, _ in sought(each.text):
                expected[name] += 1
                first.setdefault(name, (number, len(body)))
                functions.setdefault(name, set()).add(number)
            body += each.data
            counted += 1 + each.count
            if depth and data.draw(st.booleans()):
                body += b"\x00\x0b"
                depth -= 1
                counted += 2
        body += b"\x00" + b"\x0b" * (depth + 1)
        counted += depth + 2
        bodies.append(bytes(body))
    code = unsigned_leb128(len(bodies))
    starts = []
    for body_ in bodies:
        code += unsigned_leb128(len(body_))
        starts.append(len(code))
        code += body_
    source = with_code(skeleton(len(bodies)), code)
    assert is_valid(engine, source)
    module = wasm.parse(source)
    report = analysis.analyse(module)
    section = module.section(SectionId.CODE)
    assert section is not None
    assert (report.not_understood, report.instructions) == (None, counted)
    assert report.bodies == len(bodies)
    assert {each.instruction: each.count for each in report.occurrences} == expected
    for each_ in report.occurrences:
        number, offset = first[each_.instruction]
        assert each_.first_function == IMPORTED + number
        assert each_.first_offset == section.payload + starts[number] + offset
        assert each_.functions == len(functions[each_.instruction])
    sites = analysis.find_sites(module, tuple(Instruction))
    assert Counter(site.instruction for site in sites) == expected
    assert [site.offset for site in sites] == sorted(site.offset for site in sites)


# What is reported


MARKING = f"""(module {instructions.PREAMBLE}
  (func (global.set $h (i64.const 1)) (drop (memory.grow $o (i32.const 1))))
  (func (memory.init $c (i32.const 0) (i32.const 0) (i32.const 0)) (data.drop $d))
  (func (table.init $u $y (i32.const 0) (i32.const 0) (i32.const 0)) (elem.drop $x))
  (func (table.copy $t $u (i32.const 0) (i32.const 0) (i32.const 0)) (data.drop $d)))"""


def test_indices_are_reported_by_what_happens_to_them() -> None:
    report = report_of(MARKING)
    assert (report.globals_set, report.memories_grown, report.tables_changed) == (
        (1,),
        (1,),
        (0, 1),
    )
    assert (report.data_used, report.data_dropped) == ((1,), (0,))
    assert (report.elements_used, report.elements_dropped) == ((1,), (0,))
    drop = report.occurrence("data.drop")
    assert drop is not None
    assert (drop.count, drop.functions, drop.first_function) == (2, 2, 2)
    assert report.occurrence("table.set") is None
    json.dumps(dataclasses.asdict(report))


def test_sites_are_found_one_by_one() -> None:
    source = assemble(MARKING)
    sites = analysis.find_sites(wasm.parse(source))
    assert [(site.instruction, site.function) for site in sites] == [
        ("memory.init", 2),
        ("data.drop", 2),
        ("table.init", 3),
        ("elem.drop", 3),
        ("table.copy", 4),
        ("data.drop", 4),
    ]
    assert [source[site.offset] for site in sites] == [0xFC] * 6
    assert analysis.find_sites(wasm.parse(source), ()) == ()


def test_a_module_without_code_has_an_empty_report() -> None:
    report = report_of("(module (memory 1))")
    assert (report.bodies, report.instructions, report.not_understood) == (0, 0, None)
    assert analysis.find_sites(wasm.parse(HEADER)) == ()


# Bytes that are no code


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"\x00\x0c", "The opcode 0x0c is cut off at byte {2}, in function 1."),
        (b"\x00\x01", "The code is cut off at byte {3}, in function 1."),
        (b"\x00", "The code is cut off at byte {2}, in function 1."),
        (b"\x00\x01\x27\x0b", "The opcode 0x27 is not known here (at byte {3}, in function 1)."),
        (b"\x00\xe0\x0b", "The opcode 0xe0 is not known here (at byte {2}, in function 1)."),
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
def test_what_is_not_understood_is_named_with_its_place(body: bytes, sentence: str) -> None:
    source = minimal(b"\x00\x0b", body)
    size = bytes([len(body)])
    start = source.index(size + body, source.index(b"\x02\x00\x0b" + size) + 3)
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
    said = report_of(source).not_understood
    assert said is not None
    assert "bytes that belong to nothing" in said


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xff\xff\xff\x0f",  # runs of locals
        b"\x00\x0e\xff\xff\xff\xff\x0f",  # labels
        b"\x00\x1c\xff\xff\xff\xff\x0f",  # value types
        b"\x00\x1f\x40\xff\xff\xff\xff\x0f",  # catch clauses
    ],
)
def test_a_lying_count_costs_nothing(body: bytes) -> None:
    start = time.process_time()
    assert report_of(minimal(body)).not_understood is not None
    assert time.process_time() - start < 1


def test_a_lying_number_of_segments_costs_nothing() -> None:
    source = minimal(b"\x00\x0b").replace(
        b"\x09\x04\x01\x01\x00\x00", b"\x09\x05\xff\xff\xff\xff\x0f"
    )
    start = time.process_time()
    assert report_of(source).elements_used == ()
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "opener", [b"\x02\x40", b"\x03\x40", b"\x04\x40", b"\x06\x40", b"\x1f\x40\x00"]
)
def test_nesting_is_a_number(opener: bytes) -> None:
    deep = 1_000_000
    report = report_of(minimal(b"\x00" + opener * deep + b"\x0b" * (deep + 1)))
    assert (report.not_understood, report.instructions) == (None, 2 * deep + 1)


class Fenced:
    """Bytes that end where the next byte faults, so that reading past them ends the process."""

    def __init__(self, capacity: int) -> None:
        pages = -(-capacity // PAGE_SIZE) * PAGE_SIZE
        self._map = mmap.mmap(-1, pages + PAGE_SIZE)
        self._address = int(ffi.cast("uintptr_t", ffi.from_buffer(self._map)))
        self._end = self._address + pages
        assert lib.ms_forbid(self._end, PAGE_SIZE) == 0

    def fault(self, code: bytes) -> int:
        """What the core says about these contents of a code section."""
        start = ffi.cast("uint8_t *", self._end - len(code))
        ffi.memmove(start, code, len(code))
        report, marks = ffi.new("ms_code_report *"), ffi.new("ms_code_marks *")
        space = ffi.new("uint8_t[]", 4)
        for name in ("globals", "tables", "memories", "data", "elements"):
            part = getattr(marks, name)
            part.marks, part.count = space, 4
        lib.ms_analyse_code(start, 0, len(code), marks, report)
        return int(report.fault)


@pytest.fixture(scope="module")
def fenced() -> Fenced:
    return Fenced(len(CATALOGUE) + 64)


def code_of(source: bytes) -> bytes:
    section = wasm.parse(source).section(SectionId.CODE)
    assert section is not None
    return source[section.payload : section.end]


def test_code_that_is_cut_anywhere_is_not_understood(fenced: Fenced) -> None:
    code = code_of(CATALOGUE)
    assert fenced.fault(code) == lib.MS_CODE_UNDERSTOOD
    assert all(fenced.fault(code[:end]) for end in range(len(code)))


@given(st.sampled_from(ENCODED), st.integers(0, 40))
def test_an_instruction_that_is_cut_anywhere_is_not_understood(
    fenced: Fenced, encoded: Encoded, end: int
) -> None:
    body = (LOCALS + b"\x00" + encoded.data + b"\x00\x0b")[: end + 1]
    whole = len(body) == len(encoded.data) + 6
    assert (fenced.fault(b"\x01" + unsigned_leb128(len(body)) + body) == 0) == whole


@given(st.binary(max_size=300))
@settings(max_examples=examples(300))
def test_any_bytes_end_in_an_answer(fenced: Fenced, noise: bytes) -> None:
    fenced.fault(noise)
    fenced.fault(b"\x01" + unsigned_leb128(len(noise)) + noise)


@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=examples(300))
def test_changed_code_ends_in_an_answer(fenced: Fenced, changes: list[tuple[int, int]]) -> None:
    changed = bytearray(code_of(CATALOGUE))
    for position, value in changes:
        changed[position % len(changed)] = value
    fenced.fault(bytes(changed))


# Against the judgement of a runtime


@given(
    st.lists(st.sampled_from(RUNNABLE), min_size=1, max_size=8),
    st.lists(
        st.tuples(
            st.integers(0, 1 << 10),
            st.sampled_from(["set", "insert", "delete", "double"]),
            st.integers(0, 255),
        ),
        min_size=1,
        max_size=3,
    ),
)
@settings(max_examples=examples(1500))
def test_code_that_a_runtime_accepts_is_understood(
    engine: Any, chosen: list[Encoded], changes: list[tuple[int, str, int]]
) -> None:
    body = bytearray(LOCALS)
    for each in chosen:
        body += b"\x00" + each.data
    body += b"\x00\x0b"
    for position, what, value in changes:
        at = position % len(body)
        if what == "set":
            body[at] = value
        elif what == "insert":
            body.insert(at, value)
        elif what == "delete":
            del body[at]
        else:  # an integer written longer than needed
            body[at : at + 1] = bytes([body[at] | 0x80, 0])
        if not body:
            return
    source = with_one_body(bytes(body))
    report = report_of(source)
    if is_valid(engine, source):
        assert report.not_understood is None
        assert report.bodies == 1


def test_integers_may_be_written_as_long_as_a_runtime_allows(engine: Any) -> None:
    """Among them an offset of ten bytes into a 32-bit memory, and an opcode after a prefix."""
    long32, long64 = b"\x80\x80\x80\x80\x00", b"\x80" * 9 + b"\x00"
    body = LOCALS + b"".join(
        (
            *(b"\x41", long32, b"\x28\x82\x80\x80\x80\x00", long64, b"\x1a"),
            *(b"\x42", long64, b"\x1a"),
            *(b"\xfc\x89\x80\x80\x80\x00", long32),
            *(b"\x41\x00\x24", long32, b"\x0b"),
        )
    )
    source = with_one_body(body)
    assert is_valid(engine, source)
    report = report_of(source)
    assert (report.not_understood, report.data_dropped) == (None, (0,))
    assert report.globals_set == (0,)


# The verdict


def verdict_of(text: str) -> analysis.Verdict:
    module = wasm.parse(assemble(text))
    return analysis.verdict(module, analysis.analyse(module))


REFUSED = [
    (
        """(module (table 1 funcref) (func (export "f") (table.set (i32.const 0) (ref.null func))
             (table.set (i32.const 0) (ref.null func))))""",
        'The code has table.set in function 0 (exported as "f"), at byte 0x',
    ),
    (
        """(module (table 1 funcref) (func (drop (table.grow (ref.null func) (i32.const 1)))))""",
        "a table cannot shrink.",
    ),
    (
        """(module (table 1 funcref)
             (func (table.fill (i32.const 0) (ref.null func) (i32.const 1))))""",
        "table.fill in function 0",
    ),
    (
        """(module (table 1 funcref)
             (func (table.copy (i32.const 0) (i32.const 0) (i32.const 1))))""",
        "table.copy in function 0",
    ),
    (
        """(module (table 1 funcref) (elem $e func)
             (func (table.init $e (i32.const 0) (i32.const 0) (i32.const 0))))""",
        "table.init in function 0",
    ),
    (
        "(module (elem $e func) (func (elem.drop $e)))",
        "a segment that was dropped does not come back.",
    ),
    ('(module (memory 1) (data $d "x") (func (data.drop $d)))', "data.drop in function 0"),
    (
        """(module (memory 1) (data $d "x")
             (func (memory.init $d (i32.const 0) (i32.const 0) (i32.const 1))))""",
        "whether its segment is still there cannot be seen from outside.",
    ),
    (
        """(module (type $s (struct (field (mut i32)))) (global $g (ref $s) (struct.new_default $s))
             (func (struct.set $s 0 (global.get $g) (i32.const 1))))""",
        "struct.set in function 0",
    ),
    (
        """(module (type $a (array (mut i32)))
             (global $g (ref $a) (array.new_default $a (i32.const 3)))
             (func (array.set $a (global.get $g) (i32.const 0) (i32.const 1))))""",
        "an object that the instance keeps cannot be put back.",
    ),
    (
        """(module (func $f) (global $g (mut funcref) (ref.null func))
             (elem declare func $f) (func (global.set $g (ref.func $f))))""",
        "Global 0 holds references, (ref null func), and is assigned to; a reference cannot be saved.",
    ),
    (
        '(module (global (export "g") (mut externref) (ref.null extern)))',
        'Global 0 holds references, (ref null extern), and is exported as "g"',
    ),
    (
        "(module (func $f) (start $f))",
        "Function 0 starts each new instance and does not run at a reset in place;",
    ),
    (
        """(module (import "env" "m" (memory 1)) (data (i32.const 0) "x"))""",
        "Each new instance copies data into the memory that is imported as env.m;",
    ),
    (
        """(module (import "env" "t" (table 1 funcref)) (func $f) (elem (i32.const 0) $f))""",
        "Each new instance may put its functions into the table that is imported as env.t;",
    ),
    (
        """(module (type $f (func)) (type $c (cont $f)) (elem declare func $z)
             (func $z (drop (cont.new $c (ref.func $z)))))""",
        "What the code does cannot be proven: the opcode 0xe0 is not known here (at byte",
    ),
]


NOT_CAPTURED = {
    "a field of an object": (
        """(module (type $s (struct (field (mut i32)))) (global $g (ref $s) (struct.new_default $s))
             (func (struct.set $s 0 (global.get $g) (i32.const 1))))""",
        "The code has struct.set in function 0",
    ),
    "an element of an array": (
        """(module (type $a (array (mut i32)))
             (global $g (ref $a) (array.new_default $a (i32.const 3)))
             (func (array.set $a (global.get $g) (i32.const 0) (i32.const 1))))""",
        "The code has array.set in function 0",
    ),
    "an imported table": (
        """(module (import "env" "t" (table 1 funcref)) (func $f) (elem (i32.const 0) $f))""",
        "Each new instance may put its functions into the table that is imported as env.t;",
    ),
    "code that is not understood": (
        """(module (type $f (func)) (type $c (cont $f)) (elem declare func $z)
             (func $z (drop (cont.new $c (ref.func $z)))))""",
        "What the code does cannot be proven: the opcode 0xe0 is not known here",
    ),
}


@pytest.mark.parametrize("name", NOT_CAPTURED)
def test_what_a_snapshot_could_miss_is_a_reason(name: str) -> None:
    text, said = NOT_CAPTURED[name]
    module = wasm.parse(assemble(text))
    report = analysis.analyse(module)
    reason = analysis.reason_against_snapshots(module, report, given_away=False)
    assert reason is not None
    assert reason.startswith(said)
    assert reason.endswith(".")


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_what_a_reset_in_place_could_miss_is_a_reason(text: str, reason: str) -> None:
    verdict = verdict_of(text)
    assert not verdict.in_place
    (said,) = verdict.reasons
    assert reason in said
    assert said.endswith(".")


PROVEN = [
    "(module)",
    """(module (memory (export "m") 1) (global (mut i32) (i32.const 1))
         (func (global.set 0 (i32.const 2)) (i32.store (i32.const 0) (i32.const 1))))""",
    """(module (table 2 funcref) (func $f) (elem (i32.const 0) $f)
         (func (call_indirect (i32.const 0)) (drop (table.get (i32.const 1))) (drop (table.size))))""",
    "(module (global $g (mut funcref) (ref.null func)) (func (drop (global.get $g))))",
    """(module (import "env" "m" (memory 1)) (func (i32.store (i32.const 0) (i32.const 1))))""",
    """(module (memory 1) (data "never used") (func (memory.fill (i32.const 0) (i32.const 1)
         (i32.const 5)) (memory.copy (i32.const 0) (i32.const 1) (i32.const 2))))""",
    """(module (type $s (struct (field (mut i32)))) (func (drop (struct.new_default $s))))""",
]


@pytest.mark.parametrize("text", PROVEN)
def test_what_only_writes_memories_and_globals_can_be_reset_in_place(text: str) -> None:
    verdict = verdict_of(text)
    assert (verdict.in_place, verdict.reasons) == (True, ())


def test_a_start_function_that_was_dropped_is_no_reason() -> None:
    module = wasm.parse(assemble("(module (func $f) (start $f))"))
    assert analysis.verdict(module, analysis.analyse(module), start_dropped=True).in_place


def test_what_must_be_watched_is_a_condition() -> None:
    verdict = verdict_of(
        """(module (memory 1) (table (export "t") (export "u") 1 funcref)
             (func (export "grow") (drop (memory.grow (i32.const 1)))))"""
    )
    assert verdict.in_place
    growth, table = verdict.conditions
    assert growth.startswith(
        'The code has memory.grow in function 0 (exported as "grow"), at byte 0x'
    )
    assert growth.endswith("; after a growth only a new instance has the right size.")
    assert table.startswith('Table 0 is exported as "t" and "u"; who was given')


def test_what_is_imported_belongs_to_the_embedder() -> None:
    verdict = verdict_of(
        """(module (import "a" "m" (memory 1)) (import "a" "t" (table 1 funcref))
             (import "a" "g" (global (mut i32))) (import "a" "c" (global i32))
             (export "again" (table 0)) (func (global.set 0 (i32.const 1))))"""
    )
    assert verdict.in_place
    assert verdict.conditions == ()
    assert [sentence.split(" belongs")[0] for sentence in verdict.foreign] == [
        "The memory that is imported as a.m",
        "The table that is imported as a.t",
        "The global that is imported as a.g",
    ]


def test_globals_change_if_code_assigns_to_them_or_the_embedder_can() -> None:
    module = wasm.parse(
        assemble(
            """(module (import "env" "g" (global (mut i32)))
                 (global $a (mut i32) (i32.const 0)) (global $b (mut v128) (v128.const i64x2 0 0))
                 (global $c (mut i32) (i32.const 0)) (global $d i32 (i32.const 0))
                 (global $e (export "e") (mut i32) (i32.const 0)) (export "d" (global $d))
                 (func (global.set 0 (i32.const 0)) (global.set $a (i32.const 0))
                   (global.set $b (v128.const i64x2 1 1))))"""
        )
    )
    report = analysis.analyse(module)
    assert report.globals_set == (0, 1, 2)
    assert analysis.changing_globals(module, report) == (1, 2, 5)
    assert analysis.verdict(module, report).vector_globals == (2,)
    unclear = dataclasses.replace(report, not_understood="The code is odd.", globals_set=())
    assert analysis.changing_globals(module, unclear) == (1, 2, 3, 5)


# What the verdict is worth: the same behaviour as a new instance

PARTS = {
    "memory": """(func (export "memory") (result i32) (i32.atomic.rmw.add (i32.const 64)
        (i32.const 3)))""",
    "fill": """(func (export "fill") (result i32) (memory.fill (i32.load (i32.const 128))
        (i32.const 7) (i32.const 9)) (i32.store (i32.const 128)
        (i32.add (i32.load (i32.const 128)) (i32.const 300))) (i32.load (i32.const 128)))""",
    "i32": """(func (export "i32") (result i32) (global.set $i (i32.add (global.get $i) (i32.const 1)))
        (global.get $i))""",
    "i64": """(func (export "i64") (result i64) (global.set $l (i64.mul (global.get $l) (i64.const 7)))
        (global.get $l))""",
    "f64": """(func (export "f64") (result i64) (global.set $d (f64.add (global.get $d)
        (f64.const 0.1))) (i64.reinterpret_f64 (global.get $d)))""",
    "table.get": '(func (export "table.get") (result i32) (ref.is_null (table.get (i32.const 1))))',
    "table.set": '(func (export "table.set") (table.set (i32.const 1) (ref.func $callee)))',
    "table.grow": """(func (export "table.grow") (result i32) (table.grow (ref.null func)
        (i32.const 1)))""",
    "table.copy": """(func (export "table.copy") (table.copy (i32.const 1) (i32.const 0)
        (i32.const 1)))""",
    "indirect": """(func (export "indirect") (result i32)
        (call_indirect (type $callee) (i32.const 1)))""",
    "memory.init": """(func (export "memory.init") (result i32) (memory.init $p (i32.const 200)
        (i32.const 0) (i32.const 4)) (i32.load (i32.const 200)))""",
    "data.drop": '(func (export "data.drop") (data.drop $p))',
    "table.init": """(func (export "table.init") (table.init $e (i32.const 1) (i32.const 0)
        (i32.const 1)))""",
    "elem.drop": '(func (export "elem.drop") (elem.drop $e))',
    "struct": """(func (export "struct") (result i32) (struct.set $s 0 (global.get $o) (i32.add
        (struct.get $s 0 (global.get $o)) (i32.const 1))) (struct.get $s 0 (global.get $o)))""",
    "reference": """(func (export "reference") (result i32) (ref.is_null (global.get $r))
        (global.set $r (ref.func $callee)))""",
    "size": '(func (export "size") (result i32) (table.size))',
    "trap": """(func (export "trap") (global.set $i (i32.const 99)) (i32.store (i32.const 4)
        (i32.const -1)) (unreachable))""",
    "start": "(func $start (i32.store8 (i32.const 70) (i32.const 42))) (start $start)",
}
INNOCENT = {"memory", "fill", "i32", "i64", "f64", "table.get", "indirect", "size", "trap"}


def stateful(parts: list[str]) -> str:
    return f"""(module (type $callee (func (result i32))) (type $s (struct (field (mut i32))))
      (memory (export "m") 1) (table 3 funcref) (elem (i32.const 0) $callee)
      (global $i (export "g:i") (mut i32) (i32.const -5))
      (global $l (export "g:l") (mut i64) (i64.const 3))
      (global $d (export "g:d") (mut f64) (f64.const 1.5))
      (global $r (mut funcref) (ref.null func)) (global $o (ref $s) (struct.new $s (i32.const 4)))
      (data (i32.const 60) "some initial bytes") (data $p "passive") (elem $e func $callee)
      (elem declare func $callee)
      (func $callee (result i32) (i32.const 11)) {" ".join(PARTS[part] for part in parts)})"""


def behaviour(store: Any, exports: Any, calls: list[str]) -> list[object]:
    seen: list[object] = []
    for name in calls:
        if name == "start":
            continue
        try:
            seen.append((name, exports[name](store)))
        except wasmtime.Trap as trap:
            seen.append((name, trap.trap_code))
    return [*seen, bytes(exports["m"].read(store))]


@given(st.data())
@settings(max_examples=examples(200))
def test_after_a_proven_reset_in_place_an_instance_behaves_as_a_new_one(
    engine: Any, data: st.DataObject
) -> None:
    parts = data.draw(st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=5, unique=True))
    calls = data.draw(st.lists(st.sampled_from(parts), max_size=6))
    again = data.draw(st.lists(st.sampled_from(parts), max_size=6))
    text = stateful(parts)
    verdict = verdict_of(text)
    assert verdict.in_place == (set(parts) <= INNOCENT)
    if not verdict.in_place:
        return
    compiled = wasmtime.Module(engine, assemble(text))
    store = wasmtime.Store(engine)
    new, used = (wasmtime.Instance(store, compiled, []).exports(store) for _ in range(2))
    initial = bytes(used["m"].read(store))
    globals_ = {name: used[name].value(store) for name in ("g:i", "g:l", "g:d")}
    behaviour(store, used, calls)
    used["m"].write(store, initial)
    for name, value in globals_.items():
        used[name].set_value(store, value)
    assert behaviour(store, used, again) == behaviour(store, new, again)


# Speed


@pytest.mark.timing
def test_thirty_megabytes_of_code_are_walked_in_less_than_half_a_second() -> None:
    """Bodies as compilers write them: mostly locals, constants, loads and branches."""
    text = """(module (memory 1) (global $g (mut i32) (i32.const 0)) (func (param i32 i32) (result i32)
      (local i32) (global.set $g (local.tee 2 (i32.sub (global.get $g) (i32.const 160))))
      (block (loop (br_if 1 (i32.eqz (i32.load offset=12 (local.get 0))))
        (i32.store offset=8 (local.get 2) (i32.add (local.get 1) (i32.const 1000000)))
        (local.set 1 (i32.xor (i32.load8_u (local.get 1)) (i32.shl (local.get 0) (i32.const 3))))
        (f64.store offset=32 (local.get 2) (f64.mul (f64.const 0.5) (f64.load (local.get 1))))
        (br 0))) (drop (memory.grow (i32.const 1))) (call 0 (local.get 0) (local.get 1))))"""
    source = assemble(text)
    (body,) = bodies_of(source)
    count = 30_000_000 // (len(body) + 1)
    code = unsigned_leb128(count) + (unsigned_leb128(len(body)) + body) * count
    functions = unsigned_leb128(count) + bytes(count)
    module = wasm.parse(source)
    declared = module.section(SectionId.FUNCTION)
    assert declared is not None
    many = source[: declared.start] + b"\x03" + unsigned_leb128(len(functions)) + functions
    many = with_code(many + source[declared.end :], code)
    parsed = wasm.parse(many)
    best, report = 9.0, analysis.analyse(parsed)
    for _ in range(5):
        start = time.thread_time()
        analysis.analyse(parsed)
        best = min(best, time.thread_time() - start)
    assert (report.not_understood, report.bodies) == (None, count)
    assert report.globals_set == (0,)
    assert best < 0.3, f"{len(code) / best / 1e6:.0f} MB/s"
    assert not [e for e in parsed.exports if e.kind is ExternKind.MEMORY]
