"""What a generated module has, as the parts that write it tell each other."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

Signature = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Features:
    """What a runtime may be given beyond WebAssembly 2.0, and what of that it lacks."""

    multi_memory: bool = False
    memory64: bool = False
    threads: bool = False
    table64: bool = False
    extended_const: bool = False
    filled_tables: bool = False
    tail_calls: bool = False
    exceptions: bool = False
    externref_tables: bool = True
    bound_tables: bool = False
    """Whether a table can be made outside of a module, to be imported."""


FEATURES = {
    "wasmtime": Features(
        multi_memory=True,
        memory64=True,
        threads=True,
        table64=True,
        extended_const=True,
        filled_tables=True,
        tail_calls=True,
        exceptions=True,
        bound_tables=True,
    ),
    "wasmer": Features(externref_tables=False),
}
"""By host: what it compiles as it comes."""


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
    """Its bits; None where they are not known from the module."""
    imported: bool = False


@dataclass(frozen=True)
class Data:
    """A segment; `place` is the offset of an active one, as far as the module alone tells it."""

    length: int
    memory: int | None = None
    place: int | None = None
    content: bytes = b""


@dataclass(frozen=True)
class Elements:
    index: int
    kind: str
    length: int


@dataclass(frozen=True)
class Import:
    """What has to be given: a function, or an object of the runtime's own, described by `detail`."""

    name: str
    what: str
    detail: tuple[Any, ...] = ()


@dataclass
class World:
    """What the code of one module may use."""

    rng: random.Random
    features: Features
    signatures: list[Signature] = field(default_factory=list)
    functions: list[int] = field(default_factory=list)
    imported_functions: int = 0
    memories: list[Memory] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    globals: list[Global] = field(default_factory=list)
    data: list[Data] = field(default_factory=list)
    elements: list[Elements] = field(default_factory=list)
    referable: list[int] = field(default_factory=list)
    """Functions that something outside of code refers to, so that code may."""
    tags: int = 0
    fuel: int | None = None
    grows: bool = True
    irreversible: bool = True
    """Whether code changes tables and drops segments, which no reset in place could undo."""

    def inhabited(self, kind: str) -> list[Table]:
        """Tables of this kind that have elements, and rarely the others."""
        return [t for t in self.tables if t.kind == kind and (t.minimum or self.rng.random() < 0.1)]

    def some_memory(self) -> int | None:
        return self.rng.randrange(len(self.memories)) if self.memories else None
