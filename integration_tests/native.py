"""The runtimes alone, as their documentation uses them, for comparison with memslot.

A life of a module is a list of outcomes: its start, the result of each call, and each exported memory at the end.
Errors are compared by their kind, traps by the reason of the runtime too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import memslot_plugin as memslot

Outcome = tuple[Any, ...]
Call = tuple[Any, ...]
"""Name of a function and its arguments."""

Imports = Callable[["Runtime"], Mapping[str, Mapping[str, Any]]]
"""Factory of a module's imports: Python functions and objects of the runtime."""


class Runtime:
    """Parts that both runtimes share. The module that was compiled last is kept."""

    errors: tuple[type[BaseException], ...]
    memories: tuple[type, ...]
    _last: tuple[bytes, Any] | None = None

    def run(self, module: bytes, imports: Imports | None, calls: Sequence[Call]) -> list[Outcome]:
        """Run a module with these imports and then these calls."""
        compiled = self.compiled(module)
        if compiled is None:
            return [("refused",)]
        types = {(each.module, each.name): each.type for each in compiled.imports}
        given = {
            namespace: {
                name: self._function(value, types[namespace, name])
                if isinstance(value, FunctionType)
                else value
                for name, value in entries.items()
            }
            for namespace, entries in (imports(self) if imports else {}).items()
        }
        try:
            exports = self._instantiate(compiled, given)
        except self.errors as error:
            return [self.reason(error)]
        outcomes: list[Outcome] = [("started",)]
        for name, *arguments in calls:
            try:
                outcomes.append(("value", self._call(exports[name], *arguments)))
            except self.errors as error:
                outcomes.append(self.reason(error))
        for name, export in exports.items():
            if isinstance(export, self.memories):
                outcomes.append(("memory", name, self._content(export)))
        outcomes.append(("exports", {each.name: kind_of(each) for each in compiled.exports}))
        return outcomes

    def compiled(self, module: bytes) -> Any:
        """Compile the module; return None if the runtime refuses it."""
        if self._last is None or self._last[0] != module:
            self._last = module, self._compile(module)
        return self._last[1]

    def bound(self) -> dict[str, Any]:
        """Return arguments that `instantiate` needs beside the imports made here."""
        return {}

    def close(self) -> None:
        """Free objects that no finalizer frees."""


def kind_of(declared: Any) -> str:
    """Return the kind of an export or import."""
    name = type(declared.type).__name__.lower()
    kinds = ("func", "memory", "global", "table")
    return next((kind for kind in kinds if name.startswith(kind)), "tag")


class Wasmtime(Runtime):
    """wasmtime-py with its default engine."""

    def __init__(self, engine: Any = None) -> None:
        import wasmtime

        self.wasmtime = wasmtime
        self.errors = wasmtime.Trap, wasmtime.WasmtimeError
        self.memories = wasmtime.Memory, wasmtime.SharedMemory
        self.engine = engine or wasmtime.Engine()
        self.store = wasmtime.Store(self.engine)

    def memory(self, minimum: int, maximum: int, content: bytes = b"") -> Any:
        kind = self.wasmtime.MemoryType(self.wasmtime.Limits(minimum, maximum))
        memory = self.wasmtime.Memory(self.store, kind)
        if content:  # wasmtime-py cannot write zero bytes into an empty memory
            memory.write(self.store, content)
        return memory

    def i32(self, value: int) -> Any:
        kind = self.wasmtime.GlobalType(self.wasmtime.ValType.i32(), False)
        return self.wasmtime.Global(self.store, kind, self.wasmtime.Val.i32(value))

    def table(self, minimum: int, maximum: int) -> Any:
        limits = self.wasmtime.Limits(minimum, maximum)
        kind = self.wasmtime.TableType(self.wasmtime.ValType.funcref(), limits)
        return self.wasmtime.Table(self.store, kind, None)

    def _function(self, called: Any, kind: Any) -> Any:
        return self.wasmtime.Func(self.store, kind, called)

    def _compile(self, module: bytes) -> Any:
        try:
            return self.wasmtime.Module(self.engine, module)
        except self.wasmtime.WasmtimeError:
            return None

    def _instantiate(self, compiled: Any, given: Mapping[str, Mapping[str, Any]]) -> Any:
        linker = self.wasmtime.Linker(self.engine)
        for namespace, entries in given.items():
            for name, value in entries.items():
                linker.define(self.store, namespace, name, value)
        return linker.instantiate(self.store, compiled).exports(self.store)

    def _call(self, function: Any, *arguments: Any) -> Any:
        return function(self.store, *arguments)

    def _content(self, memory: Any) -> bytes:
        address = ctypes.cast(memory.data_ptr(self.store), ctypes.c_void_p).value or 0
        return ctypes.string_at(address, memory.data_len(self.store))

    def reason(self, error: BaseException) -> Outcome:
        if isinstance(error, self.wasmtime.Trap):
            return "trap", error.trap_code
        return ("failed to start",)

    def bound(self) -> dict[str, Any]:
        return {"store": self.store}

    def close(self) -> None:
        self.store.close()


class Wasmer(Runtime):
    """wasmer-python with its default engine."""

    errors = (RuntimeError,)

    def __init__(self, store: Any = None) -> None:
        import wasmer

        self.wasmer = wasmer
        self.memories = (wasmer.Memory,)
        self.store = store or wasmer.Store()

    def memory(self, minimum: int, maximum: int, content: bytes = b"") -> Any:
        memory = self.wasmer.Memory(self.store, self.wasmer.MemoryType(minimum, maximum, False))
        memory.uint8_view()[0 : len(content)] = content
        return memory

    def i32(self, value: int) -> Any:
        return self.wasmer.Global(self.store, self.wasmer.Value.i32(value))

    def _function(self, called: Any, kind: Any) -> Any:
        return self.wasmer.Function(self.store, called, kind)

    def _compile(self, module: bytes) -> Any:
        try:
            return self.wasmer.Module(self.store, module)
        except BaseException as error:
            # wasmer panics for proposals that it knows by name alone.
            if isinstance(error, RuntimeError) or type(error).__name__ == "PanicException":
                return None
            raise

    def _instantiate(self, compiled: Any, given: Mapping[str, Mapping[str, Any]]) -> Any:
        return {name: export for name, export in self.wasmer.Instance(compiled, given).exports}  # noqa: C416 - it has no keys()

    def _call(self, function: Any, *arguments: Any) -> Any:
        result = function(*arguments)
        return list(result) if isinstance(result, tuple) else result

    def _content(self, memory: Any) -> bytes:
        return bytes(memory.buffer)

    def reason(self, error: BaseException) -> Outcome:
        text = str(error)
        if "link error" in text.lower() or "Error while importing" in text:
            return ("failed to start",)
        # Later lines name a place in the module, which differs in a rewritten one.
        return "trap", text.splitlines()[0]


def runtime(host: str, opened: memslot.Host | None = None) -> Runtime:
    """Return the runtime alone. With a host it uses the host's engine or store, to make imports for guests."""
    if host == "wasmtime":
        return Wasmtime(None if opened is None else opened.engine)
    return Wasmer(None if opened is None else opened.store)
