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

from . import cells, differential, toy, wasm_tools
from .cells import Cell
from .differential import Tally
from .generated import FEATURES, generate

WAITS = {"memory.atomic.wait32", "memory.atomic.wait64"}


def assert_counts_agree(module: bytes, folder: Path) -> None:
    report = analysis.analyse(wasm.parse(module))
    assert report.not_understood is None
    counted = wasm_tools.count_instructions(module, folder)
    assert report.instructions == counted.total()
    expected = Counter(
        {each.value: counted[each.value] for each in Instruction if counted[each.value]}
    )
    if waits := sum(counted[each] for each in WAITS):
        expected[Instruction.ATOMIC_WAIT.value] = waits
    assert {each.instruction: each.count for each in report.occurrences} == expected


def test_the_decoder_counts_what_wasm_tools_prints(tmp_path: Path) -> None:
    for host, features in FEATURES.items():
        for seed in range(examples(30)):
            module = generate(seed, features)
            try:
                assert_counts_agree(module.binary, tmp_path)
            except AssertionError as error:
                raise AssertionError(f"for {host}, {module}") from error


def test_the_decoder_counts_what_wasm_tools_prints_of_its_own_modules(tmp_path: Path) -> None:
    for seed in range(examples(30)):
        module = wasm_tools.smith(seed, tmp_path, gc=seed % 2 == 0)
        try:
            assert_counts_agree(module, tmp_path)
        except AssertionError as error:
            raise AssertionError(f"seed {seed} of wasm-smith") from error


def test_the_decoder_counts_what_wasm_tools_prints_of_quickjs(
    quickjs: bytes, tmp_path: Path
) -> None:
    assert_counts_agree(quickjs, tmp_path)


def test_the_decoder_counts_every_instruction_of_the_catalogue(tmp_path: Path) -> None:
    bodies = "".join(f"(func unreachable {text} unreachable)" for text in instructions.ATOMICS)
    assert_counts_agree(toy.assemble(f"(module {instructions.PREAMBLE} {bodies})"), tmp_path)


def test_modules_of_wasm_smith_do_what_they_do_natively(
    real_cell: Cell, tmp_path: Path, note: Callable[[str, object], None]
) -> None:
    assert real_cell.host == "wasmtime"  # where wasm-tools is, wasmer is not
    tally = Tally()
    with real_cell.open(**differential.settings_of(real_cell)) as host:
        for seed in range(examples(40)):
            compare(host, seed, tmp_path, tally)
    note("compared", str(tally))
    assert not tally.differences, "\n".join(tally.differences)
    assert tally.counts["natively started"] > 10


def compare(host: cells.memslot.Host, seed: int, folder: Path, tally: Tally) -> None:
    import wasmtime

    from memslot_plugin.hosts.wasmtime_values import F64, KIND_NAMES, Signature

    binary = wasm_tools.smith(seed, folder, gc=False)
    signatures = {}
    for each in wasmtime.Module(wasmtime.Engine(), binary).exports:
        if isinstance(each.type, wasmtime.FuncType):
            signature = Signature.of(each.type)
            if max((*signature.parameters, *signature.results), default=0) <= F64:
                signatures[each.name] = tuple(KIND_NAMES[kind] for kind in signature.parameters)
    differential.compare(host, wasm_tools.Smithed(seed, signatures, binary), tally)
