"""The host on wasmer-python 1.1.0 (CPython up to 3.10), whose objects are confined to their thread.

wasmer has no place for an allocator, so it maps every memory itself, a slot is laid over that, and
the rewritten guest imports it.  wasmer also grows memories itself: that is reported afterwards.

Two of its mistakes shape this file.  An instance does not keep what it imports alive, so a
`WasmerLive` holds all of it.  And the functions of an instance that is gone can still be called
through a table that it shares, so a guest that imports a table is left to wasmer alone.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import wasmer

from memslot_hooks.types import HostMapping, LinearMemory
from memslot_plugin._core.limits import system_call_error
from memslot_plugin.errors import (
    ArgumentError,
    ExportNotFound,
    GrowthRefused,
    MemslotError,
    SnapshotRefused,
    Unsupported,
    cause_of,
)
from memslot_plugin.guest.plan import MemoryReport, Plan
from memslot_plugin.hosts.host import Host
from memslot_plugin.hosts.leases import Leases
from memslot_plugin.hosts.live import Binding, Live, ended
from memslot_plugin.hosts.runtime import Reuse, Runtime
from memslot_plugin.hosts.versions import installed_version
from memslot_plugin.hosts.wasmer.errors import (
    VALUE_ERRORS,
    Boundary,
    at_call,
    at_compile,
    made_by_wasmer,
)
from memslot_plugin.hosts.wasmer.link import BoundImports, Code, Compiled
from memslot_plugin.hosts.wasmer.state import AttachedGlobals
from memslot_plugin.hosts.wasmer.values import (
    REFERENCES,
    WASM32_BYTES,
    Owner,
    address_of,
    export_of,
    misfit,
    new_store,
    reserved_bytes,
)
from memslot_plugin.settings import Settings
from memslot_plugin.wasm import WASM_PAGE

_log = logging.getLogger("memslot.wasmer")


class WasmerHost(Host):
    """Runs guests on wasmer-python 1.1.0; every use has to be on the thread that opened it."""

    runtime: WasmerRuntime

    def __init__(self, settings: Settings | None = None, *, plugins: Iterable[object] = ()) -> None:
        super().__init__(WasmerRuntime(), settings, plugins=plugins)

    @property
    def store(self) -> Any:
        """The wasmer.Store of imports; None once the host is closed."""
        return self.runtime.store


class WasmerRuntime(Runtime):
    """The store of a `WasmerHost`."""

    name = "wasmer"
    imports_memory = True
    growth: ClassVar[Literal["decide", "report"]] = "report"
    thread_confined = True

    def open(self, leases: Leases) -> None:
        """Make the store."""
        self.leases = leases
        self.store = new_store()
        self._reserved = reserved_bytes()

    def close(self) -> None:
        """Drop the store."""
        self.store = None

    def assemble(self, text: str) -> bytes:
        """Return WebAssembly text as a binary module; raises InvalidModule."""
        with Boundary(at_compile, "the text"):
            return bytes(wasmer.wat2wasm(text))

    def compile(self, plan: Plan, name: str, binding: Binding, reuse: Reuse) -> Compiled:
        """Compile a guest's module, or take code that serves again; raises InvalidModule, Unsupported."""
        parent: Compiled | None = reuse.of_parent(plan)
        found = None if parent is not None else self._saved(plan, name, reuse)
        if parent is not None:
            code, sets_globals = parent.code, bool(plan.saved_globals)
        elif found is not None:
            code, sets_globals = found
        else:
            code, sets_globals = Code.compile(self.store, plan, name), False
        compiled = Compiled(code, plan, name, binding)
        compiled.sets_globals, compiled.reused = sets_globals, found is not None
        if plan.structure is None:
            raise Unsupported(
                f"{name} cannot be bounded by the settings, because wasmer has no limits of its own."
                f" {plan.native}"
            )
        return compiled

    def _saved(self, plan: Plan, name: str, reuse: Reuse) -> tuple[Code, bool] | None:
        """Return code that came with the guest, and true if globals are to be set; None if none fits."""
        found = reuse.saved(plan, self.code_key(plan))
        if found is None:
            return None
        try:
            return Code.load(self.store, plan, name, found[0]), found[1]
        except MemslotError as error:
            _log.info("the code of %s is compiled again: %s", name, error)
            return None

    def code_key(self, plan: Plan) -> str:  # all code is for this machine
        """Return the version, and the machine with the features of its processor."""
        # wasmer compiles for the very processor that it runs on, and does not look when it loads.
        return f"wasmer {installed_version(self.name)}, {_machine()}"

    def live(
        self, compiled: Compiled, memories: tuple[LinearMemory, ...], binding: Binding
    ) -> WasmerLive:
        """Return an instance that has not started."""
        return WasmerLive(self.leases, compiled, memories, binding)

    def map_host_memory(self, memory: MemoryReport, maximum: int) -> Callable[[], HostMapping]:
        """Return the call that makes a memory of wasmer's, which reserves its address range."""
        minimum, largest = (
            memory.minimum_bytes // WASM_PAGE,
            min(maximum, WASM32_BYTES) // WASM_PAGE,
        )
        kind = wasmer.MemoryType(minimum, largest, False)
        shape = (memory.minimum_bytes, maximum)

        def create() -> HostMapping:
            try:
                made = wasmer.Memory(self.store, kind)
            except RuntimeError as error:
                raise system_call_error(
                    errno.ENOMEM, f"mapping {self._reserved} bytes of address space in wasmer"
                ) from error
            owner = Owner(made)
            return HostMapping(
                address_of(made), made.data_size, self._reserved, owner, owner.forget, shape
            )

        return create


