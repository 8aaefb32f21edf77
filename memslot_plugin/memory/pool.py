"""The pool: one reservation for all its slots, and the policy by which they are handed out.

    reservation   | guard | slot 0: reserved bytes | guard | slot 1 ... | guard |

Strategies: `affinity` gives a guest the slot that it used last (nothing to map then), else a
never-used slot while fewer than `max_unused_warm_slots` slots of its shape are idle, whoever had
them, else the least recently used one; `next-available` gives the most recently returned slot,
`random` any.
A pool knows no hosts: a runtime that insists on its own mappings passes a way to make them, and the
pool keeps, counts and hands out those like its own.

A garbage collection or a signal may come while a thread holds the pool's lock, and run a finalizer or
a handler there.  So no release takes the lock: it resets the slot and puts the lease on a list, which
the lock's next holder deals with.  What needs the lock looks whether its own thread has it already,
and then does without (`statistics`, `purge`) or raises InUse.
"""

from __future__ import annotations

import collections
import logging
import random
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from memslot_hooks.types import RETIRED, HostMapping, PoolStatistics, ResetResult
from memslot_plugin._core import after_fork, align_up, catch_up, ffi, lib
from memslot_plugin._core.limits import system_call_error
from memslot_plugin._core.proc import map_count, max_map_count
from memslot_plugin.errors import (
    InUse,
    InvariantBroken,
    MemslotError,
    PoolExhausted,
    PoolTimeout,
    SettingError,
    SlotError,
    UsedAfterClose,
)
from memslot_plugin.memory.free import STRATEGIES, Shelf
from memslot_plugin.memory.slot import CLEAN, DIRTY, GROWTHS, Slot, State

if TYPE_CHECKING:
    from typing_extensions import Self

    from memslot_plugin.memory.image import Image
    from memslot_plugin.memory.reset import Reset

_log = logging.getLogger("memslot.pool")

MAPPINGS_PER_SLOT = 3
"""Guard and tail, image, zeros above it: what one slot costs of vm.max_map_count, with an image of
one extent.
"""

_OWN = object()
"""The shape of slots in ranges of ours; others have the shape of their runtime's mapping."""

_RETIRED = ResetResult(None, 0, RETIRED)

POLL_SECONDS = 0.05
"""Time after which a waiting lease looks for slots that the garbage collector brought back, which wakes no waiter."""


class Claim(weakref.ref[object]):
    """One lease of one slot, by somebody who holds it.

    When the holder goes without having given the slot back, the claim is put on the pool's list of
    those that came back by C code alone: no Python runs there, which a lock could stop or a signal
    cut short.
    """

    __slots__ = ("complete", "slot", "thread")

    complete: bool
    """True once the lease was made whole: the slot is on no shelf, and its place is not an unused one."""
    slot: Slot | None
    thread: int


class Reservation:
    """The address range of a pool's slots; unmapped when neither the pool nor one of them needs it any more."""

    __slots__ = ("base", "length")

    def __init__(self) -> None:
        self.base = ffi.new("uintptr_t *")
        self.length = 0

    def unmap(self) -> int:
        """Unmap it, if that has not been done; return an errno, negative, or 0."""
        return int(lib.ms_unmap_held(self.base, self.length))

    def __del__(self) -> None:
        if hasattr(self, "length"):  # it may have been cut short before
            lib.ms_unmap_held(self.base, self.length)


