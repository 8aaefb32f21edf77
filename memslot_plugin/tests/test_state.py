"""Exported state, saved values and dropped start functions: byte by byte, and as runtimes see them."""

from __future__ import annotations

import struct
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memslot_hooks.types import InitialContent, Segment
from memslot_plugin import guest, wasm
from memslot_plugin.wasm import Export, ExternKind, ImportName, SectionId, ValueType

wasmtime = pytest.importorskip("wasmtime", reason="wasmtime, which assembles and runs the guests")

PAGE = wasm.WASM_PAGE
GIB = 1 << 30


@pytest.fixture(scope="module")
def engine() -> Any:
    config = wasmtime.Config()
    config.wasm_multi_memory = True
    config.wasm_memory64 = True
    config.wasm_function_references = True
    config.wasm_gc = True
    return wasmtime.Engine(config)


def assemble(text: str) -> bytes:
    return bytes(wasmtime.wat2wasm(text))


def parse(text: str) -> wasm.Module:
    return wasm.parse(assemble(text))


def contents(module: wasm.Module | bytes, section_id: SectionId) -> bytes | None:
    module = wasm.parse(module) if isinstance(module, bytes) else module
    section = module.section(section_id)
    return None if section is None else module.source[section.payload : section.end]


def others(data: bytes, *changed: SectionId) -> list[bytes]:
    module = wasm.parse(data)
    return [data[each.start : each.end] for each in module.sections if each.id not in changed]


def run(engine: Any, module: bytes, *calls: str) -> list[object]:
    store = wasmtime.Store(engine)
    exports = wasmtime.Instance(store, wasmtime.Module(engine, module), []).exports(store)
    return [exports[name](store) for name in calls]


# Exports


def test_exports_come_after_the_modules_own_and_nothing_else_moves() -> None:
    module = parse(
        """(module (memory (export "m") 1) (table 1 funcref) (global (mut i32) (i32.const 1))
             (global (mut i64) (i64.const 2)) (func (export "f")))"""
    )
    exports = wasm.state_exports(module, globals_=(0, 1), tables=[0])
    assert exports == (
        Export("memslot:global:0", ExternKind.GLOBAL, 0),
        Export("memslot:global:1", ExternKind.GLOBAL, 1),
        Export("memslot:table:0", ExternKind.TABLE, 0),
    )
    rewritten = wasm.rewrite(module, exports=exports)
    assert wasm.parse(rewritten).exports == (*module.exports, *exports)
    assert others(rewritten, SectionId.EXPORT) == others(module.source, SectionId.EXPORT)


def test_an_export_section_is_made_where_there_is_none(engine: Any) -> None:
    module = parse("(module (global (mut i32) (i32.const 7)) (func $f) (start $f))")
    rewritten = wasm.rewrite(module, exports=wasm.state_exports(module, globals_=[0]))
    order = [section.id for section in wasm.parse(rewritten).sections]
    assert order.index(SectionId.EXPORT) == order.index(SectionId.START) - 1
    store = wasmtime.Store(engine)
    exports = wasmtime.Instance(store, wasmtime.Module(engine, rewritten), []).exports(store)
    assert exports["memslot:global:0"].value(store) == 7


def test_names_that_the_module_uses_are_avoided() -> None:
    module = parse(
        """(module (global (mut i32) (i32.const 1)) (func (export "memslot:global:0"))
             (func (export "memslot1:")))"""
    )
    (export,) = wasm.state_exports(module, globals_=[0])
    assert export.name == "memslot2:global:0"


@pytest.mark.parametrize(
    ("export", "sentence"),
    [
        (Export("f", ExternKind.GLOBAL, 0), 'the name "f" is exported already'),
        (Export("g", ExternKind.GLOBAL, 1), "global 1 does not exist"),
        (Export("g", ExternKind.TABLE, -1), "table -1 does not exist"),
        (Export("g", ExternKind.FUNCTION, 5), "function 5 does not exist"),
    ],
)
def test_an_export_of_nothing_or_of_a_taken_name_is_refused(export: Export, sentence: str) -> None:
    module = parse('(module (global (mut i32) (i32.const 1)) (func (export "f")))')
    with pytest.raises(ValueError, match=sentence):
        wasm.rewrite(module, exports=[export])
    twice = Export("new", ExternKind.GLOBAL, 0)
    with pytest.raises(ValueError, match='the name "new" is exported already'):
        wasm.rewrite(module, exports=[twice, twice])


# Values

