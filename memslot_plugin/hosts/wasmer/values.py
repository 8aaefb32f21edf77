"""The types, values and memories of wasmer-python 1.1.0."""

from __future__ import annotations

import errno
import functools
import os
from typing import Any

import wasmer
from wasmer_compiler_cranelift import Compiler

from memslot_plugin._core import ffi
from memslot_plugin._core.limits import system_call_error
from memslot_plugin._core.proc import mappings
from memslot_plugin.errors import HostUnavailable, Unsupported, shown
from memslot_plugin.hosts.live import Living
from memslot_plugin.hosts.wasmer.errors import Boundary, at_compile

WASM32_BYTES = 1 << 32
"""Bytes that a 32-bit address reaches."""

_LARGEST_MAPPING = WASM32_BYTES + (1 << 31)
"""Bytes that wasmer maps for a memory at most: what 32 bits reach, and a guard region (its BaseTunables)."""

_REFERENCES = frozenset((int(wasmer.Type.EXTERN_REF), int(wasmer.Type.FUNC_REF)))
"""Types whose values wasmer-python cannot hand to Python: it panics."""

_INTEGERS = {
    int(wasmer.Type.I32): (-(1 << 31), 1 << 32),
    int(wasmer.Type.I64): (-(1 << 63), 1 << 64),
    int(wasmer.Type.V128): (0, 1 << 128),
}
"""Integers that wasmer takes for each type: from, and up to but not including."""

_TYPES = {
    "func": wasmer.FunctionType,
    "memory": wasmer.MemoryType,
    "global": wasmer.GlobalType,
    "table": wasmer.TableType,
}

EXTERNS = {
    "func": wasmer.Function,
    "memory": wasmer.Memory,
    "global": wasmer.Global,
    "table": wasmer.Table,
}
"""The class of an import, by kind."""

_NOT_BY_ATTRIBUTE = frozenset(dir(wasmer.Exports))
"""Names of exports that are found by iteration only: Python has an attribute of the same name."""


@functools.cache
def _compiling_process() -> int:
    """Return the process that has the compiler's threads, which is the first that compiled."""
    return os.getpid()


def compiled(store: Any, source: str | bytes, name: str, hint: str | None = None) -> Any:
    """Return wasmer's module for a binary module or text; raises what `at_compile` maps, and Unsupported.

    A child of the process that has the compiler's threads has none of them, and would wait for them forever.
    """
    if _compiling_process() != os.getpid():
        raise Unsupported(
            "wasmer compiles with threads that stayed behind in the process that this one was forked from;"
            " prepare guests before the fork, or start processes with spawn or forkserver"
        )
    with Boundary(at_compile, name, hint):
        return wasmer.Module(store, source)


def new_store() -> Any:
    """Return a store with an engine of its own."""
    return wasmer.Store(wasmer.engine.Universal(Compiler))


def kind_of(type_: Any) -> str:
    """Return the kind of an import or export by its type."""
    return next(kind for kind, class_ in _TYPES.items() if isinstance(type_, class_))


def passes_references(type_: Any) -> bool:
    """Return True if guests can pass references to each other by an import or export of this type."""
    kind = kind_of(type_)
    if kind == "func":
        return not _REFERENCES.isdisjoint(map(int, (*type_.params, *type_.results)))
    return kind == "table" or (kind == "global" and int(type_.type) in _REFERENCES)


def described(type_: Any) -> str:
    """Return an import's type in a person's words."""
    kind = kind_of(type_)
    if kind != "func":
        return kind
    parameters, results = (
        ", ".join(wasmer.Type(int(each)).name.lower() for each in side)
        for side in (type_.params, type_.results)
    )
    return f"func ({parameters}) -> ({results})"


def misfit(arguments: tuple[Any, ...], parameters: tuple[int, ...]) -> str | None:
    """Return the sentence about the first argument that wasmer does not take, or None if it takes all."""
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
    """Return one of wasmer's exports by its name, which exists."""
    if name in _NOT_BY_ATTRIBUTE:
        return dict(iter(exports))[name]
    return getattr(exports, name)


def address_of(memory: Any) -> int:
    """Return the address of a memory; an empty one has an address, too."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(memory.buffer)))


class Owner:
    """The owner of a slot's mapping: wasmer's Memory, which unmaps it when its last reference goes.

    `users` are the living objects whose `drop_memory()` drops another reference to it.
    """

    __slots__ = ("memory", "namespace", "users")

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.namespace = {"memory": memory}
        self.users: Living[Any] = Living()

    def forget(self) -> None:
        """Drop the memory, so that wasmer unmaps it."""
        # A slot here is never covered or unmapped by memslot: wasmer unmaps the range once more when the memory goes,
        # and with it whatever another thread has mapped there since.
        for user in self.users.listed():
            user.drop_memory()
        self.namespace.clear()
        self.memory = None


@functools.cache
def reserved_bytes() -> int:
    """Return the address space that wasmer maps for a memory, measured on one.

    Raises SystemCallError if wasmer cannot map one, and HostUnavailable if it moves memories that grow: a slot cannot
    move.
    """
    try:
        memory = wasmer.Memory(new_store(), wasmer.MemoryType(1, 2, False))
    except RuntimeError as error:
        raise system_call_error(errno.ENOMEM, f"mapping a memory in wasmer: {error}") from error
    base = end = address_of(memory)
    # Stop at the largest mapping: other threads map and unmap neighbours behind it, which a slot must not touch.
    for mapping in mappings(base, base + _LARGEST_MAPPING):
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
