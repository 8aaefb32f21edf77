"""A live instance on wasmtime: calls, globals and memories through the C half.

Objects of wasmtime-py's are made only for a caller that asks for them.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from memslot_hooks.types import LinearMemory
from memslot_plugin._core import InstanceReset, ffi, lib, read
from memslot_plugin.errors import (
    ArgumentError,
    ExportNotFound,
    GrowthRefused,
    UsedAfterClose,
    shown,
)
from memslot_plugin.hosts.live import Binding, Live, ended, require_within
from memslot_plugin.hosts.wasi import Wasi
from memslot_plugin.hosts.wasmtime.bridge import address_of, wasmtime
from memslot_plugin.hosts.wasmtime.creator import Creator
from memslot_plugin.hosts.wasmtime.errors import (
    NATIVE_ERRORS,
    Outcome,
    Refused,
    at_start,
    one_sentence,
    refusal,
    translated,
)
from memslot_plugin.hosts.wasmtime.globals import SavedGlobals, require_readable
from memslot_plugin.hosts.wasmtime.link import BoundImports, Compiled
from memslot_plugin.hosts.wasmtime.store import (
    BorrowedStore,
    LentStore,
    NativeInstance,
    native_instance,
)
from memslot_plugin.hosts.wasmtime.values import (
    NUMBERS,
    V128,
    Name,
    bare,
    fitted,
)
from memslot_plugin.hosts.wasmtime.wasi import Environment, Streams

if TYPE_CHECKING:
    from memslot_plugin.plugins.arming import Armed

_PAGES = 1 << 48
"""More pages than any memory can grow by."""

_CELL, _ENTRY, _GLOBAL = (ffi.typeof(f"ms_wt_{name} *") for name in ("cell", "entry", "global"))

_ADDRESS, _cast = ffi.typeof("uintptr_t"), ffi.cast
_BASE = operator.attrgetter("base")
_acquire, _restore, _copy = lib.ms_wt_acquire, lib.ms_wt_restore, lib.ms_wt_copy


class WasmtimeLive(Live):
    """One instance, in a store of its own or in the embedder's."""

    # No cached_property here: with one, CPython 3.11 keeps all attributes in a dict, and a reset is 10 % slower.
    wakes = False
    token = 0
    """The creator's number for the memories; 0 until the instance begins."""
    bound: BoundImports | None = None
    """The imports, which the instance may call for as long as it lives."""
    environment: Environment | None = None
    streams: Streams | None = None
    _saved: SavedGlobals | None = None
    """The globals that a reset restores, from their first use."""
    _borrowed: BorrowedStore | None = None

    def __init__(  # noqa: PLR0917  # `WasmtimeRuntime.live` alone calls it
        self,
        creator: Creator,
        compiled: Compiled,
        memories: tuple[LinearMemory, ...],
        binding: Binding,
        link: Callable[[Compiled, Binding], BoundImports],
        configure_store: Callable[[wasmtime.Store], None] | None,
    ) -> None:
        # What the base would do: one is made for every instance.
        self.guest_name = compiled.guest_name
        self.memories = memories
        self.binding = binding
        self.cell = ffi.new(_CELL)
        self.address = int(_cast(_ADDRESS, self.cell))
        self._creator = creator
        self._link = link
        self._configure_store = configure_store
        self._compiled = compiled
        self.functions = {}

    def start(self) -> None:
        compiled, binding = self._compiled, self.binding
        bound = compiled.default
        if bound is None or binding is not compiled.binding:
            bound = self._link(compiled, binding)
            # Another `Compiled` if the store is of the other engine.
            compiled = self._compiled = bound.compiled
        self.bound = bound
        self._creator.begin(self)
        bases, store = list(map(_BASE, self.memories)), binding.store
        if bound.environment is None and store is None and self._configure_store is None:
            outcome = lib.ms_wt_start(self.cell, bound.guest, self.token, bases)
        else:
            if store is None:
                lib.ms_wt_open(self.cell, bound.guest)
            else:
                store.tenants.add(self)  # first, because it is told if the store is closed
                store.links.append(bound)
                self.cell.context = address_of(self.require_store())
            self.wakes = True
            # Within an entry: otherwise `configure_store`, or another thread, could close the store before it is used.
            outcome = self.entered(0, lambda: self._begin(bound, bases))
        if outcome:
            self.settle(outcome, lambda error: at_start(error, self.guest_name))
        if compiled.sets_globals:
            self.settle(self._globals().write())
        if compiled.reads_globals:
            self.settle(self._globals().read())

    def _begin(self, bound: BoundImports, bases: list[int]) -> int:
        """Instantiate, after setting up the store; returns the outcome."""
        self.require_store()
        wasi, store = self.binding.wasi, self.binding.store
        if bound.environment is not None:
            self.environment = bound.environment
            if wasi is not bound.wasi:
                self.environment = Environment(wasi or Wasi())
            self.streams = self.environment.give(self.cell)
        if self._configure_store is not None and store is None:
            self._configure_store(self.store())
        return int(lib.ms_wt_instantiate(self.cell, bound.guest, self.token, bases))

    # -- the boundary ------------------------------------------------------------------------------------------------

    def settle(self, outcome: int, refused: Refused | None = None) -> None:
        """Raise the exception of an entry.

        `outcome` is that of the C half, 0 for a plain end; `refused` is as for `Outcome.exception`.
        """
        if not outcome:
            return
        found = Outcome(outcome)
        error = found.exception(self.guest_name, self._compiled.offsets, refused)
        if error is not None:
            try:
                raise error
            finally:
                # The exception's traceback holds this frame: a cycle would keep the instance alive.
                del error, found

    # -- functions ---------------------------------------------------------------------------------------------------

    def function(self, name: str) -> Callable[..., Any]:
        found = self.functions.get(name)
        if found is None:
            found = self._compiled.maker(name)(self)
            if self.binding.store is not None:
                found = self._guarded(found)
            self.functions[name] = found
        return found

    def entered(self, generation: int, action: Callable[[], Any]) -> Any:
        """Return what `action`, which calls wasmtime-py, returns within an entry; generation 0 is the host's."""
        self.require_store()
        entry = ffi.new(_ENTRY)
        try:
            self.settle(lib.ms_wt_enter(self.cell, generation, entry))
            return action()
        except NATIVE_ERRORS as error:
            raise translated(error, self.guest_name, self._compiled.offsets) from None
        finally:
            self.settle(lib.ms_wt_leave(self.cell, entry))

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` for an instance in the embedder's store, which may be closed at any time."""

        def call(generation: int, *arguments: Any) -> Any:
            self.require_store()
            return function(generation, *arguments)

        return call

    def refuse(self, generation: int) -> NoReturn:
        held = self.cell.exclusive and generation == self.generation
        self._refuse(lib.MS_WT_BUSY if held else lib.MS_WT_CLOSED)

    def _refuse(self, flag: int) -> NoReturn:
        raise refusal(flag, self.guest_name) or ended(self.guest_name)

    def require_store(self) -> Any:
        """Return the context of the embedder's store, or None for a store of ours; raises UsedAfterClose."""
        if self.binding.store is None:
            return None
        try:
            return self.binding.store._context()
        except ValueError:
            raise UsedAfterClose(
                f"the store of the instance of {self.guest_name} was closed; instantiate the guest in a new store"
            ) from None

    # -- exports -----------------------------------------------------------------------------------------------------

    def exports(self) -> Mapping[str, str]:
        return self._compiled.export_kinds

    def global_value(self, name: str, generation: int) -> Any:
        kind, _ = self._compiled.global_kind(name)
        self.require_store()
        if kind > V128:
            return self.entered(
                generation, lambda: bare(self.native_export(name).value(self.store()))
            )
        label = self._compiled.name(name)
        found = ffi.new(_GLOBAL, (label.utf8, label.length))
        self.settle(lib.ms_wt_globals_read(self.cell, generation, found, 1))
        return NUMBERS[kind].unpack(ffi.buffer(found.value))[0]

    def set_global(self, name: str, value: Any, generation: int) -> None:
        kind, mutable = self._compiled.global_kind(name)
        self.require_store()
        what = f"the global {name} of the guest {self.guest_name}"
        if not mutable:
            raise ArgumentError(f"{what} is not mutable")
        (value,) = fitted([kind], [value], what, int(self.cell.instance[0]))
        if kind > V128:
            self.entered(
                generation, lambda: self.native_export(name).set_value(self.store(), value)
            )
            return
        label = self._compiled.name(name)
        given = ffi.new(_GLOBAL, (label.utf8, label.length, kind, NUMBERS[kind].pack(value)))
        self.settle(lib.ms_wt_globals_write(self.cell, generation, given, 1))

    # -- resets ------------------------------------------------------------------------------------------------------

    def can_restore(self) -> bool:
        return not self.cell.changed

    def acquire(self, generation: int, key: int, *, alone: bool = False) -> None:
        self.settle(_acquire(self.cell, generation, key, alone))

    def bind_resets(self, armed: Armed) -> None:
        self.fast_reset = (
            None  # first: an exception in between must not leave it with a newer epoch
        )
        super().bind_resets(armed)

    def reset(self, generation: int, next_generation: int, key: int) -> bool:
        done = super().reset(generation, next_generation, key)
        # Make the next one a single call, if nothing but memories and globals is to be renewed.
        if self.environment is None and self._configure_store is None:
            saved = self._globals()
            self.fast_reset = InstanceReset(
                self.address,
                int(ffi.cast("uintptr_t", saved.array)),
                saved.count,
                self.resets,
                saved,
            ).run
        return done

    def settle_reset(self, outcome: int, generation: int, next_generation: int, key: int) -> None:
        """Raise what became of a reset that was refused (`outcome` is negative then), or did not end well."""
        if outcome < 0:
            self.settle(-outcome)
            return
        self.spoiled_by, self.generation = key, next_generation
        self._settle_restore(outcome)
        self.spoiled_by = 0

    def wake(self) -> None:
        if self.environment is not None:
            self.environment.require_workers()
        if self._configure_store is not None:
            self._configure_store(self.store())

    def restore(self, generation: int) -> None:
        self.wake()
        if self.environment is not None:
            self.streams = self.environment.give(self.cell)
        saved = self._globals()
        self.generation = generation
        outcome = _restore(self.cell, generation, saved.array, saved.count)
        if outcome:
            self._settle_restore(outcome)

    def _settle_restore(self, outcome: int) -> None:
        self.settle(outcome)
        if not self.cell.context:  # closed meanwhile
            raise ended(self.guest_name)

    def release(self, key: int) -> bool:
        outcome = ffi.new("uintptr_t *")
        held = bool(lib.ms_wt_release(self.cell, key, outcome))
        if outcome[0]:
            self.settle(outcome[0])
        return held

    def _globals(self) -> SavedGlobals:
        if self._saved is None:
            self._saved = SavedGlobals(self.cell, self._compiled.initial_globals)
        return self._saved

    def saved_values(self) -> dict[int, int | None]:
        plan, name = self._compiled.plan, self.guest_name
        require_readable(plan, name)
        # A second copy: the values in the first one are those that a reset puts back.
        now = SavedGlobals(self.cell, self._globals().array)
        self.settle(now.read())
        return now.bits(plan, name)

    def descriptors_changed(self) -> str | None:
        environment = self.environment
        if environment is None or not environment.has_folders or not self._compiled.opens:
            return None
        return (
            "it can have opened files in the folders that it was given, and wasmtime does not tell"
        )

    # -- memories ----------------------------------------------------------------------------------------------------

    def locate(self, index: int) -> tuple[int, int]:
        place = self._compiled.lease_index.get(index)
        if place is not None:
            if not self.cell.context:
                self.require_store()
                raise ended(self.guest_name)
            memory = self._leased(place)
            return memory.base, memory.byte_size
        self.require_store()
        given = self._imported_memory(index)
        if given is not None:
            store = self.store()
            return ctypes.addressof(given.data_ptr(store).contents), given.data_len(store)
        label = self._label(index)
        base, byte_size = ffi.new("uintptr_t *"), ffi.new("size_t *")
        self.settle(lib.ms_wt_memory_locate(self.cell, label.utf8, label.length, base, byte_size))
        return int(base[0]), int(byte_size[0])

    def _leased(self, place: int) -> LinearMemory:
        try:
            return self.memories[place]
        except IndexError:  # the memories were taken at its end
            raise ended(self.guest_name) from None

    def _copied(self, index: int, offset: int, length: int) -> int | None:
        """Return the address of bytes of a memory in a slot; None for other memories, which a call may move."""
        # Looked up before the entry, which is one call into C.  A memory keeps its base while its cell is open, and
        # becomes smaller only between leases, so the entry is refused whenever the address is not right any more.
        place = self._compiled.lease_index.get(index)
        if place is None:
            return None
        self.require_store()
        memory = self._leased(place)
        require_within(index, offset, length, memory.byte_size)
        return memory.base + offset

    def read_memory(self, generation: int, index: int, offset: int, length: int) -> bytes:
        address = self._copied(index, offset, length)
        if address is None:
            found: bytes = self.entered(
                generation, lambda: ffi.unpack(self._place(index, offset, length), length)
            )
            return found
        content = read(self.address, generation, address, length)
        if not isinstance(content, bytes):
            self._refuse(content)
        return content

    def write_memory(
        self, generation: int, index: int, offset: int, data: Any, length: int
    ) -> None:
        address = self._copied(index, offset, length)
        if address is None:
            self.entered(
                generation, lambda: ffi.memmove(self._place(index, offset, length), data, length)
            )
            return
        refused = _copy(self.cell, generation, address, data, length)
        if refused:
            self._refuse(refused)

    def _label(self, index: int) -> Name:
        names = self._compiled.plan.memories[index].exported_as
        if not names:
            raise ExportNotFound(
                f"memory {index} of the guest {self.guest_name} is not exported, and wasmtime finds it by that alone;"
                " export it"
            )
        return self._compiled.name(names[0])

    def _imported_memory(self, index: int) -> wasmtime.Memory | None:
        """Return the embedder's memory if that is the only way to find it, because it is not exported."""
        structure = self._compiled.plan.structure
        name = None if structure is None else structure.memories[index].imported
        if name is None or self._compiled.plan.memories[index].exported_as:
            return None
        given = self.binding.imports.get(name.module, {}).get(name.name)
        return given if isinstance(given, wasmtime.Memory) else None

    def grow(self, index: int, pages: int, generation: int) -> int:
        label = self._label(index)
        what = f"memory {index} of the guest {self.guest_name}"
        self.require_store()
        if not 0 <= pages < _PAGES:
            raise GrowthRefused(f"{what} cannot grow by {shown(pages)} pages")
        before = ffi.new("uint64_t *")
        self.settle(
            lib.ms_wt_memory_grow(self.cell, generation, label.utf8, label.length, pages, before),
            lambda error: GrowthRefused(
                f"{what} may not grow by {pages} pages: {one_sentence(str(error))}"
            ),
        )
        return int(before[0])

    # -- wasmtime-py's objects ---------------------------------------------------------------------------------------

    def store(self) -> wasmtime.Store:
        """Return wasmtime-py's view of the store; raises UsedAfterClose."""
        if self.require_store() is not None:
            given: wasmtime.Store = self.binding.store
            return given
        borrowed = self._borrowed
        if borrowed is not None and borrowed.open:
            return borrowed
        if self.cell.exclusive and not lib.ms_wt_elsewhere(self.cell):  # this thread's
            return self._borrow()
        # Within an entry: otherwise another thread could close the store, and the view would outlive it.
        made: BorrowedStore = self.entered(0, self._borrow)
        return made

    def _borrow(self) -> BorrowedStore:
        borrowed = self._borrowed
        if borrowed is None or not borrowed.open:
            borrowed = self._borrowed = BorrowedStore(
                self._compiled.engine, self.cell, self.guest_name, self._compiled.limits
            )
        return borrowed

    @property
    def native(self) -> NativeInstance:
        """The instance as an object of wasmtime-py's, with its `store`."""
        return native_instance(bytes(ffi.buffer(self.cell.instance)), self.store())

    def give_native(self, generation: int) -> NativeInstance:
        def give() -> NativeInstance:
            self.native_exposed = True
            self.cell.changed = 1
            return self.native

        given: NativeInstance = self.entered(generation, give)
        return given

    def native_export(self, name: str) -> Any:
        return self.native.exports(self.store())[name]

    def output(self, stream: Literal["stdout", "stderr"]) -> bytes:
        return b"" if self.streams is None else self.streams.read(stream)

    # -- the end -----------------------------------------------------------------------------------------------------

    @property
    def running(self) -> int:  # type: ignore[override]  # the C half counts
        """The number of calls that are inside the instance, on any thread."""
        inside = int(self.cell.depth)
        borrowed: object = self._borrowed
        if isinstance(borrowed, LentStore):  # other instances live in this one's store
            inside += borrowed.running()
        return inside

    def finish(self) -> None:
        """End the instance because the embedder's store is closed; its memories come back when that is deleted."""
        if self._creator.finish(self):
            # In one step: only one of two threads has them.
            memories, self.memories = self.memories, ()
            self._creator.release(memories)

    def close(self, generation: int | None = None) -> bool | None:
        if not self.token:  # the start has failed before wasmtime heard of the memories
            return True
        return self._creator.finish(self, generation)

    def forget_views(self) -> None:
        """Close wasmtime-py's objects of the store, which raise from now on."""
        # The functions refer to this object: the cycle would keep it until the next garbage collection.
        self.functions.clear()
        borrowed = self._borrowed
        if borrowed is not None:
            borrowed.close()  # raises InUse while an instance in a store that was lent runs
            self._borrowed = None
