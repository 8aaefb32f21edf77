"""What all instances of a guest on wasmer share: its compiled module, its types, and its imports.

Host functions are made once per guest.  What an instance imports is one object of wasmer's, prepared
with everything but the memory, which is put in when it is another one than last time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from memslot_plugin.errors import LinkError, Unsupported, cause_of
from memslot_plugin.guest import plan as guests
from memslot_plugin.hosts.wasi import Wasi
from memslot_plugin.hosts.wasmer import state as wasmer_state
from memslot_plugin.hosts.wasmer import wasi as wasmer_wasi
from memslot_plugin.hosts.wasmer.errors import at_compile, made_by_wasmer
from memslot_plugin.hosts.wasmer.folders import Folders
from memslot_plugin.hosts.wasmer.values import (
    EXTERNS,
    Owner,
    Signature,
    address_of,
    described,
    kind_of,
    new_store,
    passes_references,
    require_compiler,
    wasmer,
)
from memslot_plugin.wasm.module import SectionId
from memslot_plugin.wasm.names import without_long_names

if TYPE_CHECKING:
    from memslot_plugin import wasm
    from memslot_plugin.hosts.guest import Guest
    from memslot_plugin.hosts.live import Binding

Namespaces = dict[str, dict[str, Any]]
"""Import module -> import name -> an object of wasmer's."""


class Placed(NamedTuple):
    """A compiled module, and its store."""

    store: Any
    module: Any


def placed(host_store: Any, store: Any, module: Any) -> Placed:
    """A compiled module in a `store` of its own: wasmer unmaps code only when its store goes.

    In `host_store` instead if it shares references with other guests, which are calls through a table in the
    end: wasmer compares the numbers of two types there, and each store has numbers of its own.
    """
    if any(passes_references(each.type) for each in (*module.imports, *module.exports)):
        return Placed(host_store, wasmer.Module.deserialize(host_store, module.serialize()))
    return Placed(store, module)


LONGEST_NAME = 256
"""Bytes of a function's name, which wasmer writes out for each of half a million frames in a stack of 8 MiB."""


class Connected(NamedTuple):
    """What one instance is linked with, and what has to live as long as it does."""

    imports: Any
    kept: Any
    streams: wasmer_wasi.Streams | None = None


def _said_of_source(error: BaseException, plan: guests.Plan) -> BaseException:
    """The error at an offset of the module that was given, and not of the rewritten one."""
    try:
        if plan.module is not plan.source:
            wasmer.Module(new_store(), plan.source)
    except BaseException as of_source:
        if not made_by_wasmer(of_source):
            raise
        return of_source
    return error


