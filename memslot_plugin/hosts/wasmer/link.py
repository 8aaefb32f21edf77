"""The code of a guest on wasmer, and the imports of its instances.

Host functions are made once per guest.  So is the import object of the instances that get the guest's own imports: only
the memory in it changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import wasmer

from memslot_plugin.errors import ExportNotFound, LinkError, MemslotError, Unsupported
from memslot_plugin.guest.analysis import Instruction
from memslot_plugin.guest.plan import Plan, offsets
from memslot_plugin.hosts import runtime
from memslot_plugin.hosts.live import Binding
from memslot_plugin.hosts.wasi import Wasi
from memslot_plugin.hosts.wasmer.errors import Boundary, at_compile
from memslot_plugin.hosts.wasmer.state import SavedGlobals
from memslot_plugin.hosts.wasmer.values import (
    EXTERNS,
    Owner,
    compiled,
    described,
    kind_of,
    new_store,
    passes_references,
)
from memslot_plugin.hosts.wasmer.wasi import VERSIONS, Shims, Streams, environment
from memslot_plugin.wasm import Offsets
from memslot_plugin.wasm.names import without_long_names

Namespaces = dict[str, dict[str, Any]]
"""Import module -> import name -> an object of wasmer's."""

LONGEST_NAME = 256
"""Bytes of a function's name; wasmer repeats it for each of half a million frames in a stack of 8 MiB."""


@dataclass(frozen=True, slots=True, eq=False)
class Code:
    """The compiled module of a guest and of its snapshots, and what depends on its store alone."""

    store: Any
    module: Any
    offsets: Offsets | None
    shims: Shims

    @classmethod
    def compile(cls, host_store: Any, plan: Plan, name: str) -> Code:
        """Compile a plan's module; raises InvalidModule, SystemCallError, Unsupported."""
        module = plan.module
        if plan.structure is not None:
            module = without_long_names(module, LONGEST_NAME)
        try:
            # In a store that is thrown away: after a panic, for a tag for example, its engine never compiles again.
            code = compiled(new_store(), module, name, plan.native).serialize()
        except MemslotError:
            if plan.module is not plan.source:
                # Fails with the offsets of the module that the embedder gave.
                compiled(new_store(), plan.source, name, plan.native)
            raise
        return cls.load(host_store, plan, name, code)

    @classmethod
    def load(cls, host_store: Any, plan: Plan, name: str, code: bytes) -> Code:
        """Load what wasmer serialised; raises InvalidModule, SystemCallError."""
        # wasmer unmaps code only when its store goes, so each guest has one.
        store = new_store()
        with Boundary(at_compile, name):
            module = wasmer.Module.deserialize(store, code)
            if any(passes_references(each.type) for each in (*module.imports, *module.exports)):
                # call_indirect compares numbers of types, and each store numbers its own: guests that can share a
                # table share the host's store, otherwise a call of the wrong type runs.
                store = host_store
                module = wasmer.Module.deserialize(store, code)
        return cls(store, module, offsets(plan), Shims(store))


class BoundImports:
    """The imports that an instance is linked with.

    A wasmer instance keeps none of its imports alive, not even the memory: once one is gone it traps, reads other bytes
    or crashes (wasmer 1.1.0).  So the owner of an instance keeps this object as long as the instance.
    """

    __slots__ = (
        "__weakref__",
        "_kept",
        "_memory_module",
        "imports",
        "owner",
        "serves_again",
        "streams",
    )

    def __init__(
        self,
        namespaces: Namespaces,
        kept: object,
        memory_module: str | None,
        streams: Streams | None = None,
    ) -> None:
        """Keep the objects of `namespaces`, and `kept`; `memory_module` is the import module of the slot's memory."""
        self.owner: Owner | None = None
        self.serves_again = False
        """True if `Compiled.prepared` is the place of these imports once an instance has started with them."""
        self.imports = wasmer.ImportObject()
        for module, namespace in namespaces.items():
            self.imports.register(module, namespace)
        self.streams = streams
        self._kept = namespaces, kept
        self._memory_module = memory_module

    def use(self, owner: Owner) -> None:
        """Import the memory of `owner` from now on."""
        before, self.owner = self.owner, None
        if before is not None:
            before.users.discard(self)
        # Noted last: after an exception in between, an instance over the old memory would import this one.
        owner.users.add(self)
        self.imports.register(self._memory_module, owner.namespace)
        self.owner = owner

    def drop_memory(self) -> None:
        """Drop the memory, so that it can be unmapped."""
        self.owner = None
        self.imports.register(self._memory_module, {})


