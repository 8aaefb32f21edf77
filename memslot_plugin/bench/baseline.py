"""The peers that memslot is compared with: runtimes as their own documentation uses them, wasmtime's pool, and extism.

A module is compiled once, as it is, and each request gets a new instance of it.  Where the documentation knows several
ways, the fastest one is taken (wasmtime: `Linker.instantiate_pre`).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from memslot_plugin.errors import (
    GuestExit,
    GuestTrap,
    HostUnavailable,
    InvalidModule,
    cause_of,
)
from memslot_plugin.hosts.wasi import Wasi
from memslot_plugin.settings import MIB

Request = Callable[[], object]
"""Serves one request: a fresh instance, one call, and the instance's end."""

KEPT = {"its pool": 0, "its pool, keeping 1 MiB": MIB}
"""The settings of wasmtime's own pool that are tried: bytes of a memory that stay resident."""


class WasmtimeBaseline:
    """One module on wasmtime-py with its default engine: allocation on demand, copy-on-write images.

    The module is one that a host of memslot has prepared, so it is valid and can be linked.  Raises GuestTrap and
    GuestExit as a host does.  An instance ends with the last reference to it.  Of `wasi` the program's name and
    arguments are used; its streams are this process's.
    """

    name = "wasmtime"

    def __init__(self, module: bytes, wasi: Wasi | None = None) -> None:
        self._wasmtime = wasmtime = _imported("wasmtime")
        self._wasi = wasi
        self._engine = self._make_engine()
        linker = wasmtime.Linker(self._engine)
        if wasi is not None:
            linker.define_wasi()
        self._prepared = linker.instantiate_pre(wasmtime.Module(self._engine, module))

    def _make_engine(self) -> Any:
        return self._wasmtime.Engine()

    def instantiate(self) -> Any:
        """Return a new instance."""
        store = self._wasmtime.Store(self._engine)
        if self._wasi is not None:
            config = self._wasmtime.WasiConfig()
            config.argv = [self._wasi.program, *self._wasi.arguments]
            config.inherit_stdout()
            config.inherit_stderr()
            store.set_wasi(config)
        try:
            return store, self._prepared.instantiate(store)
        except (self._wasmtime.Trap, self._wasmtime.WasmtimeError) as error:
            raise self._translated(error) from cause_of(error)

    def call(self, instance: Any, name: str, arguments: Sequence[Any] = ()) -> Any:
        """Call an exported function."""
        store, started = instance
        try:
            return started.exports(store)[name](store, *arguments)
        except (self._wasmtime.Trap, self._wasmtime.WasmtimeError) as error:
            raise self._translated(error) from cause_of(error)

    def _translated(self, error: Exception) -> GuestExit | GuestTrap:
        if isinstance(error, self._wasmtime.ExitTrap):
            return GuestExit(error.code)
        return GuestTrap(str(error), error)


class WasmtimePool(WasmtimeBaseline):
    """wasmtime-py with its own pooling allocator, which the package has in its bindings alone."""

    def __init__(self, module: bytes, keep_resident: int) -> None:
        self._keep_resident = keep_resident
        super().__init__(module)

    def _make_engine(self) -> Any:
        bindings = importlib.import_module("wasmtime._bindings")
        pool = bindings.wasmtime_pooling_allocation_config_new()
        try:
            set_kept = bindings.wasmtime_pooling_allocation_config_linear_memory_keep_resident_set
            set_kept(pool, self._keep_resident)
            bindings.wasmtime_pooling_allocation_config_table_keep_resident_set(pool, MIB)
            config = self._wasmtime.Config()
            bindings.wasmtime_pooling_allocation_strategy_set(config.ptr(), pool)
        finally:
            bindings.wasmtime_pooling_allocation_config_delete(pool)
        return self._wasmtime.Engine(config)


class WasmerBaseline:
    """One module on wasmer-python with its default store: the universal engine and Cranelift; see WasmtimeBaseline."""

    name = "wasmer"

    _EXIT = re.compile(r"WASI exited with code: (\d+)")

    def __init__(self, module: bytes, wasi: Wasi | None = None) -> None:
        self._wasmer = wasmer = _imported("wasmer")
        self._wasi = wasi
        self._store = wasmer.Store()
        self._compiled = wasmer.Module(self._store, module)
        self._version = None if wasi is None else wasmer.wasi.get_version(self._compiled, False)

    def instantiate(self) -> Any:
        """Return a new instance."""
        try:
            if self._wasi is None or self._version is None:
                return self._wasmer.Instance(self._compiled)
            state = self._wasmer.wasi.StateBuilder(self._wasi.program)
            state.arguments(list(self._wasi.arguments))
            imports = state.finalize().generate_import_object(self._store, self._version)
            return self._wasmer.Instance(self._compiled, imports)
        except RuntimeError as error:
            raise self._translated(error) from cause_of(error)

    def call(self, instance: Any, name: str, arguments: Sequence[Any] = ()) -> Any:
        """Call an exported function."""
        try:
            return getattr(instance.exports, name)(*arguments)
        except RuntimeError as error:
            raise self._translated(error) from cause_of(error)

    def _translated(self, error: RuntimeError) -> GuestExit | GuestTrap:
        exited = self._EXIT.search(str(error))
        return GuestExit(int(exited[1])) if exited else GuestTrap(str(error), error)


Baseline = WasmtimeBaseline | WasmerBaseline

RUNTIMES: dict[str, type[Baseline]] = {"wasmtime": WasmtimeBaseline, "wasmer": WasmerBaseline}
"""The runtimes that memslot can be compared with, by the name of their host."""


def assemble(text: str) -> bytes:
    """Assemble WebAssembly text by the first runtime that can be imported; raises InvalidModule, HostUnavailable."""
    reasons = []
    for name in RUNTIMES:
        try:
            runtime = _imported(name)
        except HostUnavailable as error:
            reasons.append(str(error))
            continue
        try:
            return bytes(runtime.wat2wasm(text))
        except getattr(runtime, "WasmtimeError", RuntimeError) as error:
            raise InvalidModule(f"{name} cannot assemble the text: {error}") from None
    raise HostUnavailable(f"no runtime is here that assembles text: {'; '.join(reasons)}")


def chosen(host: str | None) -> tuple[list[str], list[str]]:
    """Return the runtimes to measure, `host` or all, and a sentence for each of them that is not here."""
    here, skipped = [], []
    for name in RUNTIMES if host is None else (host,):
        try:
            _imported(name)
            here.append(name)
        except HostUnavailable as error:
            skipped.append(f"{name}: {error}")
    return here, skipped


def peers(host: str, module: bytes, function: str) -> dict[str, Request]:
    """Return the requests of each peer of a host by name; extism stands with wasmtime, on which it is built.

    Raises HostUnavailable without the runtime.
    """
    found = {f"{host} alone": _request(RUNTIMES[host](module), function)}
    if host == "wasmtime":
        for name, kept in KEPT.items():
            found[name] = _request(WasmtimePool(module, kept), function)
        with suppress(ImportError):
            found["extism"] = _extism(module, function)
    return found


def _request(runtime: Baseline, function: str) -> Request:
    def request() -> None:
        runtime.call(runtime.instantiate(), function)

    return request


def _extism(module: bytes, function: str) -> Request:
    extism = importlib.import_module("extism")
    compiled = importlib.import_module("extism.extism").CompiledPlugin(module)
    return lambda: extism.Plugin(compiled).call(function, b"")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise HostUnavailable(f"{name} cannot be imported: {error}") from None
