"""A compiled guest on wasmtime: the types of its exports, and its imports, bound once for many instances."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from memslot_plugin._core import ffi, lib
from memslot_plugin.errors import ExportNotFound, LinkError, Unsupported, cause_of
from memslot_plugin.guest.plan import Plan
from memslot_plugin.hosts import runtime, wasi
from memslot_plugin.hosts.live import Binding, Imports
from memslot_plugin.hosts.wasi import Wasi
from memslot_plugin.hosts.wasmtime.bridge import (
    address_of,
    define,
    raised_in_wasmtime_py,
    wasmtime,
    wasmtime_ffi,
)
from memslot_plugin.hosts.wasmtime.errors import one_sentence
from memslot_plugin.hosts.wasmtime.globals import initial_globals
from memslot_plugin.hosts.wasmtime.store import Limits, identity_of
from memslot_plugin.hosts.wasmtime.values import (
    FUNCREF,
    KIND_NAMES,
    OTHER,
    V128,
    Maker,
    Name,
    Signature,
    checked_results,
    direct_call,
    host_function,
    indirect_call,
    kind_of,
)
from memslot_plugin.hosts.wasmtime.wasi import WAITS, Environment, Shim, provides
from memslot_plugin.settings import Settings
from memslot_plugin.wasm import Offsets

_NATIVE_KINDS: Mapping[type, str] = {
    wasmtime.Func: "func",
    wasmtime.Global: "global",
    wasmtime.Table: "table",
    wasmtime.Memory: "memory",
    wasmtime.SharedMemory: "memory",
    wasmtime.Tag: "tag",
}
"""wasmtime-py's objects that an import can be given, and the kind of import that each is."""

_TYPE_KINDS: Mapping[type, str] = {
    wasmtime.FuncType: "func",
    wasmtime.GlobalType: "global",
    wasmtime.TableType: "table",
    wasmtime.MemoryType: "memory",
    wasmtime.TagType: "tag",
}

_NAMES = ("func", "global", "table", "memory")
"""wasm_externkind_t; every higher number is a tag."""


class BoundImports:
    """A guest and its bound imports: everything that an instance is made of, but for its memories."""

    def __init__(
        self,
        compiled: Compiled,
        linker: wasmtime.Linker,
        environment: Environment | None,
        wasi: Wasi | None,
        kept: list[Any],
    ) -> None:
        self.compiled = compiled
        self.environment = environment
        self.wasi = wasi
        self.kept = kept
        """Objects that the linker calls.  They live as long as the live instances and the embedder's stores do."""
        own, limits = compiled.own, compiled.limits
        # The C structure below holds bare pointers: these attributes keep alive what they point to.
        self._prepared = linker.instantiate_pre(compiled.module)
        self._sizes = ffi.new("size_t[]", [memory.minimum_bytes for memory in own])
        self._capacities = ffi.new("size_t[]", [compiled.settings.reserved] * len(own))
        self.guest = ffi.new(
            "ms_wt_guest *",
            {
                "creator": compiled.creator,
                "engine": address_of(compiled.engine.ptr()),
                "prepared": address_of(self._prepared.ptr()),
                "count": len(own),
                "byte_sizes": self._sizes,
                "capacities": self._capacities,
                "most_bytes": limits.memory_size,
                "most_elements": limits.table_elements,
                "most_tables": limits.tables,
                "most_memories": limits.memories,
                "heap_first": bool(own) and own[0].minimum_bytes == 0,
            },
        )


