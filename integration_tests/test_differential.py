"""Generated modules compute under memslot what they compute natively, over every cell of the matrix."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin import wasm
from memslot_plugin.guest import plan as guests
from memslot_plugin.guest import verdict
from memslot_plugin.guest.target import Target
from memslot_plugin.settings import Settings
from memslot_plugin.tests.profiles import examples

from . import cells, differential
from .cells import Cell
from .differential import Tally, features_for
from .generated import FEATURES, generate

PER_HOST = examples(84)
"""Modules per host, spread over its cells."""


@pytest.mark.scales
def test_generated_module_does_what_it_does_natively(
    runtime_cell: Cell, note: Callable[[str, object], None]
) -> None:
    in_this_tier = cells.PAIRWISE_CELLS if PER_HOST == 84 else cells.POSSIBLE_CELLS
    alike = [each for each in in_this_tier if each.host == runtime_cell.host]
    # Other modules for each cell and Python, and the same in each run.
    first = sys.version_info.minor * 10_000_000 + cells.EVERY_CELL.index(runtime_cell) * 100_000
    seeds = range(first, first - PER_HOST // -len(alike))
    tally = differential.run(runtime_cell, seeds, Tally())
    note("compared", str(tally))
    assert not tally.differences, "\n".join(tally.differences)
    assert tally.counts["modules"] == len(seeds)
    assert tally.counts["lives"] > 2 * len(seeds)


# Comparisons with a broken memslot


def globals_stay(monkeypatch: pytest.MonkeyPatch, host: memslot.Host) -> None:
    with host.prepare(b"\0asm\1\0\0\0").instantiate() as instance:
        live = type(instance.enter())
    acquire, keys = live.acquire, list[int]()

    def noted(self: Any, generation: int, key: int, *, alone: bool = False) -> None:
        keys.append(key)
        acquire(self, generation, key, alone=alone)

    monkeypatch.setattr(live, "acquire", noted)
    monkeypatch.setattr(live, "restore", lambda self, _: self.release(keys.pop()))


def tables_stay(monkeypatch: pytest.MonkeyPatch, host: memslot.Host) -> None:
    """Let no instruction count as irreversible."""
    monkeypatch.setattr(verdict, "IRREVERSIBLE", {})


def data_is_cut(monkeypatch: pytest.MonkeyPatch, host: memslot.Host) -> None:
    """Cut the last byte of each segment off the images."""
    right = guests.Segment
    monkeypatch.setattr(guests, "Segment", lambda offset, data: right(offset, data[:-1]))


def rewritten_with(**changes: Any) -> Callable[[pytest.MonkeyPatch, memslot.Host], None]:
    right = wasm.rewrite

    def rewrite(module: wasm.Module, **options: Any) -> bytes:
        return right(module, **{**options, **changes})

    return lambda monkeypatch, host: monkeypatch.setattr(wasm, "rewrite", rewrite)


SABOTAGE = {
    "globals_stay": (globals_stay, "reset"),
    "tables_stay": (tables_stay, ""),
    "data_is_cut": (data_is_cut, "first instance"),
    "start_runs_twice": (rewritten_with(drop_start=False), "instance of a snapshot"),
    "values_are_lost": (rewritten_with(initial_values=None), "instance of a snapshot"),
}
"""Sabotage, and a part of the name of the life that shows it."""


@pytest.mark.parametrize("sabotage", SABOTAGE)
@pytest.mark.parametrize("name", cells.REAL_HOSTS)
def test_comparison_with_a_broken_memslot_finds_a_difference(
    name: str, sabotage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, tally = Cell(name, "memfd"), Tally()
    if cell.missing:
        pytest.skip(cell.missing)
    break_it, where = SABOTAGE[sabotage]
    with cell.open(**differential.SETTINGS) as host:
        break_it(monkeypatch, host)
        for seed in range(300):
            differential.compare(host, generate(seed, features_for(name, seed)), tally)
            if tally.differences:
                break
    (found,) = tally.differences
    said, _, life = found.partition("\n")
    assert said.startswith(f"seed {seed}: 0061736d01000000")
    assert where in life.partition(":")[0]


# The generator


def digest() -> str:
    made = [generate(seed, features) for features in FEATURES.values() for seed in range(20)]
    text = repr([(each.binary, each.calls, each.probes) for each in made])
    return hashlib.sha256(text.encode()).hexdigest()


def test_seed_in_another_process_makes_an_equal_module() -> None:
    code = "from integration_tests import test_differential; print(test_differential.digest())"
    root, seeded = Path(__file__).parents[1], {"PYTHONHASHSEED": "1"}
    there = subprocess.check_output([sys.executable, "-c", code], env=seeded, cwd=root, text=True)
    assert there.strip() == digest()


@pytest.mark.scales
def test_every_generated_module_is_valid() -> None:
    wasmtime = pytest.importorskip("wasmtime", reason="wasmtime is not installed")
    engine = wasmtime.Engine()
    for features in FEATURES.values():
        for seed in range(examples(150)):
            wasmtime.Module.validate(engine, generate(seed, features).binary)


WANTED = [
    *(f"instruction={name!r}" for name in ("table.set", "table.grow", "table.fill", "table.copy")),
    *(f"instruction={name!r}" for name in ("table.init", "elem.drop", "data.drop", "memory.init")),
    *("instruction='memory.grow'", "instruction='global.set'", "in_place=True", "in_place=False"),
    *("memories=[]", "Memory(index=0", "Memory(index=1", "Memory(index=2", "memory64=True"),
    *("minimum_pages=0", "maximum_pages=None", "start=None", "start=1", "memory=None"),
    *(f"value=ValueType(name='{kind}'" for kind in ("i32", "i64", "f32", "f64", "v128")),
    *("value=ValueType(name='(ref null func)'", "value=ValueType(name='(ref null extern)'"),
    *("data=b''", "image=True", "image=False", "belongs to the embedder"),
    *(
        "instantiation traps",
        "is global",
        "is shared",
        "at the last byte",
        "is not a single constant",
    ),
]
"""Parts of the printed module and plan, and two items that are not printed."""


def test_generated_modules_together_have_each_promised_kind_of_item() -> None:
    found: Counter[str] = Counter()
    for seed in range(400):
        binary = generate(seed, FEATURES["wasmtime"]).binary
        plan = guests.plan(binary, Target(Settings(), import_memory=False))
        module = wasm.parse(binary)
        printed = [
            repr((plan.memories, plan.code, plan.verdict, dataclasses.replace(module, source=b"")))
        ]
        for each in module.data_segments:
            printed.append(f"data={bytes(each.data[:1])!r}")
            if each.offset is not None and each.offset.value is not None:
                end = each.offset.value + len(each.data)
                inside = end == module.memories[each.memory].type.minimum_bytes and each.data
                printed.append("at the last byte" if inside else "elsewhere")
        found.update(what for what in WANTED if any(what in each for each in printed))
    assert not {what: found[what] for what in WANTED if found[what] < 3}
