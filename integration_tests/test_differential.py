"""Modules that nobody thought of compute under memslot what they compute natively, over every cell of the matrix."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

import memslot_plugin as memslot
from memslot_plugin import analysis, wasm
from memslot_plugin import guest as guests
from memslot_plugin.tests.profiles import examples

from . import cells, differential
from .cells import Cell
from .differential import Tally, features_for, imports_of
from .generated import FEATURES, generate

PER_LEG = examples(336)
"""Modules per host, spread over the cells that a leg has."""


def seeds_of(cell: Cell, count: int) -> range:
    """Other modules for each cell and Python, and the same in each run."""
    first = sys.version_info.minor * 10_000_000 + cells.EVERY_CELL.index(cell) * 100_000
    return range(first, first + count)


def test_generated_modules_do_what_they_do_natively(
    cell: Cell, note: Callable[[str, object], None]
) -> None:
    alike = [each for each in cells.POSSIBLE_CELLS if each.host == cell.host]
    seeds = seeds_of(cell, -(-PER_LEG // len(alike)))
    if cell.host == "fake":
        for seed in seeds:
            compare_contents(cell, seed)
        return
    tally = differential.run(cell, seeds)
    note("compared", str(tally))
    assert not tally.differences, "\n".join(tally.differences)
    assert tally.counts["modules"] == len(seeds)
    assert tally.counts["lives"] > 2 * len(seeds)


def compare_contents(cell: Cell, seed: int) -> None:
    """Without a runtime: what an image lays is what the generator meant."""
    module = generate(seed, FEATURES["wasmtime"])
    with cell.open(slots=8) as host:
        try:
            guest = host.prepare(module.binary)
        except memslot.InvalidModule:
            assert guests.plan(module.binary, image_limit=0, import_memory=False).native, module
            return
        with guest, guest.instantiate() as instance:
            for memory in guest.report.memories:
                if memory.image:
                    content = instance.memories[memory.index].read(0, memory.minimum_bytes)
                    assert content == module.initial_memory(memory.index), module


# What the comparison is worth


def globals_stay(monkeypatch: pytest.MonkeyPatch, host: memslot.Host) -> None:
    with host.prepare(b"\0asm\1\0\0\0").instantiate() as instance:
        live = type(instance._live())
    monkeypatch.setattr(live, "restore", live.let_go)


def tables_stay(monkeypatch: pytest.MonkeyPatch, host: memslot.Host) -> None:
    """Nothing that code does counts as irreversible."""
    monkeypatch.setattr(analysis, "_IRREVERSIBLE", {})


def data_is_cut(monkeypatch: pytest.MonkeyPatch, host: memslot.Host) -> None:
    """An image lacks the last byte of each segment."""
    right = guests.Segment
    monkeypatch.setattr(guests, "Segment", lambda offset, data: right(offset, data[:-1]))


def start_runs_twice(monkeypatch: pytest.MonkeyPatch, host: memslot.Host) -> None:
    right = wasm.rewrite
    monkeypatch.setattr(
        wasm, "rewrite", lambda module, **options: right(module, **{**options, "drop_start": False})
    )


def values_are_lost(monkeypatch: pytest.MonkeyPatch, host: memslot.Host) -> None:
    """A snapshot has the globals that the module starts with."""
    right = wasm.rewrite
    monkeypatch.setattr(
        wasm,
        "rewrite",
        lambda module, **options: right(module, **{**options, "initial_values": None}),
    )


SABOTAGE = {
    globals_stay: ("reset", 0),
    tables_stay: ("", 40),
    data_is_cut: ("first instance", 0),
    start_runs_twice: ("instance of a snapshot", 120),
    values_are_lost: ("instance of a snapshot", 0),
}
"""What is broken, in which life that has to be noticed, and a seed not far before one that notices it."""


@pytest.mark.parametrize("sabotage", SABOTAGE, ids=lambda each: each.__name__)
def test_the_comparison_notices_what_is_wrong(
    real_cell: Cell, sabotage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, first = SABOTAGE[sabotage]
    tally = Tally()
    with real_cell.open(**differential.settings_of(real_cell)) as host:
        sabotage(monkeypatch, host)
        for seed in range(first, first + 300):
            differential.compare(host, generate(seed, features_for(real_cell.host, seed)), tally)
            if tally.differences:
                break
    (found,) = tally.differences
    said, _, life = found.partition("\n")
    assert said.startswith(f"seed {seed}: 0061736d01000000")
    assert where in life.partition(":")[0]


# The generator


def test_a_seed_makes_the_same_module_in_every_process() -> None:
    script = (
        "import hashlib; from integration_tests.generated import FEATURES, generate;"
        "print(hashlib.sha256(b''.join(repr((g.binary, g.calls, g.probes)).encode() for g in"
        " (generate(s, FEATURES[h]) for h in FEATURES for s in range(20)))).hexdigest())"
    )
    made = [generate(seed, features) for features in FEATURES.values() for seed in range(20)]
    here = hashlib.sha256(
        b"".join(repr((each.binary, each.calls, each.probes)).encode() for each in made)
    )
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": hash_seed},
            cwd=cells.__file__.rpartition("/integration_tests/")[0],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == here.hexdigest()


def test_every_generated_module_is_valid() -> None:
    wasmtime = pytest.importorskip("wasmtime", reason="wasmtime is not installed")
    engine = wasmtime.Engine()
    for features in FEATURES.values():
        for seed in range(examples(150)):
            wasmtime.Module.validate(engine, generate(seed, features).binary)


def test_generated_modules_have_everything_that_they_should() -> None:
    """Each kind of thing that the generator promises occurs among some hundreds of modules."""
    found: Counter[str] = Counter()
    for seed in range(400):
        made = generate(seed, FEATURES["wasmtime"])
        module = wasm.parse(made.binary)
        plan = guests.plan(made.binary, image_limit=1 << 30, import_memory=False)
        assert plan.code is not None
        assert plan.code.not_understood is None
        found.update(each.instruction for each in plan.code.occurrences)
        found.update(f"{len(module.memories)} memories" for _ in "1")
        found.update(f"a {each.type.value.name} global" for each in module.globals)
        found.update(
            f"a memory{' of 64 bits' * each.type.memory64}{' that is imported' * bool(each.imported)}"
            for each in module.memories
        )
        found.update(
            "a memory without pages" for each in module.memories if not each.type.minimum_pages
        )
        found.update(
            "a memory without a maximum" for m in module.memories if m.type.maximum_pages is None
        )
        found.update(
            f"{'active' if each.active else 'passive'} data" for each in module.data_segments
        )
        found.update("empty data" for each in module.data_segments if not each.data)
        found["start"] += module.start is not None
        found["in place"] += plan.verdict.in_place
        found["not in place"] += not plan.verdict.in_place
        for memory in plan.memories:
            found["image"] += memory.content is not None
            for part in ("imported", "instantiation traps", "is global", "is shared"):
                found[part] += part in (memory.reason or "")
        for segment in module.data_segments:
            if segment.active and segment.offset.value is not None:
                size = module.memories[segment.memory].type.minimum_bytes
                end = segment.offset.value + len(segment.data)
                found["data at the last byte"] += end == size and bool(segment.data)
                found["data out of bounds"] += end > size
                found["a computed offset"] += len(segment.offset.encoded) > 8
    wanted = {
        *(
            [
                "table.set",
                "table.grow",
                "table.fill",
                "table.copy",
                "table.init",
                "elem.drop",
                "data.drop",
            ]
        ),
        *(["memory.init", "memory.grow", "global.set"]),
        *(f"{count} memories" for count in range(4)),
        *(f"a {kind} global" for kind in ("i32", "i64", "f32", "f64", "v128")),
        *("a (ref null func) global", "a (ref null extern) global"),
        *("a memory", "a memory of 64 bits", "a memory that is imported"),
        *("a memory without pages", "a memory without a maximum"),
        *(
            "active data",
            "passive data",
            "empty data",
            "data at the last byte",
            "data out of bounds",
        ),
        *("a computed offset", "start", "in place", "not in place", "image", "imported"),
        *("instantiation traps", "is global", "is shared"),
    }
    assert not {what for what in wanted if found[what] < 3}
    assert imports_of(()) is None