class Compiled(runtime.Compiled):
    """A module compiled for one engine."""

    def __init__(
        self,
        engine: wasmtime.Engine,
        module: wasmtime.Module,
        plan: Plan,
        name: str,
        binding: Binding,
        *,
        settings: Settings,
        creator: Any,
    ) -> None:
        super().__init__(plan, name, binding)
        self.offsets: Offsets | None = None
        self.engine = engine
        self.settings = settings
        self.creator = creator
        """The ms_wt_creator of the host."""
        self.module = module
        self.default: BoundImports | None = None
        """The imports that the guest was prepared with, once they are bound."""
        self.elsewhere: Compiled | None = None
        """The guest compiled for the host's other engine, once an instance was wanted in a store of that one."""
        self.shim: Shim | None = None
        """The shim of a guest that imports one of `waits`."""
        self.own = [] if plan.native else [each for each in plan.memories if each.imported is None]
        """The memories that are in slots."""
        self.lease_index = {memory.index: place for place, memory in enumerate(self.own)}
        """The position among the leased memories, by memory index."""
        self._names: dict[str, Name] = {}
        self._makers: dict[str, Maker] = {}

    def serialise(self) -> bytes:
        """Return the code for another process."""
        return bytes(self.module.serialize())

    @functools.cached_property
    def limits(self) -> Limits:
        """The limits of a store for this guest."""
        settings, plan = self.settings, self.plan
        # Preparing the guest has counted its memories and tables, unless it did not understand the module.
        uncounted = plan.structure is None
        largest = settings.largest_native_memory
        if plan.native is None:
            largest = max(settings.largest_memory, settings.largest_heap)
        return Limits(
            memory_size=largest,
            table_elements=settings.table_limit,
            tables=settings.tables_per_instance if uncounted else -1,
            memories=1 if uncounted else -1,
        )

    @functools.cached_property
    def _exports(self) -> dict[str, wasmtime.ExportType]:
        reserved = {each.export_name for each in self.plan.saved_globals}
        return {
            export.name: export for export in self.module.exports if export.name not in reserved
        }

    @functools.cached_property
    def export_kinds(self) -> dict[str, str]:
        """Every export's kind by name."""
        kinds = {}
        for name, export in self._exports.items():
            kind: Any = wasmtime_ffi.wasm_externtype_kind(
                wasmtime_ffi.wasm_exporttype_type(export.ptr())
            )
            number = int(kind)  # the stubs name the C type
            kinds[name] = _NAMES[number] if number < len(_NAMES) else "tag"
        return kinds

    @functools.cached_property
    def opens(self) -> bool:
        """True if the guest imports a function that can give it another descriptor of WASI."""
        names = {each.name for each in self.module.imports if each.module in wasi.MODULES}
        return not names.isdisjoint(("path_open", "sock_accept"))

    @functools.cached_property
    def waits(self) -> list[str]:
        """The functions that the guest imports from WASI and that can wait past a deadline."""
        names = {each.name for each in self.module.imports if provides(each.module)}
        return [name for name in WAITS if name in names]

    @functools.cached_property
    def memory_type(self) -> wasmtime.MemoryType | None:
        """The type of the memory that WASI works on, which is exported as "memory"."""
        export = self._exports.get("memory")
        declared = None if export is None else export.type
        return declared if isinstance(declared, wasmtime.MemoryType) else None

    @functools.cached_property
    def initial_globals(self) -> Any:
        """The globals that a reset restores."""
        return initial_globals(self.plan, self.name)

    def name(self, text: str) -> Name:
        """Return the one object for this name."""
        found = self._names.get(text)
        return self._names.setdefault(text, Name(text)) if found is None else found

    def export_type(self, name: str, kind: str) -> Any:
        """Return the type of an export; raises ExportNotFound, which lists the exports of that kind."""
        export = self._exports.get(name)
        if export is None:
            there = sorted(each for each, what in self.export_kinds.items() if what == kind)
            raise ExportNotFound(
                f"the guest {self.guest_name} exports no {kind} {name!r}; it exports:"
                f" {', '.join(there[:20]) or 'none'}"
            )
        if self.export_kinds[name] != kind:
            raise ExportNotFound(
                f"the export {name!r} of the guest {self.guest_name} is a {self.export_kinds[name]}, not a {kind}"
            )
        return export.type

    def maker(self, name: str) -> Maker:
        """Return the maker of an exported function for one instance; raises ExportNotFound, Unsupported."""
        found = self._makers.get(name)
        if found is None:
            signature = Signature.of(self.export_type(name, "func"))
            kinds = (*signature.parameters, *signature.results)
            if OTHER in kinds or (V128 in kinds and not signature.direct):
                raise Unsupported(
                    f"{name!r} of the guest {self.guest_name} is {signature}, whose values wasmtime-py cannot pass;"
                    " wrap it in a function of numbers"
                )
            kind = direct_call if signature.direct else indirect_call
            found = kind(self.name(name), signature, f"{name} of the guest {self.guest_name}")
            self._makers[name] = found
        return found

    def global_kind(self, name: str) -> tuple[int, bool]:
        """Return the kind of an exported global, and true if it is mutable; raises ExportNotFound, Unsupported."""
        declared: wasmtime.GlobalType = self.export_type(name, "global")
        kind = kind_of(declared.content)
        if kind > FUNCREF:
            raise Unsupported(
                f"the global {name!r} of the guest {self.guest_name} holds {KIND_NAMES[kind]}"
            )
        return kind, declared.mutable

    def bind(self, binding: Binding) -> BoundImports:
        """Bind the imports; raises LinkError, which says what is missing or wrong."""
        linker = wasmtime.Linker(self.engine)
        kept: list[Any] = []
        uses_wasi = False
        imports = {(each.module, each.name or ""): each.type for each in self.module.imports}
        for (module, name), wanted in imports.items():
            if binding.imports.get(module) is not None or module not in wasi.MODULES:
                kept.append(_Import(self, binding, module, name, wanted).define(linker))
            elif not provides(module):
                raise LinkError(
                    f"the guest {self.guest_name} imports {module}, an older WASI than wasmtime has;"
                    " build it for wasi_snapshot_preview1, or give the import yourself"
                )
            else:
                uses_wasi = True
        try:
            if uses_wasi:
                linker.define_wasi()
                for name in self.waits:
                    assert self.shim is not None
                    kept.append(self.shim)
                    self.shim.stand_before(linker, name, foreign=binding.store is not None)
            environment = Environment(binding.wasi or Wasi()) if uses_wasi else None
            return BoundImports(self, linker, environment, binding.wasi, kept)
        except wasmtime.WasmtimeError as error:
            said = one_sentence(str(error)).replace("`", "").replace("::", ".")
            raise LinkError(f"the guest {self.guest_name} cannot be linked: {said}") from cause_of(
                error
            )


