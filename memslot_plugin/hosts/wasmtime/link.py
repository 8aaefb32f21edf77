"""A compiled guest on wasmtime: the types of its exports, and its imports bound once for all instances."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from memslot_plugin._core import ffi, lib
from memslot_plugin.errors import ExportNotFound, LinkError, Unsupported, cause_of
from memslot_plugin.guest.plan import Plan
from memslot_plugin.hosts import wasi
from memslot_plugin.hosts.lazy import Lazy
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
from memslot_plugin.hosts.wasmtime.store import Limits, identity_of
from memslot_plugin.hosts.wasmtime.values import (
    FUNCREF,
    KIND_NAMES,
    OTHER,
    V128,
    Name,
    Signature,
    checked_result,
    host_function,
    kind_of,
)
from memslot_plugin.hosts.wasmtime.wasi import WAITS, Environment, Shim, provides
from memslot_plugin.settings import Settings
from memslot_plugin.wasm import Offsets

NATIVE_KINDS: Mapping[type, str] = {
    wasmtime.Func: "func",
    wasmtime.Global: "global",
    wasmtime.Table: "table",
    wasmtime.Memory: "memory",
    wasmtime.SharedMemory: "memory",
    wasmtime.Tag: "tag",
}
"""The runtime's own objects that an import can be given, and the kind of import that each is."""

_TYPE_KINDS: Mapping[type, str] = {
    wasmtime.FuncType: "func",
    wasmtime.GlobalType: "global",
    wasmtime.TableType: "table",
    wasmtime.MemoryType: "memory",
    wasmtime.TagType: "tag",
}

_NAMES = ("func", "global", "table", "memory")
"""wasm_externkind_t; what comes after is a tag."""


class Link:
    """A guest bound to imports: what its instances are made of."""

    def __init__(
        self,
        compiled: Compiled,
        linker: wasmtime.Linker,
        creator: Any,
        environment: Environment | None,
        wasi: Wasi | None,
        *,
        kept: list[Any],
    ) -> None:
        """`kept` is what the linker needs, which belongs to its users: live instances, and
        stores of the embedder's.
        """
        self.kept = kept
        self.compiled = compiled
        self.environment = environment
        self.wasi = wasi
        self._prepared = linker.instantiate_pre(compiled.module)
        plan = compiled.plan
        own = [] if plan.native else [memory for memory in plan.memories if memory.imported is None]
        self._sizes = ffi.new("size_t[]", [memory.minimum_bytes for memory in own])
        self._capacities = ffi.new("size_t[]", [compiled.settings.reserved] * len(own))
        self.guest = ffi.new("ms_wt_guest *")
        self.guest.creator = creator
        self.guest.engine = address_of(compiled.engine.ptr())
        self.guest.prepared = address_of(self._prepared.ptr())
        self.guest.count = len(own)
        self.guest.byte_sizes = self._sizes
        self.guest.capacities = self._capacities
        limits = compiled.limits
        self.guest.most_bytes, self.guest.most_elements = limits.memory_size, limits.table_elements
        self.guest.most_tables, self.guest.most_memories = limits.tables, limits.memories
        self.guest.heap_first = bool(own) and own[0].minimum_bytes == 0


