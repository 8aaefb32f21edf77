"""Faults that the adversary looks for. A patch puts each back, and a seed finds it."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from memslot_plugin._core import ffi
from memslot_plugin.allocators import SlotMemory
from memslot_plugin.hosts.instance import Instance
from memslot_plugin.hosts.leases import Handle, Leases
from memslot_plugin.hosts.live import KEYS, Live, require_within
from memslot_plugin.hosts.memory import Memory


@dataclass(frozen=True)
class Mutant:
    """A fault. `seeds` has the seed that finds it on each host that can have it; `says` is in the report."""

    put_back: Callable[[], None]
    says: str
    seeds: Mapping[str, int]
    threads: int = 1


def _every_live() -> list[type[Live]]:
    """Return the classes of live instances of all imported hosts."""
    return Live.__subclasses__()


def _handles_outlive_their_lease() -> None:
    reset = Instance.reset_in_place
    Instance.reset_in_place = lambda self, live, _: reset(self, live, self.generation)  # type: ignore[method-assign]


def _memory_is_read_outside_of_an_entry() -> None:
    checked = Memory.read

    def read(self: Memory, offset: int, length: int) -> bytes:
        if not isinstance(offset, int):
            return checked(self, offset, length)
        base, byte_size = self._handle.enter().locate(self.index)
        require_within(self.index, offset, length, byte_size)
        time.sleep(0.02)
        return bytes(ffi.buffer(ffi.cast("char *", base + offset), length))

    Memory.read = read  # type: ignore[method-assign]


def _around_reset(keep: Callable[[Live], Any], put: Callable[[Live, Any], None]) -> None:
    reset = Instance.reset_in_place

    def reset_but(self: Instance, live: Live, generation: int) -> bool:
        kept = keep(live)
        done = reset(self, live, generation)
        if done:
            put(live, kept)
        return done

    Instance.reset_in_place = reset_but  # type: ignore[method-assign]


def _a_page_is_not_reset() -> None:
    def page(live: Live) -> Any:
        return ffi.buffer(ffi.cast("char *", live.memories[0].base + 16384), 4096)

    def put(live: Live, kept: bytes) -> None:
        page(live)[:] = kept

    _around_reset(lambda live: bytes(page(live)), put)


def _globals_are_not_reset() -> None:
    def put(live: Live, value: Any) -> None:
        live.set_global("count", value, live.generation)

    _around_reset(lambda live: live.global_value("count", live.generation), put)


def _ready_instances_are_not_reset() -> None:
    reset = Instance.reset_in_place

    def within_leases(self: Instance, live: Live, generation: int) -> bool:
        return generation != self.generation or reset(self, live, generation)

    Instance.reset_in_place = within_leases  # type: ignore[method-assign]


def _exposed_slots_are_handed_on() -> None:
    SlotMemory.exposed = property(lambda _: False, lambda _, __: None)  # type: ignore[assignment]


def _native_objects_are_forgotten() -> None:
    from memslot_plugin.hosts.wasmtime.live import WasmtimeLive

    give = WasmtimeLive.give_native

    def forget(self: WasmtimeLive, generation: int) -> Any:
        given = give(self, generation)
        self.cell.changed = 0
        return given

    WasmtimeLive.give_native = forget  # type: ignore[method-assign]
    Live.native_exposed = property(lambda _: False, lambda _, __: None)  # type: ignore[assignment]


def _grown_memories_are_reset_in_place() -> None:
    for kind in _every_live():
        kind.can_restore = lambda self: not self.native_exposed  # type: ignore[method-assign]


def _what_drops_segments_is_reset_in_place() -> None:
    from memslot_plugin.hosts.guest import Guest

    Guest.in_place = property(lambda _: True, lambda _, __: None)  # type: ignore[assignment]


def _children_do_not_reset() -> None:
    process, reset = os.getpid(), Instance.reset_in_place

    def in_the_parent(self: Instance, live: Live, generation: int) -> bool:
        if os.getpid() == process:
            return reset(self, live, generation)
        live.acquire(self.generation, next(KEYS), alone=True)
        live.restore(generation)
        return True

    Instance.reset_in_place = in_the_parent  # type: ignore[method-assign]


def _dropped_handles_are_kept() -> None:
    Leases.end_dropped = lambda self: None  # type: ignore[method-assign]


def _finalizers_want_a_lock() -> None:
    lock, drop, lease = threading.Lock(), Handle.__del__, Leases.lease
    gc.set_threshold(20)

    def drop_locked(self: Handle) -> None:
        with lock:
            drop(self)

    def lease_locked(self: Leases, requests: Any) -> Any:
        with lock:
            return lease(self, requests)

    Handle.__del__ = drop_locked  # type: ignore[method-assign]
    Leases.lease = lease_locked  # type: ignore[method-assign]


MUTANTS = {
    "handles-outlive-their-lease": Mutant(
        _handles_outlive_their_lease, "a handle that ended answered", {"wasmtime": 2, "wasmer": 2}
    ),
    "memory-outside-of-an-entry": Mutant(
        _memory_is_read_outside_of_an_entry, "words of others", {"wasmtime": 11}, threads=4
    ),
    "a-page-is-not-reset": Mutant(
        _a_page_is_not_reset, "words of others", {"wasmtime": 1, "wasmer": 1}
    ),
    "globals-are-not-reset": Mutant(
        _globals_are_not_reset, "the global is", {"wasmtime": 5, "wasmer": 2}
    ),
    "ready-instances-are-not-reset": Mutant(
        _ready_instances_are_not_reset, "a new instance", {"wasmtime": 1, "wasmer": 1}
    ),
    "exposed-slots-are-handed-on": Mutant(
        _exposed_slots_are_handed_on, "words of others", {"wasmer": 3}
    ),
    "native-objects-are-forgotten": Mutant(
        _native_objects_are_forgotten, "found", {"wasmtime": 2, "wasmer": 3}
    ),
    "grown-memories-are-reset-in-place": Mutant(
        _grown_memories_are_reset_in_place, "cannot shrink it", {"wasmer": 1}
    ),
    "dropped-segments-are-reset-in-place": Mutant(
        _what_drops_segments_is_reset_in_place, "once of", {"wasmtime": 3, "wasmer": 2}
    ),
    "children-do-not-reset": Mutant(
        _children_do_not_reset, "a child of", {"wasmtime": 1, "wasmer": 1}
    ),
    "dropped-handles-are-kept": Mutant(
        _dropped_handles_are_kept, "after the last handle", {"wasmtime": 1, "wasmer": 1}
    ),
    "finalizers-want-a-lock": Mutant(
        _finalizers_want_a_lock, "Timeout", {"wasmtime": 3, "wasmer": 1}
    ),
}
