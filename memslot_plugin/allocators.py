"""memslot's allocators: plugins like those of other distributions, enabled by the entry points `memfd` and
`anonymous`.

    memfd        asked first; answers None where there is no sealed memfd, and that is the fallback
    anonymous    asked last, accepts everything; images are copied, not mapped
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from memslot_hooks import hookimpl
from memslot_hooks.types import (
    Answer,
    Extent,
    LinearMemory,
    MemoryRequest,
    PoolStatistics,
    ResetResult,
)
from memslot_plugin.errors import MemoryTooLarge, SystemCallError, Unsupported, UsedAfterClose
from memslot_plugin.memory import image as images
from memslot_plugin.memory import layers
from memslot_plugin.memory.backing import Mapped
from memslot_plugin.memory.pool import Pool
from memslot_plugin.memory.probe import probe
from memslot_plugin.memory.reset import choose

if TYPE_CHECKING:
    from memslot_hooks.types import Image, InitialContent
    from memslot_plugin.memory.slot import Slot
    from memslot_plugin.settings import Settings


class SlotMemory(LinearMemory):
    """A linear memory in a leased slot; `slot` is None once it was released."""

    __slots__ = ("slot",)

    def __init__(self, request: MemoryRequest, owner: object) -> None:
        # What the base would do: one is made for every instance, and a call costs as much as five of these.
        self.request = request
        self.base = 0
        self.byte_size = request.minimum
        self.owner = owner
        self.mapping = None
        self.exposed = False
        self.slot: Slot | None = None

    @property
    def reset(self) -> Callable[[], object] | None:  # type: ignore[override]
        """The reset of the slot as one call, for the host to bind; None once the memory was released."""
        owner, slot = self.owner, self.slot
        if slot is None or not isinstance(owner, PoolAllocator) or owner.pool is None:
            return None
        return owner.pool.bound_reset(slot)

    def record_growth(self, byte_size: int) -> None:
        super().record_growth(byte_size)
        if self.slot is not None:
            self.slot.grow(
                byte_size
            )  # the runtime changed the protection; the slot records the size


class PoolAllocator:
    """The base of both allocators: a pool per host, and the hooks in terms of it."""

    name = "abstract"
    resets_own_memories_only = True
    """Tells the arming that `memslot_reset_memory` answers None for every memory of another owner."""

    def __init__(self) -> None:
        self.pool: Pool | None = None
        self.settings: Settings | None = None

    @hookimpl
    def memslot_open_host(self, settings: Settings) -> None:
        self.settings = settings
        if self._answers().answers:
            self.pool = Pool(
                slots=settings.slots,
                reserved=settings.reserved,
                guard=settings.guard,
                reset=choose(settings.reset, settings.keep_resident),
                strategy=settings.strategy,
                max_unused_warm_slots=settings.max_unused_warm_slots,
                allocation=settings.allocation,
                growth=settings.growth,
                audit=settings.audit,
                name=self.name,
            )

    @hookimpl
    def memslot_close_host(self) -> None:
        if self.pool is not None:
            self.pool.close()

    @hookimpl
    def memslot_describe(self) -> Answer:
        return self._answers()

    @hookimpl
    def memslot_statistics(self) -> PoolStatistics | None:
        return None if self.pool is None else self.pool.statistics()

    @hookimpl
    def memslot_forget_image(self, image: Image) -> None:
        if self.pool is not None and isinstance(image, images.Image):
            self.pool.purge(image)

    @hookimpl
    def memslot_grow_memory(self, memory: LinearMemory, byte_size: int) -> bool | None:
        slot = self._slot_of(memory)
        if slot is None:
            return None
        try:
            slot.grow(byte_size)
        except (MemoryTooLarge, SystemCallError):
            return False  # the guest sees -1, as it does when its own runtime is out of memory
        memory.byte_size = byte_size
        return True

    @hookimpl
    def memslot_reset_memory(self, memory: LinearMemory) -> ResetResult | None:
        # What _slot_of says, without the call: this is in the path of every request.
        if memory.owner is not self or self.pool is None or not isinstance(memory, SlotMemory):
            return None
        result = self.pool.reset(memory.slot or self._released(memory))
        memory.byte_size = memory.request.minimum
        return result

    @hookimpl
    def memslot_release_memory(self, memory: LinearMemory) -> ResetResult | None:
        # As in memslot_reset_memory.
        if memory.owner is not self or self.pool is None or not isinstance(memory, SlotMemory):
            return None
        slot = memory.slot or self._released(memory)
        memory.slot = None
        # Compare memory.byte_size too: recording a growth in the slot may have failed.
        # A runtime's own objects reach its mapping for as long as they live, so an exposed one has no other tenant.
        retire = slot.mapping is not None and (
            memory.exposed
            or slot.accessible != slot.initial
            or memory.byte_size != memory.request.minimum
        )
        return self.pool.release(slot, retire=retire)

    def _warm(self, request: MemoryRequest, image: images.Image | None, count: int) -> int | None:
        if self.pool is None:
            return None
        self.admit(request, self.pool)
        return self.pool.warm(
            image,
            request.minimum,
            affinity=(request.guest_id, request.memory_index),
            count=count,
            maximum=request.maximum,
            map_host_memory=request.map_host_memory,
            shape=request.host_shape,
        )

    def admit(self, request: MemoryRequest, pool: Pool) -> None:
        """Refuse a request that no slot of the pool can serve: MemoryTooLarge, Unsupported.

        Compiled code must find the reserved and guard bytes that it counts on; a runtime's own mapping has
        what its runtime expects.
        """
        if pool.growth == "ftruncate" and request.bounds_checks != "code":
            raise Unsupported(
                f"growth = ftruncate needs a host that checks bounds in code; {request.host} relies on guard pages,"
                " where an access past the end would raise SIGBUS; allowed here: mprotect"
            )
        if request.map_host_memory is not None:
            return
        if request.minimum > pool.reserved:
            raise MemoryTooLarge(
                f"{request.guest_id} needs {request.minimum} bytes for memory {request.memory_index},"
                f" and a slot holds {pool.reserved}; raise the setting reserved"
            )
        if request.bounds_checks == "guard" and (
            request.reserved > pool.reserved or request.guard > pool.guard
        ):
            raise Unsupported(
                f"{request.host} counts on {request.reserved} reserved and {request.guard} guard"
                f" bytes, and slots here have {pool.reserved} and {pool.guard}; open the host with"
                " the same settings as its plugins"
            )

    def _slot_of(self, memory: LinearMemory) -> Slot | None:
        """Return the leased slot of a memory of this allocator; None if another plugin owns the memory."""
        if memory.owner is not self or not isinstance(memory, SlotMemory):
            return None
        return memory.slot or self._released(memory)

    def _released(self, memory: SlotMemory) -> NoReturn:
        raise UsedAfterClose(f"the memory of {memory.request.guest_id} was released before")

    def _layered(self, content: InitialContent) -> images.Image | None:
        """An image that keeps only what differs from the one that its memory began with; None where
        there is none, or it would take too many extents.
        """
        slot = None if content.memory is None else self._slot_of(content.memory)
        if slot is None or slot.image is None:
            return None
        held = content.segments[0].data if content.segments else b""
        changes = slot.changes(images.MIN_GAP)
        seen = slot.memory.accessible
        if len(held) > seen:  # it grew in a file of its own, or was not reported yet
            changes.append((seen, len(held) - seen))
        return layers.layered(content.name, slot.image, held, changes)

    def _answers(self) -> Answer:
        raise NotImplementedError


def _creates(kind: type[images.Image]) -> Callable[[Any, MemoryRequest], LinearMemory | None]:
    """Return the hook `memslot_create_memory` of an allocator whose slots take images of this kind."""

    def memslot_create_memory(self: PoolAllocator, request: MemoryRequest) -> LinearMemory | None:
        image, pool, minimum = request.image, self.pool, request.minimum
        if pool is None or not (image is None or isinstance(image, kind)):
            return None
        if (
            minimum > pool.reserved
            or request.reserved > pool.reserved
            or request.guard > pool.guard
            or pool.growth == "ftruncate"
        ):
            self.admit(request, pool)
        memory = SlotMemory(request, self)
        slot = memory.slot = pool.lease(
            image,
            minimum,
            affinity=(request.guest_id, request.memory_index),
            maximum=request.maximum,
            timeout=request.wait_timeout,
            map_host_memory=request.map_host_memory,
            shape=request.host_shape,
            holder=memory,
        )
        memory.base, memory.mapping = slot.base, slot.mapping
        return memory

    return memslot_create_memory


class MemfdAllocator(PoolAllocator):
    """Slots that map sealed memfd images copy-on-write."""

    name = "memfd"

    @hookimpl
    def memslot_open_host(self, settings: Settings) -> None:
        super().memslot_open_host(settings)
        answer = self._answers()
        if settings.memfd == "on" and not answer.answers:
            raise Unsupported(
                f"memfd = on is not possible here: {answer.reason}; allowed: auto, off"
            )

    memslot_create_memory = hookimpl(_creates(images.MemfdImage))

    @hookimpl
    def memslot_warm_memory(self, request: MemoryRequest, count: int) -> int | None:
        image = request.image
        if image is not None and not isinstance(image, images.MemfdImage):
            return None
        return self._warm(request, image, count)

    @hookimpl
    def memslot_build_image(self, content: InitialContent) -> Image | None:
        if self.pool is None:
            return None
        extents = [
            Extent(each.offset, len(each.data), each.file_offset, each.backing)
            for each in content.segments
            if isinstance(each.backing, Mapped)
        ]
        if extents and len(extents) == len(content.segments):
            return images.MemfdImage.of_extents(content.name, extents)
        return self._layered(content) or images.MemfdImage(content.name, content)

    def _answers(self) -> Answer:
        if self.settings is not None and self.settings.memfd == "off":
            return Answer(self.name, False, "the setting memfd is off")
        found = probe()
        for finding in (found.memfd, found.seals):
            if not finding.works:
                return Answer(self.name, False, finding.detail)
        return Answer(self.name, True, "sealed memfd images can be made here")


class AnonymousAllocator(PoolAllocator):
    """The fallback: the same slots over anonymous memory, onto which images are copied."""

    name = "anonymous"

    memslot_create_memory = hookimpl(_creates(images.Image), trylast=True)

    @hookimpl(trylast=True)
    def memslot_warm_memory(self, request: MemoryRequest, count: int) -> int | None:
        image = request.image
        if image is not None and not isinstance(image, images.Image):
            return None
        return self._warm(request, image, count)

    @hookimpl(trylast=True)
    def memslot_build_image(self, content: InitialContent) -> Image | None:
        return self._layered(content) or images.BytesImage(content.name, content)

    def _answers(self) -> Answer:
        return Answer(
            self.name, True, "anonymous memory is always there; images are copied, not mapped"
        )
