"""The benchmark: families of cases, measured in rounds that take turns with whom they are compared with.

    results    what a run is: rows of ratios, claims about them; to JSON and back
    runner     how everything is measured
    memory     slots without a guest;  guests, peers: with one, and against whom
    reset, cycle, request, density, warm, scaling, snapshot, hooks, analysis
               the families (live and worker are processes that two of them start; ruby is a guest of snapshot)
    report     the README's tables, from a stored run;  plot: a picture

A ratio is taken within each round and its median told: prices of different moments are never compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

from memslot_plugin.bench import (
    analysis,
    cycle,
    density,
    hooks,
    request,
    reset,
    scaling,
    snapshot,
    warm,
)
from memslot_plugin.bench.machine import facts
from memslot_plugin.bench.results import Family, Grid, Run
from memslot_plugin.bench.runner import Bench

__all__ = ["FAMILIES", "Bench", "Family", "Grid", "Run", "grids", "run"]

FAMILIES: dict[str, ModuleType] = {
    family.NAME: family
    for family in (reset, cycle, request, density, warm, scaling, snapshot, hooks, analysis)
}
"""Each has `measure(bench)`, which answers a `Family`, and `grids(rows)`, which shows it."""


def run(bench: Bench, only: Sequence[str] = ()) -> Run:
    """Measure these families, or all."""
    chosen = [name for name in FAMILIES if not only or name in only]
    found = tuple(FAMILIES[name].measure(bench) for name in chosen)
    return Run(facts(), bench.quick, found)


def grids(family: Family) -> Iterator[Grid]:
    """A family's tables."""
    yield from FAMILIES[family.name].grids(family.rows)
