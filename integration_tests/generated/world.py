"""The contents of a generated module, which the writing parts share."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

Signature = tuple[tuple[str, ...], tuple[str, ...]]

Features = frozenset[str]
"""Proposals of a runtime beyond WebAssembly 2.0, and two features of 2.0 that one runtime lacks.

bound_tables: a table can be made outside of a module, to be imported.
"""

FEATURES = {
    "wasmtime": frozenset(
        [
            *("multi_memory", "memory64", "threads", "table64", "extended_const", "filled_tables"),
            *("tail_calls", "exceptions", "externref_tables", "bound_tables"),
        ]
    ),
    "wasmer": frozenset[str](),
}
"""Features that each host compiles by default."""


@dataclass(frozen=True)
class Memory:
    index: int
    minimum: int
    maximum: int | None
    address: str = "i32"
    imported: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Table:
    index: int
    kind: str
    minimum: int
    maximum: int | None
    address: str = "i32"
    imported: bool = False


@dataclass(frozen=True)
class Global:
    index: int
    kind: str
    mutable: bool
    initial: int | None
    """Bits of the value, or None if the module does not tell them."""
    imported: bool = False


@dataclass(frozen=True)
class Elements:
    index: int
    kind: str
    length: int


@dataclass(frozen=True)
class Import:
    """An import: a function, or an object of the runtime that `detail` describes."""

    name: str
    what: str
    detail: tuple[Any, ...] = ()
    namespace: str = "env"


@dataclass
class World:
    """Items that the code of one module may use."""

    rng: random.Random
    features: Features
    signatures: list[Signature] = field(default_factory=list)
    functions: list[int] = field(default_factory=list)
    imported_functions: int = 0
    memories: list[Memory] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    globals: list[Global] = field(default_factory=list)
    data: list[int] = field(default_factory=list)
    """Lengths of data segments."""
    elements: list[Elements] = field(default_factory=list)
    referable: list[int] = field(default_factory=list)
    """Functions with a reference outside of code, to which code may refer too."""
    tags: int = 0
    fuel: int | None = None
    grows: bool = True
    irreversible: bool = True
    """True if code changes tables and drops segments, which no reset in place could undo."""

    def inhabited(self, kind: str) -> list[Table]:
        """Return the tables of this kind with elements, and rarely the others."""
        return [t for t in self.tables if t.kind == kind and (t.minimum or self.rng.random() < 0.1)]

    def some_memory(self) -> Memory | None:
        """Return a memory for an access; rarely one without pages, where each access traps."""
        found = self.rng.choice(self.memories) if self.memories else None
        empty = found is not None and not found.minimum
        return None if empty and self.rng.random() < 0.8 else found

    def counters(self) -> list[Global]:
        """Return the integer globals that code may change to count its runs."""
        return [g for g in self.assignable() if g.kind in ("i32", "i64")]

    def assignable(self) -> list[Global]:
        return [g for g in self.globals if g.mutable and g.index != self.fuel]

    def constants(self, kind: str) -> list[Global]:
        """Return the globals that a constant expression of this type may name."""
        found = [g for g in self.globals if g.kind == kind and not g.mutable]
        return [g for g in found if g.imported or "extended_const" in self.features]
