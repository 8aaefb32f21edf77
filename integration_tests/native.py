"""The runtimes alone, as their own documentation uses them: what memslot is compared with.

What happened to a module is a list of outcomes: how it started, what each call gave, what each exported memory
holds at the end.  Errors are compared by their kind, traps also by the runtime's own reason.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import memslot_plugin as memslot

Outcome = tuple[Any, ...]
Call = tuple[Any, ...]
"""The name of a function and its arguments."""


class Natives(Protocol):
    """Makes what a module may import besides Python functions: objects of a runtime's own."""

    def memory(self, minimum: int, maximum: int, content: bytes = b"") -> Any: ...
    def i32(self, value: int) -> Any: ...
    def table(self, minimum: int, maximum: int) -> Any: ...


class Declared(NamedTuple):
    """The kind of each export by name, and the imported functions with how many results they have."""

    exports: dict[str, str]
    functions: dict[tuple[str, str], int]


def _declared(exports: Iterable[Any], imports: Iterable[Any]) -> Declared:
    kinds = {"FuncType": "func", "FunctionType": "func", "MemoryType": "memory"}
    kinds |= {"GlobalType": "global", "TableType": "table"}
    return Declared(
        {each.name: kinds.get(type(each.type).__name__, "tag") for each in exports},
        {
            (each.module, each.name): len(each.type.results)
            for each in imports
            if kinds.get(type(each.type).__name__) == "func"
        },
    )


Imports = Callable[[Natives], Mapping[str, Mapping[str, Any]]]


class _Runtime:
    """What both runtimes have in common: the module that was compiled last is kept."""

    _last: tuple[bytes, Any] | None = None

    def _compile(self, module: bytes) -> Any:
        """The module, or None where the runtime refuses it."""
        raise NotImplementedError

    def declared(self, module: bytes) -> Declared | None:
        """What a module that compiles exports and imports."""
        compiled = self.compiled(module)
        return None if compiled is None else _declared(compiled.exports, compiled.imports)

    def compiled(self, module: bytes) -> Any:
        """The module, or None where the runtime refuses it."""
        if self._last is None or self._last[0] != module:
            self._last = module, self._compile(module)
        return self._last[1]


class Wasmtime(_Runtime):
    """wasmtime-py with its default engine."""

    def __init__(self, engine: Any = None) -> None:
        import wasmtime

        self.wasmtime = wasmtime
        self.engine = engine or wasmtime.Engine()
        self.store = wasmtime.Store(self.engine)

    def memory(self, minimum: int, maximum: int, content: bytes = b"") -> Any:
        kind = self.wasmtime.MemoryType(self.wasmtime.Limits(minimum, maximum))
        memory = self.wasmtime.Memory(self.store, kind)
        if content:  # nothing cannot be written into an empty memory of wasmtime-py's
            memory.write(self.store, content)
        return memory

    def i32(self, value: int) -> Any:
        kind = self.wasmtime.GlobalType(self.wasmtime.ValType.i32(), False)
        return self.wasmtime.Global(self.store, kind, self.wasmtime.Val.i32(value))

    def table(self, minimum: int, maximum: int) -> Any:
        kind = self.wasmtime.TableType(
            self.wasmtime.ValType.funcref(), self.wasmtime.Limits(minimum, maximum)
        )
        return self.wasmtime.Table(self.store, kind, None)

    def run(self, module: bytes, imports: Imports | None, calls: Sequence[Call]) -> list[Outcome]:
        wasmtime, store = self.wasmtime, self.store
        compiled = self.compiled(module)
        if compiled is None:
            return [("refused",)]
        linker = wasmtime.Linker(self.engine)
        for namespace, entries in (imports(self) if imports else {}).items():
            for name, given in entries.items():
                if callable(given) and not isinstance(given, wasmtime.Func):
                    kind = next(
                        i.type for i in compiled.imports if (i.module, i.name) == (namespace, name)
                    )
                    given = wasmtime.Func(store, kind, given)  # noqa: PLW2901
                linker.define(store, namespace, name, given)
        try:
            instance = linker.instantiate(store, compiled)
        except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
            return [self.reason(error)]
        outcomes: list[Outcome] = [("started",)]
        exports = instance.exports(store)
        for name, *arguments in calls:
            try:
                outcomes.append(("value", exports[name](store, *arguments)))
            except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
                outcomes.append(self.reason(error))
        for name, export in exports.items():
            if isinstance(export, (wasmtime.Memory, wasmtime.SharedMemory)):
                outcomes.append(("memory", name, self.content(export)))
        return outcomes

    def _compile(self, module: bytes) -> Any:
        try:
            return self.wasmtime.Module(self.engine, module)
        except self.wasmtime.WasmtimeError:
            return None

    def content(self, memory: Any) -> bytes:
        address = ctypes.cast(memory.data_ptr(self.store), ctypes.c_void_p).value or 0
        return ctypes.string_at(address, memory.data_len(self.store))

    def reason(self, error: BaseException) -> Outcome:
        if isinstance(error, self.wasmtime.Trap):
            return "trap", error.trap_code
        return ("failed to start",)

    def bound(self) -> dict[str, Any]:
        """What `instantiate` needs beside the imports that were made here."""
        return {"store": self.store}

    def close(self) -> None:
        self.store.close()