NUMBERS = {"i32": 32, "i64": 64, "f32": 32, "f64": 64}
SIGNALLING = {"f32": 0x7FA00001, "f64": 0xFFF4000000000001}


@given(st.sampled_from(sorted(NUMBERS)), st.integers(0, (1 << 64) - 1))
def test_saved_numbers_are_bit_exact(engine: Any, kind: str, bits: int) -> None:
    bits &= (1 << NUMBERS[kind]) - 1
    check_bits(engine, kind, bits)


@pytest.mark.parametrize("kind", NUMBERS)
def test_the_ends_of_each_type_and_nans_are_bit_exact(engine: Any, kind: str) -> None:
    top = 1 << NUMBERS[kind]
    for bits in (0, 1, 63, 64, top // 2 - 1, top // 2, top - 1, SIGNALLING.get(kind, 5)):
        check_bits(engine, kind, bits)


def check_bits(engine: Any, kind: str, bits: int) -> None:
    integer = kind.replace("f", "i")
    result = (
        "(global.get 1)" if kind == integer else f"({integer}.reinterpret_{kind} (global.get 1))"
    )
    module = parse(
        f"""(module (global i32 (i32.const 3)) (global (mut {kind}) ({kind}.const 1))
              (func (export "get") (result {integer}) {result}))"""
    )
    rewritten = wasm.rewrite(module, initial_values={1: bits})
    (got,) = run(engine, rewritten, "get")
    assert isinstance(got, int)
    assert got % (1 << NUMBERS[kind]) == bits
    initializer = wasm.parse(rewritten).globals[1].initializer
    assert initializer is not None
    assert wasm.constant_bits(ValueType(kind), initializer) == bits
    assert others(rewritten, SectionId.GLOBAL) == others(module.source, SectionId.GLOBAL)


@given(st.integers(0, (1 << 128) - 1))
def test_saved_vectors_are_bit_exact(engine: Any, bits: int) -> None:
    module = parse(
        """(module (global $v (mut v128) (v128.const i64x2 0 0))
             (func (export "low") (result i64) (i64x2.extract_lane 0 (global.get $v)))
             (func (export "high") (result i64) (i64x2.extract_lane 1 (global.get $v))))"""
    )
    rewritten = wasm.rewrite(module, initial_values={0: bits})
    low, high = run(engine, rewritten, "low", "high")
    assert struct.pack("<qq", low, high) == bits.to_bytes(16, "little")
    initializer = wasm.parse(rewritten).globals[0].initializer
    assert initializer is not None
    assert wasm.constant_bits(ValueType("v128"), initializer) == bits


HEAPS = [
    "func",
    "extern",
    "any",
    "eq",
    "i31",
    "struct",
    "array",
    "none",
    "nofunc",
    "noextern",
    "$s",
]


@pytest.mark.parametrize("heap", HEAPS)
def test_null_is_saved_for_every_type_of_reference(engine: Any, heap: str) -> None:
    module = parse(
        f"""(module (type $s (struct)) (global $g (mut (ref null {heap})) (ref.null {heap}))
              (func (export "null") (result i32) (ref.is_null (global.get $g))))"""
    )
    rewritten = wasm.rewrite(module, initial_values={0: None})
    assert contents(rewritten, SectionId.GLOBAL) == contents(module, SectionId.GLOBAL)
    assert run(engine, rewritten, "null") == [1]


def test_a_function_that_only_a_replaced_value_referred_to_stays_declared(engine: Any) -> None:
    """Else `ref.func` in the code would no longer be valid."""
    module = parse(
        """(module (func $f (result i32) (i32.const 5)) (global $g (mut funcref) (ref.func $f))
             (table 1 funcref)
             (func (export "null") (result i32) (ref.is_null (global.get $g)))
             (func (export "call") (result i32) (table.set (i32.const 0) (ref.func $f))
               (call_indirect (result i32) (i32.const 0))))"""
    )
    assert module.element_segment_count == 0
    rewritten = wasm.rewrite(module, initial_values={0: None})
    assert run(engine, rewritten, "null", "call") == [1, 5]
    again = wasm.parse(rewritten)
    assert again.element_segment_count == 1
    with_elements = parse(
        """(module (func $f (result i32) (i32.const 5)) (func $g (result i32) (i32.const 6))
             (global $g (mut funcref) (ref.func $f)) (table 1 funcref) (elem (i32.const 0) $g)
             (func (export "call") (result i32) (drop (ref.func $f))
               (call_indirect (result i32) (i32.const 0))))"""
    )
    rewritten = wasm.rewrite(with_elements, initial_values={0: None})
    assert run(engine, rewritten, "call") == [6]
    assert wasm.parse(rewritten).element_segment_count == 2


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
def test_a_value_that_a_global_cannot_have_is_refused(
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
        ("i32", "(i32.sub (i32.const 1) (i32.const 2))", 0xFFFFFFFF),
        ("i32", "(global.get $c)", 9),
        ("i32", "(global.get $imported)", None),
        ("i64", "(i64.const -2)", (1 << 64) - 2),
        ("f32", "(f32.const 1)", 0x3F800000),
        ("f64", "(f64.const nan:0x4)", 0x7FF0000000000004),
        ("v128", "(v128.const i64x2 1 2)", (2 << 64) + 1),
        ("funcref", "(ref.null func)", None),
    ],
)
def test_the_bits_of_an_initial_value_are_known_where_the_module_says_them(
    kind: str, text: str, bits: int | None
) -> None:
    module = parse(
        f"""(module (import "a" "b" (global $imported i32)) (global $c i32 (i32.const 9))
              (global (mut {kind}) {text}))"""
    )
    last = module.globals[2]
    assert last.initializer is not None
    assert wasm.constant_bits(last.type.value, last.initializer) == bits


