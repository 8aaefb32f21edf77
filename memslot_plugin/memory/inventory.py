"""The inventory of a pool: its slots by place, the free ones among them, and where they are made.

    reservation   | guard | place 0: reserved bytes | guard | place 1 ... | guard |

On demand each slot has a reservation of its own, and a runtime's range is where the runtime made it; such
a slot takes a place, too, because the number of places bounds how many memories live at once.

The truth is on the slots.  A slot is *free* (on a free list), *held* (it has a lease whose holder lives), or
neither, because an exception came in between: `reclaim` finds those.  Nothing here is safe for threads: the
pool's lock protects it.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from memslot_hooks.types import HostMapping, PoolStatistics
from memslot_plugin._core import align_up
from memslot_plugin._core.proc import map_count, max_map_count
from memslot_plugin.errors import InvariantBroken, MemslotError, SettingError
from memslot_plugin.memory.backing import Holder
from memslot_plugin.memory.extension import ExtensionSlot
from memslot_plugin.memory.free import STRATEGIES, FreeList
from memslot_plugin.memory.image import Image
from memslot_plugin.memory.lease import RETURNED, SlotLease
from memslot_plugin.memory.region import CLEAN, DESTROYED, UNKNOWN, Reservation
from memslot_plugin.memory.slot import Slot

_log = logging.getLogger("memslot.pool")

MAPPINGS_PER_SLOT = 3
"""Mappings (VMAs) of one slot with an image of one extent: guard and tail, image, zeros above it."""

GROWTHS: dict[str, type[Slot]] = {"mprotect": Slot, "ftruncate": ExtensionSlot}

ALLOCATIONS = ("pooling", "on-demand")

OWN = object()
"""The shape of slots in ranges of ours; a runtime's ranges have the shape that the runtime names."""


