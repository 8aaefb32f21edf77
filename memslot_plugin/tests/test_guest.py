"""The plan for a guest: its rules, and that a planned module computes what the runtime alone computes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from memslot_hooks.types import InitialContent
from memslot_plugin import guest, wasm

wasmtime = pytest.importorskip("wasmtime", reason="wasmtime, which assembles and runs the guests")

PAGE = wasm.WASM_PAGE
GIB = 1 << 30


@pytest.fixture(scope="module")
def engine() -> Any:
    config = wasmtime.Config()
    config.wasm_threads = True
    config.shared_memory = True
    config.wasm_memory64 = True
    config.wasm_multi_memory = True
    return wasmtime.Engine(config)


def plan_of(text: str, *, image_limit: int = GIB, import_memory: bool = False) -> guest.Plan:
    source = bytes(wasmtime.wat2wasm(text))
    return guest.plan(
        source, image_limit=image_limit, import_memory=import_memory, export_state=False
    )


# The rules


@pytest.mark.parametrize(
    ("text", "sizes", "import_memory"),
    [
        ('(func (export "f"))', [], False),
        ('(func (export "f"))', [], True),
        ("(memory 0)", [0], False),
        ("(memory 1)", [PAGE], False),
        ('(import "a" "b" (memory 1 2 shared))', [PAGE], False),
        ('(import "a" "b" (memory 1 2 shared))', [PAGE], True),
    ],
)
def test_a_module_that_needs_no_change_is_left_alone(
    text: str, sizes: list[int], *, import_memory: bool
) -> None:
    plan = plan_of(f"(module {text})", import_memory=import_memory)
    assert plan.module is plan.source
    assert (plan.native, plan.import_name) == (None, None)
    assert [memory.minimum_bytes for memory in plan.memories] == sizes
    for memory in plan.memories:
        if memory.imported is None:
            assert memory.content == InitialContent(memory.minimum_bytes, ())


def test_content_is_the_active_segments_in_order_without_the_empty_ones() -> None:
    plan = plan_of(
        """(module (memory (export "memory") 2 5)
             (data (i32.const 8) "first") (data "passive") (data (i32.const 3) "")
             (data (i32.const 10) "later") (data (i32.const 131071) "z"))"""
    )
    (memory,) = plan.memories
    assert memory.content is not None
    segments = [(s.offset, s.data) for s in memory.content.segments]
    assert segments == [(8, b"first"), (10, b"later"), (131071, b"z")]
    assert memory.content.byte_size == memory.minimum_bytes == 2 * PAGE
    assert (memory.maximum_bytes, memory.exported_as) == (5 * PAGE, ("memory",))
    assert (memory.segment_count, memory.data_bytes, memory.reason) == (4, 11, None)
    assert [bytes(s.data) for s in wasm.parse(plan.module).data_segments] == [b"passive"]


def test_a_segment_that_code_may_name_keeps_its_index() -> None:
    text = """(module (memory (export "memory") 2)
             (data (i32.const 8) "first") (data $p "passive") (data $n (i32.const 3) "named")
             (data (i32.const 10) "later") (data (i32.const 131071) "z")
             (func (export "use") (memory.init $n (i32.const 0) (i32.const 0) (i32.const 0)){}))"""
    for more, kept in ("", 3), ("(data.drop 3)", 4):
        plan = plan_of(text.format(more))
        rewritten = wasm.parse(plan.module)
        sizes, offsets = [0, 7, 0, 0], [8, None, 3, 10]
        assert [len(s.data) for s in rewritten.data_segments] == sizes[:kept]
        assert [s.offset and s.offset.value for s in rewritten.data_segments] == offsets[:kept]


def test_code_that_is_not_understood_may_name_every_segment() -> None:
    source = wasmtime.wat2wasm(
        '(module (memory 1) (data (i32.const 8) "first") (func (drop (i32.const 65))))'
    )
    unknown = bytes(source).replace(b"\x41\xc1\x00\x1a", b"\xff\xc1\x00\x1a")
    assert unknown != source
    plan = guest.plan(unknown, image_limit=GIB, import_memory=False)
    assert plan.code is not None
    assert (plan.code.named_segments, plan.memories[0].reason) == (None, None)
    assert [len(s.data) for s in wasm.parse(plan.module).data_segments] == [0]


ENDS = "Data segment {} ends at byte {} and the memory starts with {}"
IMAGELESS = [
    (
        """(import "env" "base" (global i32)) (memory 1) (data (i32.const 0) "a")
             (data (global.get 0) "b")""",
        "The offset of data segment 1 is global 0, which is imported; place it at a constant",
    ),
    (
        '(memory 1) (data (i32.const 65530) "a") (data (i32.const 65530) "sevenby")',
        ENDS.format(1, 65537, "65536, so instantiation traps"),
    ),
    ('(memory 1) (data (i32.const 65537) "")', ENDS.format(0, 65537, 65536)),
    ('(memory 0) (data (i32.const 0) "a")', ENDS.format(0, 1, 0)),
    ('(memory 1) (data (i32.const -1) "a")', ENDS.format(0, 4294967296, 65536)),
    (
        '(import "env" "memory" (memory 1)) (data (i32.const 0) "a")',
        "It is imported as env.memory and belongs to whoever provides it",
    ),
]


@pytest.mark.parametrize("import_memory", [False, True])
@pytest.mark.parametrize(("text", "reason"), IMAGELESS)
def test_a_memory_without_an_image_keeps_its_segments_and_says_why(
    text: str, reason: str, *, import_memory: bool
) -> None:
    plan = plan_of(f"(module {text})", import_memory=import_memory)
    (memory,) = plan.memories
    assert memory.content is None
    assert memory.reason is not None
    assert memory.reason.startswith(reason)
    assert memory.reason.endswith(".")
    assert plan.native is None
    assert (plan.import_name is not None) == (import_memory and memory.imported is None)
    before, after = wasm.parse(plan.source), wasm.parse(plan.module)
    assert before.data_segments == after.data_segments


def test_an_image_past_the_limit_is_refused_with_both_numbers() -> None:
    text = """(module (memory 3) (data (i32.const 131000) "b") (data (i32.const 65536) "a")
      (data (i32.const 0) ""))"""  # the empty one does not widen the image
    (memory,) = plan_of(text, image_limit=65465).memories
    assert memory.content is not None
    (memory,) = plan_of(text, image_limit=65464).memories
    assert memory.reason == (
        "The image would span 65465 bytes and the limit is 65464; raise the image limit to get one."
    )


def test_memories_get_images_one_by_one() -> None:
    plan = plan_of(
        """(module (import "env" "base" (global i32)) (memory 1) (memory 2)
             (data (memory 1) (i32.const 70000) "of 1") (data (memory 0) (global.get 0) "dynamic")
             (data (memory 1) (i32.const 70001) "later"))"""
    )
    none, content = (memory.content for memory in plan.memories)
    assert none is None
    assert content is not None
    assert [(s.offset, s.data) for s in content.segments] == [(70000, b"of 1"), (70001, b"later")]
    assert [bytes(s.data) for s in wasm.parse(plan.module).data_segments] == [b"dynamic"]


TWO = "The module has 2 memories and this host can be given a single one"
NATIVE = [
    ("(memory 1 2 shared)", "Memory 0 is shared between threads", (False, True)),
    ("(memory i64 1)", "Memory 0 has 64-bit addresses and no maximum", (False, True)),
    (
        "(memory i64 1 65537)",
        "Memory 0 may grow to 4295032832 bytes and a slot holds at most 4294967296",
        (False, True),
    ),
    (
        "(memory 1) (memory 7 (pagesize 1))",
        "Memory 1 has pages of 1 bytes and a slot grows by 65536",
        (False,),
    ),
    ("(memory 1) (memory 1)", TWO, (True,)),
    ('(import "a" "b" (memory 1)) (memory 1)', TWO, (True,)),
]


@pytest.mark.parametrize(
    ("text", "reason", "import_memory"),
    [(text, reason, mode) for text, reason, modes in NATIVE for mode in modes],
)
def test_a_module_that_no_slot_can_serve_runs_natively_with_the_reason(
    text: str, reason: str, *, import_memory: bool
) -> None:
    plan = plan_of(f"(module {text})", import_memory=import_memory)
    assert plan.module is plan.source
    assert plan.import_name is None
    assert plan.native is not None
    assert plan.native.startswith(reason)
    assert plan.native.endswith(".")
    assert {memory.reason for memory in plan.memories} == {plan.native}
    assert {memory.content for memory in plan.memories} == {None}


def test_a_64_bit_memory_of_at_most_4_gib_gets_an_image() -> None:
    plan = plan_of("""(module (memory i64 1 65536) (data (i64.const 7) "x"))""")
    assert plan.memories[0].content is not None
    assert plan.memories[0].maximum_bytes == 1 << 32
    assert plan.memories[0].memory64


def test_an_offset_of_the_wrong_type_is_left_for_the_runtime_to_refuse() -> None:
    source = bytes(wasmtime.wat2wasm("""(module (memory 1) (data (i32.const 7) "x"))"""))
    source = source.replace(b"\x41\x07\x0b\x01x", b"\x42\x07\x0b\x01x")
    plan = guest.plan(source, image_limit=GIB, import_memory=False)
    assert plan.memories[0].reason == (
        "The offset of data segment 0 is an i64 and the memory's addresses are i32, so the runtime"
        " refuses the module."
    )


def test_what_is_not_understood_runs_natively_with_the_reason() -> None:
    source = b"\0asm\x01\0\0\0\x0e\x01\x00"
    plan = guest.plan(source, image_limit=GIB, import_memory=True)
    assert plan.native == (
        "The module has a section of the unknown kind 14; the runtime decides about it."
    )
    assert plan.module is source
    assert (plan.memories, plan.structure) == ((), None)
    assert plan.report().segments == ()


def test_the_import_gets_a_module_name_that_the_guest_does_not_use() -> None:
    plan = plan_of(
        """(module (import "memslot" "f" (func)) (import "memslot1" "f" (func)) (memory 1))""",
        import_memory=True,
    )
    assert str(plan.import_name) == "memslot2.memory"
    assert wasm.parse(plan.module).imports[-1].name == plan.import_name


def test_the_report_says_what_was_done_and_is_json() -> None:
    plan = plan_of(
        """(module (memory (export "m") 1) (data (i32.const 8) "abc") (data "p"))""",
        import_memory=True,
    )
    report = json.loads(json.dumps(dataclasses.asdict(plan.report())))
    assert report["changes"] == [
        "1 data segment of memory 0 (3 bytes) went from the module into its image.",
        "Memory 0 is imported as memslot.memory instead of defined.",
    ]
    assert report["import_name"] == "memslot.memory"
    assert report["memories"][0]["image"] is True
    assert report["memories"][0]["exported_as"] == ["m"]
    assert [tuple(each.values()) for each in report["segments"]] == [
        (0, "active", 0, 8, 3, True),
        (1, "passive", None, None, 1, False),
    ]
    text = "(module (global $g (mut i32) (i32.const 1)) (func (global.set $g (i32.const 2))))"
    plan = guest.plan(bytes(wasmtime.wat2wasm(text)), image_limit=GIB, import_memory=False)
    assert "Mutable globals are exported as" in " ".join(plan.report().changes)
    assert plan_of(text).report().changes == ()


# The same results and traps as natively

SUM = """
  (func (export "sum") (param $from i32) (param $to i32) (result i32) (local $s i32)
    (block $done (loop $next
      (br_if $done (i32.ge_u (local.get $from) (local.get $to)))
      (local.set $s (i32.add (i32.mul (local.get $s) (i32.const 31))
                             (i32.load8_u (local.get $from))))
      (local.set $from (i32.add (local.get $from) (i32.const 1)))
      (br $next)))
    (local.get $s))
  (func (export "size") (result i32) (memory.size))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