class Compiled:
    """A module compiled for one engine."""

    def __init__(
        self,
        engine: wasmtime.Engine,
        module: wasmtime.Module,
        plan: Plan,
        name: str,
        settings: Settings,
    ) -> None:
        self.offsets: Offsets | None = None
        self.engine = engine
        self.plan = plan
        self.guest_name = name
        self.settings = settings
        self.module = module
        self.default: Link | None = None
        self.elsewhere: Compiled | None = None
        """The same for the other engine, once an instance was wanted in a store of that one."""
        self.shim: Shim | None = None
        """For a guest that imports one of `waits`."""
        self.places = {
            memory.index: place
            for place, memory in enumerate(
                () if plan.native else (each for each in plan.memories if each.imported is None)
            )
        }
        """Where the memory of an index is among the leased ones."""
        self._names: dict[str, Name] = {}
        self._signatures: dict[str, Signature] = {}
        self.callables: dict[str, Callable[[Any], Callable[..., Any]]] = {}
        """Makers of an exported function for one instance, by its name."""

    @Lazy
    def limits(self) -> Limits:
        """The limits of a store of this guest's."""
        settings, plan = self.settings, self.plan
        # How many there are was looked at when the guest was prepared, but for what was not understood.
        uncounted = plan.structure is None
        return Limits(
            memory_size=max(settings.largest_memory, settings.largest_heap)
            if plan.native is None
            else settings.largest_native_memory,
            table_elements=settings.table_limit,
            tables=settings.tables_per_instance if uncounted else -1,
            memories=1 if uncounted else -1,
        )

    @Lazy
    def _exports(self) -> dict[str, wasmtime.ExportType]:
        reserved = {each.export_name for each in self.plan.saved_globals}
        return {
            export.name: export for export in self.module.exports if export.name not in reserved
        }

    @Lazy
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

    @Lazy
    def opens(self) -> bool:
        """Whether the guest imports what can give it another descriptor of WASI."""
        return any(
            each.module in wasi.MODULES and each.name in ("path_open", "sock_accept")
            for each in self.module.imports
        )

    @Lazy
    def waits(self) -> list[str]:
        """Functions that the guest imports from WASI and that can wait past a deadline."""
        return [
            name
            for name in WAITS
            if any(provides(each.module) and each.name == name for each in self.module.imports)
        ]

    @Lazy
    def memory_type(self) -> wasmtime.MemoryType | None:
        """The type of the memory that WASI works on, which is exported as "memory"."""
        export = self._exports.get("memory")
        declared = None if export is None else export.type
        return declared if isinstance(declared, wasmtime.MemoryType) else None

    @Lazy
    def saved(self) -> Any:
        """What a reset puts back, with the values as far as the module tells them."""
        every = ffi.new("ms_wt_global[]", len(self.plan.saved_globals))
        for saved, each in zip(every, self.plan.saved_globals, strict=True):
            assert each.export_name is not None
            name = self.name(each.export_name)
            saved.name, saved.length = name.utf8, name.length
            saved.kind = KIND_NAMES.index(each.type) if each.type in KIND_NAMES else 0
            if each.initial is not None:
                saved.value = list(each.initial.to_bytes(16, "little"))
        return every

    def name(self, text: str) -> Name:
        """The one object for this name."""
        found = self._names.get(text)
        return self._names.setdefault(text, Name(text)) if found is None else found

    def export_type(self, name: str, kind: str) -> Any:
        """The type of an export; raises ExportNotFound with what there is instead."""
        export = self._exports.get(name)
        if export is None:
            there = (
                ", ".join(
                    sorted(each for each, what in self.export_kinds.items() if what == kind)[:20]
                )
                or "none"
            )
            raise ExportNotFound(
                f"the guest {self.guest_name} exports no {kind} {name!r}; it exports: {there}"
            )
        if self.export_kinds[name] != kind:
            raise ExportNotFound(
                f"the export {name!r} of the guest {self.guest_name} is a {self.export_kinds[name]}, not a {kind}"
            )
        return export.type

    def signature(self, name: str) -> Signature:
        """The signature of an exported function; raises ExportNotFound, Unsupported."""
        found = self._signatures.get(name)
        if found is None:
            found = Signature.of(self.export_type(name, "func"))
            kinds = (*found.parameters, *found.results)
            if OTHER in kinds or (V128 in kinds and not found.direct):
                raise Unsupported(
                    f"{name!r} of the guest {self.guest_name} is {found}, whose values wasmtime-py cannot pass;"
                    " wrap it in a function of numbers"
                )
            self._signatures[name] = found
        return found

    def global_kind(self, name: str) -> tuple[int, bool]:
        """The kind of an exported global's value, and whether it is mutable; raises ExportNotFound, Unsupported."""
        declared: wasmtime.GlobalType = self.export_type(name, "global")
        kind = kind_of(declared.content)
        if kind > FUNCREF:
            raise Unsupported(
                f"the global {name!r} of the guest {self.guest_name} holds {KIND_NAMES[kind]}"
            )
        return kind, declared.mutable

    # -- imports -----------------------------------------------------------------------------------------------------

    def link(self, binding: Binding, creator: Any) -> Link:
        """Bind the imports; raises LinkError with what is missing or wrong."""
        linker = wasmtime.Linker(self.engine)
        uses_wasi = False
        kept: list[Any] = []
        done: set[tuple[str, str]] = set()
        for wanted in self.module.imports:
            module, name = wanted.module, wanted.name or ""
            if (module, name) in done:
                continue
            done.add((module, name))
            given = binding.imports.get(module)
            if given is None and module in wasi.MODULES:
                if not provides(module):
                    raise LinkError(
                        f"the guest {self.guest_name} imports {module}, an older WASI than wasmtime has;"
                        " build it for wasi_snapshot_preview1, or give the import yourself"
                    )
                if not uses_wasi:
                    linker.define_wasi()
                    uses_wasi = True
                continue
            self._bind(linker, binding, module, name, wanted.type, kept)
        try:
            for name in self.waits if uses_wasi else ():
                assert self.shim is not None
                kept.append(self.shim)
                self.shim.stand_before(linker, name, foreign=binding.store is not None)
            environment = Environment(binding.wasi or Wasi()) if uses_wasi else None
            return Link(self, linker, creator, environment, binding.wasi, kept=kept)
        except wasmtime.WasmtimeError as error:
            said = one_sentence(str(error)).replace("`", "").replace("::", ".")
            raise LinkError(f"the guest {self.guest_name} cannot be linked: {said}") from cause_of(
                error
            )

    def _bind(  # noqa: PLR0917 - one import, from all sides
        self,
        linker: wasmtime.Linker,
        binding: Binding,
        module: str,
        name: str,
        wanted: Any,
        kept: list[Any],
    ) -> None:
        kind = _TYPE_KINDS.get(type(wanted), "tag")
        wants = f"the guest {self.guest_name} imports {module}.{name}, a {_described(kind, wanted)}"
        try:
            given = binding.imports[module][name]
        except KeyError:
            raise LinkError(
                f"{wants}, and no such import was given{_nearest(binding.imports, module)}"
            ) from None
        native = next(
            (what for each, what in NATIVE_KINDS.items() if isinstance(given, each)), None
        )
        if native is None:
            if kind != "func" or not callable(given):
                raise LinkError(f"{wants}, and {given!r} was given")
            kept.append(
                self._bind_function(
                    linker, module, name, wanted, given, foreign=binding.store is not None
                )
            )
            return
        if native != kind:
            raise LinkError(f"{wants}, and a {native} was given")
        if binding.store is None and not isinstance(given, wasmtime.SharedMemory):
            raise LinkError(
                f"{wants}, and a {type(given).__name__} of wasmtime's was given, which belongs to a store:"
                " pass that one to instantiate(store=...)"
            )
        if isinstance(given, wasmtime.SharedMemory):
            given = _Shared(given)
        elif identity_of(given) != binding.store.identity:
            raise LinkError(
                f"{wants}, and the {type(given).__name__} that was given belongs to another store than the"
                " one that was passed to instantiate(store=...)"
            )
        try:
            linker.define(binding.store or wasmtime.Store(self.engine), module, name, given)
        except ValueError:
            raise LinkError(f"{wants}, and the {native} that was given is closed") from None
        except wasmtime.WasmtimeError as error:
            raise LinkError(
                f"{wants}, and what was given is refused: {one_sentence(str(error))}"
            ) from cause_of(error)

    def _bind_function(
        self,
        linker: wasmtime.Linker,
        module: str,
        name: str,
        wanted: wasmtime.FuncType,
        function: Callable[..., Any],
        *,
        foreign: bool,
    ) -> Callable[..., Any]:
        """Put a host function into the linker, and return what has to be kept for it."""
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
                    f"the guest {self.guest_name} imports {module}.{name}, a func {signature}, whose values wasmtime-py"
                    " cannot pass"
                )
            # References are wasmtime-py's business; it may only be used where it does not end the process.
            watched = _watched(signature, function, label)
            weakly = _weakly(watched, foreign=foreign)
            linker.define_func(module, name, wanted, weakly, access_caller=True)
        except wasmtime.WasmtimeError as error:
            raise LinkError(f"{label} is refused: {one_sentence(str(error))}") from cause_of(error)
        return watched


