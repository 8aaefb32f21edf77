"""Offsets in traps and refusals: those of the given module, although a rewritten one was compiled."""

from __future__ import annotations

import re
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin import wasm
from memslot_plugin.tests import hosts

on_runtimes = pytest.mark.parametrize("name", hosts.RUNTIMES)

# Rewritten parts lie before the code: an import, a minimum, exports, initial values, a count of segments.
TEXT = """(module (memory (export "memory") 1) (global $g (mut i64) (i64.const 1)) (global $h (mut i32) (i32.const 2))
  (data (i32.const 0) "some data") (data (i32.const 70) "more")
  (func $inner (param i32) (result i32) (i32.div_u (i32.const 7) (local.get 0)))
  (func (export "init") (global.set $g (i64.const 0x7fffffffffff)) (global.set $h (i32.const -70000)))
  (func (export "divide") (param i32) (result i32) (global.set $h (i32.const 5)) (call $inner (local.get 0))))"""


def frames(error: memslot.GuestTrap) -> list[int]:
    """Return the module offsets of the running functions as they are printed, innermost first."""
    printed = getattr(error, "message", str(error))
    found = [int(each, 16) for each in re.findall(r"0x([0-9a-f]+)", printed)]
    assert found == [each.module_offset for each in getattr(error, "frames", [])] or not hasattr(
        error, "frames"
    )
    return found


def places(module: bytes) -> list[int]:
    return [module.rindex(b"\x20\x00\x6e") + 2, module.rindex(b"\x20\x00\x10\x00") + 2]


def trap(instance: memslot.Instance) -> memslot.GuestTrap:
    with pytest.raises(memslot.GuestTrap) as raised:
        instance.call("divide", 0)
    return raised.value


@on_runtimes
def test_trap_in_a_rewritten_module_is_at_offsets_of_the_given_one(
    name: str, tmp_path: Any
) -> None:
    module = hosts.assemble(TEXT)
    with hosts.serving(name) as host:
        guest = host.prepare(module)
        assert guest.plan.module.rindex(b"\x6e") != module.rindex(b"\x6e")
        with guest.instantiate() as instance:
            assert frames(trap(instance)) == places(module)
            instance.call("init")
            with instance.snapshot() as taken, taken.instantiate() as other:
                assert frames(trap(other)) == places(module)
        initialised = host.prepare(module, init="init")
        with initialised.instantiate() as instance:
            assert frames(trap(instance)) == places(module)
            with instance.fork(1)[0] as fork:
                assert frames(trap(fork)) == places(module)


@on_runtimes
def test_refusal_of_a_rewritten_module_is_at_an_offset_of_the_given_one(name: str) -> None:
    module = hosts.assemble(TEXT)
    at = places(module)[0]
    wrong = module[:at] + b"\x7c" + module[at + 1 :]  # i64.add
    with hosts.serving(name) as host, pytest.raises(memslot.InvalidModule) as raised:
        host.prepare(wrong)
    (said,) = re.findall(r"\(at offset (\w+)\)", str(raised.value))
    assert int(said, 0) == at


def test_offset_outside_of_its_function_is_returned_unchanged() -> None:
    module = wasm.parse(hosts.assemble(TEXT))
    rewritten = wasm.rewrite(module, emptied=[0, 1], exports=wasm.state_exports(module, [0]))
    offsets = wasm.Offsets(module, rewritten)
    inner = rewritten.rindex(b"\x20\x00\x6e") + 2
    moved = places(module.source)[0] - inner
    assert moved != 0
    assert offsets.given(0, inner) == inner + moved
    for function, offset in (
        (0, 0),
        (0, inner + 60),
        (2, inner),
        (3, inner),
        (99, inner),
        (-1, inner),
    ):
        assert offsets.given(function, offset) == offset
    without_code = wasm.parse(hosts.assemble("(module (memory 1))"))
    assert wasm.Offsets(without_code, without_code.source).given(0, 9) == 9
