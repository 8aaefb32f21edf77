"""The reader, the rewriting and the walk over code, given damaged modules.

Every sequence of bytes gets an answer in a number of steps that its size bounds. The runtime accepts a rewritten
module exactly if it accepts the given one, and both mean the same.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memslot_hooks.types import InitialContent
from memslot_plugin import wasm
from memslot_plugin.errors import InvalidModule
from memslot_plugin.guest import plan as guest
from memslot_plugin.guest.target import Target
from memslot_plugin.settings import Settings
from memslot_plugin.tests import instructions
from memslot_plugin.tests.encode import EVERYTHING, HEADER
from memslot_plugin.tests.mutations import mutated
from memslot_plugin.tests.profiles import examples
from memslot_plugin.tests.test_analysis import assemble, is_valid
from memslot_plugin.tests.test_wasm import calls_of

wasmtime = pytest.importorskip("wasmtime", reason="wasmtime, which assembles and validates")

TEXTS = [
    instructions.module(instructions.PLAIN),
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
CORPUS = [*map(assemble, TEXTS), EVERYTHING]

LIMITS = [Settings(image_limit=1 << 30), Settings(image_limit=2)]

BITS = {"i32": 32, "i64": 64, "f32": 32, "f64": 64, "v128": 128}

modules = st.builds(
    mutated, st.randoms(use_true_random=False), st.sampled_from(CORPUS)
) | st.builds(  # not hypothesis's own randomness, which stays close to examples that it has seen
    lambda seed, module: mutated(random.Random(seed), module),
    st.integers(0, 2**64),
    st.sampled_from(CORPUS),
)


@pytest.fixture(scope="module")
def engine() -> Any:
    return wasmtime.Engine()


def plans(module: bytes) -> list[guest.Plan]:
    """Return every plan that a host asks for, or none for bytes that are no core module."""
    try:
        return [
            guest.plan(module, Target(settings, import_memory=imported))
            for settings in LIMITS
            for imported in (False, True)
        ]
    except InvalidModule:
        return []


def check(engine: Any, module: bytes) -> None:
    """Fail unless memslot accepts and refuses a module as the runtime does."""
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


@given(modules)
@settings(max_examples=examples(150))
def test_damaged_module_is_accepted_exactly_if_a_runtime_accepts_it(
    engine: Any, module: bytes
) -> None:
    check(engine, module)


def snapshot_of(plan: guest.Plan) -> guest.Plan | None:
    """Return a snapshot with other globals and one more page, or None if a host would refuse it."""
    if guest.reason_against_snapshots(plan, native_exposed=False) is not None:
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
                size += wasm.WASM_PAGE  # others are left to the runtime
            contents[memory.index] = InitialContent(size, (), "snapshot")
    return guest.snapshot(plan, contents=contents, values=values)


def assert_same_meaning(plan: guest.Plan) -> None:
    """Fail unless the declarations of both modules are equal, except for the changes of the plan."""
    old, new = plan.structure, wasm.parse(plan.module)
    assert old is not None
    added = [] if plan.import_name is None else [plan.import_name]
    assert [each.name for each in new.imports] == [*(each.name for each in old.imports), *added]
    assert new.exports[: len(old.exports)] == old.exports
    assert {each.name for each in new.exports[len(old.exports) :]} == {
        each.export_name for each in plan.saved_globals if each.export_name
    }
    assert [each.type for each in new.memories] == [each.type for each in old.memories]
    for same in ("tables", "globals", "start", "function_count"):
        assert getattr(new, same) == getattr(old, same)
    assert (new.data_count is None) is (old.data_count is None)
    kept = ("CUSTOM", "TYPE", "FUNCTION", "ELEMENT", "CODE", "TAG")
    before, after = (
        [each.source[s.payload : s.end] for s in each.sections if s.id.name in kept]
        for each in (old, new)
    )
    assert after == before
    assert_same_segments(plan, old, new)
    for memory in plan.memories:
        if memory.image:
            # By address: a memory of 4 GiB would not fit a buffer.
            laid: dict[int, int] = {}
            meant: dict[int, int] = {}
            for segment in plan.contents[memory.index].segments:
                laid.update(enumerate(segment.data, segment.offset))
            for each in old.data_segments:
                if each.memory == memory.index:
                    assert each.offset is not None
                    assert each.offset.value is not None
                    meant.update(enumerate(each.data, each.offset.value))
            assert laid == meant


def assert_same_segments(plan: guest.Plan, old: wasm.Module, new: wasm.Module) -> None:
    """Fail unless exactly the data in images is gone, with its segments as far as no code could name them."""
    named = plan.code.named_segments if plan.code is not None else None
    left = list(new.data_segments)
    for segment in old.data_segments:
        taken = segment.memory is not None and plan.memories[segment.memory].image
        expected = b"" if taken else bytes(segment.data)
        if left and _same_place(segment, left[0]) and bytes(left[0].data) == expected:
            left.pop(0)
        else:
            assert taken, segment.index
            assert named is not None, segment.index
            assert segment.index >= named, segment.index
    assert not left


def _same_place(one: wasm.DataSegment, other: wasm.DataSegment) -> bool:
    if one.offset is None or other.offset is None:
        return (one.memory, one.offset) == (other.memory, other.offset)
    return one.memory == other.memory and one.offset.value in (None, other.offset.value)


@given(modules)
@settings(max_examples=examples(50))
def test_work_for_a_damaged_module_is_bounded_by_its_size(module: bytes) -> None:
    found: list[guest.Plan] = []
    assert calls_of(lambda: found.extend(plans(module))) < 8 * 40 * (len(module) + 50)
    for plan in found:
        assert len(plan.module) < len(module) + 200 + 40 * len(plan.saved_globals)


@given(st.binary(max_size=400))
@settings(max_examples=examples(75))
def test_bytes_of_any_kind_are_accepted_exactly_if_a_runtime_accepts_them(
    engine: Any, noise: bytes
) -> None:
    for module in (noise, HEADER + noise):
        check(engine, module)


def test_damage_done_to_modules_yields_valid_and_invalid_ones(engine: Any) -> None:
    """Prove that the tests above compare modules of each sort."""
    found = Counter[tuple[bool, str]]()
    for seed in range(600):
        module = mutated(random.Random(seed), CORPUS[seed % len(CORPUS)])
        try:
            wasm.parse(module)
            said = "read"
        except (InvalidModule, wasm.NotUnderstood) as error:
            said = type(error).__name__
        found[is_valid(engine, module), said] += 1
    assert min(found[valid, "read"] for valid in (False, True)) > 50
    assert found[False, "NotUnderstood"] > 20
    assert found[False, "InvalidModule"] > 0
    assert not found[True, "InvalidModule"]
