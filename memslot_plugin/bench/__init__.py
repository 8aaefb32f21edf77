"""The benchmark: families of cases, measured in rounds that take turns with the peers that they are compared with.

    runner     measures: subjects in rounds;  results: rows of ratios, claims about them, and tables
    baseline   the peers;  guests, memory: what is measured, with a guest and without
    reset, cycle, request, density, scaling, snapshot
               the families (live is the process that density starts)
    plot       a picture of a run

A ratio is taken within each round and its median shown: prices of different moments are never compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

from memslot_plugin.bench import cycle, density, request, reset, scaling, snapshot
from memslot_plugin.bench.machine import facts
from memslot_plugin.bench.results import Claim, Family, Grid, Row, Run, judge
from memslot_plugin.bench.runner import Bench

__all__ = ["FAMILIES", "Bench", "Family", "Grid", "Run", "grids", "run"]

FAMILIES: dict[str, ModuleType] = {
    family.NAME: family for family in (reset, cycle, request, density, scaling, snapshot)
}
"""Families by name.

`measure(bench)` yields rows, claims that are not about single rows, and sentences about what is left out.  LIMITS judge
the rows, and `grids(rows)` shows them.
"""


def run(bench: Bench, only: Sequence[str] = ()) -> Run:
    """Measure these families, or all."""
    chosen = [name for name in FAMILIES if not only or name in only]
    return Run(facts(), bench.quick, tuple(_measured(name, bench) for name in chosen))


def _measured(name: str, bench: Bench) -> Family:
    family = FAMILIES[name]
    found = list(family.measure(bench))
    rows = tuple(each for each in found if isinstance(each, Row))
    claims = [each for each in found if isinstance(each, Claim)]
    skipped = tuple(each for each in found if isinstance(each, str))
    return Family(name, rows, (*judge(rows, family.LIMITS), *claims), skipped)


def grids(family: Family) -> Iterator[Grid]:
    """Yield the tables of a family."""
    yield from FAMILIES[family.name].grids(family.rows)