"""
CALLS: list[tuple[str, tuple[int, ...]]] = [
    ("sum", (0, 4096)),
    ("sum", (65000, 65536)),
    ("sum", (131000, 131072)),
    ("size", ()),
    ("grow", (1,)),
    ("size", ()),
    ("sum", (0, 100)),
]

GUESTS = {
    "no memory": '(module (func (export "f") (result i32) (i32.const 7)))',
    "no data": f"(module (memory 1) {SUM})",
    "minimum 0": f"(module (memory 0) {SUM})",
    "minimum 0 and an empty segment": f'(module (memory 0) (data (i32.const 0) "") {SUM})',
    "minimum 0 and data": f'(module (memory 0) (data (i32.const 0) "x") {SUM})',
    "one segment": f'(module (memory 1) (data (i32.const 100) "hello") {SUM})',
    "overlapping segments": f"""(module (memory 1) (data (i32.const 0) "aaaaaaaa")
        (data (i32.const 4) "bb") (data (i32.const 3) "c") {SUM})""",
    "up to the last byte": f'(module (memory 2 3) (data (i32.const 131071) "z") {SUM})',
    "one byte too far": f'(module (memory 1) (data (i32.const 65535) "zz") {SUM})',
    "an empty segment at the end": f'(module (memory 1) (data (i32.const 65536) "") {SUM})',
    "an empty segment past the end": f'(module (memory 1) (data (i32.const 65537) "") {SUM})',
    "a negative offset": f'(module (memory 1) (data (i32.const -2) "z") {SUM})',
    "an offset by an imported global": f"""(module (import "env" "base" (global i32))
        (memory 1) (data (global.get 0) "dynamic") (data (i32.const 3) "static") {SUM})""",
    "an offset by a defined global": f"""(module (global $g i32 (i32.const 77)) (memory 1)
        (data (global.get $g) "at 77") {SUM})""",
    "an offset by arithmetic": f"""(module (memory 1)
        (data (offset (i32.sub (i32.mul (i32.const 5) (i32.const 9)) (i32.const 3))) "at 42")
        {SUM})""",
    "an imported memory": f"""(module (import "env" "memory" (memory 1))
        (data (i32.const 9) "mine") {SUM})""",
    "custom sections": f"""(module (@custom "before" (before first) "abc") (memory 1)
        (data (i32.const 1) "x") {SUM} (@custom "after" (after last) "def"))""",
    "a start function that reads its data": f"""(module (memory 1) (data (i32.const 8) "AB")
        (func $start (i32.store8 (i32.const 0) (i32.load8_u (i32.const 9)))) (start $start) {SUM})""",
    "a start function that traps": f"""(module (memory 1) (data (i32.const 8) "AB")
        (func $start (unreachable)) (start $start) {SUM})""",
    "passive segments": f"""(module (memory 1) (data (i32.const 2) "active") (data $p "passive")
        (func (export "init") (memory.init $p (i32.const 50) (i32.const 1) (i32.const 3)))
        (func (export "drop") (data.drop $p)) {SUM})""",
    "memory.init and data.drop on an active segment": f"""(module (memory 1)
        (data $a (i32.const 2) "active")
        (func (export "drop") (data.drop $a))
        (func (export "init") (memory.init $a (i32.const 0) (i32.const 0) (i32.const 0)))
        (func (export "init1") (memory.init $a (i32.const 0) (i32.const 0) (i32.const 1))) {SUM})""",
    "a table, elements and an import": f"""(module (import "env" "log" (func $log (param i32)))
        (type $unary (func (result i32))) (table 2 funcref) (elem (i32.const 0) $one $two)
        (memory 1) (data (i32.const 0) "\\01")
        (func $one (result i32) (i32.const 1)) (func $two (result i32) (i32.const 2))
        (func (export "indirect") (param i32) (result i32)
          (call $log (local.get 0)) (call_indirect (type $unary) (local.get 0))) {SUM})""",
    "elements out of bounds": f"""(module (table 1 funcref) (func $f) (elem (i32.const 1) $f)
        (memory 1) (data (i32.const 0) "x") {SUM})""",
    "an exception tag": f"""(module (tag $e (param i32)) (memory 1) (data (i32.const 5) "tag")
        (func (export "throw") (result i32) (block $h (result i32)
          (try_table (catch $e $h) (throw $e (i32.load8_u (i32.const 5)))) (unreachable))) {SUM})""",
    "references, vectors and tail calls": f"""(module (type $f (func (result i32)))
        (global $v v128 (v128.const i64x2 1 2)) (global $n (ref null $f) (ref.null $f))
        (table $t 1 (ref null $f)) (table $x i64 1 externref)
        (elem declare func $seven) (global $r (ref $f) (ref.func $seven))
        (func $seven (type $f) (i32.load8_u (i32.const 7)))
        (memory 1) (data (i32.const 7) "7")
        (func (export "tail") (result i32) (return_call_ref $f (global.get $r))) {SUM})""",
    "a 64-bit memory": """(module (memory i64 1 2) (data (i64.const 9) "\\07")
        (func (export "f") (result i32) (i32.load8_u (i64.const 9)))
        (func (export "far") (result i32) (i32.load8_u (i64.const 0x100000000))))""",
    "a shared memory": f'(module (memory 1 2 shared) (data (i32.const 0) "shared") {SUM})',
}


def execute(
    engine: Any, module: bytes, prepare: Callable[[Any, Any, Any], None] | None = None
) -> list[object]:
    """The results and traps of instantiating a module and calling its exports, in order.

    `prepare` puts the memory that the rewritten module imports into the linker.
    """
    seen: list[object] = []
    store = wasmtime.Store(engine)
    linker = wasmtime.Linker(engine)
    i32 = wasmtime.ValType.i32()
    constant = wasmtime.GlobalType(i32, False)
    memory = wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
    log = wasmtime.FuncType([i32], [])
    for name, item in (
        ("base", wasmtime.Global(store, constant, wasmtime.Val.i32(40))),
        ("memory", memory),
        ("log", wasmtime.Func(store, log, lambda value: seen.append(("log", value)))),
    ):
        linker.define(store, "env", name, item)
    compiled = wasmtime.Module(engine, module)
    if prepare is not None:
        prepare(store, linker, compiled)
    try:
        exports = linker.instantiate(store, compiled).exports(store)
    except wasmtime.Trap as trap:
        return [*seen, ("instantiation", trap.trap_code), bytes(memory.read(store))]
    names = ("f", "far", "init", "init1", "drop", "init", "init1", "tail", "throw")
    calls = [
        *CALLS,
        *((name, ()) for name in names),
        *(("indirect", (index,)) for index in range(3)),
    ]
    for name, arguments in [*calls, *CALLS]:
        if name in exports:
            try:
                seen.append((name, exports[name](store, *arguments)))
            except wasmtime.Trap as trap:
                seen.append((name, trap.trap_code))
    return seen


@pytest.mark.parametrize("name", GUESTS)
def test_a_guest_with_its_memory_imported_computes_what_it_computes_alone(
    engine: Any, name: str
) -> None:
    plan = plan_of(GUESTS[name], import_memory=True)

    def prepare(store: Any, linker: Any, compiled: Any) -> None:
        if plan.import_name is None:
            return
        memory = wasmtime.Memory(store, compiled.imports[-1].type)
        if (content := plan.memories[0].content) is not None:
            for segment in content.segments:
                memory.write(store, segment.data, segment.offset)
        linker.define(store, *plan.import_name, memory)

    assert execute(engine, plan.module, prepare) == execute(engine, plan.source)
