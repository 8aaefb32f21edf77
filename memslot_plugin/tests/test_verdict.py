"""The verdict about a reset in place: the state that a module can change, and its reasons."""

from __future__ import annotations

import dataclasses

import pytest

from memslot_plugin import wasm
from memslot_plugin.guest import analysis
from memslot_plugin.guest import verdict as verdicts

wasmtime = pytest.importorskip("wasmtime", reason="wasmtime, which assembles and validates")


def judge(text: str) -> tuple[wasm.Module, analysis.CodeReport, verdicts.Verdict]:
    """Return the module with these fields, the report about its code, and its verdict."""
    module = wasm.parse(wasmtime.wat2wasm(f"(module {text})"))
    report = analysis.analyse(module)
    return module, report, verdicts.judge(module, report)


TABLE = "(table 1 funcref)"
REFUSED = {
    f'{TABLE} (func (export "f") unreachable table.set unreachable table.set)': (
        'The code has table.set in function 0 (exported as "f"), at byte 0x'
    ),
    f"{TABLE} (func unreachable table.fill)": "the elements of a table cannot be put back.",
    f"{TABLE} (func unreachable table.grow unreachable)": "a table cannot shrink.",
    "(elem $e func) (func elem.drop $e)": "a segment that was dropped does not come back.",
    '(memory 1) (data $d "x") (func unreachable memory.init $d)': (
        "whether its segment is still there cannot be seen from outside."
    ),
    "(type $a (array (mut i32))) (func unreachable array.set $a)": (
        "an object that the instance keeps cannot be put back."
    ),
    "(global $g (mut funcref) (ref.null func)) (func unreachable global.set $g)": (
        "Global 0 holds references, (ref null func), and is assigned to; a reference cannot be saved."
    ),
    '(global (export "g") (mut externref) (ref.null extern))': (
        'Global 0 holds references, (ref null extern), and is exported as "g"'
    ),
    "(func $f) (start $f)": "Function 0 starts each new instance and does not run at a reset",
    '(import "env" "m" (memory 1)) (data (i32.const 0) "x")': (
        "Each new instance copies data into the memory that is imported as env.m;"
    ),
    '(import "env" "t" (table 1 funcref)) (func $f) (elem (i32.const 0) $f)': (
        "Each new instance may put its functions into the table that is imported as env.t;"
    ),
    "(type $f (func)) (type $c (cont $f)) (func unreachable cont.new $c unreachable)": (
        "What the code does cannot be proven: the opcode 0xe0 is not known here (at byte"
    ),
}

CAPTURED = ("segment", "Global", "starts each")
"""Words in reasons about state that a snapshot captures and a reset in place would not restore."""


@pytest.mark.parametrize(("text", "reason"), REFUSED.items())
def test_state_that_a_reset_in_place_could_miss_is_a_reason_against_it(
    text: str, reason: str
) -> None:
    module, report, verdict = judge(text)
    assert not verdict.in_place
    (said,) = verdict.reasons
    assert reason in said
    assert said.endswith(".")
    captured = verdicts.uncaptured_state(module, report, native_exposed=False)
    if any(word in said for word in CAPTURED):
        assert captured is None
    else:
        assert captured is not None
        if "imported as" in said:
            assert "is not the guest's own, and no snapshot holds its contents" in captured
        else:
            assert captured.split(", at byte")[0] == said.split(", at byte")[0]
        assert captured.endswith(".")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(global $g (mut funcref) (ref.null func)) (func (drop (global.get $g)))",
        "(type $s (struct)) (global (ref $s) (struct.new $s))",
        '(import "env" "m" (memory 1)) (func unreachable i32.store)',
    ],
)
def test_module_that_writes_only_memories_and_globals_is_reset_in_place(text: str) -> None:
    *_, verdict = judge(text)
    assert (verdict.in_place, verdict.reasons) == (True, ())


def test_state_that_must_be_watched_is_a_condition() -> None:
    *_, verdict = judge(
        """(memory 1) (table (export "t") (export "u") 1 funcref)
           (func (export "grow") (drop (memory.grow (i32.const 1))))"""
    )
    assert verdict.in_place
    growth, table = verdict.conditions
    said = 'The code has memory.grow in function 0 (exported as "grow"), at byte 0x'
    assert growth.startswith(said)
    assert growth.endswith("; after a growth only a new instance has the right size.")
    assert table.startswith('Table 0 is exported as "t" and "u"; after the embedder was given')


def test_state_that_is_imported_is_named_as_the_embedders() -> None:
    *_, verdict = judge(
        """(import "a" "m" (memory 1)) (import "a" "t" (table 1 funcref))
           (import "a" "g" (global (mut i32))) (import "a" "c" (global i32))
           (export "again" (table 0)) (func (global.set 0 (i32.const 1)))"""
    )
    assert verdict.in_place
    assert verdict.conditions == ()
    assert [sentence.split(" belongs")[0] for sentence in verdict.foreign] == [
        "The memory that is imported as a.m",
        "The table that is imported as a.t",
        "The mutable global that is imported as a.g",
    ]


def test_global_changes_if_code_assigns_to_it_or_the_embedder_can() -> None:
    module, report, _ = judge(
        """(import "env" "g" (global (mut i32)))
           (global $a (mut i32) (i32.const 0)) (global $b (mut v128) (v128.const i64x2 0 0))
           (global $c (mut i32) (i32.const 0)) (global $d i32 (i32.const 0))
           (global $e (export "e") (mut i32) (i32.const 0)) (export "d" (global $d))
           (func unreachable global.set 0 unreachable global.set $a unreachable global.set $b)"""
    )
    assert report.globals_set == (0, 1, 2)
    assert verdicts.changing_globals(module, report) == (1, 2, 5)
    unclear = dataclasses.replace(report, not_understood="The code is odd.", globals_set=())
    assert verdicts.changing_globals(module, unclear) == (1, 2, 3, 5)
