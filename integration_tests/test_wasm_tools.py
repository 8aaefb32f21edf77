"""Against wasm-tools: its reader counts what our decoder counts, and modules that it generates compute the same."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from memslot_plugin import analysis, wasm
from memslot_plugin.analysis import Instruction
from memslot_plugin.tests import instructions
from memslot_plugin.tests.profiles import examples

if sys.version_info < (3, 11):
    pytest.skip("impossible: the package has no build for CPython 3.10", allow_module_level=True)

import wasmtime

from memslot_plugin.hosts.wasmtime_values import F64, KIND_NAMES, Signature

from . import differential, toy, wasm_tools
from .cells import Cell
from .differential import Tally
from .generated import FEATURES, generate

WAITS = {"memory.atomic.wait32", "memory.atomic.wait64"}


def counts_agree(module: bytes, folder: Path) -> bool:
    report = analysis.analyse(wasm.parse(module))
    counted = wasm_tools.count_instructions(module, folder)
    expected = Counter({each.value: counted[each.value] for each in Instruction})
    expected[Instruction.ATOMIC_WAIT.value] = sum(counted[each] for each in WAITS)
    found = Counter({each.instruction: each.count for each in report.occurrences})
    return (report.not_understood, report.instructions) == (None, counted.total()) and (
        found == expected
    )


@pytest.mark.scales
def test_decoder_counts_what_wasm_tools_prints(tmp_path: Path) -> None:
    bodies = "".join(f"(func unreachable {text} unreachable)" for text in instructions.ATOMICS)
    assert counts_agree(toy.assemble(f"(module {instructions.PREAMBLE} {bodies})"), tmp_path)
    for host, features in FEATURES.items():
        for seed in range(examples(20)):
            module = generate(seed, features)
            assert counts_agree(module.binary, tmp_path), f"for {host}, {module}"
    for seed in range(examples(20)):
        smithed = wasm_tools.smith(seed, tmp_path, gc=seed % 2 == 0)
        assert counts_agree(smithed, tmp_path), f"seed {seed} of wasm-smith"


@pytest.mark.long
def test_decoder_counts_what_wasm_tools_prints_of_quickjs(quickjs: bytes, tmp_path: Path) -> None:
    assert counts_agree(quickjs, tmp_path)


@pytest.mark.scales
def test_modules_of_wasm_smith_do_what_they_do_natively(
    tmp_path: Path, note: Callable[[str, object], None]
) -> None:
    tally = Tally()
    with Cell("wasmtime", "memfd").open(**differential.SETTINGS) as host:
        for seed in range(examples(20)):
            differential.compare(host, smithed(seed, tmp_path), tally)
    note("compared", str(tally))
    assert not tally.differences, "\n".join(tally.differences)
    assert tally.counts["natively started"] > 5


def smithed(seed: int, folder: Path) -> wasm_tools.Smithed:
    binary = wasm_tools.smith(seed, folder, gc=False)
    signatures = {}
    for each in wasmtime.Module(wasmtime.Engine(), binary).exports:
        if isinstance(each.type, wasmtime.FuncType):
            signature = Signature.of(each.type)
            if max((*signature.parameters, *signature.results), default=0) <= F64:
                signatures[each.name] = tuple(KIND_NAMES[kind] for kind in signature.parameters)
    return wasm_tools.Smithed(seed, binary, signatures)
