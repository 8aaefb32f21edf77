"""Exported state, saved values and dropped start functions, byte by byte and in wasmtime."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memslot_hooks.types import InitialContent, Segment
from memslot_plugin import wasm
from memslot_plugin.guest import plan as guest
from memslot_plugin.guest.report import report_on
from memslot_plugin.tests.test_fuzz import BITS
from memslot_plugin.tests.test_guest import plan_of
from memslot_plugin.wasm import ExternKind, SectionId
from memslot_plugin.wasm.module import Export

wasmtime = pytest.importorskip("wasmtime", reason="wasmtime, which assembles and runs the guests")

PAGE = wasm.WASM_PAGE


@pytest.fixture(scope="module")
def engine() -> Any:
    config = wasmtime.Config()
    config.wasm_multi_memory = config.wasm_memory64 = True
    config.wasm_function_references = config.wasm_gc = True
    return wasmtime.Engine(config)


def parse(text: str) -> wasm.Module:
    return wasm.parse(bytes(wasmtime.wat2wasm(text)))


def others(data: bytes, *changed: SectionId) -> list[bytes]:
    """Return the sections that no rewriting of `changed` may touch."""
    module = wasm.parse(data)
    return [data[each.start : each.end] for each in module.sections if each.id not in changed]


def run(engine: Any, module: bytes, *calls: str) -> list[Any]:
    store = wasmtime.Store(engine)
    exports = wasmtime.Instance(store, wasmtime.Module(engine, module), []).exports(store)
    return [exports[name](store) for name in calls]


def test_exports_added_to_a_module_come_last_and_move_nothing_else() -> None:
    module = parse(
        """(module (memory (export "m") 1) (table 1 funcref) (global (mut i32) (i32.const 1))
             (global (mut i64) (i64.const 2)) (func (export "memslot:f")))"""
    )
    exports = wasm.state_exports(module, (0, 1))
    # Names that the module uses are avoided.
    assert exports == {0: "memslot1:global:0", 1: "memslot1:global:1"}
    rewritten = wasm.rewrite(module, exports=exports)
    added = [Export(name, ExternKind.GLOBAL, index) for index, name in exports.items()]
    assert wasm.parse(rewritten).exports == [*module.exports, *added]
    assert others(rewritten, SectionId.EXPORT) == others(module.source, SectionId.EXPORT)


def test_export_added_to_a_module_without_exports_makes_the_section(engine: Any) -> None:
    module = parse("(module (global (mut i32) (i32.const 7)) (func $f) (start $f))")
    rewritten = wasm.rewrite(module, exports=wasm.state_exports(module, [0]))
    order = [section.id for section in wasm.parse(rewritten).sections]
    assert order.index(SectionId.EXPORT) == order.index(SectionId.START) - 1
    assert [each.name for each in wasmtime.Module(engine, rewritten).exports] == [
        "memslot:global:0"
    ]


@pytest.mark.parametrize(
    ("exports", "sentence"),
    [
        ({0: "f"}, 'the name "f" is exported already'),
        ({0: "new", 1: "new"}, 'the name "new" is exported already'),
        ({-1: "g"}, "global -1 does not exist"),
        ({5: "g"}, "global 5 does not exist"),
    ],
)
def test_export_of_nothing_or_of_a_taken_name_is_refused(
    exports: dict[int, str], sentence: str
) -> None:
    one = "(global (mut i32) (i32.const 1))"
    module = parse(f'(module {one} {one} (func (export "f")))')
    with pytest.raises(ValueError, match=sentence):
        wasm.rewrite(module, exports=exports)


READS = {
    "i32": ["(result i32) (global.get 1)"],
    "i64": ["(result i64) (global.get 1)"],
    "f32": ["(result i32) (i32.reinterpret_f32 (global.get 1))"],
    "f64": ["(result i64) (i64.reinterpret_f64 (global.get 1))"],
    "v128": [f"(result i64) (i64x2.extract_lane {lane} (global.get 1))" for lane in (0, 1)],
}


@example("f32", 0x7FA00001)  # signalling NaNs
@example("f64", 0xFFF4000000000001)
@example("i32", 64)
@example("i32", 1 << 31)
@example("i64", (1 << 63) - 1)
@given(st.sampled_from(sorted(READS)), st.integers(0, (1 << 128) - 1))
def test_number_saved_as_an_initial_value_is_bit_exact(engine: Any, kind: str, bits: int) -> None:
    bits &= (1 << BITS[kind]) - 1
    constant = "i64x2 1 1" if kind == "v128" else "1"
    reads = (f'(func (export "{number}") {read})' for number, read in enumerate(READS[kind]))
    module = parse(
        f"""(module (global i32 (i32.const 3)) (global (mut {kind}) ({kind}.const {constant}))
              {" ".join(reads)})"""
    )
    rewritten = wasm.rewrite(module, initial_values={1: bits})
    got = run(engine, rewritten, *map(str, range(len(READS[kind]))))
    width = BITS[kind] // len(got)
    assert sum(value % (1 << width) << width * lane for lane, value in enumerate(got)) == bits
    initializer = wasm.parse(rewritten).globals[1].initializer
    assert initializer is not None
    assert (initializer.type, initializer.value) == (kind, bits)
    assert others(rewritten, SectionId.GLOBAL) == others(module.source, SectionId.GLOBAL)


HEAPS = "func extern any eq i31 struct array none nofunc noextern $s"


def test_null_of_any_reference_type_is_saved(engine: Any) -> None:
    module = parse(
        "(module (type $s (struct))"
        + "".join(f"(global (mut (ref null {heap})) (ref.null {heap}))" for heap in HEAPS.split())
        + ")"
    )
    values: dict[int, int | None] = dict.fromkeys(range(len(HEAPS.split())))
    rewritten = wasm.rewrite(module, initial_values=values)
    assert others(rewritten) == others(module.source)
    wasmtime.Module.validate(engine, rewritten)


@pytest.mark.parametrize("elements", ["", "(elem (i32.const 0) $g)"])
def test_function_of_a_replaced_value_stays_declared(engine: Any, elements: str) -> None:
    """Without the declaration `ref.func` in the code would be invalid."""
    module = parse(
        f"""(module (func $f (result i32) (i32.const 5)) (func $g (result i32) (i32.const 6))
             (global $r (mut funcref) (ref.func $f)) (table 1 funcref) {elements}
             (func (export "null") (result i32) (ref.is_null (global.get $r)))
             (func (export "call") (result i32) (call_indirect (result i32) (i32.const 0)))
             (func (export "set") (table.set (i32.const 0) (ref.func $f))))"""
    )
    rewritten = wasm.rewrite(module, initial_values={0: None})
    assert run(engine, rewritten, "null", "set", "call") == [1, None, 5]
    assert wasm.parse(rewritten).element_segment_count == 1 + bool(elements)
    if elements:
        assert run(engine, rewritten, "call") == [6]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({0: 1}, "global 0 is not one that the module defines"),
        ({9: 1}, "global 9 is not one that the module defines"),
        ({-1: 1}, "global -1 is not one that the module defines"),
        ({1: 1}, "global 1 is immutable"),
        ({2: 1 << 32}, "a global of type i32 is saved as 32 bits, and not as 4294967296"),
        ({2: -1}, "a global of type i32 is saved as 32 bits, and not as -1"),
        ({2: None}, "a global of type i32 is saved as 32 bits, and not as None"),
        ({3: 0}, r"a global of type \(ref null func\) can only be saved if it may be null and is"),
        ({4: None}, r"a global of type \(ref func\) can only be saved if it may be null and is"),
    ],
)
def test_initial_value_that_is_invalid_is_refused(
    values: dict[int, int | None], sentence: str
) -> None:
    module = parse(
        """(module (import "a" "b" (global (mut i32))) (global i32 (i32.const 0))
             (global (mut i32) (i32.const 0)) (global (mut funcref) (ref.null func)) (func $f)
             (global (mut (ref func)) (ref.func $f)))"""
    )
    with pytest.raises(ValueError, match=sentence):
        wasm.rewrite(module, initial_values=values)


@pytest.mark.parametrize(
    ("kind", "text", "bits"),
    [
        ("i32", "(i32.sub (i32.const 1) (i32.const 2))", None),
        ("i32", "(global.get $c)", 9),
        ("i32", "(global.get $imported)", None),
        ("funcref", "(ref.null func)", None),
    ],
)
def test_bits_of_an_initial_value_are_found(kind: str, text: str, bits: int | None) -> None:
    module = parse(
        f"""(module (import "a" "b" (global $imported i32)) (global $c i32 (i32.const 9))
              (global (mut {kind}) {text}))"""
    )
    last = module.globals[2]
    assert last.initializer is not None
    assert last.initializer.value == bits


def test_start_function_of_a_snapshot_is_dropped_alone(engine: Any) -> None:
    module = parse(
        """(module (global $g (mut i32) (i32.const 1)) (func $s (global.set $g (i32.const 2)))
             (start $s) (func (export "g") (result i32) (global.get $g)))"""
    )
    rewritten = wasm.rewrite(module, drop_start=True)
    assert others(rewritten) == others(module.source, SectionId.START)
    assert run(engine, module.source, "g") == [2]
    assert run(engine, rewritten, "g") == [1]
    assert wasm.rewrite(wasm.parse(rewritten), drop_start=True) is rewritten


GUEST = """(module (import "env" "log" (func $log (param i32)))
  (memory (export "memory") 1 5) (table 2 funcref) (elem (i32.const 1) $change)
  (global $n (mut i32) (i32.const 10)) (global $x (mut f64) (f64.const 0.5))
  (global $v (mut v128) (v128.const i64x2 0 0)) (global $never (mut i64) (i64.const 4))
  (data (i32.const 8) "initial") (data $p "passive") (data (i32.const 100) "more")
  (func $start (call $log (i32.const 1)) (global.set $n (i32.const 20)))
  (start $start)
  (func $change (export "change")
    (global.set $n (i32.const 1)) (global.set $x (f64.const 3))
    (global.set $v (v128.const i64x2 1 2)))
  (func (export "grow") (result i32) (memory.grow (i32.const 1))))"""
SHARED = "(module (memory 1 1 shared))"


@pytest.mark.parametrize("import_memory", [False, True])
def test_snapshot_of_changed_state_changes_the_plan_accordingly(
    engine: Any, *, import_memory: bool
) -> None:
    plan = plan_of(GUEST, import_memory=import_memory)
    assert [(s.index, s.type, s.export_name, s.initial) for s in plan.saved_globals] == [
        (0, "i32", "memslot:global:0", 10),
        (1, "f64", "memslot:global:1", 0x3FE0000000000000),
        (2, "v128", "memslot:global:2", 0),
    ]
    content = InitialContent(2 * PAGE, (Segment(0, b"x"),))
    taken = guest.snapshot(plan, contents={0: content}, values={0: 1, 1: 2, 2: 3})
    assert taken.memories[0].minimum_bytes == 2 * PAGE
    assert taken.contents == {0: content}
    assert [each.initial for each in taken.saved_globals] == [1, 2, 3]
    assert (plan.verdict.in_place, taken.verdict.in_place) == (False, True)
    wasmtime.Module.validate(engine, taken.module)
    changed = [SectionId.IMPORT, SectionId.MEMORY, SectionId.GLOBAL, SectionId.EXPORT]
    changed += [SectionId.START, SectionId.DATA]
    assert others(taken.module, *changed) == others(plan.source, *changed)
    rewritten = wasm.parse(taken.module)
    assert rewritten.start is None
    assert rewritten.memories[0].type.minimum_pages == 2
    assert rewritten.memories[0].imported == plan.import_name
    assert [len(each.data) for each in rewritten.data_segments] == [7]
    changes = report_on(taken).changes
    assert "Memories and globals start as they were when the snapshot was taken." in changes
    assert "Function 1 does not run at instantiation." in changes
    again = guest.snapshot(taken, contents={0: content}, values={0: 1, 1: 2, 2: 3})
    assert again.module == taken.module


@pytest.mark.parametrize(
    ("text", "memories", "values", "sentence"),
    [
        (GUEST, {0: PAGE}, {0: 1}, r"needs the globals \[0, 1, 2\] and has \[0\]"),
        (GUEST, {}, {0: 1, 1: 1, 2: 1}, r"needs the memories \[0\] and has \[\]"),
        (GUEST, {0: 0}, {0: 1, 1: 1, 2: 1}, "allowed are 1 to 5"),
        (SHARED, {}, {}, "left to the runtime has no snapshot: Memory 0 is shared"),
    ],
)
def test_snapshot_that_lacks_something_is_refused(
    text: str, memories: dict[int, int], values: dict[int, int | None], sentence: str
) -> None:
    contents = {index: InitialContent(size, ()) for index, size in memories.items()}
    with pytest.raises(ValueError, match=sentence):
        guest.snapshot(plan_of(text), contents=contents, values=values)


def test_globals_exported_for_a_snapshot_are_those_that_may_change() -> None:
    text = """(module (global $a (mut i32) (i32.const 1)) (global $b (mut i32) (i32.const 2))
                (global $c (export "c") (mut i32) (i32.const 3)) (func (global.set $a (i32.const 2))))"""
    plan = plan_of(text)
    assert [s.export_name for s in plan.saved_globals] == ["memslot:global:0", "memslot:global:2"]
    assert report_on(plan).changes == (
        "Mutable globals are exported as memslot:global:0, memslot:global:2 to be restored.",
    )
    assert report_on(plan).saved_globals == plan.saved_globals
    assert plan.verdict.in_place
