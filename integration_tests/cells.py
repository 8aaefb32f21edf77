"""The matrix: host x backend x allocation x reset x growth, and which of its cells cannot exist.

A cell is also the name in a test's brackets: `wasmtime-memfd-pooling-auto-mprotect`.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import memslot_plugin as memslot
from memslot_plugin.allocators import PoolAllocator
from memslot_plugin.settings import KIB

from . import toy

HOSTS = ("fake", "wasmtime", "wasmer")
REAL_HOSTS = HOSTS[1:]
ALLOCATIONS = ("pooling", "on-demand")
RESETS = ("madvise", "pagemap", "copy", "auto")
GROWTHS = ("mprotect", "ftruncate")


def backends() -> tuple[str, ...]:
    """Those that MEMSLOT_PLUGINS leaves; without it both."""
    named = os.environ.get("MEMSLOT_PLUGINS")
    both = ("memfd", "anonymous")
    if named is None:
        return both
    return tuple(name for name in both if name in [part.strip() for part in named.split(",")])


@dataclass(frozen=True)
class Cell:
    """One combination of everything that a user can choose."""

    host: str
    backend: str
    allocation: str = "pooling"
    reset: str = "auto"
    growth: str = "mprotect"

    def __str__(self) -> str:
        return f"{self.host}-{self.backend}-{self.allocation}-{self.reset}-{self.growth}"

    @property
    def missing(self) -> str | None:
        """Why this cell's host cannot be opened by this Python, or None."""
        if self.host == "fake":
            return None
        if self.host == "wasmer" and sys.version_info >= (3, 11):
            return "impossible: the last wasmer, 1.1.0, has no build for CPython 3.11 and later"
        if importlib.util.find_spec(self.host) is None:
            return f"{self.host} is not installed"
        return None

    @property
    def refused(self) -> str | None:
        """Why memslot refuses this cell although its host is there, or None."""
        if self.host == "wasmer" and self.growth == "ftruncate":
            return "impossible: wasmer owns its mappings and grows them by mprotect itself"
        return None

    def settings(self, **changes: Any) -> memslot.Settings:
        """The settings that make this cell."""
        values = {
            "plugins": (self.backend,),
            "allocation": self.allocation,
            "reset": self.reset,
            "growth": self.growth,
            "slots": 4,
            "bounds_checks": "code" if self.growth == "ftruncate" else "guard",
            "image_limit": 512 * KIB,
            "audit": 1.0,  # every reset is checked byte by byte
        }
        return memslot.Settings(**{**values, **changes})

    def open(self, *, plugins: tuple[object, ...] = (), **changes: Any) -> memslot.Host:
        """A host in this cell; `changes` are settings."""
        options = {"functions": toy.FUNCTIONS} if self.host == "fake" else {}
        return memslot.open_host(
            self.host, settings=self.settings(**changes), plugins=plugins, **options
        )

    @contextmanager
    def serving(self, **changes: Any) -> Iterator[memslot.Host]:
        """A host in this cell that must have nothing leased, and sound slots, at the end."""
        with self.open(**changes) as host:
            yield host
            assert host.statistics().live_instances == 0
            check(host, in_use=0)

    def with_changes(self, **changes: str) -> Cell:
        """This cell with some of its coordinates changed."""
        return replace(self, **changes)


def check(host: memslot.Host, *, in_use: int | None = None) -> None:
    """Every pool's invariant, and how many of its slots are leased."""
    host.statistics()  # takes back what was dropped
    for name, plugin in host.plugins.manager.list_name_plugin():
        if isinstance(plugin, PoolAllocator) and plugin.pool is not None:
            plugin.pool.check()
            if in_use is not None:
                assert plugin.pool.statistics().in_use == in_use, name


def pool(host: memslot.Host) -> memslot.Pool:
    """The only pool behind a host."""
    (found,) = (
        plugin.pool
        for _, plugin in host.plugins.manager.list_name_plugin()
        if isinstance(plugin, PoolAllocator) and plugin.pool is not None
    )
    return found


EVERY_CELL = tuple(
    Cell(*coordinates)
    for coordinates in itertools.product(HOSTS, backends(), ALLOCATIONS, RESETS, GROWTHS)
)
POSSIBLE_CELLS = tuple(cell for cell in EVERY_CELL if not (cell.missing or cell.refused))
PLAIN_CELLS = tuple(Cell(host, backend) for host in HOSTS for backend in backends())
"""One cell per host and backend, with the default of everything else."""
