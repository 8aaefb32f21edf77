"""Instances: calls, resets and the end of a live guest in a leased slot."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import get_ident
from typing import TYPE_CHECKING, Any

from memslot_plugin.errors import (
    ArgumentError,
    ExportNotFound,
    InUse,
    MemslotError,
    UsedAfterClose,
    shown,
)
from memslot_plugin.hosts.leases import RENEWAL, Handle
from memslot_plugin.hosts.live import KEYS, Group, Live, being_reset, ended
from memslot_plugin.hosts.memory import Memory

if TYPE_CHECKING:
    from typing_extensions import Self

    from memslot_plugin.hosts.guest import Guest


class Instance(Handle):
    """A live guest in a leased slot.

    Dropping it without closing gives the slot back at the host's next call; closing it gives it
    back at once.
    """

    __slots__ = ("guest",)

    def __init__(self, guest: Guest, live: Live) -> None:
        self.leases = guest.leases
        self.guest_name = guest.name
        self.generation = live.generation
        self.live = live
        self.guest = guest

    def call(self, name: str, *arguments: Any) -> Any:
        """Call an exported function with Python numbers: None, one value, or a list of several.

        Raises ExportNotFound, ArgumentError, GuestTrap, GuestExit, and whatever a host function
        raised.
        """
        # Not by `enter`, because this is in the path of every request: the function compares generation and thread.
        live = self.live
        if live is None or not live.open:
            live = self.enter()
        try:
            function = live.functions.get(name) or live.function(name)
        except TypeError:  # an object that is in no dictionary
            raise _no_name(name) from None
        return function(self.generation, *arguments)

    def function(self, name: str) -> Callable[..., Any]:
        """Return the exported function, looked up once.

        It is valid until the instance is closed, its lease ends, or it is reset by a new instance:
        UsedAfterClose from then on.
        """
        _require_name(name)
        return functools.partial(self.enter().function(name), self.generation)

    @property
    def exports(self) -> Mapping[str, str]:
        """Every export's kind by name."""
        return self.enter().exports()

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
        """Return the value of an exported global."""
        _require_name(name)
        return self.enter().global_value(name, self.generation)

    def set_global(self, name: str, value: Any) -> None:
        """Set an exported mutable global."""
        _require_name(name)
        self.enter().set_global(name, value, self.generation)

    @property
    def stdout(self) -> bytes:
        """The captured standard output since the instance was instantiated or reset."""
        return self.seen(lambda live: live.output("stdout"))

    @property
    def stderr(self) -> bytes:
        """The captured standard error since the instance was instantiated or reset."""
        return self.seen(lambda live: live.output("stderr"))

    @property
    def native(self) -> Any:
        """The runtime's own instance, for what this surface does not offer.

        Its holder can change what no reset in place restores, so the next `reset` makes a new instance, and
        where the runtime's objects outlive that one (wasmer) the slot is not handed on.
        """
        return self.enter().give_native(self.generation)

    def reset(self) -> None:
        """Return to the guest's pristine state; the handle stays good.

        The reset is in place, in the time of the pages that were written, if it is proven that memories and
        globals are all that can have changed (`guest.report.verdict`), no memory has grown, no heap
        of a garbage collector passed `keep_resident` and `native` was not given away.  Else a new
        instance starts over the reset slot.  If it raises, the
        instance is closed and its slot back in the pool or destroyed.  Raises InUse while a call
        runs, and UsedAfterClose where the guest was closed; the instance goes on then.
        """
        guest, leases, live = self.guest, self.leases, self.live
        if live is None or not live.open or live.generation != self.generation:
            live = self.enter()
        if leases.thread_confined and get_ident() != leases.thread:
            leases.require_thread()
        if guest.closed:
            raise UsedAfterClose(
                f"the guest {guest.name} was closed: its instances go on and cannot be reset; prepare it again"
            )
        if not self.reset_in_place(live, self.generation):
            self.restart(live, RENEWAL)
        if guest.is_snapshot:
            guest.restored(self)

    def restart(self, live: Live, meanwhile: Any) -> Live:
        """Return a new live instance over the reset memories of this one.

        `self.live` is set to `meanwhile` before the old one ends.  In the place of `RENEWAL` it gets the new one
        here, so that an exception on the way does not leave `RENEWAL`.  If this raises, the reset was refused and
        the instance goes on, or `self.live` is None.
        """
        leases, guest = self.leases, self.guest
        if live.binding.store is not None:
            raise InUse(
                "an instance in a store of the embedder's own cannot be reset: end the store instead"
            )
        live.require_idle()
        if self.live is not live:  # another thread was first
            raise (ended if self.live is None else being_reset)(guest.name)
        # Before anything ends: another thread may close the guest meanwhile, and drop its code.
        compiled = guest.open_code()
        group = live.group
        try:
            self.live = meanwhile
            memories = leases.detach(live, self.generation)
            if memories is None:  # the live instance serves another lease, and goes on
                live.refuse(self.generation)
            if len(memories) < len(guest.requests):
                if not live.memories:  # another thread has ended it
                    raise ended(guest.name)
                raise InUse(f"the runtime still uses the memories of an instance of {guest.name}")
            memories = leases.renew(memories)
            renewed = leases.start(guest.runtime.live(compiled, memories, live.binding))
            if group is not None:
                # Before the old one leaves it below: a group closes its guest when it becomes empty.
                renewed.group = group
                group.add(renewed)
            if self.live is not meanwhile:  # its holder closed it when this had just begun
                leases.end(renewed)
                raise ended(guest.name)
            if meanwhile is RENEWAL:
                self.live, self.generation = renewed, renewed.generation
        except BaseException as error:
            if isinstance(error, InUse) and live.open:  # a call has just begun in it
                self.live = live
            else:
                self.live = None
                if not live.ended and live.generation == self.generation:
                    leases.dropped.append(live)
            raise
        finally:
            if group is not None and live.ended:
                group.discard(live)
        leases.resets_by_instantiation += 1
        return renewed

    def reset_in_place(self, live: Live, next_generation: int) -> bool:
        """Reset the live instance in place for the lease `next_generation`; False if only a new instance is pristine.

        If this raises, the reset was refused and the instance goes on, or the instance has ended.
        """
        leases, generation, key = self.leases, self.generation, next(KEYS)
        armed = leases.armed
        if live.bound_to is not armed.epoch:
            live.bind_resets(armed)
        fast_reset = live.fast_reset
        try:
            if fast_reset is not None:
                done = fast_reset(generation, next_generation, key)
                if done is True:
                    live.generation = next_generation
                elif done is not False:
                    live.settle_reset(done, generation, next_generation, key)
            else:
                done = (
                    self.guest.in_place
                    and live.binding.store is None
                    and live.reset(generation, next_generation, key)
                )
        except BaseException:
            # Not acquired with this key: the reset was refused before it changed anything, and the instance goes on.
            if not live.release(key) and live.spoiled_by != key:
                raise
            # Acquired, or changed: memories and globals may be half reset, so the instance ends.
            self.live = None
            if live.open:
                with suppress(MemslotError):  # what is wrong is being raised already
                    leases.end(live)
            raise
        if done is False:
            return False
        leases.resets_in_place += 1
        return True

    def snapshot(self, name: str | None = None) -> Guest:
        """Return a new guest whose instances start where this one is now, between two calls; it goes on.

        Memories, their sizes and every mutable global are captured; imports and WASI are the ones that this
        instance was given, and no start function runs.  Raises SnapshotRefused with the reason where
        there is more state than that, InUse while a call runs, MemoryTooLarge beyond the setting
        image_limit.
        """
        guest = self.guest.snapshot_of(self, name)
        guest.announce()
        return guest

    def fork(self, count: int = 1) -> list[Instance]:
        """Return `count` independent instances that start where this one is now; it goes on.

        They share every page that none of them has written.  A reset of one goes back to this
        point.  Raises what `snapshot` raises, ArgumentError, and PoolExhausted: none is left then.
        """
        if not isinstance(count, int) or count < 0:
            raise ArgumentError(f"a number of forks is an integer, at least 0, and not {count!r}")
        guest = self.guest.snapshot_of(self, None)
        group = Group(guest.close)
        forks: list[Instance] = []
        try:
            for _ in range(count):
                fork = guest.instantiate()
                forks.append(fork)
                live = fork.enter()
                live.group = group
                group.add(live)
        except Exception:
            for fork in forks:
                fork.close()
            raise
        finally:
            if not forks:
                guest.close()
        return forks

    @property
    def closed(self) -> bool:
        """True once the instance has ended, or the lease of this handle."""
        return self.live is not RENEWAL and not self.is_open

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Instance of {self.guest.guest_id}{', closed' * self.closed}>"


def _no_name(name: object) -> ArgumentError:
    return ArgumentError(f"the name of an export is a string, and not {shown(name)}")


def _require_name(name: object) -> None:
    """Raise ArgumentError if no export can be called like this."""
    if not isinstance(name, str):
        raise _no_name(name)
