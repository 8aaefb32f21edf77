"""The pool: leases of slots, safe for threads, finalizers and signal handlers.

A garbage collection or a signal may come while a thread has the pool's lock, and run a finalizer or a
handler there.  So a release never takes the lock: it resets the slot and puts it into a queue, from which
the lock's next owner, or a lease that waits, takes it.  A call that needs the lock while its own thread
has it raises InUse.

A pool knows no hosts: a runtime that insists on its own mappings passes a way to make them, and the pool
keeps, counts and hands out those like its own.
"""

from __future__ import annotations

import functools
import logging
import queue
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from memslot_hooks.types import RETIRED, HostMapping, PoolStatistics, ResetResult
from memslot_plugin._core import after_fork, catch_up
from memslot_plugin.errors import (
    InUse,
    MemslotError,
    PoolExhausted,
    PoolTimeout,
    SettingError,
    UsedAfterClose,
)
from memslot_plugin.memory.backing import Holder
from memslot_plugin.memory.inventory import OWN, Inventory, destroy_or_log
from memslot_plugin.memory.lease import RETURNED, Returns, SlotLease, not_leased
from memslot_plugin.memory.region import CLEAN, DIRTY, UNKNOWN
from memslot_plugin.memory.slot import Slot

if TYPE_CHECKING:
    from typing_extensions import Self

    from memslot_plugin.memory.image import Image
    from memslot_plugin.memory.reset import Reset

_log = logging.getLogger("memslot.pool")

_RETIRED = ResetResult(None, 0, RETIRED)


