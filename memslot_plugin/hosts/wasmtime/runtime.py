"""The runtime wasmtime-py: an engine whose linear memories are leased through the hooks.

wasmtime asks a *memory creator* for each memory.  An instance's memories are leased first, and offered to the creator
on the same thread just before the instantiation; the creator, which is C, takes them in order.  wasmtime's own
copy-on-write is off for this engine: with a creator, it ends the process if a module still has active data.  Guests
that no slot can serve run on a second engine, which has wasmtime's defaults.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable
from contextlib import suppress

from memslot_hooks.types import LinearMemory
from memslot_plugin._core import lib
from memslot_plugin._core.limits import errno_in_text
from memslot_plugin.errors import (
    InvalidModule,
    LinkError,
    Unsupported,
    UsedAfterClose,
    cause_of,
)
from memslot_plugin.guest import plan as guests
from memslot_plugin.guest.plan import Plan
from memslot_plugin.guest.target import MOST_GLOBALS
from memslot_plugin.hosts.leases import Leases
from memslot_plugin.hosts.live import Binding
from memslot_plugin.hosts.runtime import Reuse, Runtime
from memslot_plugin.hosts.versions import installed_version
from memslot_plugin.hosts.wasmtime.bridge import (
    CREATORS,
    address_of,
    bind,
    drop_functions,
    wasmtime,
)
from memslot_plugin.hosts.wasmtime.creator import Creator
from memslot_plugin.hosts.wasmtime.errors import (
    WasmtimeExit,
    WasmtimeFailure,
    WasmtimeTrap,
    one_sentence,
)
from memslot_plugin.hosts.wasmtime.link import BoundImports, Compiled
from memslot_plugin.hosts.wasmtime.live import WasmtimeLive
from memslot_plugin.hosts.wasmtime.store import NativeInstance, lent
from memslot_plugin.hosts.wasmtime.wasi import Shim, shim_text

__all__ = ["NativeInstance", "WasmtimeExit", "WasmtimeFailure", "WasmtimeTrap"]

_log = logging.getLogger("memslot.wasmtime")

ONE_MEMORY = b"\0asm\1\0\0\0\5\3\1\0\1"
"""A module that defines one memory of one page and nothing else."""


_PROCESS = os.getpid()
"""The process that imported this module.  wasmtime's compiler has no threads in a fork of it."""


