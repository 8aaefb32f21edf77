"""What wasmer-python 1.1.0 is like: its types, its values, its memories.

Importing this module is importing wasmer, so it raises HostUnavailable where that is not possible.
"""

from __future__ import annotations

import errno
import functools
import os
import weakref
from typing import TYPE_CHECKING, Any

from memslot_plugin._core import ffi
from memslot_plugin._core.limits import system_call_error
from memslot_plugin._core.proc import mappings
from memslot_plugin.errors import HostUnavailable, Unsupported, shown

try:
    import wasmer
    from wasmer_compiler_cranelift import Compiler
except ImportError as missing:
    raise HostUnavailable(
        f"wasmer cannot be imported ({missing}); wasmer-python 1.1.0 exists for CPython 3.7 to 3.10:"
        " install memslot[wasmer] there, or use the host wasmtime"
    ) from missing

if TYPE_CHECKING:
    from memslot_plugin.hosts.wasmer.link import Compiled

__all__ = [
    "EXTERNS",
    "REFERENCES",
    "WASM32_BYTES",
    "Owner",
    "Signature",
    "address_of",
    "described",
    "export_of",
    "kind_of",
    "misfit",
    "new_store",
    "passes_references",
    "require_compiler",
    "reserved_bytes",
    "wasmer",
]

WASM32_BYTES = 1 << 32
"""What a 32-bit address reaches."""

LARGEST_BYTES = WASM32_BYTES + (1 << 31)
"""The most that wasmer maps for a memory: all that 32 bits reach, and a guard behind it (its BaseTunables)."""

REFERENCES = frozenset((int(wasmer.Type.EXTERN_REF), int(wasmer.Type.FUNC_REF)))
"""Types whose values wasmer-python cannot hand to Python: it panics."""

_INTEGERS = {
    int(wasmer.Type.I32): (-(1 << 31), 1 << 32),
    int(wasmer.Type.I64): (-(1 << 63), 1 << 64),
    int(wasmer.Type.V128): (0, 1 << 128),
}
"""The integers that wasmer takes for each type: from, and up to but not including."""

_KINDS = (
    (wasmer.FunctionType, "func"),
    (wasmer.MemoryType, "memory"),
    (wasmer.GlobalType, "global"),
    (wasmer.TableType, "table"),
)

EXTERNS = {
    "func": wasmer.Function,
    "memory": wasmer.Memory,
    "global": wasmer.Global,
    "table": wasmer.Table,
}
"""The class of what can be imported, by kind."""

_NOT_BY_ATTRIBUTE = frozenset(dir(wasmer.Exports))
"""Exports of these names are found by iteration only: Python has an attribute of that name."""


_compiling: list[int] = []
"""The process that has the compiler's threads, once there are any."""


def require_compiler() -> None:
    """Raise Unsupported in a child of the process that has the compiler's threads: it would wait for them forever."""
    process = os.getpid()
    if not _compiling:
        _compiling.append(process)
    if _compiling != [process]:
        raise Unsupported(
            "wasmer compiles with threads that stayed behind in the process that this one was forked from;"
            " prepare guests before the fork, or start processes with spawn or forkserver"
        )


def new_store() -> Any:
    """A store with an engine of its own."""
    return wasmer.Store(wasmer.engine.Universal(Compiler))


def kind_of(type_: Any) -> str:
    """The kind of an import or export by its type."""
    return next(kind for class_, kind in _KINDS if isinstance(type_, class_))


class Signature:
    """What a function takes and returns, as wasmer's numbers for types.

    `several` says that it returns more than one value, `refers` that references are among them all.
    """

    __slots__ = ("arity", "parameters", "refers", "results", "several")

    def __init__(self, type_: Any) -> None:
        self.parameters = tuple(map(int, type_.params))
        self.results = tuple(map(int, type_.results))
        self.arity = len(self.parameters)
        self.several = len(self.results) > 1
        self.refers = not REFERENCES.isdisjoint((*self.parameters, *self.results))


def passes_references(type_: Any) -> bool:
    """True for an import or export by whose type guests can pass references to each other."""
    kind = kind_of(type_)
    if kind == "func":
        return Signature(type_).refers
    return kind == "table" or (kind == "global" and int(type_.type) in REFERENCES)


def described(type_: Any) -> str:
    """An import's type as a person reads it."""
    kind = kind_of(type_)
    if kind != "func":
        return kind
    signature = Signature(type_)
    parameters, results = (
        ", ".join(wasmer.Type(number).name.lower() for number in side)
        for side in (signature.parameters, signature.results)
    )
    return f"func ({parameters}) -> ({results})"


def misfit(arguments: tuple[Any, ...], parameters: tuple[int, ...]) -> str | None:
    """Which of these arguments wasmer does not take; None if it complained about something else."""
    for place, (value, type_) in enumerate(zip(arguments, parameters, strict=True), start=1):
        bounds, name = _INTEGERS.get(type_), wasmer.Type(type_).name.lower()
        if bounds is None:
            if not isinstance(value, float):
                return f"value {place} is an {name}, and {shown(value)} is no float"
        elif not isinstance(value, int):
            return f"value {place} is an {name}, and {value!r} is no integer"
        elif not bounds[0] <= value < bounds[1]:
            return f"value {place} is an {name}, and {shown(value)} is not in {bounds[0]} to {bounds[1] - 1}"
    return None


def export_of(exports: Any, name: str) -> Any:
    """One of wasmer's exports by its name, which has to be one of theirs."""
    if name in _NOT_BY_ATTRIBUTE:
        return dict(iter(exports))[name]
    return getattr(exports, name)


def address_of(memory: Any) -> int:
    """Where a memory begins; wasmer knows that of an empty one, too."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(memory.buffer)))


class Owner:
    """The owner of a mapping: wasmer's memory, without which it is unmapped.

    `holders` are the guests whose prepared imports have the memory in them.
    """

    __slots__ = ("holders", "memory", "namespace")

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.namespace = {"memory": memory}
        self.holders: set[weakref.ref[Compiled]] = set()

    def forget(self) -> None:
        """Drop the memory; wasmer unmaps it."""
        for holder in self.holders:
            compiled = holder()
            if compiled is not None:
                compiled.let_go()
        self.holders.clear()
        self.namespace.clear()
        self.memory = None


@functools.cache
def reserved_bytes() -> int:
    """How much address space wasmer maps for a memory: one is made, and looked at.

    Raises SystemCallError where it cannot, and HostUnavailable if it moves memories that grow: a slot
    cannot.
    """
    try:
        memory = wasmer.Memory(new_store(), wasmer.MemoryType(1, 2, False))
    except RuntimeError as error:
        raise system_call_error(errno.ENOMEM, f"mapping a memory in wasmer: {error}") from error
    base = end = address_of(memory)
    # Behind it may be a neighbour, which other threads map and unmap meanwhile: that is not this memory's to cover.
    for mapping in mappings(base, base + LARGEST_BYTES):
        if mapping.start != end:
            break
        end = mapping.end
    memory.grow(1)
    if address_of(memory) != base or end - base < WASM32_BYTES:
        raise HostUnavailable(
            f"this wasmer reserves {end - base} bytes for a memory and moves it when it grows;"
            " memslot needs a build that reserves all that 32 bits reach"
        )
    return end - base
