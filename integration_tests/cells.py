"""The matrix host x backend x allocation x reset x growth, and its impossible cells.

A cell is also the name in a test's brackets: `wasmtime-memfd-pooling-auto-mprotect`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any, get_args, get_type_hints

import memslot_plugin as memslot
from memslot_plugin.allocators import PoolAllocator
from memslot_plugin.settings import KIB
from memslot_plugin.tests import runtimes

from . import toy

HOSTS = ("fake", "wasmtime", "wasmer")
REAL_HOSTS = HOSTS[1:]
BACKENDS = ("memfd", "anonymous")
ALLOCATIONS = ("pooling", "on-demand")
RESETS: tuple[str, ...] = get_args(get_type_hints(memslot.Settings)["reset"])
GROWTHS = ("mprotect", "ftruncate")


@dataclass(frozen=True)
class Cell:
    """One combination of host, backend, allocation, reset and growth."""

    host: str
    backend: str
    allocation: str = "pooling"
    reset: str = "auto"
    growth: str = "mprotect"

    def __str__(self) -> str:
        return "-".join(astuple(self))

    @property
    def pairs(self) -> set[tuple[tuple[int, str], ...]]:
        """Return the pairs of the five coordinates, with their places."""
        return set(itertools.combinations(enumerate(astuple(self)), 2))

    @property
    def missing(self) -> str | None:
        """Return the reason why this Python cannot open the host of this cell, or None."""
        return runtimes.missing(self.host)

    @property
    def refused(self) -> bool:
        """Return True if memslot refuses this cell: wasmer grows its mappings by mprotect itself."""
        return self.host == "wasmer" and self.growth == "ftruncate"

    def settings(self, **changes: Any) -> memslot.Settings:
        """Return the settings of this cell."""
        values = {
            "plugins": (self.backend,),
            "allocation": self.allocation,
            "reset": self.reset,
            "growth": self.growth,
            "slots": 4,
            "bounds_checks": "code" if self.growth == "ftruncate" else "guard",
            "image_limit": 512 * KIB,
            "audit": 1.0,  # each reset is checked byte by byte
        }
        return memslot.Settings(**{**values, **changes})

    def open(self, *, plugins: tuple[object, ...] = (), **changes: Any) -> memslot.Host:
        """Open a host in this cell; `changes` are settings."""
        options = {"functions": toy.FUNCTIONS} if self.host == "fake" else {}
        return memslot.open_host(
            self.host, settings=self.settings(**changes), plugins=plugins, **options
        )

    @contextmanager
    def serving(self, **changes: Any) -> Iterator[memslot.Host]:
        """Open a host in this cell, and fail if it ends with a lease or an unsound slot."""
        with self.open(**changes) as host:
            yield host
            assert host.statistics().live_instances == 0
            check(host, in_use=0)

    def with_changes(self, **changes: str) -> Cell:
        """Return this cell with other coordinates."""
        return replace(self, **changes)


def pools(host: memslot.Host) -> Iterator[tuple[str, memslot.Pool]]:
    """Return each pool behind a host, by the name of its plugin."""
    for name, plugin in host.plugins.manager.list_name_plugin():
        if isinstance(plugin, PoolAllocator) and plugin.pool is not None:
            yield name, plugin.pool


def pool(host: memslot.Host) -> memslot.Pool:
    """Return the only pool behind a host."""
    ((_, found),) = pools(host)
    return found


def check(host: memslot.Host, *, in_use: int | None = None) -> None:
    """Check the invariant of each pool and its number of leased slots."""
    host.statistics()  # takes back dropped slots
    for name, each in pools(host):
        each.check()
        if in_use is not None:
            assert each.statistics().in_use == in_use, name


def pairwise(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    """Choose a few cells that have each pair of coordinates of `cells`.

    The choice is greedy and as small as a cover can be: 12 cells with wasmer, 8 without. It depends on the order of
    `cells` alone.
    """
    found, ordered = [], sorted(cells, key=lambda cell: (cell.reset, cell.host))
    missing = set().union(*(cell.pairs for cell in ordered))
    while missing:
        found.append(max(ordered, key=lambda cell: len(cell.pairs & missing)))
        missing -= found[-1].pairs
    return tuple(found)


EVERY_CELL = tuple(
    Cell(*coordinates)
    for coordinates in itertools.product(HOSTS, BACKENDS, ALLOCATIONS, RESETS, GROWTHS)
)
POSSIBLE_CELLS = tuple(cell for cell in EVERY_CELL if not (cell.missing or cell.refused))
RUNTIME_CELLS = tuple(cell for cell in POSSIBLE_CELLS if cell.host != "fake")
PAIRWISE_CELLS = pairwise(POSSIBLE_CELLS)
"""The cells that T0 runs."""
PLAIN_CELLS = tuple(Cell(host, backend) for host in HOSTS for backend in BACKENDS)
"""One cell per host and backend, with defaults for the other coordinates."""
SAMPLE_CELLS = (Cell("fake", "anonymous"), Cell("wasmtime", "memfd"), Cell("wasmer", "memfd"))
"""Plain cells that T0 runs: each host and each backend."""
TENANT_CELLS = (
    Cell("fake", "anonymous", "on-demand", "pagemap"),
    Cell("wasmtime", "memfd"),
    Cell("wasmtime", "anonymous", "on-demand", "copy", "ftruncate"),
    Cell("wasmer", "memfd", "on-demand", "madvise"),
)
"""Cells in which T0 has hostile tenants: each host, each backend and both allocations."""
