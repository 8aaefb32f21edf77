"""Live instances: the runtime's part of one instance, as the floors above see it."""

from __future__ import annotations

import abc
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, NoReturn, TypeVar

from memslot_hooks.types import LinearMemory
from memslot_plugin._core import ffi
from memslot_plugin.errors import (
    AccessOutOfBounds,
    ArgumentError,
    InUse,
    LinkError,
    UsedAfterClose,
    shown,
)
from memslot_plugin.hosts.wasi import Wasi
from memslot_plugin.plugins.arming import Armed

# Looked up once: a request reads and writes as often as it calls.
_BYTES = ffi.typeof("char *")
_cast, _unpack, _memmove = ffi.cast, ffi.unpack, ffi.memmove

_T = TypeVar("_T")

Imports = Mapping[str, Mapping[str, Any]]
"""Module name -> import name -> a Python callable, or an object of the runtime's own."""


KEYS = itertools.count(1)
"""Keys of `Live.acquire`, each used once."""


@dataclass(frozen=True, slots=True)
class Binding:
    """The connections of an instance: imports, WASI, and the embedder's own store if the runtime has such."""

    imports: Imports
    wasi: Wasi | None = None
    store: Any = None

    @classmethod
    def given(cls, imports: Imports | None, wasi: Wasi | None) -> Binding:
        """Return the embedder's imports and WASI; an empty mapping is kept, because it may make imports on demand."""
        return cls({} if imports is None else imports, wasi)

    def __post_init__(self) -> None:
        modules = self.imports
        if not isinstance(modules, Mapping):
            raise LinkError(
                f"imports are a mapping of modules to their imports, and not {shown(modules)}"
            )
        for module, given in modules.items():
            if not isinstance(given, Mapping):
                raise LinkError(
                    f"the imports of the module {module!r} are a mapping of names to objects, and not {shown(given)}"
                )
        if self.wasi is not None and not isinstance(self.wasi, Wasi):
            raise ArgumentError(f"wasi is a memslot.Wasi, and not {shown(self.wasi)}")


class Living(Generic[_T]):
    """The living among objects that others own; any thread may add, discard and list them at any time.

    A weakref.WeakSet raises RuntimeError if another thread adds while it is listed.
    """

    __slots__ = ("__weakref__", "_references")

    def __init__(self) -> None:
        self._references: set[weakref.ref[_T]] = set()

    def add(self, each: _T) -> None:
        """Count an object until it is collected or discarded."""
        self._references.add(weakref.ref(each, self._references.discard))

    def discard(self, each: _T) -> None:
        """Count an object no longer; idempotent."""
        self._references.discard(weakref.ref(each))

    def listed(self) -> list[_T]:
        """Return the living, in no order."""
        # Copy into a list: allocating a tuple may start a collection between two looks at the set.
        return [each for found in list(self._references) if (each := found()) is not None]

    def __len__(self) -> int:
        return len(self._references)


