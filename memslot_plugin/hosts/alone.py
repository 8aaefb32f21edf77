"""A runtime alone, as its own documentation uses it: what `memslot run` and `memslot bench` compare with.

The module is compiled once, as it is, and each request gets a new instance of it: nothing of memslot.  Where the
documentation knows several ways, the fastest one is taken (wasmtime: `Linker.instantiate_pre`).
"""

from __future__ import annotations

import abc
import ctypes
import functools
import importlib
import importlib.metadata
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from memslot_plugin.errors import (
    GuestExit,
    GuestTrap,
    HostUnavailable,
    InvalidModule,
    LinkError,
    cause_of,
)
from memslot_plugin.hosts.wasi import Wasi


class Alone(abc.ABC):
    """One module on one bare runtime; raises InvalidModule, LinkError, GuestTrap and GuestExit as a host does."""

    name: ClassVar[str]

    @abc.abstractmethod
    def instantiate(self) -> Any:
        """A new instance, which ends when the last reference to what is returned goes."""

    @abc.abstractmethod
    def call(self, instance: Any, name: str, arguments: Sequence[Any]) -> Any:
        """Call an exported function."""

    @abc.abstractmethod
    def read_memory(self, instance: Any, name: str, most: int) -> bytes | None:
        """All bytes of an exported memory, or None if they are more than `most`."""

    @classmethod
    @abc.abstractmethod
    def assemble(cls, text: str) -> bytes:
        """WebAssembly text as a module in the binary format."""


class WasmtimeAlone(Alone):
    """wasmtime-py with its default engine: allocation on demand, copy-on-write images."""

    name = "wasmtime"

    def __init__(self, module: bytes, wasi: Wasi | None) -> None:
        self._wasmtime = wasmtime = _imported("wasmtime")
        self._wasi = wasi
        self._engine = self._make_engine()
        try:
            compiled = wasmtime.Module(self._engine, module)
        except wasmtime.WasmtimeError as error:
            raise InvalidModule(f"wasmtime refuses the module: {error}") from None
        linker = wasmtime.Linker(self._engine)
        if wasi is not None:
            linker.define_wasi()
        try:
            self._prepared = linker.instantiate_pre(compiled)
        except wasmtime.WasmtimeError as error:
            raise LinkError(f"wasmtime cannot link the module: {error}") from None

    def _make_engine(self) -> Any:
        """The engine; the benchmark has one with wasmtime's own pool."""
        return self._wasmtime.Engine()

    def instantiate(self) -> Any:
        store = self._wasmtime.Store(self._engine)
        if self._wasi is not None:
            store.set_wasi(self._wasi_config(self._wasi))
        try:
            return store, self._prepared.instantiate(store)
        except (self._wasmtime.Trap, self._wasmtime.WasmtimeError) as error:
            raise self._translated(error) from cause_of(error)

    def call(self, instance: Any, name: str, arguments: Sequence[Any]) -> Any:
        store, started = instance
        try:
            return started.exports(store)[name](store, *arguments)
        except (self._wasmtime.Trap, self._wasmtime.WasmtimeError) as error:
            raise self._translated(error) from cause_of(error)

    def read_memory(self, instance: Any, name: str, most: int) -> bytes | None:
        store, started = instance
        memory = started.exports(store)[name]
        length = memory.data_len(store)
        return ctypes.string_at(memory.data_ptr(store), length) if length <= most else None

    @classmethod
    def assemble(cls, text: str) -> bytes:
        wasmtime = _imported("wasmtime")
        try:
            return bytes(wasmtime.wat2wasm(text))
        except wasmtime.WasmtimeError as error:
            raise InvalidModule(f"wasmtime cannot assemble the text: {error}") from None

    def _wasi_config(self, wasi: Wasi) -> Any:
        config = self._wasmtime.WasiConfig()
        config.argv = [wasi.program, *wasi.arguments]
        config.env = list(wasi.environment.items())
        if wasi.stdout == "inherit":
            config.inherit_stdout()
        if wasi.stderr == "inherit":
            config.inherit_stderr()
        for folder, seen, writable in wasi.folders():
            config.preopen_dir(folder, seen, writable)
        return config

    def _translated(self, error: Exception) -> GuestExit | GuestTrap:
        if isinstance(error, self._wasmtime.ExitTrap):
            return GuestExit(error.code)
        return GuestTrap(str(error), error)


class WasmerAlone(Alone):
    """wasmer-python with its default store: the universal engine and the Cranelift compiler."""

    name = "wasmer"

    _EXIT = re.compile(r"WASI exited with code: (\d+)")

    def __init__(self, module: bytes, wasi: Wasi | None) -> None:
        self._wasmer = wasmer = _imported("wasmer")
        self._wasi = wasi
        self._store = wasmer.Store()
        try:
            self._compiled = wasmer.Module(self._store, module)
        except RuntimeError as error:
            raise InvalidModule(f"wasmer refuses the module: {error}") from None
        self._version = None if wasi is None else wasmer.wasi.get_version(self._compiled, False)

    def instantiate(self) -> Any:
        try:
            if self._wasi is None or self._version is None:
                return self._wasmer.Instance(self._compiled)
            state = self._wasmer.wasi.StateBuilder(self._wasi.program)
            state.arguments(list(self._wasi.arguments))
            state.environments(dict(self._wasi.environment))
            state.map_directories({seen: folder for folder, seen, _ in self._wasi.folders()})
            imports = state.finalize().generate_import_object(self._store, self._version)
            return self._wasmer.Instance(self._compiled, imports)
        except RuntimeError as error:
            if "link" in str(error).lower():
                raise LinkError(f"wasmer cannot link the module: {error}") from None
            raise self._translated(error) from cause_of(error)

    def call(self, instance: Any, name: str, arguments: Sequence[Any]) -> Any:
        try:
            return getattr(instance.exports, name)(*arguments)
        except RuntimeError as error:
            raise self._translated(error) from cause_of(error)

    def read_memory(self, instance: Any, name: str, most: int) -> bytes | None:
        memory = getattr(instance.exports, name)
        return bytes(memory.buffer) if memory.data_size <= most else None

    @classmethod
    def assemble(cls, text: str) -> bytes:
        wasmer = _imported("wasmer")
        try:
            return bytes(wasmer.wat2wasm(text))
        except RuntimeError as error:
            raise InvalidModule(f"wasmer cannot assemble the text: {error}") from None

    def _translated(self, error: RuntimeError) -> GuestExit | GuestTrap:
        exited = self._EXIT.search(str(error))
        return GuestExit(int(exited[1])) if exited else GuestTrap(str(error), error)


KNOWN: dict[str, type[WasmtimeAlone | WasmerAlone]] = {
    "wasmtime": WasmtimeAlone,
    "wasmer": WasmerAlone,
}
"""The runtimes that memslot can compare with, by the name of their host."""


def assemble(text: str) -> bytes:
    """WebAssembly text as a module, by whichever runtime can be imported; raises InvalidModule, HostUnavailable."""
    reasons = []
    for runtime in KNOWN.values():
        try:
            return runtime.assemble(text)
        except HostUnavailable as error:
            reasons.append(str(error))
    raise HostUnavailable(f"no runtime is here that assembles text: {'; '.join(reasons)}")


@functools.cache
def runtime_version(name: str) -> str | None:
    """The version of the runtime's distribution, or None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise HostUnavailable(f"{name} cannot be imported: {error}") from None