class WasmtimeRuntime(Runtime):
    """The engines of a `WasmtimeHost`, and the creator of their memories."""

    name = "wasmtime"
    limits_growth = True
    most_globals = MOST_GLOBALS

    def __init__(
        self,
        configure: Callable[[wasmtime.Config], None] | None,
        configure_store: Callable[[wasmtime.Store], None] | None,
    ) -> None:
        self._configure = configure
        self._configure_store = configure_store
        self._engine: wasmtime.Engine | None = None
        self._native: wasmtime.Engine | None = None
        self._process = os.getpid()
        """The process in which the compilers of the engines have their threads."""
        self._shims: dict[tuple[bool, str], Shim] = {}
        """The shims of WASI, by false for the native engine, and their text."""

    # -- engines -----------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> wasmtime.Engine:
        """The engine whose memories are leased."""
        if self._engine is None:
            raise UsedAfterClose("the wasmtime host was closed; open a new one")
        return self._engine

    @property
    def native_engine(self) -> wasmtime.Engine:
        """The engine of guests that run natively."""
        if self._native is None:
            made = wasmtime.Engine(self._config(native=True))
            # No lock: this thread would wait for itself if a finalizer in `configure` came here.
            if self._native is None:  # the first engine stays
                self._native = made
        return self._native

    @property
    def has_native_engine(self) -> bool:
        """True once a guest runs natively, or the embedder has asked for the native engine."""
        return self._native is not None

    def open(self, leases: Leases) -> None:
        """Make the engine whose memories are leased."""
        bind()
        self.leases, settings = leases, leases.settings
        self.checks_bounds_in_code = settings.bounds_checks == "code"
        self._creator = Creator(settings, leases)
        leases.retained, leases.settle = self._creator.retained, self._creator.drain
        self._engine = engine = wasmtime.Engine(self._config(native=False))
        # Stores on the engine, also the embedder's, use memories that the creator keeps.  If it were collected first,
        # their slots would go to other tenants.
        engine.creator = self._creator  # type: ignore[attr-defined]
        if self._configure is not None:
            _require_creator(engine)
        CREATORS[self._creator.identity] = self._creator

    def _config(self, *, native: bool) -> wasmtime.Config:
        config = wasmtime.Config()
        if self._configure is not None:
            self._configure(config)
        if not native:
            settings = self.leases.settings
            config.memory_init_cow = False
            config.memory_reservation = settings.reserved
            config.memory_guard_size = settings.guard
            config.memory_may_move = False
            config.memory_reservation_for_growth = 0
            config.signals_based_traps = not self.checks_bounds_in_code
            lib.ms_wt_creator_install(self._creator.raw, address_of(config.ptr()))
        if os.getpid() != _PROCESS:
            config.parallel_compilation = False
        return config

    def close(self) -> None:
        """Drop the engines."""
        self._engine = self._native = None
        self._shims.clear()
        CREATORS.pop(self._creator.identity, None)
        drop_functions()

    # -- guests ------------------------------------------------------------------------------------------------------

    def assemble(self, text: str) -> bytes:
        """Return WebAssembly text as a binary module; raises InvalidModule."""
        try:
            return bytes(wasmtime.wat2wasm(text))
        except wasmtime.WasmtimeError as error:
            raise InvalidModule(
                f"the text is not WebAssembly: {one_sentence(str(error))}"
            ) from cause_of(error)

    def compile(self, plan: Plan, name: str, binding: Binding, reuse: Reuse) -> Compiled:
        """Compile a guest's module, or take code that serves again; raises InvalidModule."""
        engine = self.engine if plan.native is None else self.native_engine
        parent: Compiled | None = reuse.of_parent(plan)
        found = None if parent is not None else self._saved(plan, name, reuse, engine)
        sets_globals = False
        try:
            if parent is not None:
                module, sets_globals = parent.module, bool(plan.saved_globals)
            elif found is not None:
                module, sets_globals = found
            else:
                module = self._compile_alone(engine, plan.module)
            compiled = self._compiled(engine, module, plan, name, binding)
        except wasmtime.WasmtimeError as error:
            short = errno_in_text(one_sentence(str(error)), f"compiling {name}")
            if short is not None:
                raise short from cause_of(error)
            raise InvalidModule(
                f"wasmtime refuses {name}: {_said_of_source(engine, plan, error)}"
            ) from cause_of(error)
        compiled.sets_globals, compiled.reused = sets_globals, found is not None
        compiled.offsets = guests.offsets(plan) if parent is None else parent.offsets
        return compiled

    def _saved(
        self, plan: Plan, name: str, reuse: Reuse, engine: wasmtime.Engine
    ) -> tuple[wasmtime.Module, bool] | None:
        """Return code that came with the guest, and true if globals are to be set; None if none fits."""
        found = reuse.saved(plan, self.code_key(plan))
        if found is None:
            return None
        try:
            return wasmtime.Module.deserialize(engine, found[0]), found[1]
        except wasmtime.WasmtimeError as error:  # it checks version, configuration and processor
            _log.info("the code of %s is compiled again: %s", name, one_sentence(str(error)))
            return None

    def _compiled(
        self,
        engine: wasmtime.Engine,
        module: wasmtime.Module,
        plan: Plan,
        name: str,
        binding: Binding,
    ) -> Compiled:
        """Return a guest's module on an engine, with the shim that its calls of WASI need."""
        compiled = Compiled(
            engine,
            module,
            plan,
            name,
            binding,
            settings=self.leases.settings,
            creator=self._creator.raw,
        )
        if compiled.waits:
            key = engine is self._engine, shim_text(compiled.memory_type)
            if key not in self._shims:
                self._shims[key] = Shim(engine, self._compile_alone(engine, self.assemble(key[1])))
            compiled.shim = self._shims[key]
        return compiled

    def code_key(self, plan: Plan) -> str:
        """Return the version, the machine, and the settings that compiled code depends on."""
        settings = self.leases.settings
        engine = (
            f"slots of {settings.reserved} + {settings.guard}, bounds by {settings.bounds_checks}"
        )
        if plan.native is not None:
            engine = "its own memories"
        return f"wasmtime {installed_version(self.name)}, {platform.machine()}, {engine}"

    def _compile_alone(self, engine: wasmtime.Engine, module: bytes) -> wasmtime.Module:
        """Compile for an engine, in a fork without the threads of its compiler, for which it would wait for ever."""
        if os.getpid() == self._process:
            return wasmtime.Module(engine, module)
        alone = wasmtime.Engine(self._config(native=engine is not self._engine))
        return wasmtime.Module.deserialize(engine, wasmtime.Module(alone, module).serialize())

    def live(
        self, compiled: Compiled, memories: tuple[LinearMemory, ...], binding: Binding
    ) -> WasmtimeLive:
        """Return an instance that has not started."""
        return WasmtimeLive(
            self._creator, compiled, memories, binding, self._link, self._configure_store
        )

    def _link(self, compiled: Compiled, binding: Binding) -> BoundImports:
        """Bind the imports; raises LinkError.

        A guest without a memory of its own also fits a store of the other engine, for which it is compiled again.
        """
        store = binding.store
        if store is None:
            if binding.imports is not compiled.binding.imports:
                return compiled.bind(binding)
            if compiled.default is None:
                compiled.default = compiled.bind(compiled.binding)
            return compiled.default
        name, native, why = compiled.guest_name, compiled.plan.native, ""
        if not isinstance(store, wasmtime.Store) or store.engine not in (
            self._engine,
            self._native,
        ):
            why = f", not {store!r}"
        elif store.engine is not compiled.engine and native is not None:
            why = f", because the guest is left to the runtime: {native}"
        elif store.engine is not compiled.engine and compiled.lease_index:
            why = (
                ", because its memory is in a slot; a guest that it shall be linked with has to run from slots"
                " as well"
            )
        if why:
            fits = "host.engine" if native is None else "host.native_engine"
            raise LinkError(
                f"the store for an instance of {name} must be a wasmtime.Store of {fits}{why}"
            )
        lent(store, name)
        if store.engine is compiled.engine:
            return compiled.bind(binding)
        if compiled.elsewhere is None:
            module = self._compile_alone(store.engine, compiled.plan.module)
            compiled.elsewhere = self._compiled(
                store.engine, module, compiled.plan, name, compiled.binding
            )
            compiled.elsewhere.offsets = guests.offsets(compiled.plan)
        return compiled.elsewhere.bind(binding)

    def settle(self) -> None:
        """Release memories and host functions that wasmtime no longer needs."""
        self._creator.drain()
        drop_functions()

    def require_unused(self) -> None:
        """Raise InUse if stores of the embedder's, or running calls, still use memories."""
        self._creator.require_unused()


def _said_of_source(engine: wasmtime.Engine, plan: Plan, error: wasmtime.WasmtimeError) -> str:
    """Return the error at an offset of the given module, and not of the rewritten one."""
    try:
        if plan.module is not plan.source:
            wasmtime.Module.validate(engine, plan.source)
    except wasmtime.WasmtimeError as of_source:
        error = of_source
    return one_sentence(str(error))


def _require_creator(engine: wasmtime.Engine) -> None:
    """Raise Unsupported if the engine makes memories of its own.

    wasmtime has no getter for the allocation strategy, so only a memory shows it.  An engine that asks for it is
    refused, because its creator is not among `CREATORS` yet.
    """
    module = wasmtime.Module(engine, ONE_MEMORY)
    with suppress(wasmtime.WasmtimeError):
        wasmtime.Instance(wasmtime.Store(engine), module, [])
        raise Unsupported(
            "the configuration has a pool of wasmtime's own, which memslot takes the place of and cannot"
            " be combined with; leave the allocation strategy alone, and use memslot's settings"
        )
