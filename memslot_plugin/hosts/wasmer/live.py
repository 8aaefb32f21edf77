"""A live instance on wasmer-python 1.1.0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import get_ident
from typing import Any, Literal

import wasmer

from memslot_hooks.types import LinearMemory
from memslot_plugin.errors import (
    ArgumentError,
    ExportNotFound,
    GrowthRefused,
    SnapshotRefused,
    Unsupported,
    cause_of,
)
from memslot_plugin.hosts.leases import Leases
from memslot_plugin.hosts.live import Binding, Live, ended
from memslot_plugin.hosts.wasmer.errors import (
    VALUE_ERRORS,
    at_call,
    at_instantiate,
    made_by_wasmer,
)
from memslot_plugin.hosts.wasmer.link import BoundImports, Compiled
from memslot_plugin.hosts.wasmer.state import AttachedGlobals
from memslot_plugin.hosts.wasmer.values import Owner, address_of, export_of, misfit
from memslot_plugin.hosts.wasmer.wasi import Streams


class WasmerLive(Live):
    """One instance, and everything that has to outlive it."""

    # Class attributes, because setting each of them costs every new instance 30 ns.
    wakes = False
    _bound: BoundImports | None = None
    _streams: Streams | None = None
    """The standard streams of a guest that imports WASI."""
    _memory: Any = None
    """wasmer's memory under the slot; None if the guest runs natively or has none."""
    _instance: Any = None
    _exports: Any = None
    _captured: tuple[int, ...] | None = None
    """The bits of the saved globals at the start, if the module does not tell them."""
    _attached: AttachedGlobals | None = None
    _restore: Callable[[], None] | None = None
    """Sets the saved globals to their first values; made at the first reset."""

    def __init__(
        self,
        leases: Leases,
        compiled: Compiled,
        memories: tuple[LinearMemory, ...],
        binding: Binding,
    ) -> None:
        # What the base would do: one is made for every instance.
        self.guest_name = compiled.guest_name
        self.memories = memories
        self.binding = binding
        self._leases = leases
        self._compiled = compiled
        self.functions = {}
        self._natives: dict[str, Any] = {}
        """wasmer's functions behind `functions`; empty once the instance has ended, which ends those too."""

    def start(self) -> None:
        compiled = self._compiled
        if self.binding.store is not None:
            raise Unsupported("wasmer's stores belong to their hosts; use the host of that store")
        owner = None
        if self.memories and compiled.plan.native is None:
            owner = _owner_of(self.memories[0])
            self._memory = owner.memory  # first, because a start function may grow it and trap
        try:
            bound = self._bound = compiled.bind(self.binding, owner)
            # Nothing that a failure leaves behind is used again: wasmer may free the instance while its functions stay
            # in a table that it shares.  A guest that imports a table has no slot, so they reach none.
            instance = self._instance = wasmer.Instance(compiled.module, bound.imports)
            if bound.serves_again:
                compiled.prepared = bound
        except BaseException as error:  # not a `Boundary`, which adds 200 ns
            if made_by_wasmer(error):
                raise at_instantiate(error, self.guest_name, compiled.code.offsets) from cause_of(
                    error
                )
            raise
        self._streams = bound.streams
        self._exports = instance.exports
        if compiled.sets_globals:
            self._attach()()
        if compiled.reads_globals:
            self._captured = compiled.saved.attach(self._exports, None).read()

    # -- exports

    def function(self, name: str) -> Callable[..., Any]:
        found = self.functions.get(name)
        if found is None:
            if get_ident() != self._leases.thread:
                self._leases.require_thread()
            parameters, several = self._compiled.signature(name)
            self._natives[name] = self._export(name)
            found = self.functions[name] = self._entry(name, parameters, several=several)
        return found

    def _entry(
        self, name: str, parameters: tuple[int, ...], *, several: bool
    ) -> Callable[..., Any]:
        """Return the function that enters this instance and calls one of wasmer's."""
        # Each variable that `call` keeps costs every new instance 20 ns.
        compiled, natives, arity = self._compiled, self._natives, len(parameters)
        calls_out, may_grow = compiled.calls_out, compiled.may_grow
        thread = self._leases.thread

        def call(generation: int, *arguments: Any) -> Any:
            if get_ident() != thread:
                self._leases.require_thread()
            if len(arguments) != arity:
                raise ArgumentError(
                    f"{name} of {self.guest_name} takes {arity} arguments, and {len(arguments)} were given"
                )
            if calls_out:
                self.running += 1
            try:
                # Compared last: CPython 3.10 handles signals after a call and at a jump back, and wasmer takes plain
                # numbers alone, so no Python code ends the lease before the guest runs.
                if generation != self.admits or name not in natives:
                    self.refuse(generation)
                result = natives[name](*arguments)
            except BaseException as error:
                # Not a `Boundary`, which adds 90 ns to a call of 660 (CPython 3.10).  The new error gets no name: its
                # traceback has this frame, and the cycle would keep the instance alive.
                if made_by_wasmer(error):
                    if isinstance(error, VALUE_ERRORS):
                        wrong = misfit(arguments, parameters)
                        if wrong is not None:
                            raise ArgumentError(f"{name} of {self.guest_name}: {wrong}") from error
                    raise at_call(
                        error, name, self._compiled.code.offsets, host_function_is_wrong=calls_out
                    ) from cause_of(error)
                raise
            finally:
                if calls_out:
                    self.running -= 1
                # Compared here, because a call of `_report` takes 50 ns.
                if (
                    may_grow
                    and (memory := self._memory) is not None
                    and memory.data_size != self.memories[0].byte_size
                ):
                    self._report()
            return list(result) if several else result

        return call

    def exports(self) -> Mapping[str, str]:
        return self._compiled.kinds

    def global_value(self, name: str, generation: int) -> Any:
        self._compiled.export_type(name, "global")
        found = self._export(name)
        if generation != self.admits or self.ended:  # compared last, as in read_memory
            self.refuse(generation)
        return found.value

    def set_global(self, name: str, value: Any, generation: int) -> None:
        type_ = self._compiled.export_type(name, "global")
        found = self._export(name)
        if not found.mutable:
            raise ArgumentError(f"the global {name} of {self.guest_name} is not mutable")
        if generation != self.admits or self.ended:
            self.refuse(generation)
        try:
            found.value = value
        except VALUE_ERRORS as error:
            wrong = misfit((value,), (int(type_.type),)) or error
            raise ArgumentError(f"the global {name} of {self.guest_name}: {wrong}") from error

    def _export(self, name: str) -> Any:
        if self._exports is None:  # a signal's handler came while it was being closed
            raise ended(self.guest_name)
        return export_of(self._exports, name)

    # -- memories

    def locate(self, index: int) -> tuple[int, int]:
        own, leased = self._memory, self.memories  # at once, for a signal's handler may close it
        if own is not None and index == 0:
            return leased[0].base, own.data_size
        memory = self._foreign_memory(index)
        return address_of(memory), memory.data_size

    def grow(self, index: int, pages: int, generation: int) -> int:
        own = self._memory
        memory = own if own is not None and index == 0 else self._foreign_memory(index)
        if generation != self.admits or self.ended:
            self.refuse(generation)
        try:
            before: int = memory.grow(pages)
        except RuntimeError as error:
            raise GrowthRefused(f"memory {index} of {self.guest_name}: {error}") from error
        except VALUE_ERRORS as error:
            raise ArgumentError(f"memory {index} of {self.guest_name}: {error}") from error
        self._report()
        return before

    def _foreign_memory(self, index: int) -> Any:
        """Return a memory without a slot: a natively running guest exports it, or it was imported."""
        memories = self._compiled.plan.memories
        if 0 <= index < len(memories) and memories[index].exported_as:
            return self._export(memories[index].exported_as[0])
        raise ExportNotFound(
            f"memory {index} of {self.guest_name} cannot be reached: the guest does not export it"
        )

    def _report(self) -> None:
        """Report growth that has not been reported.  A wasm memory cannot shrink, so its slot is retired at release."""
        if self._memory is not None:
            self._leases.report_growth(self.memories[0], self._memory.data_size)

    # -- resets

    def can_restore(self) -> bool:
        if self.native_exposed:
            return False
        if self._memory is not None:
            minimum = self.memories[0].request.minimum
            if self._memory.data_size != minimum or self.memories[0].byte_size != minimum:
                return False
        return self._streams is None or self._streams.changed.value == 0

    def restore(self, generation: int) -> None:
        (self._restore or self._attach())()
        if self._streams is not None:
            self._streams.clear()
        # What release does, without the call.
        self.held = 0
        self.generation = self.admits = generation

    def _attach(self) -> Callable[[], None]:
        """Return what gives every saved global its first value, and keep it for resets."""
        saved, values = self._compiled.saved, self._captured
        self._attached = saved.attach(self._exports, saved.initial if values is None else values)
        self._restore = self._attached.restore
        return self._restore

    # -- snapshots

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
        if self._streams is None or self._streams.changed.value == 0:
            return None
        return "it called functions of WASI that open, close or change descriptors"

    def output(self, stream: Literal["stdout", "stderr"]) -> bytes:
        return b"" if self._streams is None else self._streams.output(stream)

    # -- the end

    @property
    def native(self) -> Any:
        return self._instance

    def close(self, generation: int | None = None) -> bool:  # one thread ends it, within its lease
        self.require_idle()
        self._natives.clear()
        self.functions.clear()
        try:
            self._report()
        finally:
            self._restore = self._attached = None
            # The instance goes first: wasmer does not keep its imports alive, and it would run without them.
            self._instance = self._exports = self._bound = self._memory = self._streams = None
        return True


def _owner_of(memory: LinearMemory) -> Owner:
    mapping = memory.mapping
    if mapping is None or not isinstance(mapping.owner, Owner):
        raise Unsupported(
            f"{memory!r} is not laid over a memory of wasmer's: a plugin has to call map_host_memory"
            " of the request"
        )
    return mapping.owner
