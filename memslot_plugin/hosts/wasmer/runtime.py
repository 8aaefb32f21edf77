"""The host on wasmer-python 1.1.0 (CPython up to 3.10), whose objects are confined to their thread.

wasmer has no place for an allocator, so it maps every memory itself, a slot is laid over that, and
the rewritten guest imports it.  wasmer also grows memories itself: that is reported afterwards.

Two of its mistakes shape this file.  An instance does not keep what it imports alive, so a
`WasmerLive` holds all of it.  And the functions of an instance that is gone can still be called
through a table that it shares, so a guest that imports a table is left to wasmer alone.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NoReturn

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
from memslot_plugin.guest.plan import MemoryReport
from memslot_plugin.hosts import saved
from memslot_plugin.hosts.guest import Guest
from memslot_plugin.hosts.host import Host
from memslot_plugin.hosts.live import Binding, Live, ended
from memslot_plugin.hosts.memory import WASM_PAGE
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
    wasmer,
)

_log = logging.getLogger("memslot.wasmer")


class WasmerHost(Host):
    """Runs guests on wasmer-python 1.1.0; every use has to be on the thread that opened it."""

    name = "wasmer"
    imports_memory = True
    growth: ClassVar[Literal["decide", "report"]] = "report"
    thread_confined = True

    def _open_runtime(self) -> None:
        self.store = new_store()
        self._reserved = reserved_bytes()

    def _close_runtime(self) -> None:
        self.store = None

    def _assemble(self, text: str) -> bytes:
        with Boundary(at_compile, "the text"):
            return bytes(wasmer.wat2wasm(text))

    def _compile(self, guest: Guest) -> Compiled:
        plan = guest.plan
        parent: Compiled | None = self._parents_code(guest)
        if parent is not None:
            guest.sets_globals = bool(plan.saved_globals)
            code = parent.code
        else:
            code = self._loaded(guest) or Code.compile(self.store, plan, guest.name)
        compiled = Compiled(code, plan, guest.name, guest.binding)
        if plan.structure is None:
            raise Unsupported(
                f"{guest.name} cannot be bounded by the settings, because wasmer has no limits of its own."
                f" {plan.native}"
            )
        return compiled

    def _loaded(self, guest: Guest) -> Code | None:
        """Return the code that came with the guest, or None if none fits."""
        found = self._saved_code(guest)
        if found is None:
            return None
        try:
            code = Code.load(self.store, guest.plan, guest.name, found[0])
        except MemslotError as error:
            _log.info("the code of %s is compiled again: %s", guest.name, error)
            return None
        guest.reused_code, guest.sets_globals = True, found[1]
        return code

    def _code_key(self, guest: Guest) -> str | None:
        # wasmer compiles for the very processor that it runs on, and does not look when it loads.
        return f"wasmer {installed_version(self.name)}, {saved.machine()}"

    def _serialise(self, guest: Guest) -> bytes:
        compiled: Compiled = guest.compiled
        return bytes(compiled.module.serialize())

    def _map_host_memory(self, memory: MemoryReport, maximum: int) -> Callable[[], HostMapping]:
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

    def _start(
        self, guest: Guest, memories: tuple[LinearMemory, ...], binding: Binding
    ) -> WasmerLive:
        compiled: Compiled = guest.compiled
        owner = _owner_of(memories[0]) if memories and guest.plan.native is None else None
        if binding.store is not None:
            raise Unsupported("wasmer's stores belong to their hosts; use the host of that store")
        with compiled.instantiating:
            bound = compiled.bind(binding, owner)
            # What a failure leaves behind is never used again: wasmer may free the instance while its functions stay in
            # a table that it shares.  A guest that imports a table has no slot, so none of them reaches one.
            instance = wasmer.Instance(compiled.module, bound.imports)
        memory = None if owner is None else owner.memory
        live = WasmerLive(guest, memories, memory, instance, bound)
        if guest.sets_globals:
            live._attach()()
        if guest.captures:
            live.read_globals()
        return live

    def _cut_short(self, memories: tuple[LinearMemory, ...]) -> None:
        for memory in memories:  # a start function may have come far
            if memory.mapping is not None:
                self._report_growth(memory, _owner_of(memory).memory.data_size)


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
        guest: Guest,
        memories: tuple[LinearMemory, ...],
        memory: Any,
        instance: Any,
        bound: BoundImports,
    ) -> None:
        self.memories = memories
        self._host = guest.host
        self._guest = guest
        self._compiled: Compiled = guest.compiled
        self._memory = memory
        self._instance = instance
        self._exports = instance.exports
        self._bound: BoundImports | None = bound
        self._functions: dict[str, Callable[..., Any]] = {}
        self._natives: dict[str, Any] = {}

    @property
    def guest_name(self) -> str:
        return self._guest.name

    def function(self, name: str) -> Callable[..., Any]:
        found = self._functions.get(name)
        if found is None:
            if threading.get_ident() != self._host._thread:
                self._host._require_thread()
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
                f"{name} of {self._guest.name} takes or returns references, which wasmer-python"
                " cannot hand to Python"
            )
        arity, several, parameters = signature.arity, signature.several, signature.parameters
        calls_out, may_grow, offsets = compiled.calls_out, compiled.may_grow, compiled.code.offsets
        thread, get_ident, guest_name = self._host._thread, threading.get_ident, self._guest.name

        def make(live: WasmerLive, natives: dict[str, Any]) -> Callable[..., Any]:
            # Not kept by `make`: a cycle of host and code could end on another thread.
            host = live._host

            def call(generation: int, *arguments: Any) -> Any:
                if get_ident() != thread:
                    host._require_thread()
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
            raise ArgumentError(f"the global {name} of {self._guest.name} is not mutable")
        if generation != self.admits or self.ended:
            self.refuse(generation)
        try:
            found.value = value
        except (TypeError, OverflowError) as error:
            wrong = misfit((value,), (int(self._compiled.globals[name].type),)) or error
            raise ArgumentError(f"the global {name} of {self._guest.name}: {wrong}") from error

    def _global(self, name: str) -> Any:
        type_ = self._compiled.globals.get(name)
        if type_ is None:
            self._no_export(name, "global")
        if int(type_.type) in REFERENCES:
            raise Unsupported(
                f"the global {name} of {self._guest.name} is a reference, which wasmer-python cannot"
                " hand to Python"
            )
        return self._export(name)

    def _export(self, name: str) -> Any:
        if self._exports is None:  # a signal's handler came while it was being closed
            raise ended(self._guest.name)
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
            raise GrowthRefused(f"memory {index} of {self._guest.name}: {error}") from error
        except (TypeError, OverflowError) as error:
            raise ArgumentError(f"memory {index} of {self._guest.name}: {error}") from error
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
        saved = self._guest.plan.saved_globals
        for each in saved:
            if each.type.startswith("(ref "):
                raise SnapshotRefused(
                    f"global {each.index} of {self._guest.name} holds references, {each.type}, which"
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
                self._host._report_growth(self.memories[0], size)

    def _foreign_memory(self, index: int) -> Any:
        """A memory that is not ours: exported by a guest that runs natively, or imported."""
        memories = self._guest.plan.memories
        if 0 <= index < len(memories) and memories[index].exported_as:
            return self._export(memories[index].exported_as[0])
        raise ExportNotFound(
            f"memory {index} of {self._guest.name} cannot be reached: the guest does not export it"
        )

    def _no_export(self, name: str, kind: str) -> NoReturn:
        is_ = self._compiled.kinds.get(name)
        what = "nothing of that name" if is_ is None else f"a {is_} of that name"
        raise ExportNotFound(f"{self._guest.name} has no {kind} {name!r}: it exports {what}")