class _Shared(wasmtime.SharedMemory):
    """A shared memory as an import, which wasmtime-py itself describes by one pointer too many."""

    def __init__(self, given: wasmtime.SharedMemory) -> None:
        self._given = given

    def _as_extern(self) -> Any:
        union = wasmtime_ffi.wasmtime_extern_union(sharedmemory=self._given.ptr())
        return wasmtime_ffi.wasmtime_extern_t(wasmtime_ffi.WASMTIME_EXTERN_SHAREDMEMORY, union)


def _watched(signature: Signature, function: Callable[..., Any], label: str) -> Callable[..., Any]:
    """Let our own entry raise what the function raises, and not whoever asks wasmtime-py next."""

    @functools.wraps(function)
    def watched(*arguments: Any) -> Any:
        try:
            return checked_result(signature, function(*arguments), f"what {label} returned")
        except BaseException as error:
            raised_in_wasmtime_py(error)
            raise

    return watched


def _weakly(function: Callable[..., Any], *, foreign: bool) -> Callable[..., Any]:
    """`function` for wasmtime-py, which keeps what it is given where no collection looks.

    `foreign` says that it is for a store of the embedder's own.
    """
    found = weakref.ref(function)

    def call(caller: wasmtime.Caller, *arguments: Any) -> Any:
        held: Any = found()  # there, because its link is: see `FUNCTIONS`
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
    """What was given instead, to follow a complaint."""
    if not imports:
        return ""
    if module in imports:
        return f"; {module} has: {', '.join(sorted(imports[module])) or 'nothing'}"
    return f"; given are the modules: {', '.join(sorted(imports))}"