class Pool:
    """Slots and the policy by which they are handed out; safe for threads.

    `slots` bounds how many memories live at once.  `reserved` and `guard` are bytes per slot,
    rounded up to host pages. `allocation` is "pooling" (one reservation, made at the first lease)
    or "on-demand" (each slot over a reservation of its own, unmapped at release).  `reset` is one
    of `memslot_plugin.memory.reset`'s.  Close it, or use it in a with statement.
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
        if slots < 1:
            raise SettingError(f"slots must be at least 1, not {slots}")
        if strategy not in STRATEGIES:
            raise SettingError(f"strategy must be one of {', '.join(STRATEGIES)}, not {strategy!r}")
        if allocation not in ("pooling", "on-demand"):
            raise SettingError(f"allocation must be pooling or on-demand, not {allocation!r}")
        if growth not in GROWTHS:
            raise SettingError(f"growth must be one of {', '.join(GROWTHS)}, not {growth!r}")
        if (
            reserved < 1 or guard < 0
        ):  # with a stride shorter than a slot, tenants would share bytes
            raise SettingError(
                f"reserved must be at least 1 and guard at least 0 bytes, not {reserved} and {guard}"
            )
        if not 0 <= audit <= 1:
            raise SettingError(f"audit must be from 0 to 1, not {audit}")
        if max_unused_warm_slots is not None and max_unused_warm_slots < 0:
            raise SettingError(
                f"max_unused_warm_slots must be at least 0, not {max_unused_warm_slots}"
            )
        self.name = name
        self.limit = slots
        self.reserved = align_up(reserved)
        self.guard = align_up(guard)
        self.allocation = allocation
        self.growth = growth
        self._reset = reset
        self._audit = audit
        self._strategy = strategy
        self._max_unused_warm = slots if max_unused_warm_slots is None else max_unused_warm_slots
        # A slot is always in one of these, and while it goes from one to another in both: an exception
        # may come at any line, and whoever finds the slot then puts it where it belongs.
        self._leased: dict[Slot, Claim] = {}
        self._returning: dict[Slot, object] = {}
        """Leased slots that a release has begun with, each with an object of the one that came first."""
        self._shelves: dict[Hashable, Shelf] = {}
        self._lost: list[Slot] = []
        """Those that have to be destroyed, and could not be so far."""
        self._came_back: collections.deque[Claim | Image] = collections.deque()
        """Leases that have ended, and images to be purged, for the lock's next holder."""
        self._reservation = Reservation()
        self._unused_places: list[int] = []
        self._laid_out = False
        self._adopted: set[Slot] = set()
        self._orphans: list[Claim] = []
        """In a child of a fork, leases by threads that stayed behind: they end at the latest with the pool."""
        self._waiting: collections.deque[Any] = collections.deque()
        """A lock per waiting lease; who gives a slot back releases one."""
        self._closed = False
        self._counts: collections.Counter[str] = collections.Counter()
        # Counters of their own: of each lease and reset, and a Counter costs twice as much to look into.
        self._hits = self._remaps = 0
        self._how: collections.defaultdict[str, int] = collections.defaultdict(int)
        self._parting = 0
        """The thread that puts it in order in a child of a fork."""
        self._make_lock()
        _POOLS.add(self)

    # -- leasing

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
        """A slot with `image` laid and `byte_size` bytes accessible, dirty from now on and the
        caller's until `release`.

        `timeout` (seconds, 0 for none) is how long to wait for one.  The slot also comes back when
        `holder` goes, if one is given and it was not released before.  Raises PoolExhausted,
        PoolTimeout, MemoryTooLarge, SystemCallError, UsedAfterClose, and InUse in a finalizer or a
        signal handler that interrupts the pool; whatever it raises, nothing stays leased.
        """
        catch_up()
        if self._inside():
            self._refuse_inside("lease")
        deadline = time.monotonic() + timeout if timeout > 0 else 0.0
        key: Hashable = _OWN if map_host_memory is None else shape
        claim = Claim(self if holder is None else holder, self._came_back.append)
        claim.complete, claim.slot, claim.thread = False, None, threading.get_ident()
        try:
            while True:
                with self._lock:
                    if self._closed:
                        self._require_open()
                    if self._came_back:
                        slot = self._hand_on(claim, affinity)
                        if slot is not None:
                            break
                        self._take_back()
                    slot = self._pick(claim, key, affinity, byte_size, map_host_memory)
                    if slot is not None:
                        break
                    turn = self._line_up(deadline, timeout)
                try:
                    if not self._came_back:  # what has come since may not have seen this turn
                        turn.acquire(timeout=min(max(deadline - time.monotonic(), 0), POLL_SECONDS))
                finally:
                    with suppress(ValueError):  # whoever released it took it out
                        self._waiting.remove(turn)
            remapped = slot.instantiate(image, byte_size, maximum=maximum)
            slot.affinity = affinity
            claim.complete = True
            if remapped:
                self._remaps += 1
            else:
                self._hits += 1
        except BaseException:
            with self._lock:
                self._put_away(claim)
            raise
        return slot

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
        """Make up to `count` unused slots ready for a guest before its requests come; how many
        there are now.

        Each gets the image laid, and the pages that the guest usually writes made private ahead of
        their faults: those that a slot it used last has kept resident.  Slots in use are left
        alone, and fewer than `count` unused ones is no error; on demand there are none at all.
        Raises SystemCallError, and InUse as `lease` does.
        """
        if self._inside():
            self._refuse_inside("warm slots")
        if self.allocation != "pooling":
            return 0  # no slot outlives its memory
        catch_up()
        key: Hashable = _OWN if map_host_memory is None else shape
        ready = 0
        with self._lock:
            self._require_open()
            self._take_back()
            shelf = self._shelves.get(key)
            model = None if shelf is None else shelf.latest(affinity)
            usual = None if model is None else model.private_runs()
            try:
                while ready < count:
                    claim = Claim(self, self._came_back.append)
                    claim.complete, claim.slot, claim.thread = False, None, threading.get_ident()
                    self._came_back.append(claim)  # dealt with below, under the same lock
                    slot = self._pick(claim, key, affinity, byte_size, map_host_memory)
                    if slot is None:
                        break
                    slot.instantiate(image, byte_size, maximum=maximum)
                    slot.affinity = affinity
                    if usual is not None:
                        slot.populate(usual)
                    slot.state = State.CLEAN  # nobody has run in it
                    ready += 1
            finally:
                self._take_back()
        return ready

    def reset(self, slot: Slot) -> ResetResult:
        """Make a leased slot pristine; it stays leased, and is dirty again as soon as its guest may
        run.

        Raises SystemCallError or SlotError; the slot is then unknown and `release` will retire it.
        """
        if slot not in self._leased or (self._returning and slot in self._returning):
            raise SlotError(
                "this slot is not leased from this pool: it was released before, or belongs elsewhere"
            )
        result = self._reset_slot(slot)
        slot.state = DIRTY
        return result

    def release(self, slot: Slot, *, retire: bool = False) -> ResetResult:
        """Take a leased slot back, pristine; `retire` destroys it instead (its memory grew where it
        cannot shrink).

        Raises SlotError if it is not leased (released twice).  If the reset fails the slot is
        destroyed, never handed out again, and SystemCallError is raised.  A slot whose `reset` has
        failed already is destroyed without a further word.  May be called anywhere, also in a
        finalizer and in a signal handler.
        """
        # A child of a fork may do this first: no lock is taken, and a reset asks for its own process's pages.
        claim, first, result = self._leased.get(slot), object(), _RETIRED
        # While there is a holder, the claim cannot come back by itself, and two would reset the slot.
        holder = None if claim is None else claim()
        if claim is None or holder is None or self._returning.setdefault(slot, first) is not first:
            raise SlotError(
                "this slot is not leased from this pool: it was released before, or belongs elsewhere"
            )
        try:
            if retire or not self._may_be_kept(slot):
                self._destroy(slot)
            else:
                result = self._reset_slot(slot)
                if slot.image is not None and slot.image.closed:
                    self._purge_slot(slot)
        except BaseException:
            self._destroy(slot)
            raise
        finally:
            self._came_back.append(claim)
            if self._waiting:
                self._wake_one()
        return result

    def _may_be_kept(self, slot: Slot) -> bool:
        return self.allocation == "pooling" and slot.state is not State.UNKNOWN

    def _reset_slot(self, slot: Slot) -> ResetResult:
        """From dirty to clean, counted, and audited at the rate that was set.

        Raises SystemCallError or, where an audit finds a difference, InvariantBroken; the slot is
        unknown then.
        """
        try:
            result = slot.reset(self._reset)
            if self._audit and random.random() < self._audit:  # noqa: S311  # a sample, no secret
                self._counts["audits"] += 1
                slot.audit()
        except MemslotError:
            self._counts["failed_resets"] += 1
            raise
        _, _, strategy, reason = result
        self._how[f"{strategy}: {reason}" if reason else strategy] += 1
        return result

    def _take_back(self) -> None:
        """Under the lock: deal with what came back without it."""
        while self._came_back:
            given = self._came_back[0]  # which stays there until it has been dealt with
            if isinstance(given, Claim):
                self._put_away(given)
            else:
                self._purge(given)
            self._came_back.popleft()

    def _put_away(self, claim: Claim) -> None:
        """Under the lock: end a lease; its slot becomes idle, or is destroyed."""
        slot = getattr(claim, "slot", None)  # it may have been cut short before it had one
        if slot is None or self._leased.get(slot) is not claim:
            return
        if not claim.complete:
            # An interrupt in _pick may have left it on its shelf, or a new slot's place among the unused ones: it would
            # be given to two.
            self._take_off(slot)
            with suppress(ValueError):
                self._unused_places.remove(slot.base)
        if slot.state is DIRTY and self.allocation == "pooling":  # a finalizer brought it
            self._reset_or_log(slot)
        if slot.state is CLEAN and self.allocation == "pooling":
            self._shelve(slot)
        else:
            self._retire(slot)
        self._returning.pop(slot, None)
        del self._leased[slot]
        if self._waiting:
            self._wake_one()

    def _reset_or_log(self, slot: Slot) -> None:
        """Reset a slot that was dropped: only the log and the statistics can be told of a failure."""
        try:
            self._reset_slot(slot)
        except MemslotError as error:
            # As text: a handler that keeps records would keep the traceback, and with it the slot's memory.
            _log.error(
                "a slot that was dropped could not be reset and is destroyed: %s", str(error)
            )

    def _hand_on(self, claim: Claim, affinity: Hashable) -> Slot | None:
        """Under the lock: the one slot that came back, if its guest wants it again: any strategy but the random one
        would put it away and choose it.  None for that way.
        """
        came_back = self._came_back
        ended = came_back[0]  # twice, if the holder went after the release
        if type(ended) is not Claim or came_back[-1] is not ended or len(came_back) > 2:
            return None
        slot: Slot | None = getattr(ended, "slot", None)
        if (
            slot is None
            or not ended.complete
            or slot.affinity != affinity
            or slot.state is not CLEAN
            or self.allocation != "pooling"
            or self._strategy == "random"
            or self._leased.get(slot) is not ended
            or self._waiting
        ):
            return None
        claim.slot = slot
        self._leased[slot] = claim
        self._returning.pop(slot, None)
        came_back.popleft()
        if came_back and came_back[0] is ended:
            came_back.popleft()
        return slot

    def _pick(
        self,
        claim: Claim,
        key: Hashable,
        affinity: Hashable,
        byte_size: int,
        map_host_memory: Callable[[], HostMapping] | None,
    ) -> Slot | None:
        """Under the lock: an idle slot, or a new one, leased from now on; None if every slot is in use."""
        if self._lost:
            self._retire_again()
        in_use = len(self._leased)
        if in_use >= (self.limit - self._lost_places() if self._lost else self.limit):
            return None
        shelf = self._shelves.get(key)
        if shelf is not None:
            can_create = self._can_make if map_host_memory is None else self._can_adopt
            slot = shelf.choose(affinity, can_create)
            if slot is not None:
                claim.slot = slot  # as _hand_out does, without the call: this is in the path of every instance
                self._leased[slot] = claim
                shelf.discard(slot)
                return slot
        if map_host_memory is not None:
            slot = self._adopt(map_host_memory)
            self._hand_out(slot, claim)
            self._adopted.add(slot)
        elif self.allocation == "on-demand":
            slot = Slot.create(self.reserved, byte_size, guard=self.guard, growth=self.growth)
            self._hand_out(slot, claim)
        else:
            self._reserve()
            slot = Slot(self._unused_places[-1], self.reserved, growth=self.growth)
            slot.within = self._reservation
            self._hand_out(slot, claim)
            self._unused_places.remove(slot.base)
        self._counts["created"] += 1
        return slot

    def _can_adopt(self) -> bool:
        return len(self._adopted) < self.limit

    def _can_make(self) -> bool:
        if self.allocation == "on-demand":
            return True
        self._reserve()
        return bool(self._unused_places)

    def _hand_out(self, slot: Slot, claim: Claim) -> None:
        claim.slot = slot
        self._leased[slot] = claim

    def _adopt(self, map_host_memory: Callable[[], HostMapping]) -> Slot:
        """A slot over a range that the runtime makes; an idle one of another shape makes room where
        the limit is reached.
        """
        if len(self._adopted) >= self.limit:
            for key, shelf in self._shelves.items():
                if key is not _OWN and (idle := shelf.oldest()) is not None:
                    self._retire(idle)
                    if not shelf:
                        del self._shelves[key]
                    break
        mapping = map_host_memory()
        return Slot(
            mapping.base, mapping.reserved, mapping.accessible, mapping=mapping, growth=self.growth
        )

    def _line_up(self, deadline: float, timeout: float) -> Any:
        """Under the lock: what will be released when a slot comes back; or say why there is none."""
        limit, in_use = self.limit - self._lost_places(), self._in_use()
        if not deadline:
            self._counts["exhausted"] += 1
            raise PoolExhausted(
                f"all {limit} slots of the pool are in use; release instances, raise the setting slots,"
                " or set wait_timeout to wait for one",
                limit=limit,
                in_use=in_use,
            )
        left = deadline - time.monotonic()
        if left <= 0:
            self._counts["exhausted"] += 1
            raise PoolTimeout(
                f"all {limit} slots of the pool stayed in use for {timeout:g} s; release instances or raise the"
                " setting slots or wait_timeout",
                limit=limit,
                in_use=in_use,
            )
        turn = threading.Lock()
        turn.acquire()  # by whoever waits, and nobody else has it yet
        self._waiting.append(turn)
        return turn

    def _wake_one(self) -> None:
        if self._waiting:
            with suppress(IndexError):  # whoever waited has just given up
                self._waiting.popleft().release()

    def _shelve(self, slot: Slot) -> None:
        """Under the lock: a clean slot becomes idle; the image of a closed guest is not kept in
        it.
        """
        outdated = slot.image is not None and slot.image.closed
        if outdated:
            self._purge_slot(slot)
            if slot.state is not CLEAN:
                self._retire(slot)
                return
        key: Hashable = _OWN if slot.mapping is None else slot.mapping.shape
        shelf = self._shelves.get(key)
        if shelf is None:
            shelf = self._shelves[key] = Shelf(self._strategy, self._max_unused_warm)
        shelf.put(slot, next_to_go=outdated)

    def _purge_slot(self, slot: Slot) -> None:
        """Take the image out of a slot that is on no shelf; the slot is unknown if that fails."""
        try:
            slot.purge()
        except MemslotError:
            self._counts["failed_resets"] += 1
        else:
            slot.affinity = None
            self._counts["purged"] += 1

    def _retire(self, slot: Slot) -> None:
        """Under the lock: destroy a slot, from wherever it is; its place in the reservation is used
        again once it is covered.
        """
        if slot not in self._lost:
            self._lost.append(slot)  # until it is destroyed, also if something comes in between
            self._counts["destroyed"] += 1
        self._take_off(slot)
        self._adopted.discard(slot)
        self._destroy(slot)
        self._account_for(slot)

    def _destroy(self, slot: Slot) -> None:
        """Destroy a slot that is on no shelf, or log why that is impossible for now."""
        try:
            slot.destroy()
        except MemslotError as error:
            _log.error("a slot could not be destroyed, which is tried again later: %s", str(error))

    def _retire_again(self) -> None:
        """Under the lock: try once more to destroy what could not be destroyed."""
        for slot in list(self._lost):
            self._take_off(slot)
            self._adopted.discard(slot)
            with suppress(MemslotError):  # as it was told before
                slot.destroy()
            self._account_for(slot)

    def _account_for(self, slot: Slot) -> None:
        """Under the lock: a destroyed slot's place can be used again; with one that is not goes a slot of the limit."""
        if slot.state is State.DESTROYED:
            if self._in_reservation(slot) and slot.base not in self._unused_places:
                self._unused_places.append(slot.base)
            self._lost.remove(slot)

    def _take_off(self, slot: Slot) -> None:
        """Under the lock: off the shelf that it is on."""
        key: Hashable = _OWN if slot.mapping is None else slot.mapping.shape
        shelf = self._shelves.get(key)
        if shelf is not None:
            shelf.discard(slot)

    def _in_reservation(self, slot: Slot) -> bool:
        return slot.mapping is None and self.allocation == "pooling"

    def _idle(self) -> list[Slot]:
        """Under the lock: every slot that nobody has leased."""
        return [slot for shelf in self._shelves.values() for slot in shelf.listed()]

    def _in_use(self) -> int:
        return len(self._leased)

    def _lost_places(self) -> int:
        return sum(1 for slot in self._lost if self._in_reservation(slot))

    # -- the reservation

    def _reserve(self) -> None:
        """Under the lock: make the one reservation, at the first lease that needs it."""
        if self._laid_out:
            return
        allowed, used = max_map_count(), map_count()
        if (
            allowed is not None
            and used is not None
            and used + self.limit * MAPPINGS_PER_SLOT > allowed
        ):
            possible = max(allowed - used, 0) // MAPPINGS_PER_SLOT
            raise SettingError(
                f"slots = {self.limit} needs about {self.limit * MAPPINGS_PER_SLOT} mappings, but"
                f" vm.max_map_count is {allowed} with {used} in use; allowed here: at most {possible} slots"
            )
        stride = self.reserved + self.guard
        length = self._reservation.length = self.guard + self.limit * stride
        base = self._reservation.base
        failed = 0 if base[0] else lib.ms_reserve(length, base)
        if failed:
            raise system_call_error(
                -failed,
                f"reserving {length} bytes of address space for {self.limit} slots of {self.reserved} bytes and"
                f" {self.guard} bytes of guard (fewer slots or a smaller reserved need less)",
            )
        self._unused_places = self._places()
        self._laid_out = True

    def _places(self) -> list[int]:
        """The base of every slot in the reservation, the first one last."""
        first, stride = self._reservation.base[0] + self.guard, self.reserved + self.guard
        return [first + place * stride for place in reversed(range(self.limit))]

    # -- upkeep

    def purge(self, image: Image) -> int:
        """Take `image` out of every unused slot, so that closing its guest gives its memory back;
        how many slots held it.

        Slots that are still leased give it up when they come back, if the image is closed by then.
        """
        catch_up()
        if self._inside():
            self._came_back.append(image)
            return 0
        with self._lock:
            before = self._counts["purged"]
            self._take_back()
            self._purge(image)
            return self._counts["purged"] - before

    def _purge(self, image: Image) -> None:
        """Under the lock: take `image` out of every idle slot."""
        for shelf in self._shelves.values():
            for slot in shelf.listed():
                if slot.image is image:
                    try:
                        shelf.discard(slot)
                        self._purge_slot(slot)
                    except BaseException:
                        self._retire(slot)
                        raise
                    if slot.state is CLEAN:
                        shelf.put(slot, next_to_go=True)
                    else:
                        self._retire(slot)

    def statistics(self) -> PoolStatistics:
        """The pool's counters, read at once; in a finalizer or a signal handler that interrupts the
        pool, as they are in the middle of that.
        """
        catch_up()
        outside = not self._inside()
        with self._lock:
            if self._came_back and outside and not self._closed:
                self._take_back()
            idle = self._idle()
            count, hits, remaps = self._counts, self._hits, self._remaps
            return PoolStatistics(
                plugin=self.name,
                limit=self.limit - self._lost_places(),
                in_use=self._in_use(),
                idle=len(idle),
                warm=sum(1 for slot in idle if slot.image is not None),
                created=count["created"],
                destroyed=count["destroyed"],
                leases=hits + remaps,
                affinity_hits=hits,
                remaps=remaps,
                resets=sum(self._how.values()),
                failed_resets=count["failed_resets"],
                exhausted=count["exhausted"],
                purged=count["purged"],
                audits=count["audits"],
                resets_by=dict(self._how),
            )

    def check(self) -> None:
        """Check every slot's invariant, and that no slot and no place is lost or held twice; raises
        InvariantBroken.  Nobody else may use a leased slot meanwhile: it might grow while it is looked at.
        """
        if self._inside():
            self._refuse_inside("check the pool")
        with self._lock:
            self._take_back()
            idle = self._idle()
            for slot in (*idle, *self._leased):
                slot.check()
            for slot in idle:
                if slot.state is not State.CLEAN:
                    raise InvariantBroken(f"an idle slot is {slot.state.value}")
            if self._laid_out and not self._closed:
                held = (*idle, *self._leased, *self._lost)
                places = self._unused_places + self._bases(held)
                if len(set(places)) != len(places) or len(places) != self.limit:
                    raise InvariantBroken(
                        f"{len(places)} places are accounted for, but the pool has {self.limit}"
                    )

    def close(self) -> None:
        """Destroy every slot and unmap the reservation; twice is a no-op.

        Raises InUse while slots are leased, and SystemCallError after giving back everything else;
        closing again then tries again.
        """
        catch_up()
        if self._inside():
            self._refuse_inside("close the pool")
        with self._lock:
            if not self._closed:
                self._came_back.extend(self._orphans)
                self._take_back()
                if self._in_use():
                    raise InUse(
                        f"the pool has {self._in_use()} leased slots; release them before closing it"
                    )
                self._closed = True
            failures: list[MemslotError] = []
            for shelf in self._shelves.values():
                self._lost += shelf.listed()
            self._shelves.clear()
            for slot in self._lost:
                try:
                    if self._in_reservation(slot):
                        slot.forget()  # one munmap below unmaps them all
                    else:
                        slot.destroy()
                except MemslotError as error:
                    failures.append(error)
            self._forget_destroyed()
            failed = self._reservation.unmap()
            if failed:
                failures.append(system_call_error(-failed, "unmapping the pool's reservation"))
            if failures:
                raise failures[0]

    # Comprehensions stand in functions of their own: from Python 3.12 on an exception that comes while one runs within
    # a with block, a KeyboardInterrupt, keeps the lock.

    def _forget_destroyed(self) -> None:
        self._lost = [slot for slot in self._lost if slot.state is not State.DESTROYED]

    def _bases(self, slots: Iterable[Slot]) -> list[int]:
        """The places in the reservation that these have."""
        return [slot.base for slot in slots if self._in_reservation(slot)]

    def _make_lock(self) -> None:
        lock: Any = threading.RLock()
        self._lock = lock
        self._inside: Callable[[], bool] = lock._is_owned  # noqa: SLF001  # as threading.Condition uses it
        """True on a thread that has the lock: a finalizer or a signal handler asks."""

    def _refuse_inside(self, what: str) -> NoReturn:
        raise InUse(
            f"cannot {what} here: this finalizer or signal handler came while its own thread was changing the pool;"
            " do it after the finalizer or handler has returned"
        )

    def _require_open(self) -> None:
        if self._closed:
            raise UsedAfterClose("the pool was closed; make a new one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def after_fork(self) -> None:
        """In a child: locks may be held by threads that do not exist here; what is leased goes on
        as a private copy.
        """
        if self._parting == threading.get_ident():
            return  # a signal handler or a finalizer interrupts this, and has had the child catch up
        self._parting = threading.get_ident()
        try:
            self._make_lock()
            with self._lock:
                self._part()
        finally:
            self._parting = 0

    def _part(self) -> None:
        """Under the lock, so that what comes in between leases nothing meanwhile."""
        self._waiting.clear()
        self._finish_for_others()
        for shelf in self._shelves.values():
            for slot in shelf.listed():
                try:
                    slot.part()
                except MemslotError as error:
                    _log.error("a slot could not be parted from the parent's: %s", str(error))
                    shelf.discard(slot)
                    self._retire(slot)
        ours = threading.get_ident()
        self._orphans = [claim for claim in self._leased.values() if claim.thread != ours]
        for slot in self._leased:
            try:
                slot.part()
            except MemslotError as error:
                _log.error("a leased slot could not be parted from the parent's: %s", str(error))

    def _finish_for_others(self) -> None:
        """Whoever was in the middle of something does not exist here: each slot is where it belongs again."""
        for shelf in self._shelves.values():
            shelf.tidy()
        for slot in self._leased:
            self._take_off(slot)
        ended = {id(given) for given in list(self._came_back)}
        for slot in list(self._returning):
            if id(self._leased.get(slot)) not in ended:
                self._leased.pop(slot, None)
                self._retire(slot)
                del self._returning[slot]
        self._retire_again()
        if self._laid_out:
            idle = self._idle()
            held = {slot.base for slot in (*idle, *self._leased, *self._lost)}
            self._unused_places = [place for place in self._places() if place not in held]


_POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_POOLS):
        pool.after_fork()


after_fork(_after_fork)