class _Import:
    """One import of a guest, and what it was given."""

    def __init__(
        self, compiled: Compiled, binding: Binding, module: str, name: str, wanted: Any
    ) -> None:
        self.compiled, self.store = compiled, binding.store
        self.module, self.name, self.wanted = module, name, wanted
        self.kind = _TYPE_KINDS.get(type(wanted), "tag")
        try:
            self.given = binding.imports[module][name]
        except KeyError:
            raise self.refusal(
                f"no such import was given{_nearest(binding.imports, module)}"
            ) from None

    def refusal(self, why: str) -> LinkError:
        """Return the exception for this import."""
        wanted = _described(self.kind, self.wanted)
        return LinkError(
            f"the guest {self.compiled.guest_name} imports {self.module}.{self.name}, a {wanted}, and {why}"
        )

    def define(self, linker: wasmtime.Linker) -> Any:
        """Put what was given into the linker, and return the object that has to be kept for it; raises LinkError."""
        given, store = self.given, self.store
        native = next((kind for each, kind in _NATIVE_KINDS.items() if isinstance(given, each)), "")
        if not native:
            if self.kind != "func" or not callable(given):
                raise self.refusal(f"{given!r} was given")
            return self._define_function(linker)
        if native != self.kind:
            raise self.refusal(f"a {native} was given")
        # wasmtime ends the process if it meets an object of another store.
        if isinstance(given, wasmtime.SharedMemory):
            given = _Shared(given)
        elif store is None:
            raise self.refusal(
                f"a {type(given).__name__} of wasmtime's was given, which belongs to a store:"
                " pass that one to instantiate(store=...)"
            )
        elif identity_of(given) != store.identity:
            raise self.refusal(
                f"the {type(given).__name__} that was given belongs to another store than the one that was passed to"
                " instantiate(store=...)"
            )
        try:
            linker.define(
                store or wasmtime.Store(self.compiled.engine), self.module, self.name, given
            )
        except ValueError:
            raise self.refusal(f"the {native} that was given is closed") from None
        except wasmtime.WasmtimeError as error:
            raise self.refusal(
                f"what was given is refused: {one_sentence(str(error))}"
            ) from cause_of(error)
        return given

    def _define_function(self, linker: wasmtime.Linker) -> Callable[..., Any]:
        module, name, wanted, function = self.module, self.name, self.wanted, self.given
        foreign = self.store is not None
        signature = Signature.of(wanted)
        label = f"the host function {module}.{name}"
        try:
            if signature.direct:
                direct = host_function(signature, function, label)
                define(linker, module, name, wanted, direct, foreign=foreign)
                return direct
            kinds = (*signature.parameters, *signature.results)
            if OTHER in kinds or V128 in kinds:
                raise LinkError(
                    f"the guest {self.compiled.guest_name} imports {module}.{name}, a func {signature}, whose values"
                    " wasmtime-py cannot pass"
                )
            # wasmtime-py passes references.  The check comes first, because it ends the process for other values.
            watched = _watched(signature, function, label)
            linker.define_func(
                module, name, wanted, _weakly(watched, foreign=foreign), access_caller=True
            )
        except wasmtime.WasmtimeError as error:
            raise LinkError(f"{label} is refused: {one_sentence(str(error))}") from cause_of(error)
        return watched