def _machine() -> str:
    """Return the kind of this machine, with a digest of the features of its processor."""
    try:
        described = Path("/proc/cpuinfo").read_bytes()
    except OSError:
        described = b""
    features = sorted(
        {line for line in described.splitlines() if line.startswith((b"flags", b"Features"))}
    )
    return f"{os.uname().machine} {hashlib.sha256(b''.join(features)).hexdigest()[:16]}"


def _owner_of(memory: LinearMemory) -> Owner:
    mapping = memory.mapping
    if mapping is None or not isinstance(mapping.owner, Owner):
        raise Unsupported(
            f"{memory!r} is not laid over a memory of wasmer's: a plugin has to call map_host_memory"
            " of the request"
        )
    return mapping.owner


class WasmerLive(Live):
    """One instance, and everything that has to outlive it."""

    _captured: tuple[int, ...] | None = None
    """What its globals held when it began, where the module does not tell."""
    _attached: AttachedGlobals | None = None
    _restore: Callable[[], None] | None = None

    def __init__(
        self,
        leases: Leases,
        compiled: Compiled,
        memories: tuple[LinearMemory, ...],
        binding: Binding,
    ) -> None:
        self.memories = memories
        self.binding = binding
        self._leases = leases
        self._compiled = compiled
        self._memory: Any = None
        self._instance: Any = None
        self._exports: Any = None
        self._bound: BoundImports | None = None
        self._functions: dict[str, Callable[..., Any]] = {}
        self._natives: dict[str, Any] = {}

    @property
    def guest_name(self) -> str:
        return self._compiled.guest_name

    def start(self) -> None:
        compiled = self._compiled
        if self.binding.store is not None:
            raise Unsupported("wasmer's stores belong to their hosts; use the host of that store")
        owner = None
        if self.memories and compiled.plan.native is None:
            owner = _owner_of(self.memories[0])
            self._memory = owner.memory  # first, because a start function may grow it and trap
        with compiled.instantiating:
            self._bound = compiled.bind(self.binding, owner)
            # What a failure leaves behind is never used again: wasmer may free the instance while its functions stay in
            # a table that it shares.  A guest that imports a table has no slot, so none of them reaches one.
            self._instance = wasmer.Instance(compiled.module, self._bound.imports)
        self._exports = self._instance.exports
        if compiled.sets_globals:
            self._attach()()
        if compiled.reads_globals:
            self.read_globals()

    def function(self, name: str) -> Callable[..., Any]:
        found = self._functions.get(name)
        if found is None:
            self._leases.require_thread()
            make = self._compiled.callables.get(name)
            if make is None:
                make = self._compiled.callables[name] = self._maker(name)
            self._natives[name] = self._export(name)
            found = self._functions[name] = make(self, self._natives)
        return found

    def _maker(self, name: str) -> Callable[[WasmerLive, dict[str, Any]], Callable[..., Any]]:
        """What makes the function to call for one instance of this guest or another; `natives` is empty again when
        that has ended, and so has the function.
        """
        compiled = self._compiled
        signature = compiled.functions.get(name)
        if signature is None:
            self._no_export(name, "func")
        if signature.refers:
            raise Unsupported(
                f"{name} of {self.guest_name} takes or returns references, which wasmer-python"
                " cannot hand to Python"
            )
        arity, several, parameters = signature.arity, signature.several, signature.parameters
        calls_out, may_grow, offsets = compiled.calls_out, compiled.may_grow, compiled.code.offsets
        thread, get_ident, guest_name = self._leases.thread, threading.get_ident, self.guest_name

        def make(live: WasmerLive, natives: dict[str, Any]) -> Callable[..., Any]:
            # Not kept by `make`: a cycle of host and code could end on another thread.
            leases = live._leases

            def call(generation: int, *arguments: Any) -> Any:
                if get_ident() != thread:
                    leases.require_thread()
                if len(arguments) != arity:
                    raise ArgumentError(
                        f"{name} of {guest_name} takes {arity} arguments, and {len(arguments)} were given"
                    )
                if calls_out:
                    live.running += 1
                try:
                    # Compared last: wasmer takes plain numbers alone, and CPython 3.10 handles signals after a call and
                    # at a jump back, so nothing can end the lease before the call.
                    if generation != live.admits or name not in natives:
                        live.refuse(generation)
                    result = natives[name](*arguments)
                except BaseException as error:
                    # No name for the new error: its traceback holds this frame, and a cycle of the two
                    # would keep the instance alive.
                    if made_by_wasmer(error):
                        if isinstance(error, VALUE_ERRORS):
                            wrong = misfit(arguments, parameters)
                            if wrong is not None:
                                raise ArgumentError(f"{name} of {guest_name}: {wrong}") from error
                        raise at_call(
                            error, name, offsets, host_function_is_wrong=calls_out
                        ) from cause_of(error)
                    raise
                finally:
                    if calls_out:
                        live.running -= 1
                    if may_grow:
                        live._report()
                return list(result) if several else result

            return call

        return make

    def exports(self) -> Mapping[str, str]:
        return self._compiled.kinds

    def global_value(self, name: str, generation: int) -> Any:
        found = self._global(name)
        if generation != self.admits or self.ended:  # compared last, as in read_memory
            self.refuse(generation)
        return found.value

    def set_global(self, name: str, value: Any, generation: int) -> None:
        found = self._global(name)
        if not found.mutable:
            raise ArgumentError(f"the global {name} of {self.guest_name} is not mutable")
        if generation != self.admits or self.ended:
            self.refuse(generation)
        try:
            found.value = value
        except (TypeError, OverflowError) as error:
            wrong = misfit((value,), (int(self._compiled.globals[name].type),)) or error
            raise ArgumentError(f"the global {name} of {self.guest_name}: {wrong}") from error

    def _global(self, name: str) -> Any:
        type_ = self._compiled.globals.get(name)
        if type_ is None:
            self._no_export(name, "global")
        if int(type_.type) in REFERENCES:
            raise Unsupported(
                f"the global {name} of {self.guest_name} is a reference, which wasmer-python cannot"
                " hand to Python"
            )
        return self._export(name)

    def _export(self, name: str) -> Any:
        if self._exports is None:  # a signal's handler came while it was being closed
            raise ended(self.guest_name)
        return export_of(self._exports, name)

    def locate(self, index: int) -> tuple[int, int]:
        own, leased = self._memory, self.memories  # at once, for a signal's handler may close it
        if own is not None and index == 0:
            return leased[0].base, own.data_size
        memory = self._foreign_memory(index)
        return address_of(memory), memory.data_size

    def grow(self, index: int, pages: int, generation: int) -> int:
        memory = (
            self._memory if self._memory is not None and index == 0 else self._foreign_memory(index)
        )
        if generation != self.admits or self.ended:
            self.refuse(generation)
        try:
            before: int = memory.grow(pages)
        except RuntimeError as error:
            raise GrowthRefused(f"memory {index} of {self.guest_name}: {error}") from error
        except (TypeError, OverflowError) as error:
            raise ArgumentError(f"memory {index} of {self.guest_name}: {error}") from error
        self._report()
        return before

    def output(self, stream: Literal["stdout", "stderr"]) -> bytes:
        streams = None if self._bound is None else self._bound.streams
        return b"" if streams is None else streams.output(stream)

    # -- resets

    def can_restore(self) -> bool:
        if self.given_away:
            return False
        if self._memory is not None:
            minimum = self.memories[0].request.minimum
            if self._memory.data_size != minimum or self.memories[0].byte_size != minimum:
                return False
        streams = None if self._bound is None else self._bound.streams
        return streams is None or streams.changed.value == 0

    def restore(self, generation: int) -> None:
        (self._restore or self._attach())()
        streams = None if self._bound is None else self._bound.streams
        if streams is not None:
            streams.clear()
        # What let_go does, without the call.
        self.held = 0
        self.generation = self.admits = generation

    def _attach(self) -> Callable[[], None]:
        """Return what gives every saved global its initial value, and keep it for resets."""
        saved, values = self._compiled.saved, self._captured
        self._attached = saved.attach(self._exports, saved.initial if values is None else values)
        self._restore = self._attached.restore
        return self._restore

    def read_globals(self) -> None:
        """Make the values that the saved globals have now those of a reset."""
        self._captured = self._compiled.saved.attach(self._exports, None).read()

    def saved_values(self) -> dict[int, int | None]:
        saved = self._compiled.plan.saved_globals
        for each in saved:
            if each.type.startswith("(ref "):
                raise SnapshotRefused(
                    f"global {each.index} of {self.guest_name} holds references, {each.type}, which"
                    " wasmer-python cannot read; use wasmtime, or keep the reference in a table"
                )
        values = self._compiled.saved.attach(self._exports, None).read()
        return {each.index: value for each, value in zip(saved, values, strict=True)}

    def descriptors_changed(self) -> str | None:
        streams = None if self._bound is None else self._bound.streams
        if streams is None or streams.changed.value == 0:
            return None
        return "it called functions of WASI that open, close or change descriptors"

    def dispose(self, generation: int | None = None) -> bool:
        self._natives.clear()
        self._functions.clear()
        try:
            self._report()
        finally:
            self._restore = self._attached = None
            self._instance = self._exports = self._memory = self._bound = None
        return True

    @property
    def native(self) -> Any:
        return self._instance

    def _report(self) -> None:
        """Tell the plugins if the memory has grown since they last heard."""
        if self._memory is not None:
            size = self._memory.data_size
            if size != self.memories[0].byte_size:
                self._leases.report_growth(self.memories[0], size)

    def _foreign_memory(self, index: int) -> Any:
        """A memory that is not ours: exported by a guest that runs natively, or imported."""
        memories = self._compiled.plan.memories
        if 0 <= index < len(memories) and memories[index].exported_as:
            return self._export(memories[index].exported_as[0])
        raise ExportNotFound(
            f"memory {index} of {self.guest_name} cannot be reached: the guest does not export it"
        )

    def _no_export(self, name: str, kind: str) -> NoReturn:
        is_ = self._compiled.kinds.get(name)
        what = "nothing of that name" if is_ is None else f"a {is_} of that name"
        raise ExportNotFound(f"{self.guest_name} has no {kind} {name!r}: it exports {what}")