class Inventory:
    """The slots of one pool; `memory.pool.Pool` explains the parameters.  Raises SettingError."""

    def __init__(
        self,
        *,
        slots: int,
        reserved: int,
        guard: int,
        strategy: str,
        max_unused_warm_slots: int | None,
        allocation: str,
        growth: str,
    ) -> None:
        most = slots if max_unused_warm_slots is None else max_unused_warm_slots
        for allowed, option, rule in (
            (slots >= 1, slots, "slots must be at least 1"),
            # With a stride shorter than a slot, tenants would share bytes.
            (reserved >= 1, reserved, "reserved must be at least 1 byte"),
            (guard >= 0, guard, "guard must be at least 0 bytes"),
            (strategy in STRATEGIES, strategy, f"strategy must be one of {', '.join(STRATEGIES)}"),
            (most >= 0, most, "max_unused_warm_slots must be at least 0"),
            (
                allocation in ALLOCATIONS,
                allocation,
                f"allocation must be {' or '.join(ALLOCATIONS)}",
            ),
            (growth in GROWTHS, growth, f"growth must be one of {', '.join(GROWTHS)}"),
        ):
            if not allowed:
                raise SettingError(f"{rule}, not {option!r}")
        self._kind = GROWTHS[growth]
        self._new_list = functools.partial(FreeList, strategy, most)
        self._limit = slots
        self._reserved = align_up(reserved)
        self._guard = align_up(guard)
        self._on_demand = allocation == "on-demand"
        self._reservation: Reservation | None = None
        self._places: list[Slot | None] = []
        """As far as places were used; None for one that is vacant."""
        self._vacant: list[int] = []
        self._free: dict[Hashable, FreeList] = {}
        """By shape."""
        self._past: Counter[str] = Counter()
        """Slots made and destroyed, and the counters of those that are gone."""
        self.purged = 0
        """Slots that gave their image up."""

    # -- from free to held, and back

    def take(
        self,
        shape: Hashable,
        affinity: Hashable,
        byte_size: int,
        map_host_memory: Callable[[], HostMapping] | None,
    ) -> Slot | None:
        """Take a slot off its free list, or make one; None if every slot is held.

        Raises SystemCallError, SettingError, and what `map_host_memory` raises.
        """
        slot, room = self._take_free(shape, affinity)
        if slot is None and not room:
            self._make_room(shape)
            slot, room = self._take_free(shape, affinity)
        if slot is None and room:
            slot = self._create(byte_size, map_host_memory)
        return slot

    def _take_free(self, shape: Hashable, affinity: Hashable) -> tuple[Slot | None, bool]:
        """Take a slot off its free list if the strategy wants one; return also if a new one could be made."""
        room = bool(self._vacant) or len(self._places) < self._limit
        free = self._free.get(shape)
        return None if free is None else free.take(affinity, room=room), room

    def _make_room(self, shape: Hashable) -> None:
        """Find lost slots; if no place is vacant then, destroy the oldest free slot of another shape."""
        self.reclaim()
        for other, free in list(self._free.items()):
            if not self._vacant and other != shape and (oldest := free.oldest()) is not None:
                free.discard(oldest)
                self._retire(oldest)

    def _create(self, byte_size: int, map_host_memory: Callable[[], HostMapping] | None) -> Slot:
        # The place is taken before the slot is made: after an exception in between, reclaim finds it without a slot.
        if self._vacant:
            place = self._vacant.pop()
        else:
            place = len(self._places)
            self._places.append(None)
        try:
            if map_host_memory is not None:
                mapping = map_host_memory()
                slot = self._kind(
                    mapping.base, mapping.reserved, mapping.accessible, mapping=mapping
                )
            elif self._on_demand:
                slot = self._kind.create(self._reserved, byte_size, guard=self._guard)
            else:
                within = self._reservation = self._reservation or self._reserve()
                base = within.base + self._guard + place * (self._reserved + self._guard)
                slot = self._kind(base, self._reserved, within=within)
        except Exception:
            self._vacant.append(place)
            raise
        slot.place = place
        slot.shape = OWN if slot.mapping is None else slot.mapping.shape
        self._places[place] = slot
        self._past["created"] += 1
        return slot

    def _reserve(self) -> Reservation:
        """Make the one reservation, at the first lease that needs it."""
        allowed, used = max_map_count(), map_count()
        needed = self._limit * MAPPINGS_PER_SLOT
        if allowed is not None and used is not None and used + needed > allowed:
            raise SettingError(
                f"slots = {self._limit} needs about {needed} mappings, but vm.max_map_count is {allowed} with"
                f" {used} in use; allowed here: at most {max(allowed - used, 0) // MAPPINGS_PER_SLOT} slots"
            )
        return Reservation(
            self._guard + self._limit * (self._reserved + self._guard),
            f"{self._limit} slots of {self._reserved} bytes and {self._guard} bytes of guard (fewer slots or a"
            " smaller reserved need less)",
        )

    def put_away(self, slot: Slot) -> None:
        """Free a slot whose lease has ended, if it is clean; else destroy it, so that its bytes are gone."""
        slot.lease = None
        if slot.image is not None and slot.image.closed and slot.state is CLEAN:
            self._purge(slot)
        if slot.state is CLEAN and not self._on_demand:
            self._make_free(slot)
        else:
            self._retire(slot)

    def _make_free(self, slot: Slot) -> None:
        if slot.shape not in self._free:
            self._free[slot.shape] = self._new_list()
        self._free[slot.shape].put(slot, next_to_go=slot.affinity is None)

    def _retire(self, slot: Slot) -> None:
        """Destroy a slot that is on no free list."""
        destroy_or_log(slot)
        if slot.state is DESTROYED or slot.mapping is not None or self._on_demand:
            slot.forget()  # what its runtime could not forget, too
            self._past.update(slot.counts())
            self._past["destroyed"] += 1
            self._places[slot.place] = None
            self._vacant.append(slot.place)
        else:  # its range could not be covered: its next use tries that again, or fails
            slot.affinity = None
            self._make_free(slot)

    def warm(
        self,
        count: int,
        image: Image | None,
        maximum: int | None,
        *wanted: Any,
    ) -> int:
        """Make up to `count` slots clean with this image, and populated as the guest's latest one; return how many.

        `wanted` are the arguments of `take`.
        """
        shape, affinity, byte_size, _ = wanted
        model = self._free[shape].latest(affinity) if shape in self._free else None
        usual = None if model is None else model.private_runs()
        slots: list[Slot] = []
        # Goes with this frame: without a lease, reclaim would free the slots in the middle.
        holder = Holder()
        try:
            while len(slots) < count:
                slot = self.take(*wanted)
                if slot is None:
                    break
                slot.lease = SlotLease(holder)
                slot.lease.pool = None
                slots.append(slot)
                slot.instantiate(image, byte_size, maximum=maximum)
                slot.affinity = affinity
                slot.populate(usual or [])
                slot.state = CLEAN  # no guest has run in it
        finally:
            for slot in slots:
                self.put_away(slot)
        return len(slots)

    def reclaim(self) -> None:
        """Put away the slots, and list the places, that an exception left neither free nor held.

        Slots that wait in the pool's queue are put away, too; the queue's entry is ignored afterwards.
        """
        self._vacant = [place for place, slot in enumerate(self._places) if slot is None]
        free = set(self.free())
        for slot in self.slots():
            if slot not in free and (slot.lease is None or slot.lease() is None):
                self._unlist(slot)
                if slot.lease not in (None, RETURNED):
                    slot.state = UNKNOWN  # its holder went: the bytes may be a guest's, also if the state is clean
                self.put_away(slot)

    # -- looking

    def slots(self) -> Iterator[Slot]:
        """Yield every slot; safe for threads."""
        return (slot for slot in list(self._places) if slot is not None)

    def free(self) -> Iterator[Slot]:
        """Yield every free slot."""
        return (slot for free in self._free.values() for slot in free)

    def counts(self) -> Counter[str]:
        """Return the counters of all slots together, those that are gone included; safe for threads."""
        total = self._past + Counter(purged=self.purged)
        for slot in self.slots():
            total.update(slot.counts())
        return total

    def statistics(self, name: str, more: Counter[str]) -> PoolStatistics:
        """Return the statistics of the pool of this name, which has counted `more`; safe for threads."""
        slots = list(self.slots())
        idle = [slot for slot in slots if slot.lease is None]
        count = self.counts() + more
        resets_by = {key[1:]: number for key, number in count.items() if key[0] == "*"}
        names = ("created", "destroyed", "remaps", "failed_resets", "exhausted", "purged", "audits")
        return PoolStatistics(
            plugin=name,
            limit=self._limit,
            in_use=len(slots) - len(idle),
            idle=len(idle),
            warm=sum(slot.image is not None for slot in idle),
            leases=count["hits"] + count["remaps"],
            affinity_hits=count["hits"],
            resets=sum(resets_by.values()),
            resets_by=resets_by,
            **{each: count[each] for each in names},
        )

    def check(self) -> None:
        """Check every slot's invariant, and that each place has one owner; raises InvariantBroken."""
        free = list(self.free())
        for place, slot in enumerate(self._places):
            owners = self._vacant.count(place)
            if slot is not None:
                slot.check()
                owners += free.count(slot) + (slot.lease is not None)
            if owners != 1:
                raise InvariantBroken(f"place {place} of a pool has {owners} owners, not 1: {slot}")

    # -- images, and the end

    def purge(self, image: Image) -> None:
        """Take `image` out of every free slot."""
        having = [slot for slot in self.free() if slot.image is image]
        for slot in having:
            self._unlist(slot)
            self._purge(slot)
            self.put_away(slot)

    def _unlist(self, slot: Slot) -> None:
        """Take a slot off every free list: left in half of one, it would be handed out while it is leased."""
        for free in self._free.values():
            free.discard(slot)

    def _purge(self, slot: Slot) -> None:
        """Take the image out of a slot that is on no free list; the slot is unknown if that fails."""
        slot.affinity = None
        try:
            slot.purge()
        except MemslotError:
            slot.failed_resets += 1
        else:
            self.purged += 1

    def destroy(self) -> None:
        """Destroy every slot, and unmap the reservation."""
        self._free.clear()
        for slot in self.slots():
            if slot.within is self._reservation and slot.mapping is None:
                slot.forget()  # one munmap unmaps all of these
            self._retire(slot)
        if self._reservation is not None:
            self._reservation.unmap()


def destroy_or_log(slot: Slot) -> None:
    """Destroy a slot; if that fails it is unknown, and mapped over at its next use."""
    try:
        slot.destroy()
    except Exception as error:  # noqa: BLE001 - a runtime may raise anything as it forgets its mapping
        # As text: a log handler that keeps records would keep the traceback, and with it the slot's memory.
        _log.error("a slot could not be destroyed: %s", str(error))