class Compiled:
    """A guest's module, compiled; `kinds` has the kind of each export by its name.

    `saved_names` and `saved_types` are those of the globals that a reset restores, `initial` the bits
    that they begin with, as far as the module tells them.  `wasi` are the names that it imports from WASI, by
    WASI module.  `calls_out` says whether a host
    function can run inside of its calls, `may_grow` whether its memory can grow there.
    """

    store: Any
    module: Any
    offsets: wasm.Offsets | None

    def __init__(self, host_store: Any, guest: Guest, reused: Compiled | Placed | None) -> None:
        """`reused` is the code of the guest whose snapshot this is, or code that came with the guest."""
        self._guest_name = guest.name
        self._binding = guest.binding
        plan = guest.plan
        if reused is None:
            require_compiler()
        try:
            if reused is None:
                # In another store: where the compiler panics, for a tag for example, its engine never compiles again.
                module = plan.module
                if plan.structure is not None:
                    module = without_long_names(module, LONGEST_NAME)
                code = wasmer.Module(new_store(), module).serialize()
                store = new_store()
                reused = placed(host_store, store, wasmer.Module.deserialize(store, code))
            self.store, self.module = reused.store, reused.module
        except BaseException as error:
            if not made_by_wasmer(error):
                raise
            raise at_compile(_said_of_source(error, plan), guest.name, plan.native) from cause_of(
                error
            )
        self.offsets = reused.offsets if isinstance(reused, Compiled) else guests.offsets(plan)
        saved = [
            each
            for each in plan.saved_globals
            if each.export_name is not None and not each.type.startswith("(ref ")
        ]
        self.saved_names = [each.export_name or "" for each in saved]
        self.saved_types = [each.type for each in saved]
        self.initial = tuple(each.initial or 0 for each in saved)
        self.callables: dict[str, Callable[[Any, dict[str, Any]], Callable[..., Any]]] = {}
        """What makes an exported function of an instance, by its name, for those that were asked for."""
        self._state_modules: dict[tuple[int, ...] | None, Any] = {}
        reserved = {each.export_name for each in plan.saved_globals}
        types = {
            export.name: export.type
            for export in self.module.exports
            if export.name not in reserved
        }
        self.kinds: Mapping[str, str] = {name: kind_of(type_) for name, type_ in types.items()}
        self.functions: dict[str, Signature] = {
            name: Signature(types[name]) for name, kind in self.kinds.items() if kind == "func"
        }
        self.globals = {name: types[name] for name, kind in self.kinds.items() if kind == "global"}
        self._memory_from = None if plan.import_name is None else plan.import_name.module
        self._imports = [
            (item.module, item.name, item.type)
            for item in self.module.imports
            if plan.import_name is None or (item.module, item.name) != plan.import_name
        ]
        self.wasi: dict[str, list[str]] = {}
        for module, name, _ in self._imports:
            if module in wasmer_wasi.VERSIONS:
                self.wasi.setdefault(module, []).append(name)
        self.calls_out = any(kind_of(type_) == "func" for _, _, type_ in self._imports)
        self.may_grow = self.calls_out or _may_grow(guest)
        self._prepared: Connected | None = None
        self._given: Namespaces | None = None
        """What the embedder gives to every instance, for those that get WASI beside it."""
        self._kept: list[Any] = []
        """Objects that `_given` needs."""
        self._bound: Owner | None = None
        self._reference = weakref.ref(self)
        # With the store goes what was compiled for it.
        self._shims: dict[tuple[object, ...], Any] = (
            reused._shims if isinstance(reused, Compiled) else {}
        )
        if plan.verdict.in_place and all(each.initial is not None for each in saved):
            self.state_module(self.initial)  # now, because a forked child cannot

    def connect(self, binding: Binding, owner: Owner | None) -> Connected:
        """What an instance imports whose memory is `owner`'s (None: not one of ours).

        Raises LinkError for what is missing or of the wrong kind, SettingError, Unsupported.
        """
        if self.wasi:
            if binding.wasi is None and any(each not in binding.imports for each in self.wasi):
                # As on wasmtime: nothing to read, and output discarded.
                binding = replace(binding, wasi=Wasi())
            if binding.wasi is not None:
                return self._with_wasi(binding, owner)
        if binding is not self._binding:
            kept: list[Any] = []
            return Connected(self._import_object(self._link(binding, kept), owner), kept)
        if self._prepared is None:
            kept = []
            imports = self._import_object(self._link(binding, kept), owner)
            self._prepared = Connected(imports, kept)
            self._bind(owner)
        elif owner is not self._bound and owner is not None:
            self._bind(
                None
            )  # were it cut short, the old owner would find the new one's memory here
            self._prepared.imports.register(self._memory_from, owner.namespace)
            self._bind(owner)
        return self._prepared

    def state_module(self, values: tuple[int, ...] | None) -> Any:
        """The module that reads the saved globals and gives them these values."""
        if values not in self._state_modules:
            # Values that an instance began with are the next one's as well, or else never seen again.
            for each in [
                each for each in self._state_modules if each not in (None, self.initial, values)
            ]:
                del self._state_modules[each]
            require_compiler()
            text = wasmer_state.state_text(self.saved_types, values)
            try:
                self._state_modules[values] = wasmer.Module(new_store(), text)
            except BaseException as error:
                if not made_by_wasmer(error):
                    raise
                what = f"the module of ours that restores the globals of {self._guest_name}"
                raise at_compile(error, what) from cause_of(error)
        return self._state_modules[values]

    def let_go(self) -> None:
        """Take the memory out of the prepared imports, so that it can be unmapped."""
        self._bound = None
        if self._prepared is not None:
            self._prepared.imports.register(self._memory_from, {})

    def _bind(self, owner: Owner | None) -> None:
        """Note whose memory the prepared imports hold."""
        bound, self._bound = self._bound, None
        if bound is not None:
            bound.holders.discard(self._reference)
        if owner is not None:
            owner.holders.add(self._reference)
        self._bound = owner

    def _import_object(self, namespaces: Namespaces, owner: Owner | None) -> Any:
        imports = wasmer.ImportObject()
        for module, namespace in namespaces.items():
            imports.register(module, namespace)
        if owner is not None:
            imports.register(self._memory_from, owner.namespace)
        return imports

    def _link(self, binding: Binding, kept: list[Any]) -> Namespaces:
        """wasmer's objects for everything that the embedder has to give, for as long as `kept` is there."""  # noqa: D403 - a name
        namespaces: Namespaces = {}
        for module, name, type_ in self._imports:
            kind, given = kind_of(type_), None
            if module not in self.wasi or module in binding.imports:
                with suppress(KeyError):  # a mapping may make what it is asked for
                    given = binding.imports[module][name]
            if given is None:
                if module in self.wasi and binding.wasi is not None:
                    continue
                hint = "; give the guest wasi=Wasi(...)" if module in self.wasi else ""
                raise self._wrong(module, name, type_, f"nothing was given for it{hint}")
            if not isinstance(given, EXTERNS[kind]):
                if kind != "func" or not callable(given):
                    raise self._wrong(module, name, type_, f"{given!r} was given for it")
                kept.append(function := _HostFunction(given))
                called = _weakly(function, several=len(type_.results) > 1)
                given = wasmer.Function(self.store, called, type_)
            namespaces.setdefault(module, {})[name] = given
        return namespaces

    def _wrong(self, module: str, name: str, type_: Any, what: str) -> LinkError:
        return LinkError(
            f"{self._guest_name} imports {module}.{name}, a {described(type_)}, and {what}"
        )

    # -- WASI

    def _with_wasi(self, binding: Binding, owner: Owner | None) -> Connected:
        """An environment of the instance's own; what the embedder gives comes before it."""
        assert binding.wasi is not None
        if self.kinds.get("memory") != "memory":
            raise LinkError(
                f"{self._guest_name} imports WASI, which works on an exported memory of the name"
                " 'memory', and it exports none"
            )
        kept: list[Any] = []
        if binding.imports is not self._binding.imports:
            given = self._link(binding, kept)
        else:
            if self._given is None:
                self._given = self._link(binding, self._kept)
            given = dict(self._given)
        memory = self._imported_memory(given) if owner is None else owner.memory
        environment = wasmer_wasi.environment(binding.wasi)
        changed = wasmer.Global(self.store, wasmer.Value.i32(0), mutable=True)
        streams = wasmer_wasi.Streams(binding.wasi, memory, address_of(memory), changed)
        kept += environment, given
        for module, names in self.wasi.items():
            offered = environment.generate_imports(self.store, wasmer_wasi.VERSIONS[module])[module]
            own = given.get(module, {})
            served = {name: offered[name] for name in names if name in offered and name not in own}
            shimmed, shim = self._shim(module, served, memory, streams, binding.wasi)
            given[module] = {**served, **shimmed, **own}
            kept += served, shim
        return Connected(self._import_object(given, owner), kept, streams)

    def _shim(
        self,
        module: str,
        served: dict[str, Any],
        memory: Any,
        streams: wasmer_wasi.Streams,
        wasi: Wasi,
    ) -> tuple[dict[str, Any], Any]:
        """What stands before some of the functions of WASI, and the instance that it comes from."""
        behind = {
            name: function
            for name, function in served.items()
            if name in wasmer_wasi.REPLACED or name not in wasmer_wasi.HARMLESS
        }
        if not behind:
            return {}, None
        key = (module, bool(wasi.preopened), *behind)
        if key not in self._shims:
            require_compiler()
            text = wasmer_wasi.shim_text(behind, folders=bool(wasi.preopened))
            self._shims[key] = wasmer.Module(self.store, text), text
        compiled, text = self._shims[key]
        folders = Folders(wasi, memory, address_of(memory))
        ours = {
            **wasmer_wasi.asked(folders, self.store, text),
            "memory": memory,
            "changed": streams.changed,
            "streams": wasmer.Global(self.store, wasmer.Value.i32(streams.mask)),
            "write": wasmer.Function(self.store, streams.write, wasmer_wasi.write_type()),
        }
        shim = wasmer.Instance(compiled, {"wasi": behind, "memslot": ours})
        return {name: getattr(shim.exports, name) for name in behind}, (shim, ours)

    def _imported_memory(self, given: Namespaces) -> Any:
        """The memory that the guest imports by its own choice, for WASI to work on."""
        for module, name, type_ in self._imports:
            if kind_of(type_) == "memory":
                return given[module][name]
        raise Unsupported(
            f"{self._guest_name} is left to wasmer alone, and WASI is possible only for a guest whose"
            " memory is ours or imported; memslot inspect says why"
        )


class _HostFunction:
    """A host function of the embedder's."""

    __slots__ = ("__weakref__", "call")

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


def _weakly(function: _HostFunction, *, several: bool) -> Callable[..., Any]:
    """`function` for wasmer, which keeps what it is given where no collection looks; it may know its instance.

    The frame of Python around it tells its exceptions from wasmer's.  Several results may come as a list, which
    wasmer itself does not take.
    """
    found = weakref.ref(function)

    def call(*arguments: Any) -> Any:
        held: Any = found()  # there for as long as what was linked with it
        return held.call(*arguments)

    def call_for_several(*arguments: Any) -> Any:
        result = call(*arguments)
        return tuple(result) if isinstance(result, list) else result

    return call_for_several if several else call


def _may_grow(guest: Guest) -> bool:
    """Whether memory.grow can occur in the code: its opcode is 0x40, then a memory's index, 0."""
    structure = guest.plan.structure
    if structure is None:
        return True
    code = structure.section(SectionId.CODE)
    if code is None:
        return False
    # The index may be written in more bytes than it needs, and then starts with 0x80.
    return any(
        structure.source.find(opcode, code.payload, code.end) >= 0
        for opcode in (b"\x40\x00", b"\x40\x80")
    )