class Wasmer(_Runtime):
    """wasmer-python with its default engine."""

    def __init__(self, store: Any = None) -> None:
        import wasmer

        self.wasmer = wasmer
        self.store = store or wasmer.Store()

    def memory(self, minimum: int, maximum: int, content: bytes = b"") -> Any:
        memory = self.wasmer.Memory(self.store, self.wasmer.MemoryType(minimum, maximum, False))
        memory.uint8_view()[0 : len(content)] = content
        return memory

    def i32(self, value: int) -> Any:
        return self.wasmer.Global(self.store, self.wasmer.Value.i32(value))

    def run(self, module: bytes, imports: Imports | None, calls: Sequence[Call]) -> list[Outcome]:
        compiled = self.compiled(module)
        if compiled is None:
            return [("refused",)]
        given = {
            namespace: {
                name: self._function(compiled, namespace, name, value) if callable(value) else value
                for name, value in entries.items()
            }
            for namespace, entries in (imports(self) if imports else {}).items()
        }
        try:
            instance = self.wasmer.Instance(compiled, given)
        except RuntimeError as error:
            return [self.reason(error)]
        outcomes: list[Outcome] = [("started",)]
        exports = {name: export for name, export in instance.exports}  # noqa: C416 - it has no keys()
        for name, *arguments in calls:
            try:
                result = exports[name](*arguments)
                outcomes.append(("value", list(result) if isinstance(result, tuple) else result))
            except RuntimeError as error:
                outcomes.append(self.reason(error))
        for name, export in exports.items():
            if isinstance(export, self.wasmer.Memory):
                outcomes.append(("memory", name, self.content(export)))
        return outcomes

    def _compile(self, module: bytes) -> Any:
        try:
            return self.wasmer.Module(self.store, module)
        except BaseException as error:
            # It panics for proposals that it knows by name alone.
            if isinstance(error, RuntimeError) or type(error).__name__ == "PanicException":
                return None
            raise

    def _function(self, compiled: Any, namespace: str, name: str, value: Any) -> Any:
        kind = next(i.type for i in compiled.imports if (i.module, i.name) == (namespace, name))
        return self.wasmer.Function(self.store, value, kind)

    def content(self, memory: Any) -> bytes:
        return bytes(memory.buffer)

    def reason(self, error: BaseException) -> Outcome:
        text = str(error)
        if "link error" in text.lower() or "Error while importing" in text:
            return ("failed to start",)
        return "trap", text.splitlines()[
            0
        ]  # the others say where in the module, which is another one

    def bound(self) -> dict[str, Any]:
        """wasmer's objects belong to no instance."""
        return {}

    def close(self) -> None:
        """Nothing: wasmer frees what nobody holds."""


def runtime(host: str, opened: memslot.Host | None = None) -> Wasmtime | Wasmer:
    """The runtime alone; with a host, on its engine or store, to make what its guests may import."""
    if host == "wasmtime":
        return Wasmtime(None if opened is None else opened.engine)
    return Wasmer(None if opened is None else opened.store)


def pooled(
    host: memslot.Host, module: bytes, imports: Imports | None, calls: Sequence[Call]
) -> list[list[Outcome]]:
    """The outcomes in three lives of a guest: a first instance, one in the slot that it left, and a reset one.

    With imports of the runtime's own each life has new ones, and there is no third.
    """
    native = runtime(host.name)
    try:
        guest = host.prepare(module)
    except memslot.InvalidModule:
        return [[("refused",)]]
    lives = []
    with guest:
        for reset in (False, False, True):
            if reset and imports is not None:
                break
            made = runtime(host.name, host)
            binding = {} if imports is None else {"imports": imports(made), **made.bound()}
            lives.append(_life(guest, binding, calls, native, reset=reset))
            made.close()  # ends the instances in it
    return lives


def _life(
    guest: memslot.Guest,
    binding: dict[str, Any],
    calls: Sequence[Call],
    native: Any,
    *,
    reset: bool,
) -> list[Outcome]:
    try:
        instance = guest.instantiate(**binding)
    except memslot.GuestTrap as error:
        return [native.reason(error.native)]
    except memslot.LinkError:
        return [("failed to start",)]
    with instance:
        outcomes = _outcomes(instance, calls, native)
        if reset:
            instance.reset()
            outcomes = _outcomes(instance, calls, native)
    return outcomes


def _outcomes(instance: memslot.Instance, calls: Sequence[Call], native: Any) -> list[Outcome]:
    outcomes: list[Outcome] = [("started",)]
    for name, *arguments in calls:
        try:
            outcomes.append(("value", instance.call(name, *arguments)))
        except memslot.GuestTrap as error:
            outcomes.append(native.reason(error.native))
    exported = {
        name: index
        for index, memory in enumerate(instance.guest.plan.memories)
        for name in memory.exported_as
    }
    for name, kind in instance.exports.items():
        if kind == "memory":
            memory = instance.memories[exported[name]]
            outcomes.append(("memory", name, memory.read(0, memory.byte_size)))
    return outcomes