class Live(abc.ABC):
    """One instance of a runtime, from `Runtime.live` over `start` to `close`.

    Its entries (see `hosts.leases`) compare the generation of a handle last.  Those here serve hosts that are
    confined to one thread; wasmtime's are in C.

    `memories` are the leased memories in the order of the guest's requests.  `functions` are those that `function`
    keeps, by name.
    """

    running: int = 0
    """Entries that are on the stack now; an instance that runs cannot end."""
    native_exposed: bool = False
    """True once the embedder got the runtime's own objects, and so may have changed anything."""
    open: bool = False
    """True from the end of its start until its end has begun."""
    ended: bool = False
    """True once it has ended, and its memories are back or with the runtime."""
    group: Group | None = None
    """The instances of a fork, whose guest ends with the last one."""
    dropped: deque[Live] | None = None
    """The list of live instances without a handle, once `Leases.start` has begun."""
    generation: int = 1
    """The lease that is served now."""
    held: int = 0
    """The key of `acquire`, until `restore` or `release`: a signal's handler or a finalizer cannot end it meanwhile."""
    admits: int = 1
    """The lease whose handles may enter: `generation`, or 0 while the instance is held."""
    resets: tuple[Callable[[], object], ...] = ()
    """The resets of `memories`, bound at the first reset: an instance that is used once needs none."""
    wakes: bool = True
    """False if nothing runs out while the instance waits for a lease, so that `wake` need not be called."""
    bound_to: object = None
    """The epoch of the plugins that `resets` are bound to."""

    def __init__(
        self, guest_name: str, memories: tuple[LinearMemory, ...], binding: Binding
    ) -> None:
        self.guest_name = guest_name
        self.memories = memories
        self.binding = binding
        self.functions: dict[str, Callable[..., Any]] = {}

    def bind_resets(self, armed: Armed) -> None:
        """Bind the resets of the memories to the plugins that there are now."""
        # Read the epoch first: a plugin that comes meanwhile must make it an old one.
        epoch = armed.epoch
        self.resets = tuple(map(armed.bound_reset, self.memories))
        self.bound_to = epoch

    def __del__(self) -> None:
        # Append here too: an exception may come before there is a handle, or cut the handle's finalizer short.
        if self.dropped is not None and not self.ended:
            self.dropped.append(self)

    # -- entries

    def refuse(self, generation: int) -> NoReturn:
        """Raise InUse or UsedAfterClose for a handle of that lease, which has no entry."""
        if generation == self.generation and not self.admits:
            raise being_reset(self.guest_name)
        raise ended(self.guest_name)

    def read_memory(self, generation: int, index: int, offset: int, length: int) -> bytes:
        """Return `length` bytes of memory `index`, within an entry; raises AccessOutOfBounds, ExportNotFound."""
        place = self._place(index, offset, length)
        # Compared last: CPython handles signals after a call and at a jump back, so none ends the lease meanwhile.
        if generation != self.admits or self.ended:
            self.refuse(generation)
        return _unpack(place, length)  # type: ignore[no-any-return]

    def write_memory(
        self, generation: int, index: int, offset: int, data: Any, length: int
    ) -> None:
        """Write `data`, a buffer of cffi's or bytes, at `offset` of memory `index`; as `read_memory`."""
        place = self._place(index, offset, length)
        if generation != self.admits or self.ended:  # compared last, as in read_memory
            self.refuse(generation)
        _memmove(place, data, length)

    def _place(self, index: int, offset: int, length: int) -> Any:
        base, byte_size = self.locate(index)
        require_within(index, offset, length, byte_size)
        return _cast(_BYTES, base + offset)

    # -- the adapter's part

    @abc.abstractmethod
    def start(self) -> None:
        """Link and instantiate over `memories`, and set or read the saved globals; called once.

        Raises LinkError, GuestTrap, and the exceptions of host functions; `close` follows then.
        """

    @abc.abstractmethod
    def function(self, name: str) -> Callable[..., Any]:
        """Return the exported function, which takes the generation of a handle and Python numbers; a call is an entry.

        Raises ExportNotFound, and WrongThread if the host is confined to its thread.
        """

    @abc.abstractmethod
    def exports(self) -> Mapping[str, str]:
        """Return every export's kind ("func", "memory", "global", "table", "tag") by name."""

    @abc.abstractmethod
    def global_value(self, name: str, generation: int) -> Any:
        """Return the value of an exported global, within an entry; raises ExportNotFound."""

    @abc.abstractmethod
    def set_global(self, name: str, value: Any, generation: int) -> None:
        """Set an exported mutable global, within an entry; raises ExportNotFound, ArgumentError."""

    @abc.abstractmethod
    def locate(self, index: int) -> tuple[int, int]:
        """Return address and accessible bytes of memory `index`; raises ExportNotFound if it cannot be reached."""

    @abc.abstractmethod
    def grow(self, index: int, pages: int, generation: int) -> int:
        """Grow memory `index` as memory.grow does, within an entry; raises GrowthRefused."""

    @abc.abstractmethod
    def output(self, stream: Literal["stdout", "stderr"]) -> bytes:
        """Return the bytes that the guest has written to a captured stream."""

    def can_restore(self) -> bool:
        """Return true if only memories, saved globals and the state that `restore` renews can have changed.

        Called only for guests whose code and host allow a reset in place.
        """
        for memory in self.memories:
            if memory.byte_size != memory.request.minimum:
                return False
        return not self.native_exposed

    fast_reset: Callable[[int, int, int], int] | None = None
    """`reset` as one call into C, or None; `settle_reset` takes other answers."""
    spoiled_by: int = 0
    """The key of a reset from when it begins to change the instance until it has succeeded, else 0."""

    def reset(self, generation: int, next_generation: int, key: int) -> bool:
        """Reset in place for the lease `next_generation`; False if only a new instance is pristine.

        If it raises, the instance may still be acquired with `key`.
        """
        self.acquire(generation, key, alone=True)
        # Asked once nothing can run any more: a call on another thread may have ended just now.
        if not self.can_restore():
            self.release(key)
            return False
        self.spoiled_by = key
        for reset in self.resets:
            reset()
        self.restore(next_generation)
        self.spoiled_by = 0
        return True

    def settle_reset(self, outcome: int, generation: int, next_generation: int, key: int) -> None:
        """Raise the exception of a `fast_reset` that answered neither True nor False."""
        raise NotImplementedError

    def acquire(self, generation: int, key: int, *, alone: bool = False) -> None:
        """Keep other threads' entries out until `restore` or `release`, and with `alone` those of this thread too.

        Raises InUse while an entry runs, and UsedAfterClose.  `key`, from `KEYS`, tells afterwards if it
        began, because a signal's handler may raise as this method returns.
        """
        if (self.running or self.held) and generation == self.generation and not self.ended:
            raise in_use(self.guest_name)
        if generation != self.generation or self.ended:  # compared last, as in read_memory
            self.refuse(generation)
        self.held = key
        if alone:
            self.admits = 0

    def require_idle(self) -> None:
        """Raise InUse while an entry runs, or while the instance is reset or captured."""
        if self.running or self.held:
            raise in_use(self.guest_name)

    @abc.abstractmethod
    def restore(self, generation: int) -> None:
        """Give every saved global its initial value, renew the instance's WASI, and admit the handles of that lease."""

    def wake(self) -> None:  # noqa: B027 - most have nothing that runs out
        """Renew deadlines at the start of a lease, because the instance may have waited for long."""

    def release(self, key: int) -> bool:
        """Admit entries again without restoring anything.

        False, and nothing happens, if the instance was not acquired with `key`.
        """
        if self.held != key:
            return False
        self.held = 0
        self.admits = self.generation
        return True

    @abc.abstractmethod
    def saved_values(self) -> dict[int, int | None]:
        """Return the present bits of the plan's saved globals, by index, as `wasm.encode_constant` takes them.

        Raises SnapshotRefused for a global that cannot be read.
        """

    def descriptors_changed(self) -> str | None:
        """Return why the guest may have WASI descriptors that a new instance lacks, as a sentence, or None."""
        return None

    @abc.abstractmethod
    def close(self, generation: int | None = None) -> bool | None:
        """Release everything that the runtime holds; idempotent, also after it was cut short.

        True if the memories may be released now, False if the runtime still uses them.  None, and nothing
        happened, if the lease `generation` is given and has ended.  Raises InUse while an entry runs, or while the
        instance is reset or captured; nothing happens then.
        """

    @property
    @abc.abstractmethod
    def native(self) -> Any:
        """The runtime's own instance."""

    def give_native(self, generation: int) -> Any:
        """Return the runtime's own instance for the embedder, within an entry."""
        native = self.native
        if generation != self.admits or self.ended:  # compared last, as in read_memory
            self.refuse(generation)
        self.native_exposed = True
        return native