# Start functions


def test_a_start_function_is_dropped_and_only_it(engine: Any) -> None:
    module = parse(
        """(module (global $g (mut i32) (i32.const 1)) (func $s (global.set $g (i32.const 2)))
             (start $s) (func (export "g") (result i32) (global.get $g)))"""
    )
    rewritten = wasm.rewrite(module, drop_start=True)
    assert others(rewritten) == others(module.source, SectionId.START)
    assert run(engine, module.source, "g") == [2]
    assert run(engine, rewritten, "g") == [1]
    assert wasm.rewrite(wasm.parse(rewritten), drop_start=True) is rewritten


# All at once

GUEST = """(module (import "env" "log" (func $log (param i32)))
  (memory (export "memory") 1 5) (table 2 funcref) (elem (i32.const 1) $count)
  (global $n (mut i32) (i32.const 10)) (global $x (mut f64) (f64.const 0.5))
  (global $v (mut v128) (v128.const i64x2 0 0)) (global $never (mut i64) (i64.const 4))
  (data (i32.const 8) "initial") (data $p "passive") (data (i32.const 100) "more")
  (func $start (call $log (i32.const 1)) (global.set $n (i32.const 20))
    (i32.store8 (i32.const 0) (i32.const 255)))
  (start $start)
  (func $count (export "count") (result i32)
    (global.set $n (i32.add (global.get $n) (i32.const 1)))
    (global.set $x (f64.mul (global.get $x) (f64.const 3)))
    (global.set $v (i64x2.add (global.get $v) (v128.const i64x2 1 2)))
    (i32.store (i32.const 200) (i32.add (i32.load (i32.const 200)) (global.get $n)))
    (i32.load (i32.const 200)))
  (func (export "grow") (result i32) (memory.grow (i32.const 1)))
  (func (export "size") (result i32) (memory.size))
  (func (export "x") (result f64) (global.get $x))
  (func (export "lane") (result i64) (i64x2.extract_lane 1 (global.get $v)))
  (func (export "call") (result i32) (call_indirect (result i32) (i32.const 1))))"""
CALLS = ("count", "x", "lane", "call", "size", "grow", "size", "count")


class Running:
    """An instance of a plan, with an image laid into its memory as a host would."""

    def __init__(self, engine: Any, plan: guest.Plan) -> None:
        self.store = wasmtime.Store(engine)
        self.log: list[int] = []
        linker = wasmtime.Linker(engine)
        kind = wasmtime.FuncType([wasmtime.ValType.i32()], [])
        linker.define(self.store, "env", "log", wasmtime.Func(self.store, kind, self.log.append))
        compiled = wasmtime.Module(engine, plan.module)
        content = plan.memories[0].content
        assert content is not None
        if plan.import_name is not None:
            memory = wasmtime.Memory(self.store, compiled.imports[-1].type)
            linker.define(self.store, *plan.import_name, memory)
            self.fill(memory, content)
            self.exports = linker.instantiate(self.store, compiled).exports(self.store)
        else:
            assert plan.structure is not None
            self.exports = linker.instantiate(self.store, compiled).exports(self.store)
            self.fill(self.exports["memory"], content)
        self.memory = self.exports["memory"]

    def fill(self, memory: Any, content: InitialContent) -> None:
        assert memory.data_len(self.store) == content.byte_size
        for segment in content.segments:
            memory.write(self.store, segment.data, segment.offset)

    def call(self, *names: str) -> list[object]:
        return [self.exports[name](self.store) for name in names]

    def snapshot(self, plan: guest.Plan) -> guest.Plan:
        size = self.memory.data_len(self.store)
        content = InitialContent(size, (Segment(0, bytes(self.memory.read(self.store))),))
        return guest.snapshot(
            plan,
            contents={0: content},
            values={each.index: self.bits(each) for each in plan.saved_globals},
        )

    def bits(self, saved: guest.SavedGlobal) -> int:
        if (
            saved.type == "v128"
        ):  # which these bindings cannot read; the second lane is twice the first
            high: int = self.exports["lane"](self.store)
            return (high << 64) + high // 2
        value = self.exports[saved.export_name].value(self.store)
        letter = {"i32": "i", "i64": "q", "f32": "f", "f64": "d"}[saved.type]
        return int.from_bytes(struct.pack(f"<{letter}", value), "little")


