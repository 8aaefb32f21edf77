"""Instances: the handles of live guests in leased slots."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from memslot_plugin.errors import (
    ArgumentError,
    ExportNotFound,
    InUse,
    MemslotError,
    UsedAfterClose,
    shown,
)
from memslot_plugin.hosts.live import HOLDS, being_reset, ended
from memslot_plugin.hosts.memory import Memory

if TYPE_CHECKING:
    from typing_extensions import Self

    from memslot_hooks.types import LinearMemory
    from memslot_plugin.hosts.guest import Guest
    from memslot_plugin.hosts.live import Binding, Live

_T = TypeVar("_T")


class _Renewal:
    """Stands where a live instance was while a reset makes another one: the handle has not ended, and admits none."""

    open = False
    generation = 0  # no lease has this number


RENEWAL: Any = _Renewal()


class Instance:
    """A live guest in a leased slot.

    Dropping it without closing gives the slot back at the host's next call; closing it gives it
    back at once.
    """

    __slots__ = ("__weakref__", "_binding", "_generation", "_now", "guest")

    def __init__(self, guest: Guest, live: Live, binding: Binding) -> None:
        self.guest = guest
        self._binding = binding
        self._generation = live.generation
        """The lease of `live` that this handle is good for; every entry compares it."""
        self._now: Live | None = live  # last, for who has it is dropped by its guest's host

    def _live(self) -> Live:
        """The live instance, to be entered; the entry decides if this handle may."""
        live, host = self._now, self.guest.host
        if live is None or not live.open or live.generation != self._generation:
            raise self._refusal(live)
        if host.thread_confined and threading.get_ident() != host._thread:
            host._require_thread()
        return live

    def _refusal(self, live: Live | None) -> MemslotError:
        """The exception for a handle behind which nothing is open."""
        return (being_reset if live is RENEWAL else ended)(self.guest.name)

    def _seen(self, look: Callable[[Live], _T]) -> _T:
        """Look at something while another thread may call: the lease has not ended before it was seen."""
        live = self._live()
        seen = look(live)
        if live.generation != self._generation:
            live.refuse(self._generation)
        return seen

    def call(self, name: str, *arguments: Any) -> Any:
        """Call an exported function with Python numbers: None, one value, or a list of several.

        Raises ExportNotFound, ArgumentError, GuestTrap, GuestExit, and whatever a host function
        raised.
        """
        # What _live says, without the call, for this is in the path of every request; the function looks at the thread.
        live = self._now
        if live is None or not live.open:
            live = self._live()
        try:
            function = live.function(name)
        except TypeError:  # an object that is in no dictionary
            raise _no_name(name) from None
        return function(self._generation, *arguments)

    def function(self, name: str) -> Callable[..., Any]:
        """The exported function itself, looked up once; valid until the instance is closed, its lease ends,
        or it is reset by a new instance: UsedAfterClose from then on.
        """
        _require_name(name)
        return functools.partial(self._live().function(name), self._generation)

    @property
    def exports(self) -> Mapping[str, str]:
        """Every export's kind by name."""
        return self._live().exports()

    @property
    def memory(self) -> Memory:
        """Memory 0; raises ExportNotFound if the guest has none."""
        if not self.guest.plan.memories:
            raise ExportNotFound(f"the guest {self.guest.name} has no linear memory")
        return Memory(self, 0)

    @property
    def memories(self) -> tuple[Memory, ...]:
        """Every linear memory in index order, imported ones first."""
        return tuple(Memory(self, memory.index) for memory in self.guest.plan.memories)

    def global_value(self, name: str) -> Any:
        """The value of an exported global."""
        _require_name(name)
        return self._live().global_value(name, self._generation)

    def set_global(self, name: str, value: Any) -> None:
        """Set an exported mutable global."""
        _require_name(name)
        self._live().set_global(name, value, self._generation)

    @property
    def stdout(self) -> bytes:
        """What the guest wrote to a captured standard output since it was instantiated or reset."""
        return self._seen(lambda live: live.output("stdout"))

    @property
    def stderr(self) -> bytes:
        """The same of standard error."""
        return self._seen(lambda live: live.output("stderr"))

    @property
    def native(self) -> Any:
        """The runtime's own instance, for what this surface does not offer.

        Its holder can change what no reset in place restores, so the next `reset` makes a new instance, and
        where the runtime's objects outlive that one (wasmer) the slot is not handed on.
        """
        return self._live().give_native(self._generation)

    def reset(self) -> None:
        """Back to the guest's pristine state, same handle.

        In place, in the time of the pages that were written, where it is proven that memories and
        globals are all that can have changed (`guest.report.verdict`), no memory has grown, no heap
        of a garbage collector passed `keep_resident` and `native` was not given away; else by a new
        instance over the reset slot.  If it raises, the
        instance is closed and its slot back in the pool or destroyed.  Raises InUse while a call
        runs, and UsedAfterClose where the guest was closed; the instance goes on then.
        """
        live, guest = self._now, self.guest
        if live is None or not live.open or live.generation != self._generation:
            live = self._live()
        if guest.host.thread_confined:
            guest.host._require_thread()
        if guest.closed:
            raise UsedAfterClose(
                f"the guest {guest.name} was closed: its instances go on and cannot be reset; prepare it again"
            )
        if not self._reset_in_place(live, self._generation):
            self._begin_again(live, self)
        if guest.plan.is_snapshot:
            guest._restored(self)

    def _pass_on(self, live: Live) -> Instance:
        """End this lease, and return the handle of the next one, over the same live instance or a new one,
        pristine; raises what `reset` raises.
        """
        if self._reset_in_place(live, self._generation + 1):
            following = Instance(self.guest, live, self.guest.binding)
        else:
            following = self._begin_again(live, None)
        # Once another handle has what is live: it would have no owner after an interrupt in between.
        self._now = None
        if self.guest.plan.is_snapshot:
            self.guest._restored(following)
        return following

    def _begin_again(self, live: Live, handle: Instance | None) -> Instance:
        """Put a new live instance over the memories of this one, which are reset, behind `handle` or a new one."""
        host = self.guest.host
        if self._binding.store is not None:
            raise InUse(
                "an instance in a store of the embedder's own cannot be reset: end the store instead"
            )
        host._require_idle(live)
        if live.generation != self._generation:
            live.refuse(self._generation)
        if self._now is not live:  # another thread was first
            raise (ended if self._now is None else being_reset)(self.guest.name)
        renewed: Live | None = None
        memories: tuple[LinearMemory, ...] = ()
        disposed: bool | None = False
        try:
            self._now = None if handle is None else RENEWAL
            disposed = live.dispose(self._generation)
            if disposed is None:
                live.refuse(self._generation)
            host._unlist(live)
            if not disposed:
                raise InUse(f"a call began in an instance of {self.guest.name} while it was reset")
            # Taken in one step, as an end does: only one of two threads has them.
            memories, live.memories = live.memories, ()
            if len(memories) < len(self.guest.requests):
                raise ended(self.guest.name)
            for place in range(len(memories)):
                memory = memories[place]
                memory.exposed = live.given_away
                memories = (*memories[:place], *memories[place + 1 :])  # what fails releases it
                memory = host._renew(memory)
                memories = (*memories[:place], memory, *memories[place:])
            renewed = host._start(self.guest, memories, self._binding)
            renewed.fork, live.fork = live.fork, None
            if renewed.fork is not None:
                renewed.fork._forks.add(renewed)
                renewed.fork._forks.discard(live)
            live.ended = True
            host._list(renewed)
            if handle is None:
                handle = Instance(self.guest, renewed, self.guest.binding)
            elif handle._now is not RENEWAL:  # its holder closed it when this had just begun
                raise ended(self.guest.name)
            else:
                handle._now, handle._generation = renewed, renewed.generation
        except BaseException:
            self._now = None
            if disposed is None:  # what is live serves another lease, and goes on
                raise
            if renewed is not None:
                host._drop(renewed)
            host._drop(live)
            with suppress(MemslotError):  # what is wrong is being raised already
                if renewed is None:
                    host._cut_short(memories)
                    host._release(memories)
                host._end_dropped()
            raise
        host._resets_by_instantiation += 1
        return handle

    def _reset_in_place(self, live: Live, next_generation: int) -> bool:
        """Reset what is live for the lease of that number; False if only a new instance is pristine."""
        host, key = self.guest.host, next(HOLDS)
        if live.bound_to is not host._armed.epoch:
            live.bind_resets(host._armed)
        fast_reset = live.fast_reset
        try:
            if fast_reset is not None:
                done = fast_reset(live, self._generation, next_generation, key)
                if done is True:
                    live.generation = next_generation
                elif done is not False:
                    live.settle_reset(done, self._generation, next_generation, key)
            else:
                done = (
                    self.guest.in_place
                    and self._binding.store is None
                    and live.reset(self._generation, next_generation, key)
                )
        except BaseException:
            if not live.let_go(key) and live.spoiled_by != key:
                raise
            self._now = None
            if live.open:
                with suppress(MemslotError):  # what is wrong is being raised already
                    host._end(live)
            raise
        if done is False:
            return False
        host._resets_in_place += 1
        return True

    def snapshot(self, name: str | None = None) -> Guest:
        """A new guest whose instances start where this one is now, between two calls; it goes on.

        Memories, their sizes and every mutable global are captured; imports and WASI are the ones that this
        instance was given, and no start function runs.  Raises SnapshotRefused with the reason where
        there is more state than that, InUse while a call runs, MemoryTooLarge beyond the setting
        image_limit.
        """
        return self._snapshot(name, depth=4)

    def _snapshot(self, name: str | None, *, depth: int) -> Guest:
        """`depth` is how many calls from whoever raises a warning the embedder is."""
        live = self._live()
        host = self.guest.host
        host._require_idle(live)
        return host._prepared(
            self.guest._snapshot_of(
                live, name, self._binding, generation=self._generation, depth=depth
            )
        )

    def fork(self, count: int = 1) -> list[Instance]:
        """`count` independent instances that start where this one is now; it goes on.

        They share every page that none of them has written.  A reset of one goes back to this
        point.  Raises what `snapshot` raises, ArgumentError, and PoolExhausted: none is left then.
        """
        if not isinstance(count, int) or count < 0:
            raise ArgumentError(f"a number of forks is an integer, at least 0, and not {count!r}")
        live = self._live()
        host = self.guest.host
        host._require_idle(live)
        guest = self.guest._snapshot_of(
            live, None, self._binding, generation=self._generation, depth=3
        )
        host._guests.add(guest)
        forks: list[Instance] = []
        try:
            for _ in range(count):
                fork = guest.instantiate()
                assert fork._now is not None
                fork._now.fork = guest
                guest._forks.add(fork._now)
                forks.append(fork)
        except BaseException:
            for fork in forks:
                fork.close()
            raise
        finally:
            if not forks:
                guest.close()
        return forks

    def close(self) -> None:
        """End the instance and give its slot back, pristine; twice is a no-op."""
        live, host = self._now, self.guest.host
        if live is not None and live.open:
            if host.thread_confined and threading.get_ident() != host._thread:
                host._require_thread()
            host._end(live, self._generation)
            self._now = None
        elif live is RENEWAL:
            raise self._refusal(live)

    @property
    def closed(self) -> bool:
        """True once the instance has ended, or the lease that this handle is of."""
        live = self._now
        if live is RENEWAL:
            return False
        return live is None or live.generation != self._generation or not live.open

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        live = getattr(self, "_now", None)
        if live is not None and live.generation == self._generation:
            self.guest.host._drop(live)

    def __repr__(self) -> str:
        return f"<Instance of {self.guest.guest_id}{', closed' * self.closed}>"


def _no_name(name: object) -> ArgumentError:
    return ArgumentError(f"the name of an export is a string, and not {shown(name)}")


def _require_name(name: object) -> None:
    """Raise ArgumentError if no export can be called like this."""
    if not isinstance(name, str):
        raise _no_name(name)
