"""The reader, the rewriting and the walk over code, given modules with something wrong in them.

What must hold for every sequence of bytes: an answer, in a number of steps that its size bounds; what a runtime accepts
stays accepted when it is rewritten, and means the same; what it refuses stays refused.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memslot_hooks.types import InitialContent
from memslot_plugin import analysis, guest, wasm
from memslot_plugin.errors import InvalidModule
from memslot_plugin.tests import instructions, test_wasm
from memslot_plugin.tests.mutations import mutated
from memslot_plugin.tests.profiles import examples
from memslot_plugin.wasm import SectionId

wasmtime = pytest.importorskip("wasmtime", reason="wasmtime, which assembles and validates")

TEXTS = [
    f"(module {instructions.PREAMBLE}"
    + "".join(f"(func (local i32) unreachable {text} unreachable)" for text in instructions.PLAIN)
    + ")",
    """(module (memory (export "m") 1 3) (data (i32.const 8) "data") (data (i32.const 10) "more")
         (data "passive") (global $g (export "g") (mut i32) (i32.const 5)) (global (mut f64) (f64.const 1))
         (table 3 9 funcref) (elem (i32.const 1) $f $f) (func $f (export "f") (result i32)
         (global.set $g (memory.grow (i32.const 1))) (global.set 1 (f64.const 2)) (i32.load (i32.const 9)))
         (func $start (i32.store8 (i32.const 0) (i32.const 1))) (start $start))""",
    """(module (import "a" "f" (func (param i32))) (import "a" "g" (global $i i32)) (import "a" "t" (table 1 funcref))
         (import "b" "mg" (global (mut i64))) (memory i64 1 2) (memory $second 0)
         (global $x i32 (i32.add (i32.const 3) (i32.const 4))) (global funcref (ref.func 0))
         (global (mut (ref null func)) (ref.func 1)) (data (offset (i64.const 3)) "x")
         (data (memory $second) (offset (global.get $x)) "") (data (memory $second) (offset (global.get $i)) "dynamic")
         (func (result funcref) (global.set 4 (ref.null func)) (ref.func 1)) (tag (param i32)) (export "t" (table 0))
         (elem declare func 0) (elem (table 0) (offset (i32.const 0)) funcref (ref.null func) (ref.func 1)))""",
]
CORPUS = [bytes(wasmtime.wat2wasm(text)) for text in TEXTS] + [test_wasm.EVERYTHING]

BITS = {"i32": 32, "i64": 64, "f32": 32, "f64": 64, "v128": 128}

modules = st.builds(
    mutated, st.randoms(use_true_random=False), st.sampled_from(CORPUS)
) | st.builds(  # with hypothesis's own idea of randomness it goes less far from what it has seen
    lambda seed, module: mutated(random.Random(seed), module),
    st.integers(0, 2**64),
    st.sampled_from(CORPUS),
)


@pytest.fixture(scope="module")
def engine() -> Any:
    return wasmtime.Engine()


def is_valid(engine: Any, module: bytes) -> bool:
    try:
        wasmtime.Module.validate(engine, module)
    except wasmtime.WasmtimeError:
        return False
    return True


def plans(module: bytes) -> list[guest.Plan]:
    """Every plan that a host asks for; none for what is no core module."""
    try:
        return [
            guest.plan(module, image_limit=limit, import_memory=imported, export_state=exported)
            for limit in (1 << 30, 2)
            for imported in (False, True)
            for exported in (False, True)
        ]
    except InvalidModule:
        return []


@given(modules)
@settings(max_examples=examples(600))
def test_what_a_runtime_accepts_stays_accepted_and_what_it_refuses_stays_refused(
    engine: Any, module: bytes
) -> None:
    valid, found = is_valid(engine, module), plans(module)
    assert found or not valid
    for plan in found:
        assert is_valid(engine, plan.module) is valid
        if plan.structure is not None and plan.module is not plan.source:
            assert_same_meaning(plan)
        if valid and plan.structure is not None:
            assert plan.code is not None
            assert plan.code.not_understood is None
            taken = snapshot_of(plan)
            assert taken is None or is_valid(engine, taken.module)


def snapshot_of(plan: guest.Plan) -> guest.Plan | None:
    """A guest that starts with other globals and a page more; None where a host would refuse it."""
    if guest.reason_against_snapshots(plan, given_away=False) is not None:
        return None
    values: dict[int, int | None] = {}
    for each in plan.saved_globals:
        if each.type in BITS:
            values[each.index] = (1 << BITS[each.type]) - 3
        elif each.type.startswith("(ref null "):
            values[each.index] = None
        else:
            return None
    contents = {}
    for memory in plan.memories:
        if memory.imported is None:
            size = memory.minimum_bytes
            if memory.maximum_bytes is None or memory.maximum_bytes > size:
                size += memory.page_size
            contents[memory.index] = InitialContent(size, (), "snapshot")
    return guest.snapshot(plan, contents=contents, values=values)


def assert_same_meaning(plan: guest.Plan) -> None:
    """The rewritten module declares what the module declares, but for what the plan says."""
    old, new = plan.structure, wasm.parse(plan.module)
    assert old is not None
    added = [] if plan.import_name is None else [plan.import_name]
    assert [each.name for each in new.imports] == [*(each.name for each in old.imports), *added]
    assert new.exports[: len(old.exports)] == old.exports
    assert {each.name for each in new.exports[len(old.exports) :]} == {
        each.export_name for each in plan.saved_globals if each.export_name
    }
    assert [each.type for each in new.memories] == [each.type for each in old.memories]
    assert (new.tables, new.globals, new.custom_names) == (
        old.tables,
        old.globals,
        old.custom_names,
    )
    assert (new.start, new.type_count) == (old.start, old.type_count)
    assert (new.data_count is None) is (old.data_count is None)
    assert (new.function_count, new.tag_count) == (old.function_count, old.tag_count)
    for kept in (
        SectionId.TYPE,
        SectionId.FUNCTION,
        SectionId.ELEMENT,
        SectionId.CODE,
        SectionId.TAG,
    ):
        assert contents(new, kept) == contents(old, kept)
    assert_same_segments(plan, old, new)
    for memory in plan.memories:
        if memory.content is not None:
            laid = bytearray(memory.minimum_bytes)
            for segment in memory.content.segments:
                laid[segment.offset : segment.offset + len(segment.data)] = segment.data
            meant = bytearray(memory.minimum_bytes)
            for each in old.data_segments:
                if each.memory == memory.index:
                    assert each.offset is not None
                    assert each.offset.value is not None
                    meant[each.offset.value : each.offset.value + len(each.data)] = each.data
            assert laid == meant


def assert_same_segments(plan: guest.Plan, old: wasm.Module, new: wasm.Module) -> None:
    """What an image holds is empty, or gone where no code could name it; everything else is as it was."""
    code = plan.code
    named = len(old.data_segments)
    if code is not None and code.not_understood is None:
        named = 1 + max((*code.data_used, *code.data_dropped), default=-1)
    left = list(new.data_segments)
    for segment in old.data_segments:
        taken = segment.memory is not None and plan.memories[segment.memory].content is not None
        expected = b"" if taken else bytes(segment.data)
        if left and _same_place(segment, left[0]) and bytes(left[0].data) == expected:
            left.pop(0)
            continue
        assert taken, segment.index
        assert segment.index >= named, segment.index
    assert not left


def _same_place(one: wasm.DataSegment, other: wasm.DataSegment) -> bool:
    if one.memory != other.memory or (one.offset is None) is not (other.offset is None):
        return False
    return (
        one.offset is None or other.offset is None or one.offset.value in (None, other.offset.value)
    )


def contents(module: wasm.Module, kept: SectionId) -> bytes | None:
    section = module.section(kept)
    return None if section is None else module.source[section.payload : section.end]


@given(modules)
@settings(max_examples=examples(400))
def test_the_work_is_bounded_by_the_size(module: bytes) -> None:
    steps = Counter[str]()

    def count(frame: Any, event: str, argument: Any) -> None:
        steps[event] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        found = plans(module)
    finally:
        sys.setprofile(before)
    assert steps["call"] + steps["c_call"] < 8 * 40 * (len(module) + 50)
    for plan in found:
        assert len(plan.module) < len(module) + 200 + 40 * len(plan.saved_globals)


@given(st.binary(max_size=400))
@settings(max_examples=examples(300))
def test_any_bytes_are_answered_as_a_runtime_does(engine: Any, noise: bytes) -> None:
    for module in (noise, b"\0asm\1\0\0\0" + noise):
        valid = is_valid(engine, module)
        found = plans(module)
        assert found or not valid
        assert all(is_valid(engine, plan.module) is valid for plan in found)


@pytest.mark.parametrize("module", CORPUS, ids=range(len(CORPUS)))
def test_a_module_cut_anywhere_is_answered_as_a_runtime_does(engine: Any, module: bytes) -> None:
    for end in range(0, len(module), max(1, len(module) // 400)):
        cut = module[:end]
        valid, found = is_valid(engine, cut), plans(cut)
        assert found or not valid
        assert all(is_valid(engine, plan.module) is valid for plan in found)


def test_the_changes_reach_what_is_valid_and_what_is_not(engine: Any) -> None:
    """Otherwise the tests above would compare nothing."""
    found = Counter[str]()
    for seed in range(600):
        module = mutated(random.Random(seed), CORPUS[seed % len(CORPUS)])
        valid = "valid" if is_valid(engine, module) else "refused"
        try:
            wasm.parse(module)
            found[f"{valid} and read"] += 1
        except InvalidModule:
            found[f"{valid} and no module"] += 1
        except wasm.NotUnderstood:
            found[f"{valid} and not understood"] += 1
    assert min(found[what] for what in ("valid and read", "refused and read")) > 50
    assert min(found[f"refused and {what}"] for what in ("no module", "not understood")) > 20
    assert not found["valid and no module"]
    assert analysis.analyse(wasm.parse(CORPUS[1])).instructions > 10