class Pool:
    """Slots and the policy by which they are handed out; safe for threads.

    `slots` bounds how many memories live at once.  `reserved` and `guard` are bytes per slot, rounded
    up to host pages.  `allocation`: "pooling" (one reservation, made at the first lease) or "on-demand"
    (each slot over a reservation of its own, unmapped at release).  `reset` is a strategy of
    `memory.reset`.  `strategy`: "affinity" gives a guest the slot that it used last (nothing to map
    then), else a never-used slot while fewer than `max_unused_warm_slots` are free, else the least
    recently used one; "next-available" the most recently released one; "random" any.  `audit` is the
    share of resets after which all bytes are compared with the image.

    Raises SettingError.  Close the pool, or use it in a with statement.
    """

    def __init__(
        self,
        *,
        slots: int,
        reserved: int,
        guard: int,
        reset: Reset,
        strategy: str = "affinity",
        max_unused_warm_slots: int | None = None,
        allocation: str = "pooling",
        growth: str = "mprotect",
        audit: float = 0.0,
        name: str = "memfd",
    ) -> None:
        if not 0 <= audit <= 1:
            raise SettingError(f"audit must be from 0 to 1, not {audit!r}")
        self.name = name
        self.limit, self.reserved, self.guard, self.growth = slots, reserved, guard, growth
        self._on_demand, self._random = allocation == "on-demand", strategy == "random"
        self._reset, self._audit = reset, audit
        self._inventory = Inventory(
            slots=slots,
            reserved=reserved,
            guard=guard,
            strategy=strategy,
            max_unused_warm_slots=max_unused_warm_slots,
            allocation=allocation,
            growth=growth,
        )
        self._returns = Returns()
        self._lock: Any = threading.RLock()
        self._closed = False
        self._counts: Counter[str] = Counter()
        _POOLS.add(self)

    # -- leases

    def lease(
        self,
        image: Image | None,
        byte_size: int,
        *,
        affinity: Hashable,
        maximum: int | None = None,
        timeout: float = 0.0,
        map_host_memory: Callable[[], HostMapping] | None = None,
        shape: Hashable = None,
        holder: object = None,
    ) -> Slot:
        """Lease a slot with `image` mapped and `byte_size` bytes accessible; it is dirty from now on.

        `timeout` is how many seconds to wait for one, 0 for none.  The lease ends with `release`, or
        when `holder` is collected.  Raises PoolExhausted, PoolTimeout, MemoryTooLarge, SystemCallError,
        UsedAfterClose, and InUse in a finalizer or a signal handler that interrupts the pool; then
        nothing stays leased.
        """
        own = Holder() if holder is None else None
        lease = SlotLease(own or holder, self._returns.put)
        lease.pool, lease.unreleased = self, [own]
        if map_host_memory is None:
            shape = OWN
        catch_up()
        if self._lock._is_owned():  # noqa: SLF001  # as threading.Condition uses it
            raise _inside("lease")
        try:
            with self._lock:
                slot = self._take(lease, shape, affinity, byte_size, map_host_memory)
            if slot is None:
                slot = self._wait(lease, timeout, shape, affinity, byte_size, map_host_memory)
            if slot.instantiate(image, byte_size, maximum=maximum):
                slot.remaps += 1
            else:
                slot.hits += 1
            slot.affinity = affinity
        except BaseException:
            # Not left to the end of the holder: a traceback may keep it alive for long.
            self._returns.put(lease)
            raise
        return slot

    def _take(
        self, lease: SlotLease, shape: Hashable, affinity: Hashable, *wanted: Any
    ) -> Slot | None:
        """Under the lock: give the lease a slot; None if every slot is held.  `wanted` is the rest of `Inventory.take`.

        A slot that came back alone is handed on if its guest wants it again: every strategy but the random one
        would put it on the free list and take it from there.
        """
        if self._closed:
            raise UsedAfterClose("the pool was closed; make a new one")
        slot, returns = None, self._returns
        if not returns.empty():
            try:
                returned = returns.take()
            except queue.Empty:  # a lease that waits was faster
                returned = None
            if (
                isinstance(returned, Slot)
                and returned.lease is RETURNED
                and returned.affinity == affinity
                and returned.shape == shape
                and returned.state is CLEAN
                and (returned.image is None or not returned.image.closed)
                and returns.empty()
                and not self._random
            ):
                slot = returned
            else:
                self._settle(returned)
                self._drain()
        if slot is None:
            slot = self._inventory.take(shape, affinity, *wanted)
        if slot is not None:
            lease.slot, slot.lease = slot, lease
        return slot

    def _wait(self, lease: SlotLease, timeout: float, *wanted: Any) -> Slot:
        """Wait until a slot comes back; raises PoolTimeout, or PoolExhausted at once if `timeout` is not positive."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            returned = self._returns.wait(left)
            with self._lock:
                self._settle(returned)
                slot = self._take(lease, *wanted)
            if slot is not None:
                return slot
        self._counts["exhausted"] += 1
        advice = "release instances, raise the setting slots, or set wait_timeout to wait for one"
        raised, state = PoolExhausted, "are in use"
        if timeout > 0:
            raised, state = PoolTimeout, f"stayed in use for {timeout:g} s"
            advice = "release instances or raise the setting slots or wait_timeout"
        raise raised(
            f"all {self.limit} slots of the pool {state}; {advice}",
            limit=self.limit,
            in_use=self.statistics().in_use,
        )

    def warm(
        self,
        image: Image | None,
        byte_size: int,
        *,
        affinity: Hashable,
        count: int,
        maximum: int | None = None,
        map_host_memory: Callable[[], HostMapping] | None = None,
        shape: Hashable = None,
    ) -> int:
        """Make up to `count` free slots ready for a guest before its requests come; return how many are.

        Each gets the image mapped, and the pages that the guest usually writes made private ahead of
        their faults: those that the slot it used last has kept resident.  Slots in use are left alone;
        on demand there are no free ones.  Raises SystemCallError, and InUse as `lease` does.
        """
        if self._on_demand:
            return 0
        self._require_outside("warm slots")
        if map_host_memory is None:
            shape = OWN
        with self._lock:
            self._drain()
            return self._inventory.warm(
                count, image, maximum, shape, affinity, byte_size, map_host_memory
            )

    # -- resets and releases

    def bound_reset(self, slot: Slot) -> Callable[[], object]:
        """Return the reset of a leased slot as a call without arguments, the cheapest that there is."""
        if self._audit:
            return functools.partial(self.reset, slot)
        return functools.partial(slot.reset_in_lease, self._reset)

    def reset(self, slot: Slot) -> ResetResult:
        """Make a leased slot pristine; it stays leased, and dirty, because its guest may write at once.

        Raises SystemCallError or SlotError; the slot is unknown then, and `release` will destroy it.
        """
        lease = slot.lease
        # Keep the holder during the reset: its end would let another lease have the slot in the middle.
        holder = None if lease is None or lease.pool is not self else lease()
        if holder is None or not lease.unreleased:
            raise not_leased()
        result = self._reset_slot(slot)
        slot.state = DIRTY
        return result

    def release(self, slot: Slot, *, retire: bool = False) -> ResetResult:
        """End the lease of a slot and reset it; `retire` destroys it instead.

        Raises SlotError if it is not leased (released twice).  If the reset fails the slot is
        destroyed, never handed out again, and SystemCallError is raised.  A slot whose `reset` failed
        before is destroyed without an error.  May be called anywhere, also in a finalizer and in a
        signal handler.
        """
        lease = slot.lease  # read once: another thread may end it, and begin the next one
        # Keep the holder until the slot is queued: its end queues the lease, and the slot would be handed on mid-reset.
        holder = None if lease is None or lease.pool is not self else lease()
        if holder is None:
            raise not_leased()
        try:
            lease.unreleased.pop()
        except IndexError:  # another thread was first
            raise not_leased() from None
        result = _RETIRED
        try:
            if retire or self._on_demand or slot.state is UNKNOWN:
                destroy_or_log(slot)
            elif self._audit:
                result = self._reset_slot(slot)
            else:
                result = slot.reset(self._reset)
        except MemslotError:
            destroy_or_log(slot)
            raise
        finally:
            # The lease first: `_settle` ignores a slot whose lease is not RETURNED.  If an interrupt cuts these lines
            # short, the lease ends with its holder, or `reclaim` finds the slot.
            slot.lease = RETURNED
            self._returns.put(slot)
        return result

    def _reset_slot(self, slot: Slot) -> ResetResult:
        """Reset a slot from dirty to clean, and audit it at the rate that was set."""
        result: ResetResult = slot.reset(self._reset)
        if self._audit and random.random() < self._audit:  # noqa: S311  # a sample, no secret
            self._counts["audits"] += 1
            slot.audit()
        return result

    # -- the lock, and what came back without it

    def _require_outside(self, what: str) -> None:
        """Raise InUse if this thread has the lock: a finalizer or a signal handler has interrupted it there."""
        catch_up()
        if self._lock._is_owned():  # noqa: SLF001
            raise _inside(what)

    def _drain(self) -> None:
        """Under the lock: settle what came back."""
        while not self._returns.empty():
            self._settle(self._returns.next())
        if self._returns.waiting and next(self._inventory.free(), None) is not None:
            self._returns.put(None)

    def _settle(self, returned: Slot | SlotLease | Image | None) -> None:
        """Under the lock: put a slot away, or purge an image; None is a wake-up alone."""
        slot: Slot | None
        if isinstance(returned, Slot):
            slot = returned
            if slot.lease is not RETURNED:  # reclaimed since, and perhaps leased again
                return
        elif isinstance(returned, SlotLease):
            slot = getattr(returned, "slot", None)  # an exception may have come before it had one
            if slot is None or slot.lease is not returned:  # or the slot is another lease's by now
                return
            if returned.unreleased and slot.state is CLEAN:
                # `reset` makes the slot clean for a moment: after an exception there its guest may have gone on.
                slot.state = DIRTY
        else:
            if returned is not None:
                self._inventory.purge(returned)
            return
        # Dirty if the holder went without a release, or that was cut short.  A runtime may have grown its own mapping
        # unseen, and its objects may reach it: such a slot is not handed on.
        if slot.state is DIRTY and slot.mapping is None and not self._on_demand:
            try:
                self._reset_slot(slot)
            except MemslotError as error:
                _log.error("a slot that was dropped could not be reset: %s", str(error))
        self._inventory.put_away(slot)

    def purge(self, image: Image) -> int:
        """Take `image` out of every free slot, so that closing its guest gives its memory back; return how many had it.

        Leased slots give it up when they come back, if the image is closed by then.
        """
        catch_up()
        if self._lock._is_owned():  # noqa: SLF001  # the lock's owner does it
            self._returns.put(image)
            return 0
        with self._lock:
            before = self._inventory.purged
            self._drain()
            self._inventory.purge(image)
            return self._inventory.purged - before

    # -- the whole

    def statistics(self) -> PoolStatistics:
        """Return the counters; in a finalizer or handler that interrupts the pool, as they are at that moment."""
        catch_up()
        if not self._lock._is_owned():  # noqa: SLF001
            with self._lock:
                self._drain()
        return self._inventory.statistics(self.name, self._counts)

    def check(self) -> None:
        """Check every slot's invariant, and that each place has one owner; raises InvariantBroken.

        No thread may use a leased slot meanwhile: it might grow while it is compared.
        """
        self._require_outside("check the pool")
        with self._lock:
            self._drain()
            self._inventory.reclaim()
            self._inventory.check()

    def close(self) -> None:
        """Destroy every slot and unmap the reservation.  Raises InUse while slots are leased."""
        self._require_outside("close the pool")
        with self._lock:
            self._drain()
            self._inventory.reclaim()
            if in_use := self.statistics().in_use:
                raise InUse(f"the pool has {in_use} leased slots; release them before closing it")
            self._closed = True
            self._inventory.destroy()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def after_fork(self) -> None:
        """In a child: leased slots go on as private copies; the lock's owner may be a thread that is not here."""
        # A finalizer or a signal handler may have forked in the middle of a change, which goes on in the child.
        if not self._lock._is_owned():  # noqa: SLF001
            self._lock = threading.RLock()
        self._returns.waiting = 0
        for slot in self._inventory.slots():
            try:
                slot.privatise()
            except MemslotError as error:
                _log.error("a slot could not be made private after a fork: %s", str(error))


def _inside(what: str) -> InUse:
    return InUse(
        f"cannot {what} here: this finalizer or signal handler came while its own thread was changing the pool;"
        " do it after the finalizer or handler has returned"
    )


_POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_POOLS):
        pool.after_fork()


after_fork(_after_fork)
