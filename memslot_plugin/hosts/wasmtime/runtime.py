"""The host on wasmtime-py: an engine whose linear memories are leased through the hooks.

wasmtime asks a *memory creator* for each memory.  The adapter leases the memories of an instance
first and offers them on its own thread just before it instantiates; the creator, which is C, takes
them in order.  Copy-on-write initialisation of wasmtime's own is off for this engine: with a creator
it ends the process when a module still has active data.  Guests that no slot can serve run on a
second engine, configured as wasmtime's defaults are.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import cast

from memslot_hooks.types import LinearMemory, MemoryRequest
from memslot_plugin._core import after_fork, catch_up, lib
from memslot_plugin._core.limits import errno_in_text
from memslot_plugin.errors import (
    InvalidModule,
    LinkError,
    Unsupported,
    UsedAfterClose,
    cause_of,
)
from memslot_plugin.guest import plan as guests
from memslot_plugin.guest.target import MOST_GLOBALS
from memslot_plugin.hosts.guest import Guest
from memslot_plugin.hosts.host import Host, HostStatistics
from memslot_plugin.hosts.live import Binding, Live
from memslot_plugin.hosts.versions import installed_version
from memslot_plugin.hosts.wasi import Wasi
from memslot_plugin.hosts.wasmtime.bridge import (
    CREATORS,
    address_of,
    bind,
    drop_functions,
    wasmtime,
)
from memslot_plugin.hosts.wasmtime.creator import Creator, Leases
from memslot_plugin.hosts.wasmtime.errors import (
    WasmtimeExit,
    WasmtimeFailure,
    WasmtimeTrap,
    one_sentence,
)
from memslot_plugin.hosts.wasmtime.link import BoundImports, Compiled
from memslot_plugin.hosts.wasmtime.live import NativeInstance, WasmtimeLive
from memslot_plugin.hosts.wasmtime.store import lent
from memslot_plugin.hosts.wasmtime.wasi import Environment, Shim, shim_text
from memslot_plugin.settings import Settings

__all__ = ["NativeInstance", "WasmtimeExit", "WasmtimeFailure", "WasmtimeHost", "WasmtimeTrap"]

_log = logging.getLogger("memslot.wasmtime")

ONE_MEMORY = b"\0asm\1\0\0\0\5\3\1\0\1"
"""A module that defines one memory of one page and nothing else."""


_FORKED: list[int] = []
"""The process itself, if it began as a fork of one with wasmtime in it: the compiler's threads are not here."""


def _after_fork() -> None:
    _FORKED[:] = [os.getpid()]


after_fork(_after_fork)