@pytest.mark.parametrize("import_memory", [False, True])
def test_a_snapshot_goes_on_where_the_instance_was(engine: Any, *, import_memory: bool) -> None:
    plan = guest.plan(
        assemble(GUEST), image_limit=GIB, import_memory=import_memory, export_state=True
    )
    assert [(s.index, s.type, s.export_name, s.initial) for s in plan.saved_globals] == [
        (0, "i32", "memslot:global:0", 10),
        (1, "f64", "memslot:global:1", 0x3FE0000000000000),
        (2, "v128", "memslot:global:2", 0),
    ]
    assert not plan.verdict.in_place
    parent = Running(engine, plan)
    if not import_memory:  # this helper fills it after the start function wrote to it
        parent.memory.write(parent.store, b"\xff", 0)
    assert parent.log == [1]
    parent.call("count", "grow", "count", "x")
    taken = parent.snapshot(plan)
    children = [Running(engine, taken) for _ in range(2)]
    expected = parent.call(*CALLS)
    for child in children:
        assert child.log == []
        assert child.call(*CALLS) == expected
        assert child.memory.read(child.store) == parent.memory.read(parent.store)
    later = Running(engine, children[0].snapshot(taken))
    assert later.call("count", "size", "call", "x", "lane") == parent.call(
        "count", "size", "call", "x", "lane"
    )


def test_a_snapshot_changes_the_plan_accordingly() -> None:
    plan = guest.plan(assemble(GUEST), image_limit=GIB, import_memory=True, export_state=True)
    content = InitialContent(2 * PAGE, (Segment(0, b"x"),))
    taken = guest.snapshot(plan, contents={0: content}, values={0: 1, 1: 2, 2: 3})
    assert taken.memories[0].minimum_bytes == 2 * PAGE
    assert taken.memories[0].content is content
    assert [each.initial for each in taken.saved_globals] == [1, 2, 3]
    assert (plan.verdict.in_place, taken.verdict.in_place) == (False, True)
    assert taken.verdict.vector_globals == (2,)
    rewritten = wasm.parse(taken.module)
    assert rewritten.start is None
    assert rewritten.memories[0].type.minimum_pages == 2
    assert rewritten.memories[0].imported == plan.import_name
    assert [len(each.data) for each in rewritten.data_segments] == [7]
    changes = taken.report().changes
    assert "Memories and globals start as they were when the snapshot was taken." in changes
    assert "Function 1 does not run at instantiation." in changes
    again = guest.snapshot(taken, contents={0: content}, values={0: 1, 1: 2, 2: 3})
    assert again.module == taken.module


def test_a_snapshot_that_lacks_something_is_refused() -> None:
    plan = guest.plan(assemble(GUEST), image_limit=GIB, import_memory=False)
    content = InitialContent(PAGE, ())
    with pytest.raises(ValueError, match=r"needs the globals \[0, 1, 2\] and has \[0\]"):
        guest.snapshot(plan, contents={0: content}, values={0: 1})
    with pytest.raises(ValueError, match=r"needs the memories \[0\] and has \[\]"):
        guest.snapshot(plan, contents={}, values={0: 1, 1: 1, 2: 1})
    small = InitialContent(0, ())
    with pytest.raises(ValueError, match="allowed are 1 to 5"):
        guest.snapshot(plan, contents={0: small}, values={0: 1, 1: 1, 2: 1})
    native = guest.plan(
        assemble("(module (memory 1 1 shared))"), image_limit=GIB, import_memory=False
    )
    with pytest.raises(ValueError, match="left to the runtime has no snapshot: Memory 0 is shared"):
        guest.snapshot(native, contents={}, values={})


