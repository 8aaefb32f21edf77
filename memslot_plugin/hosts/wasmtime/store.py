"""Stores on wasmtime: the embedder's own in which instances of ours live, and views of our stores for the embedder.

wasmtime ends the process if it meets an object of another store, or a deleted store.  So a lent store ends its
instances before it is deleted, and its identity is compared with that of each object.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from memslot_plugin.errors import InUse, UsedAfterClose
from memslot_plugin.hosts.live import Living, ended
from memslot_plugin.hosts.wasmtime.bridge import wasmtime, wasmtime_ffi


class Tenant(Protocol):
    """An instance as the store that it lives in sees it."""

    cell: Any

    @property
    def guest_name(self) -> str:
        """The guest's name, for errors."""

    @property
    def running(self) -> int:
        """The number of calls that are inside the instance."""

    def finish(self) -> None:
        """End its use of the store."""


class LentStore(wasmtime.Store):
    """A store of the embedder's in which instances of ours live; none of them can be entered once it is closed."""

    tenants: Living[Tenant]
    links: list[object]
    """The imports of its instances, which they may call for as long as the store lives."""
    identity: int
    """The store's number in wasmtime, with which every object of the store begins."""

    def running(self) -> int:
        """Return the number of calls that are inside its instances."""
        return sum(tenant.running for tenant in self.tenants.listed())

    def end_tenants(self) -> None:
        """End every instance; raises InUse while one of them runs."""
        for tenant in self.tenants.listed():
            with suppress(InUse):
                tenant.finish()
            if tenant.cell.context:
                raise InUse(
                    f"the store runs an instance of {tenant.guest_name}, and cannot be closed"
                    " before that call has returned"
                )

    def _delete(self, ptr: Any) -> None:
        self.end_tenants()
        super()._delete(ptr)


class Limits(NamedTuple):
    """The arguments of `wasmtime.Store.set_limits`; a number below 0 is no limit."""

    memory_size: int = -1
    table_elements: int = -1
    instances: int = -1
    tables: int = -1
    memories: int = -1


class BorrowedStore(wasmtime.Store):
    """A store of one of our instances as an object of wasmtime-py's; closing the object does not close the store."""

    def __init__(self, engine: wasmtime.Engine, cell: Any, guest_name: str, limits: Limits) -> None:
        self._limits = limits
        # wasmtime-py has no public way to wrap a store, so this sets what its constructor sets.
        self._set_ptr(ctypes.cast(cell.store, ctypes.POINTER(wasmtime_ffi.wasmtime_store_t)))
        self._Store__context = ctypes.cast(
            cell.context, ctypes.POINTER(wasmtime_ffi.wasmtime_context_t)
        )
        self.engine = engine
        self.guest_name = guest_name

    def _context(self) -> Any:
        if not self.open:  # wasmtime-py would raise ValueError
            raise ended(self.guest_name)
        return super()._context()

    @property
    def open(self) -> bool:
        """True until it is closed."""
        return self._Store__context is not None

    def data(self) -> None:
        """Return None: the store's data is a structure of the C half's, and no object."""

    def set_limits(
        self,
        memory_size: int = -1,
        table_elements: int = -1,
        instances: int = -1,
        tables: int = -1,
        memories: int = -1,
    ) -> None:
        """Set limits of the store (`wasmtime.Store.set_limits`); a lower limit of the settings stays."""
        given = Limits(memory_size, table_elements, instances, tables, memories)
        super().set_limits(
            *(
                ours if theirs < 0 else theirs if ours < 0 else min(ours, theirs)
                for ours, theirs in zip(self._limits, given, strict=True)
            )
        )

    def _delete(self, ptr: Any) -> None:
        self._Store__context = None  # type: ignore[assignment]  # as the package's own does


class NativeInstance(wasmtime.Instance):
    """An instance of ours as an object of wasmtime-py's; its functions are called with its `store`."""

    store: wasmtime.Store


def native_instance(raw: bytes, store: wasmtime.Store) -> NativeInstance:
    """Return the instance of a wasmtime_instance_t as an object of wasmtime-py's."""
    instance = NativeInstance._from_raw(wasmtime_ffi.wasmtime_instance_t.from_buffer_copy(raw))
    assert isinstance(instance, NativeInstance)
    instance.store = store
    return instance


_CLASSES: dict[type, type[LentStore]] = {}
"""The class that a store gets when it is lent, by its class before."""


def lent(store: wasmtime.Store, guest_name: str) -> LentStore:
    """Make a store of the embedder's know its instances, and return it; raises UsedAfterClose."""
    identity = None
    try:
        store._context()
        if not isinstance(store, LentStore):
            number = wasmtime.GlobalType(wasmtime.ValType.i32(), mutable=False)
            identity = identity_of(wasmtime.Global(store, number, wasmtime.Val.i32(0)))
    except ValueError:
        raise UsedAfterClose(
            f"the store for an instance of {guest_name} was closed; make a new one"
        ) from None
    if not isinstance(store, LentStore):
        # Set the attributes before the class: another thread may close the store as soon as it is a LentStore.
        for name, value in ("identity", identity), ("tenants", Living()), ("links", []):
            store.__dict__.setdefault(name, value)
        # Change the class of the object itself: a wrapper would not hear of it when the embedder closes the store.
        store.__class__ = _CLASSES.get(type(store)) or _CLASSES.setdefault(
            type(store), type(type(store).__name__, (LentStore, type(store)), {})
        )
    assert isinstance(store, LentStore)
    return store


def identity_of(native: Any) -> int:
    """Return wasmtime's number for the store that one of wasmtime-py's objects belongs to."""
    return int(ctypes.c_uint64.from_buffer(native._as_extern().of).value)
