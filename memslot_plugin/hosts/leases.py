"""Leases: the one place that decides who has which memory.

A live instance (`Live`) serves one lease after another, and `Live.generation` numbers them.  A `Handle` (an
`Instance`, as this floor sees it) has the number of its lease.  Each use of a handle is an *entry*: it compares the
two numbers once nothing can end the lease any more.  If they differ the entry raises UsedAfterClose and touches
nothing.  While the instance is reset or captured, entries raise InUse.

    lease     ask the plugins for memories
    start     run what a runtime makes of them, in the first lease
    renew     pristine memories for another live instance over the same slots
    end       close what the runtime has, and release the memories

A handle that is dropped instead of closed ends at the next call of its host, on the thread of that call.
"""

from __future__ import annotations

import collections
import logging
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import get_ident
from types import SimpleNamespace
from typing import Any, TypeVar

from memslot_hooks.types import RETIRED, LinearMemory, MemoryRequest
from memslot_plugin._core import catch_up
from memslot_plugin.errors import (
    InUse,
    MemslotError,
    PoolExhausted,
    UsedAfterClose,
    WrongThread,
)
from memslot_plugin.hosts.live import Live, Living, being_reset, ended
from memslot_plugin.plugins import Plugins
from memslot_plugin.settings import Settings

_log = logging.getLogger("memslot.hosts")

_T = TypeVar("_T")


RENEWAL: Any = SimpleNamespace(open=False, ended=False, generation=0)
"""The place of a live instance while a reset makes another one: open to no entry, and not ended either."""


class Handle:
    """The right of one lease to enter a live instance."""

    __slots__ = ("__weakref__", "generation", "guest_name", "leases", "live")

    leases: Leases
    guest_name: str
    generation: int
    """The lease of `live` that the handle is good for; every entry compares it."""
    live: Live | None
    """The live instance; None once the lease has ended here, and `RENEWAL` during a reset that makes another."""

    @property
    def is_open(self) -> bool:
        """True until the live instance, or the lease, has ended."""
        live = self.live
        return live is not None and live.open and live.generation == self.generation

    def enter(self) -> Live:
        """Return the live instance, to be entered with `generation`; raises UsedAfterClose, InUse, WrongThread."""
        live = self.live
        if live is None or not live.open or live.generation != self.generation:
            raise self.refusal()
        leases = self.leases
        if leases.thread_confined and get_ident() != leases.thread:
            leases.require_thread()
        return live

    def seen(self, look: Callable[[Live], _T]) -> _T:
        """Return what `look` finds while another thread may call: the lease has not ended before."""
        live = self.enter()
        found = look(live)
        if live.generation != self.generation:
            live.refuse(self.generation)
        return found

    def refusal(self) -> MemslotError:
        """Return the exception for a use of the handle while nothing behind it is open."""
        return (being_reset if self.live is RENEWAL else ended)(self.guest_name)

    def close(self) -> None:
        """End the instance and give its slot back, pristine; idempotent.  Raises InUse while a call runs."""
        live = self.live
        if live is RENEWAL:
            raise self.refusal()
        if live is not None and not live.ended:
            leases = self.leases
            if leases.thread_confined and get_ident() != leases.thread:
                leases.require_thread()
            leases.end(live, self.generation)
        self.live = None

    def __del__(self) -> None:
        live = getattr(self, "live", None)
        if live is not None and live.generation == self.generation and not live.ended:
            self.leases.dropped.append(live)


class Ready(list[Live]):
    """Live instances of a guest that wait for a lease; their present lease has no handle."""

    __slots__ = ()

    def take(self) -> Live | None:
        """Remove and return the one that came last, or None if there is none."""
        while True:
            try:
                live = self.pop()
            except IndexError:  # also if another thread has taken the last one
                return None
            if live.open:
                return live