class Compiled(runtime.Compiled):
    """A guest's code, and the types and imports that all of its instances share.

    `kinds` are the kinds of its exports by name.
    `calls_out` is true if a host function can run within its calls, `may_grow` if its memory can grow there.
    """

    def __init__(self, code: Code, plan: Plan, name: str, binding: Binding) -> None:
        super().__init__(plan, name, binding)
        self.code = code
        self.module = code.module
        self.saved = SavedGlobals(plan, name)
        self._signatures: dict[str, tuple[tuple[int, ...], bool]] = {}
        reserved = {each.export_name for each in plan.saved_globals}
        self._types = {
            export.name: export.type
            for export in self.module.exports
            if export.name not in reserved
        }
        self.kinds = {name: kind_of(type_) for name, type_ in self._types.items()}
        self._referring = {name for name, type_ in self._types.items() if passes_references(type_)}
        self._memory_module = None if plan.import_name is None else plan.import_name.module
        self._imports = [
            (item.module, item.name, item.type)
            for item in self.module.imports
            if plan.import_name is None or (item.module, item.name) != plan.import_name
        ]
        self._wasi: dict[str, list[str]] = {}
        """The names that the guest imports from WASI, by module."""
        for module, item, _ in self._imports:
            if module in VERSIONS:
                self._wasi.setdefault(module, []).append(item)
        self.calls_out = any(kind_of(type_) == "func" for _, _, type_ in self._imports)
        report = plan.code
        self.may_grow = (
            self.calls_out
            or report is None
            or report.not_understood is not None
            or report.occurrence(Instruction.MEMORY_GROW) is not None
        )
        self.prepared: BoundImports | None = None
        """The imports of every instance that gets the guest's own, and no WASI; None while one starts with them."""
        self._given: tuple[Namespaces, list[_HostFunction]] | None = None
        """The guest's own imports for every instance that gets WASI beside them."""

    def serialise(self) -> bytes:
        """Return the code for another process."""
        return bytes(self.module.serialize())

    def export_type(self, name: str, kind: str) -> Any:
        """Return the type of an export; raises ExportNotFound, and Unsupported for references."""
        found = self.kinds.get(name)
        if found != kind:
            what = "nothing of that name" if found is None else f"a {found} of that name"
            raise ExportNotFound(f"{self.guest_name} has no {kind} {name!r}: it exports {what}")
        if name in self._referring:
            raise Unsupported(
                f"the export {name} of {self.guest_name} passes references, which wasmer-python cannot hand to Python"
            )
        return self._types[name]

    def signature(self, name: str) -> tuple[tuple[int, ...], bool]:
        """Return wasmer's numbers for a function's parameters, and True if it has several results; raises as
        `export_type`.
        """
        found = self._signatures.get(name)
        if found is None:
            type_ = self.export_type(name, "func")
            found = tuple(map(int, type_.params)), len(type_.results) > 1
            self._signatures[name] = found
        return found

    def bind(self, binding: Binding, owner: Owner | None) -> BoundImports:
        """Return the imports of an instance over the memory of `owner`, or over none of memslot's.

        Raises LinkError for an import that is missing or of another kind, SettingError, Unsupported.
        """
        bound = None
        if binding is self.binding:
            # In one step: what a signal's handler or a finalizer starts meanwhile would import this owner's memory.
            bound, self.prepared = self.prepared, None
        if bound is None:
            # Without Wasi(...) a guest gets nothing to read, and its output is discarded, as on wasmtime.
            if self._wasi and (
                binding.wasi is not None or any(each not in binding.imports for each in self._wasi)
            ):
                bound = self._bind_wasi(binding.imports, binding.wasi or Wasi(), owner)
            else:
                given, kept = self._link(binding.imports, wasi=False)
                bound = BoundImports(given, kept, self._memory_module)
                bound.serves_again = binding is self.binding
        if owner is not None and owner is not bound.owner:
            bound.use(owner)
        return bound

    def _bind_wasi(
        self, imports: Mapping[str, Mapping[str, Any]], wasi: Wasi, owner: Owner | None
    ) -> BoundImports:
        """Return imports with an environment of their own; those of the embedder come before its functions."""
        if self.kinds.get("memory") != "memory":
            raise LinkError(
                f"{self.guest_name} imports WASI, which works on an exported memory of the name"
                " 'memory', and it exports none"
            )
        if imports is not self.binding.imports:
            given, functions = self._link(imports, wasi=True)
        else:
            if self._given is None:
                self._given = self._link(imports, wasi=True)
            given, functions = dict(self._given[0]), self._given[1]
        memory = self._imported_memory(given) if owner is None else owner.memory
        store, made = self.code.store, environment(wasi)
        streams = Streams(wasi, memory, wasmer.Global(store, wasmer.Value.i32(0), mutable=True))
        shims: list[object] = []
        for module, names in self._wasi.items():
            offered = made.generate_imports(store, VERSIONS[module])[module]
            own = given.get(module, {})
            served = {name: offered[name] for name in names if name in offered and name not in own}
            shimmed, shim = self.code.shims.before(module, served, streams, memory, wasi)
            given[module] = {**served, **shimmed, **own}
            shims.append(shim)
        return BoundImports(given, (functions, made, shims), self._memory_module, streams)

    def _link(
        self, imports: Mapping[str, Mapping[str, Any]], *, wasi: bool
    ) -> tuple[Namespaces, list[_HostFunction]]:
        """Return wasmer's objects for the embedder's imports, and the host functions that they need to live.

        With `wasi`, functions of WASI may be missing.
        """
        namespaces: Namespaces = {}
        functions: list[_HostFunction] = []
        for module, name, type_ in self._imports:
            kind, given = kind_of(type_), None
            if module not in self._wasi or module in imports:
                with suppress(KeyError):  # A mapping may make an import when it is asked for.
                    given = imports[module][name]
            if given is None:
                if module in self._wasi and wasi:
                    continue
                hint = "; give the guest wasi=Wasi(...)" if module in self._wasi else ""
                raise self._wrong(module, name, type_, f"nothing was given for it{hint}")
            if not isinstance(given, EXTERNS[kind]):
                if kind != "func" or not callable(given):
                    raise self._wrong(module, name, type_, f"{given!r} was given for it")
                functions.append(function := _HostFunction(given))
                called = _weakly(function, several=len(type_.results) > 1)
                given = wasmer.Function(self.code.store, called, type_)
            namespaces.setdefault(module, {})[name] = given
        return namespaces, functions

    def _wrong(self, module: str, name: str, type_: Any, what: str) -> LinkError:
        return LinkError(
            f"{self.guest_name} imports {module}.{name}, a {described(type_)}, and {what}"
        )

    def _imported_memory(self, given: Namespaces) -> Any:
        """Return the memory that the guest imports by its own choice, for WASI to work on."""
        for module, name, type_ in self._imports:
            if kind_of(type_) == "memory":
                return given[module][name]
        raise Unsupported(
            f"{self.guest_name} is left to wasmer alone, and WASI is possible only for a guest whose"
            " memory is ours or imported; memslot inspect says why"
        )


class _HostFunction:
    """A host function of the embedder's, which can be referred to weakly."""

    __slots__ = ("__weakref__", "call")

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


def _weakly(function: _HostFunction, *, several: bool) -> Callable[..., Any]:
    """Return `function` for wasmer, which hides its references from the garbage collector: a host function may know its
    instance, and the cycle would never be collected.

    The Python frame around the call tells the function's exceptions from wasmer's.  wasmer takes several results as a
    tuple only, and here they may be a list.
    """
    found = weakref.ref(function)

    def call(*arguments: Any) -> Any:
        function: Any = found()  # It lives as long as the imports of the calling instance.
        result = function.call(*arguments)
        return tuple(result) if several and isinstance(result, list) else result

    return call