def test_every_change_can_be_combined_in_one_rewriting(engine: Any) -> None:
    module = parse(GUEST)
    rewritten = wasm.rewrite(
        module,
        emptied=[0, 2],
        import_memory=ImportName("host", "memory"),
        minimums={0: 3},
        exports=wasm.state_exports(module, globals_=[0, 3], tables=[0]),
        initial_values={0: 77, 3: 5},
        drop_start=True,
    )
    wasmtime.Module.validate(engine, rewritten)
    after = wasm.parse(rewritten)
    assert [e.name for e in after.exports[-3:]] == [
        "memslot:global:0",
        "memslot:global:3",
        "memslot:table:0",
    ]
    assert [g.initializer and g.initializer.value for g in after.globals] == [77, None, None, 5]
    changed = (
        SectionId.IMPORT,
        SectionId.MEMORY,
        SectionId.GLOBAL,
        SectionId.EXPORT,
        SectionId.START,
        SectionId.DATA,
    )
    assert others(rewritten, *changed) == others(module.source, *changed)


def test_the_other_runtime_compiles_and_runs_what_was_rewritten() -> None:
    if sys.version_info >= (3, 11):
        pytest.skip("impossible: wasmer 1.1.0 has no build for CPython 3.11 and later")
    import wasmer
    import wasmer_compiler_cranelift as compiler

    plan = guest.plan(assemble(GUEST), image_limit=GIB, import_memory=True, export_state=True)
    values: dict[int, int | None] = {0: 41, 1: 0x3FF0000000000000, 2: 0}
    content = InitialContent(2 * PAGE, ())
    taken = guest.snapshot(plan, contents={0: content}, values=values)
    store = wasmer.Store(wasmer.engine.Universal(compiler.Compiler))
    module = wasmer.Module(store, taken.module)
    memory = wasmer.Memory(store, wasmer.MemoryType(2, 5, shared=False))
    log = wasmer.Function(store, lambda value: None, wasmer.FunctionType([wasmer.Type.I32], []))
    assert plan.import_name is not None
    imports = {"env": {"log": log}, plan.import_name.module: {plan.import_name.name: memory}}
    instance = wasmer.Instance(module, imports)
    assert instance.exports.count() == 42
    assert instance.exports.x() == 3.0
    assert getattr(instance.exports, "memslot:global:0").value == 42
    assert instance.exports.size() == 2


# What the plan says


def test_only_globals_that_may_change_are_exported() -> None:
    text = """(module (global $a (mut i32) (i32.const 1)) (global $b (mut i32) (i32.const 2))
                (global $c (export "c") (mut i32) (i32.const 3)) (func (global.set $a (i32.const 2))))"""
    plain = guest.plan(assemble(text), image_limit=GIB, import_memory=False, export_state=False)
    assert plain.module is plain.source
    assert [(s.index, s.export_name) for s in plain.saved_globals] == [(0, None), (2, None)]
    plan = guest.plan(assemble(text), image_limit=GIB, import_memory=False, export_state=True)
    assert [s.export_name for s in plan.saved_globals] == ["memslot:global:0", "memslot:global:2"]
    assert plan.report().changes == (
        "Mutable globals are exported as memslot:global:0, memslot:global:2 to be restored.",
    )
    assert plan.report().saved_globals == plan.saved_globals
    assert plan.verdict.in_place


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            """(module (import "env" "base" (global i32)) (memory 1)
                 (data (global.get 0) "x"))""",
            "Memory 0 has no image, so that only a new instance copies its data again.",
        ),
        ("(module (memory 1 1 shared))", "Memory 0 is shared between threads"),
        (
            "(module (table 1 funcref) (func (table.set (i32.const 0) (ref.null func))))",
            "table.set",
        ),
    ],
)
def test_the_verdict_of_a_plan_adds_what_images_decide(text: str, reason: str) -> None:
    plan = guest.plan(assemble(text), image_limit=GIB, import_memory=False, export_state=True)
    assert not plan.verdict.in_place
    (said,) = plan.verdict.reasons
    assert reason in said
    assert plan.report().verdict == plan.verdict
    assert plan.report().code == plan.code


def test_what_was_not_read_has_the_verdict_that_says_so() -> None:
    plan = guest.plan(b"\0asm\x01\0\0\0\x0e\x01\x00", image_limit=GIB, import_memory=False)
    assert plan.verdict.reasons == (plan.native,)
    assert (plan.verdict.in_place, plan.code, plan.saved_globals) == (False, None, ())