class _Shared(wasmtime.SharedMemory):
    """A shared memory as an import.  wasmtime-py's own description of it has one pointer too many."""

    def __init__(self, given: wasmtime.SharedMemory) -> None:
        self._given = given

    def _as_extern(self) -> Any:
        union = wasmtime_ffi.wasmtime_extern_union(sharedmemory=self._given.ptr())
        return wasmtime_ffi.wasmtime_extern_t(wasmtime_ffi.WASMTIME_EXTERN_SHAREDMEMORY, union)


def _watched(signature: Signature, function: Callable[..., Any], label: str) -> Callable[..., Any]:
    """Return `function`, whose exceptions the innermost entry raises; else wasmtime-py's next call would."""

    @functools.wraps(function)
    def watched(*arguments: Any) -> Any:
        try:
            result = function(*arguments)
            values = checked_results(signature.results, result, f"what {label} returned")
            if len(values) > 1:
                return values
            return values[0] if values else None
        # Catch every kind: the exception has to come out of the call that the embedder made, and out of no other.
        except BaseException as error:
            raised_in_wasmtime_py(error)
            raise

    return watched


def _weakly(function: Callable[..., Any], *, foreign: bool) -> Callable[..., Any]:
    """Return `function` for wasmtime-py, which keeps it in a table that the garbage collector does not see.

    `foreign` is true for a store of the embedder's own.
    """
    found = weakref.ref(function)

    def call(caller: wasmtime.Caller, *arguments: Any) -> Any:
        held: Any = found()  # alive, because `BoundImports.kept` has it (see `FUNCTIONS`)
        kept = ffi.new("uintptr_t *")
        try:
            if not foreign:
                lib.ms_wt_keep_open(address_of(caller._context()), kept)
            return held(*arguments)
        finally:
            lib.ms_wt_let_close(kept)

    return call


def _described(kind: str, wanted: Any) -> str:
    if isinstance(wanted, wasmtime.FuncType):
        return f"func {Signature.of(wanted)}"
    if isinstance(wanted, wasmtime.GlobalType):
        return f"{'mutable ' * wanted.mutable}global {KIND_NAMES[kind_of(wanted.content)]}"
    if isinstance(wanted, wasmtime.MemoryType):
        return f"memory of at least {wanted.limits.min} pages"
    return kind


def _nearest(imports: Imports, module: str) -> str:
    """Return what was given instead, to follow a complaint."""
    if not imports:
        return ""
    if module in imports:
        return f"; {module} has: {', '.join(sorted(imports[module])) or 'nothing'}"
    return f"; given are the modules: {', '.join(sorted(imports))}"
