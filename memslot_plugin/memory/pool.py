"""The pool: leases of slots, safe for threads, finalizers and signal handlers.

A garbage collection or a signal may come while a thread has the pool's lock, and run a finalizer or a
handler there.  So a release never takes the lock: it resets the slot and puts its lease into a queue,
from which the lock's next owner, or a lease that waits, takes it.  A call that needs the lock while its
own thread has it raises InUse.

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
    SlotError,
    UsedAfterClose,
)
from memslot_plugin.memory.extension import ExtensionSlot
from memslot_plugin.memory.free import STRATEGIES, FreeList
from memslot_plugin.memory.inventory import OWN, Inventory, destroy_or_log
from memslot_plugin.memory.region import CLEAN, DIRTY, UNKNOWN
from memslot_plugin.memory.slot import Slot

if TYPE_CHECKING:
    from typing_extensions import Self

    from memslot_plugin.memory.image import Image
    from memslot_plugin.memory.reset import Reset

_log = logging.getLogger("memslot.pool")

GROWTHS: dict[str, type[Slot]] = {"mprotect": Slot, "ftruncate": ExtensionSlot}


_RETIRED = ResetResult(None, 0, RETIRED)


class SlotLease(weakref.ref[object]):
    """One lease of one slot.  When its holder is collected, C code alone puts the lease into the pool's queue."""

    __slots__ = ("pool", "slot", "unreleased")

    pool: Pool
    slot: Slot
    unreleased: list[None]
    """Holds one item until the first release, which pops it: one C call, so only one of two threads gets it."""


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
        for allowed, option, rule in (
            (slots >= 1, slots, "slots must be at least 1"),
            (strategy in STRATEGIES, strategy, f"strategy must be one of {', '.join(STRATEGIES)}"),
            (
                allocation in ("pooling", "on-demand"),
                allocation,
                "allocation must be pooling or on-demand",
            ),
            (growth in GROWTHS, growth, f"growth must be one of {', '.join(GROWTHS)}"),
            # With a stride shorter than a slot, tenants would share bytes.
            (reserved >= 1, reserved, "reserved must be at least 1 byte"),
            (guard >= 0, guard, "guard must be at least 0 bytes"),
            (0 <= audit <= 1, audit, "audit must be from 0 to 1"),
            (
                (max_unused_warm_slots or 0) >= 0,
                max_unused_warm_slots,
                "max_unused_warm_slots must be at least 0",
            ),
        ):
            if not allowed:
                raise SettingError(f"{rule}, not {option!r}")
        self.name = name
        self.limit, self.reserved, self.guard, self.growth = slots, reserved, guard, growth
        self._on_demand, self._random = allocation == "on-demand", strategy == "random"
        new_list = functools.partial(
            FreeList, strategy, slots if max_unused_warm_slots is None else max_unused_warm_slots
        )
        self._reset, self._audit = reset, audit
        self._inventory = Inventory(
            GROWTHS[growth], new_list, slots, reserved, guard, on_demand=self._on_demand
        )
        # SimpleQueue.put is reentrant, so that finalizers and signal handlers may call it anywhere.
        self._returned: queue.SimpleQueue[SlotLease | Image | None] = queue.SimpleQueue()
        """Leases that have ended, images to purge, and None to wake a lease that waits."""
        self._waiting = 0
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
        lease = SlotLease(self if holder is None else holder, self._returned.put)
        lease.pool, lease.unreleased = self, [None]
        if map_host_memory is None:
            shape = OWN
        self._require_outside("lease")
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
            # A traceback may keep the holder alive for long.
            self._returned.put(lease)
            raise
        return slot

    def _take(self, lease: SlotLease, *wanted: Any) -> Slot | None:
        """Under the lock: give the lease a slot from the inventory; None if every slot is held."""
        if self._closed:
            raise UsedAfterClose("the pool was closed; make a new one")
        slot = None
        if not self._returned.empty():
            slot = self._hand_on(wanted[1])
        slot = slot or self._inventory.take(*wanted)
        if slot is not None:
            lease.slot, slot.lease = slot, lease
        return slot

    def _hand_on(self, affinity: Hashable) -> Slot | None:
        """Under the lock: settle what came back; but return a slot that came alone if its guest wants it again.

        Every strategy except the random one would put it on the free list and take it from there.
        """
        returned = other = self._next()
        while (
            other is returned is not None
        ):  # a lease comes twice if its holder is collected after the release
            other = self._next()
        slot: Slot | None = getattr(returned, "slot", None)
        if (
            slot is not None
            and other is None
            and slot.lease is returned
            and slot.affinity == affinity
            and slot.state is CLEAN
            and (slot.image is None or not slot.image.closed)
            and not (self._waiting or self._random)
        ):
            return slot
        self._settle(returned)
        self._settle(other)
        self._drain()
        return None

    def _next(self) -> SlotLease | Image | None:
        """Take the next of what came back; None if there is none."""
        if self._returned.empty():
            return None
        try:
            return self._returned.get_nowait()
        except queue.Empty:  # a lease that waits was faster
            return None

    def _wait(self, lease: SlotLease, timeout: float, *wanted: Any) -> Slot:
        """Wait until a slot comes back; raises PoolTimeout, or PoolExhausted at once if `timeout` is not positive."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            self._waiting += 1
            try:
                returned = self._returned.get(timeout=left)
            except queue.Empty:
                break
            finally:
                self._waiting -= 1
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
        leases: list[SlotLease] = []
        with self._lock:
            self._drain()
            model = self._inventory.latest(shape, affinity)
            usual = None if model is None else model.private_runs()
            try:
                while len(leases) < count:
                    lease = SlotLease(self)
                    slot = self._take(lease, shape, affinity, byte_size, map_host_memory)
                    if slot is None:
                        break
                    leases.append(lease)
                    slot.instantiate(image, byte_size, maximum=maximum)
                    slot.affinity = affinity
                    slot.populate(usual or [])
                    slot.state = CLEAN  # no guest has run in it
            finally:
                for lease in leases:
                    self._settle(lease)
        return len(leases)

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
        self._require_lease(slot)
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
        lease = self._require_lease(slot)
        try:
            lease.unreleased.pop()
        except IndexError:  # another thread was first
            raise _not_leased() from None
        result = _RETIRED
        try:
            if retire or self._on_demand or slot.state is UNKNOWN:
                destroy_or_log(slot)
            else:
                result = self._reset_slot(slot)
        except MemslotError:
            destroy_or_log(slot)
            raise
        finally:
            # Without this line, after an interrupt, the lease ends with its holder.
            self._returned.put(lease)
        return result

    def _require_lease(self, slot: Slot) -> SlotLease:
        """Return the lease of a slot of this pool; raises SlotError if it has ended."""
        lease: SlotLease | None = slot.lease
        if lease is None or lease.pool is not self or not lease.unreleased or lease() is None:
            raise _not_leased()
        return lease

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
        if self._lock._is_owned():  # noqa: SLF001  # as threading.Condition uses it
            raise InUse(
                f"cannot {what} here: this finalizer or signal handler came while its own thread was changing the"
                " pool; do it after the finalizer or handler has returned"
            )

    def _drain(self) -> None:
        """Under the lock: settle what came back."""
        while not self._returned.empty():
            self._settle(self._next())
        if self._waiting and next(self._inventory.free(), None) is not None:
            self._returned.put(None)

    def _settle(self, returned: SlotLease | Image | None) -> None:
        """Under the lock: end a lease, or purge an image; None is a wake-up alone."""
        if not isinstance(returned, SlotLease):
            if returned is not None:
                self._inventory.purge(returned)
            return
        slot = getattr(returned, "slot", None)  # an exception may have come before it had one
        if slot is None or slot.lease is not returned:  # or the slot is another lease's by now
            return
        if slot.state is DIRTY and not self._on_demand:  # the holder went without a release
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
            self._returned.put(image)
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
        slots = list(self._inventory.slots())
        idle = [slot for slot in slots if slot.lease is None]
        count = self._inventory.counts() + self._counts
        resets_by = {key[1:]: number for key, number in count.items() if key[0] == "*"}
        names = ("created", "destroyed", "remaps", "failed_resets", "exhausted", "purged", "audits")
        return PoolStatistics(
            plugin=self.name,
            limit=self.limit,
            in_use=len(slots) - len(idle),
            idle=len(idle),
            warm=sum(slot.image is not None for slot in idle),
            leases=count["hits"] + count["remaps"],
            affinity_hits=count["hits"],
            resets=sum(resets_by.values()),
            resets_by=resets_by,
            **{name: count[name] for name in names},
        )

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
        self._lock = threading.RLock()
        self._waiting = 0
        for slot in self._inventory.slots():
            try:
                slot.privatise()
            except MemslotError as error:
                _log.error("a slot could not be made private after a fork: %s", str(error))


def _not_leased() -> SlotError:
    return SlotError(
        "this slot is not leased from this pool: it was released before, or belongs elsewhere"
    )


_POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_POOLS):
        pool.after_fork()


after_fork(_after_fork)