class Group(Living[Live]):
    """Live instances of one guest that is closed with the last of them."""

    __slots__ = ("_close",)

    def __init__(self, close: Callable[[], None]) -> None:
        super().__init__()
        self._close = close

    def discard(self, each: Live) -> None:
        """Take out a live instance that has ended; after the last one the guest is closed."""
        super().discard(each)
        if not self:
            self._close()


def in_use(name: str) -> InUse:
    """Return the exception for the end, a reset or a capture of an instance that is not idle."""
    return InUse(
        f"the instance of {name} cannot be closed, reset or captured while a call of it runs, by its host functions or"
        " another thread, or while it is being reset; let that return first"
    )


def being_reset(name: str) -> InUse:
    """Return the exception for a handle whose instance is between two states."""
    return InUse(f"the instance of {name} is being reset; enter it after that has returned")


def ended(name: str) -> UsedAfterClose:
    """Return the exception for a handle whose instance, or whose lease, has ended."""
    return UsedAfterClose(
        f"the instance of {name} was closed, or its lease has ended; lease or instantiate the guest again"
    )


def require_within(index: int, offset: int, length: int, byte_size: int) -> None:
    """Raise AccessOutOfBounds if memory `index` of `byte_size` bytes lacks some of these."""
    if offset < 0 or length < 0 or offset + length > byte_size:
        raise AccessOutOfBounds(
            f"bytes [{shown(offset)}, {shown(offset + length)}) are outside memory {index} of {byte_size} bytes"
        )