class WasmtimeHost(Host):
    """Guests on wasmtime (wasmtime-py).  Any thread may use it; an instance serves one thread at a time.

    `configure(config)` may change a `wasmtime.Config` before an engine is made of it (epochs, fuel,
    proposals); what memory needs is set after it, and a pool of wasmtime's own is refused
    (Unsupported).  It is called once per engine.  `configure_store(store)` is called with each new
    store before its instance starts (epoch deadline, fuel, limits within those of the settings), and
    again when its instance is reset in place and when it is leased after it waited.
    """

    name = "wasmtime"
    _native_engine: wasmtime.Engine | None = None
    limits_what_grows = True
    most_globals = MOST_GLOBALS

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        plugins: Sequence[object] = (),
        configure: Callable[[wasmtime.Config], None] | None = None,
        configure_store: Callable[[wasmtime.Store], None] | None = None,
    ) -> None:
        self._configure = configure
        self._configure_store = configure_store
        self._engine: wasmtime.Engine | None = None
        self._process = os.getpid()
        self._shims: dict[tuple[bool, str], Shim] = {}
        """By true for the native engine, and text."""
        super().__init__(settings, plugins=plugins)

    # -- engines -----------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> wasmtime.Engine:
        """The engine whose memories are leased; bare wasmtime-py may use it too."""
        if self._engine is None:
            raise UsedAfterClose("the wasmtime host was closed; open a new one")
        return self._engine

    @property
    def native_engine(self) -> wasmtime.Engine:
        """The engine of guests that run natively: wasmtime's defaults, changed by `configure` alone."""
        if self._native_engine is None:
            # Without a lock: a finalizer that runs in `configure` may come here too.  The first engine stays.
            made = wasmtime.Engine(self._native_config())
            return cast("wasmtime.Engine", self.__dict__.setdefault("_native_engine", made))
        return self._native_engine

    def increment_epoch(self) -> None:
        """Let a tick pass on both engines (`wasmtime.Engine.increment_epoch`); any thread may call this at any time."""
        self.engine.increment_epoch()
        if self._native_engine is not None:
            self._native_engine.increment_epoch()

    def _open_runtime(self) -> None:
        bind()
        settings = self.settings
        self.checks_bounds_in_code = settings.bounds_checks == "code"
        self._creator = Creator(
            settings, self.name, Leases(self._lease, super()._release, self._grow)
        )
        self._engine = engine = wasmtime.Engine(self._engine_config())
        # Stores on it, also the embedder's, have memories of ours, which are unmapped when the creator is collected.
        engine.creator = self._creator  # type: ignore[attr-defined]
        if self._configure is not None:
            _require_creator(engine)
        CREATORS[self._creator.identity] = self._creator

    def _engine_config(self) -> wasmtime.Config:
        """What the engine of our guests is made from."""
        settings, config = self.settings, wasmtime.Config()
        if self._configure is not None:
            self._configure(config)
        config.memory_init_cow = False
        config.memory_reservation = settings.reserved
        config.memory_guard_size = settings.guard
        config.memory_may_move = False
        config.memory_reservation_for_growth = 0
        config.signals_based_traps = not self.checks_bounds_in_code
        if _FORKED:
            config.parallel_compilation = False
        lib.ms_wt_creator_install(self._creator.raw, address_of(config.ptr()))
        return config

    def _native_config(self) -> wasmtime.Config:
        catch_up()
        config = wasmtime.Config()
        if self._configure is not None:
            self._configure(config)
        if _FORKED:
            config.parallel_compilation = False
        return config

    def _close_runtime(self) -> None:
        self._engine = None
        self.__dict__.pop("_native_engine", None)
        self._shims.clear()
        CREATORS.pop(self._creator.identity, None)
        drop_functions()

    # -- guests ------------------------------------------------------------------------------------------------------

    def _assemble(self, text: str) -> bytes:
        try:
            return bytes(wasmtime.wat2wasm(text))
        except wasmtime.WasmtimeError as error:
            raise InvalidModule(
                f"the text is not WebAssembly: {one_sentence(str(error))}"
            ) from cause_of(error)

    def _compile(self, guest: Guest) -> Compiled:
        native = guest.plan.native is not None
        engine = self.native_engine if native else self.engine
        try:
            module = self._reused(guest, engine)
            if module is None:
                module = self._compile_alone(engine, guest.plan.module, native=native)
        except wasmtime.WasmtimeError as error:
            short = errno_in_text(one_sentence(str(error)), f"compiling {guest.name}")
            if short is not None:
                raise short from cause_of(error)
            raise InvalidModule(
                f"wasmtime refuses {guest.name}: {self._said_of_source(engine, guest, error)}"
            ) from cause_of(error)
        return self._compiled(engine, module, guest)

    def _said_of_source(
        self, engine: wasmtime.Engine, guest: Guest, error: wasmtime.WasmtimeError
    ) -> str:
        """The error at an offset of the module that was given, and not of the rewritten one."""
        try:
            if guest.plan.module is not guest.plan.source:
                wasmtime.Module.validate(engine, guest.plan.source)
        except wasmtime.WasmtimeError as of_source:
            error = of_source
        return one_sentence(str(error))

    def _compiled(self, engine: wasmtime.Engine, module: wasmtime.Module, guest: Guest) -> Compiled:
        """A guest's module on an engine of ours, with the shim that its calls of WASI need."""
        parents: Compiled | None = self._parents_code(guest)
        compiled = Compiled(
            engine,
            module,
            guest.plan,
            guest.name,
            settings=self.settings,
            creator=self._creator.raw,
        )
        compiled.offsets = guests.offsets(guest.plan) if parents is None else parents.offsets
        if compiled.waits:
            native, text = engine is not self._engine, shim_text(compiled.memory_type)
            if (native, text) not in self._shims:
                shim = self._compile_alone(engine, self._assemble(text), native=native)
                self._shims[native, text] = Shim(engine, shim)
            compiled.shim = self._shims[native, text]
        return compiled

    def _reused(self, guest: Guest, engine: wasmtime.Engine) -> wasmtime.Module | None:
        """The module of the parent, or from code that came with the guest; None where there is none that
        fits.
        """
        parents: Compiled | None = self._parents_code(guest)
        if parents is not None:
            guest.sets_globals = bool(guest.plan.saved_globals)
            return parents.module
        found = self._saved_code(guest)
        if found is None:
            return None
        try:
            module = wasmtime.Module.deserialize(engine, found[0])
        except wasmtime.WasmtimeError as error:  # it checks version, configuration and processor
            _log.info("the code of %s is compiled again: %s", guest.name, one_sentence(str(error)))
            return None
        guest.reused_code, guest.sets_globals = True, found[1]
        return module

    def _code_key(self, guest: Guest) -> str | None:
        settings = self.settings
        engine = (
            f"slots of {settings.reserved} + {settings.guard}, bounds by {settings.bounds_checks}"
        )
        if guest.plan.native is not None:
            engine = "its own memories"
        return f"wasmtime {installed_version(self.name)}, {platform.machine()}, {engine}"

    def _serialise(self, guest: Guest) -> bytes:
        compiled: Compiled = guest.compiled
        return bytes(compiled.module.serialize())

    def _compile_alone(
        self, engine: wasmtime.Engine, module: bytes, *, native: bool
    ) -> wasmtime.Module:
        """Compiled for this engine, without its compiler's threads where those stayed behind in a fork."""
        catch_up()
        if os.getpid() == self._process:
            return wasmtime.Module(engine, module)
        alone = wasmtime.Engine(self._native_config() if native else self._engine_config())
        return wasmtime.Module.deserialize(engine, wasmtime.Module(alone, module).serialize())

    def _start(self, guest: Guest, memories: tuple[LinearMemory, ...], binding: Binding) -> Live:
        compiled: Compiled | None = guest.compiled
        if compiled is None:
            raise UsedAfterClose(f"the guest {guest.name} was closed; prepare it again")
        if binding.store is None and binding.imports is guest.binding.imports:
            link = compiled.default
            if link is None:
                link = compiled.default = compiled.bind(guest.binding)
        else:
            link = self._link(guest, compiled, binding)
            compiled = link.compiled
        live = WasmtimeLive(self._creator, compiled, memories, binding, self._configure_store)
        live.bound, token = link, live.token
        try:
            bases = [memory.base for memory in memories]
            if link.environment is None and binding.store is None and self._configure_store is None:
                outcome = lib.ms_wt_start(live.cell, link.guest, token, bases)
            else:
                if binding.store is None:
                    lib.ms_wt_open(live.cell, link.guest)
                else:
                    binding.store.tenants.add(live)  # first, for it is told if the store is closed
                    binding.store.links.append(link)
                    live.enter_store()
                # Within an entry, so that nothing that comes in between can close the store.
                outcome = live.entered(0, lambda: self._begin(live, link, binding, token, bases))
            live.settle(outcome, starting=True)
            if guest.sets_globals:
                live.set_globals()
            if guest.captures:
                live.read_globals()
        except BaseException:
            # Of any kind: a start function may call a host function, which may raise KeyboardInterrupt or SystemExit.
            self._creator.finish(live, release=False)
            raise
        return live

    def _link(self, guest: Guest, compiled: Compiled, binding: Binding) -> BoundImports:
        """Bind the imports; a guest without a memory of its own, for the engine of the store that was given."""
        store, name = binding.store, compiled.guest_name
        if store is None:
            return compiled.bind(binding)
        native = compiled.plan.native
        if not isinstance(store, wasmtime.Store) or store.engine not in (
            self._engine,
            self._native_engine,
        ):
            fits = "host.engine" if native is None else "host.native_engine"
            raise LinkError(
                f"the store for an instance of {name} must be a wasmtime.Store of {fits}, not {store!r}"
            )
        lent(store, name)
        if store.engine is compiled.engine:
            return compiled.bind(binding)
        if native is not None:
            raise LinkError(
                f"the store for an instance of {name} must be a wasmtime.Store of host.native_engine, because"
                f" the guest is left to the runtime: {native}"
            )
        if compiled.lease_index:
            raise LinkError(
                f"the store for an instance of {name} must be a wasmtime.Store of host.engine, because its"
                " memory is in a slot; a guest that it shall be linked with has to run from slots as well"
            )
        if compiled.elsewhere is None:
            module = self._compile_alone(store.engine, guest.plan.module, native=True)
            compiled.elsewhere = self._compiled(store.engine, module, guest)
        return compiled.elsewhere.bind(binding)

    def _begin(
        self, live: WasmtimeLive, link: BoundImports, binding: Binding, token: int, bases: list[int]
    ) -> int:
        """Instantiate, after what must be set in the store before; the outcome."""
        cell = live.cell
        live.require_store()
        if link.environment is not None:
            live.environment = link.environment
            if binding.wasi is not link.wasi:
                live.environment = Environment(binding.wasi or Wasi())
            live.streams = live.environment.give(cell)
        if self._configure_store is not None and binding.store is None:
            self._configure_store(live.store())
        return int(lib.ms_wt_instantiate(cell, link.guest, token, bases))

    def _cut_short(self, memories: tuple[LinearMemory, ...]) -> None:
        self._creator.abandon(memories)

    def _lease(self, requests: Sequence[MemoryRequest]) -> tuple[LinearMemory, ...]:
        self._creator.drain()
        return super()._lease(requests)

    def _release(self, memories: Sequence[LinearMemory]) -> None:
        super()._release(self._creator.unused(memories))

    # -- the host's own life -----------------------------------------------------------------------------------------

    def statistics(self) -> HostStatistics:
        self._require_usable()
        self._creator.drain()
        drop_functions()
        return super().statistics()

    def close(self, *, force: bool = False) -> None:
        """Close guests, pools and the runtime; twice is a no-op.

        Raises InUse while instances are live, and goes on serving; with `force` they are ended first.
        Stores of the embedder's own and instances that bare wasmtime-py made on our engine cannot be
        ended here: InUse, also with `force`.
        """
        if self._gave_back:
            return
        if force and not self._closed:
            self._end_dropped()
            for live in self._listed():
                self._end_or_log(live)
        self._creator.require_unused()
        super().close(force=force)


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