class Leases:
    """The memories and live instances of one host."""

    def __init__(
        self, name: str, settings: Settings, plugins: Plugins, *, thread_confined: bool
    ) -> None:
        self.name = name
        self.settings = settings
        self.plugins = plugins
        self.armed = plugins.armed
        self.thread_confined = thread_confined
        self.thread = get_ident()
        self.closed = False
        self.guests: Living[Any] = Living()
        self.dropped: collections.deque[Live] = collections.deque()
        """Live instances that have lost their handle, or that were never finished; a finalizer only appends."""
        self.dropped_code: collections.deque[object] = collections.deque()
        """Compiled code of dropped guests, which has to be freed on the host's thread."""
        self.waiting: list[object] = []
        """An object for each request that waits for a slot."""
        self.retained: Collection[object] = ()
        """The memories that a runtime uses longer than their instances, if it does; set by the runtime."""
        self.settle: Callable[[], None] = lambda: None
        """Release what is `retained` and no longer used; set by the runtime."""
        self.instances = self.resets_in_place = self.resets_by_instantiation = 0
        # A collection may find a live instance and its memories at once.  They are kept here, because its slot would
        # go to another tenant before the runtime has closed it.
        self._live: dict[int, tuple[weakref.ref[Live], tuple[LinearMemory, ...]]] = {}

    # -- memories

    def lease(self, requests: Sequence[MemoryRequest]) -> tuple[LinearMemory, ...]:
        """Ask the plugins for every memory; all or none.  Instances that wait for a lease make room."""
        if self.retained:
            self.settle()
        leased: list[LinearMemory] = []
        armed = self.armed
        try:
            for request in requests:
                try:
                    wait = request.wait_timeout
                    memory = self._wait_for(request) if wait else armed.create_memory(request)
                except PoolExhausted:
                    if wait or not self.end_a_ready_one():
                        raise
                    memory = self._lease_with_room(request)
                leased.append(memory)
                if armed.memory_created is not None:
                    armed.memory_created(memory)
        except Exception as error:  # after an interrupt the garbage collector gives them back
            with suppress(MemslotError):  # the first failure is the one to raise
                self.release(leased)
            if isinstance(error, PoolExhausted) and armed.pool_exhausted is not None:
                armed.pool_exhausted(request, error.limit, error.in_use)
            raise
        return tuple(leased)

    def _lease_with_room(self, request: MemoryRequest) -> LinearMemory:
        """Ask the plugins for a memory; ready instances end one by one before the request fails."""
        while True:
            try:
                return self.armed.create_memory(request)
            except PoolExhausted:
                if not self.end_a_ready_one():
                    raise

    def _wait_for(self, request: MemoryRequest) -> LinearMemory:
        """Ask the plugins for a memory; ready instances end one by one before the request waits."""
        # Not the request: its removal would compare requests in Python, while another thread changes the list.
        waits = object()
        self.waiting.append(waits)  # from now on the end of a lease gives its slot back
        try:
            while any(self.ready()):
                try:
                    memory = self.armed.create_memory(replace(request, wait_timeout=0.0))
                except PoolExhausted:
                    self.end_a_ready_one()
                else:
                    memory.request = request
                    return memory
            return self.armed.create_memory(request)
        finally:
            self.waiting.remove(waits)

    def ready(self) -> list[Ready]:
        """Return what waits for a lease, by guest."""
        return [guest.ready for guest in self.guests.listed()]

    def end_a_ready_one(self) -> bool:
        """End an instance that waits for a lease, of the guest that has the most; False if there is none."""
        for ready in sorted(self.ready(), key=len, reverse=True):
            live = ready.take()
            if live is not None:
                self.end_or_log(live)
                return True
        return False

    def release(self, memories: Sequence[LinearMemory]) -> None:
        """Give every memory back, also if one of them fails; raises the first failure."""
        failure: MemslotError | None = None
        armed = self.armed
        for memory in memories:
            try:
                result = armed.release_memory(memory)
                if armed.memory_reset is not None and result.strategy != RETIRED:
                    armed.memory_reset(memory, result)
            except MemslotError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def renew(self, memories: Sequence[LinearMemory]) -> tuple[LinearMemory, ...]:
        """Return leased memories pristine, or others where a runtime grew one that it cannot shrink.

        If this raises, all of them are released.
        """
        left, renewed = list(memories), list[LinearMemory]()
        armed = self.armed
        try:
            while left:
                memory = left[0]
                if memory.mapping is not None and (
                    memory.exposed or memory.byte_size != memory.request.minimum
                ):
                    self.release([left.pop(0)])
                    renewed += self.lease([memory.request])
                    continue
                armed.reset_and_notify(memory)
                renewed.append(left.pop(0))
        except Exception:
            with suppress(MemslotError):  # the plugin says once more what is being raised already
                self.release([*renewed, *left])
            raise
        return tuple(renewed)

    def grow(self, memory: LinearMemory, byte_size: int) -> bool:
        """Grow a memory to `byte_size` bytes; False if its maximum or a plugin refuses that."""
        before, maximum = memory.byte_size, memory.request.maximum
        if maximum is not None and byte_size > maximum:
            return False
        if not self.armed.grow_memory(memory, byte_size):
            return False
        memory.byte_size = byte_size
        if self.armed.memory_grown is not None and byte_size != before:
            self.armed.memory_grown(memory, byte_size)
        return True

    def report_growth(self, memory: LinearMemory, byte_size: int) -> None:
        """Record that a runtime has grown a memory by itself, and notify the watchers."""
        if byte_size != memory.byte_size:
            memory.record_growth(byte_size)
            if self.armed.memory_grown is not None:
                self.armed.memory_grown(memory, byte_size)

    # -- live instances

    def start(self, live: Live) -> Live:
        """Start a live instance over its leased memories.  If this raises, they are released."""
        live.dropped = self.dropped
        self._live[id(live)] = weakref.ref(live), live.memories
        try:
            live.start()
            live.open = True
        except BaseException:
            # A start function may have written: end what the runtime has before a slot is handed on.
            with suppress(MemslotError):  # the first failure is the one to raise
                self.end(live)
            raise
        return live

    def detach(self, live: Live, generation: int | None = None) -> tuple[LinearMemory, ...] | None:
        """End what the runtime has of a live instance; return its memories, which the caller releases or renews.

        The tuple is empty if the runtime still uses the memories, or if another thread was first.  Returns None
        if the lease `generation` is given and has ended: the instance goes on.  Raises InUse while a call runs.
        """
        if generation is not None and generation != live.generation:
            return None
        finished = False
        try:
            unused = live.close(generation)
            if unused is None:
                finished = True
                return None
            live.open = False
            memories: tuple[LinearMemory, ...] = ()
            if unused:
                # First: an exception below leaves the memories to the garbage collector, and the slots to the pool.
                for memory in live.memories if live.native_exposed else ():
                    memory.exposed = True
                # In one step: only one of two threads has them.
                memories, live.memories = live.memories, ()
                live.resets, live.fast_reset = (
                    (),
                    None,
                )  # bound to slots that may serve other guests from now on
            self._live.pop(id(live), None)
            finished = live.ended = True
        except InUse:  # nothing happened
            finished = True
            raise
        finally:
            if not finished and generation in (None, live.generation):
                self.dropped.append(live)  # the next call finishes what an exception has cut short
        return memories

    def end(self, live: Live, generation: int | None = None) -> None:
        """End a live instance as `detach` does, release its memories, and leave its group; idempotent."""
        memories = self.detach(live, generation)
        if memories is None:
            return
        try:
            self.release(memories)
        finally:
            if live.group is not None:
                live.group.discard(live)

    def end_dropped(self) -> None:
        """Free dropped code, and end the instances that lost their handle or whose end was cut short.

        Those in which a call runs stay in `dropped`.
        """
        self.dropped_code.clear()
        for _ in range(len(self.dropped)):  # each once: those that stay are appended again
            try:
                live = self.dropped.popleft()
            except IndexError:  # another thread has ended the last one
                break
            try:
                if not live.ended:
                    self.end_or_log(live)
            except InUse:  # a function of it runs, which may outlive the handle
                pass
            finally:
                if not live.ended:
                    self.dropped.append(live)

    def end_all(self) -> None:
        """End every live instance, also the dropped ones."""
        for reference, _ in list(self._live.values()):
            live = reference()
            if live is not None:
                self.end_or_log(live)
        self.end_dropped()  # a collection since may have cleared references

    def end_or_log(self, live: Live) -> None:
        """End an instance whose owner is not the caller: a reset that fails destroys its slot, and is logged."""
        try:
            self.end(live)
        except InUse:
            raise
        except MemslotError as error:
            # As text: a kept record would keep the traceback, and with it the slot's memory.
            _log.error(
                "an instance on %s could not be reset, its slot is destroyed: %s",
                self.name,
                str(error),
            )

    def __len__(self) -> int:
        """Return the number of live instances."""
        return len(self._live)

    # -- the owner

    def require_usable(self) -> None:
        """Raise UsedAfterClose or WrongThread if the host cannot be used here."""
        catch_up()
        if self.closed:
            raise UsedAfterClose(f"the {self.name} host was closed; open a new one")
        self.require_thread()

    def require_thread(self) -> None:
        """Raise WrongThread if the runtime confines its objects to another thread than this one."""
        if self.thread_confined and get_ident() != self.thread:
            raise WrongThread(
                f"the {self.name} host was opened on thread {self.thread} and used on {get_ident()};"
                f" {self.name} confines its objects to their thread: open one host per thread"
            )
