"""Arguments and answers of the hooks: requests, memories, images and results.

Sizes are bytes throughout, addresses are integers.  This file maps no memory and imports no runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable


@runtime_checkable
class Backing(Protocol):
    """An immutable file behind one or more images.  Call `acquire` to keep it open, `release` when done."""

    @property
    def fd(self) -> int:
        """The file descriptor, or -1 if there is no file.  Map it; the backing closes it."""

    def acquire(self, holder: object) -> None:
        """Keep the file open until `holder` releases it or is collected."""

    def release(self, holder: object) -> None:
        """Let the file close once no other holder needs it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes that a module puts at `offset` of a linear memory before its first instruction.

    In a snapshot `data` is a view of a live memory: copy it to keep it beyond the call.  If `backing`
    is not None, the bytes are also at its `file_offset`, both offsets are multiples of the page size,
    and a plugin may map them instead.
    """

    offset: int
    data: bytes | memoryview
    backing: Backing | None = None
    file_offset: int = 0


@dataclass(frozen=True, slots=True)
class InitialContent:
    """The initial contents of one linear memory: `segments` in order, later over earlier, over zeros.

    `byte_size` is the memory's minimum in bytes; no segment reaches past it.  `name` appears in
    /proc/self/maps and in errors.  For a snapshot `memory` is the live memory with these contents.
    It began as its request's image, so the plugin that made both may store only what differs.
    """

    byte_size: int
    segments: tuple[Segment, ...] = ()
    name: str = "guest"
    memory: LinearMemory | None = None


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes at `offset` of a linear memory, stored at `file_offset` of `backing`; all page multiples.

    `backing` is None before an image is built, or if the plugin does not tell.
    """

    offset: int
    length: int
    file_offset: int
    backing: Any = field(default=None, compare=False, repr=False)


@runtime_checkable
class Image(Protocol):
    """The initial contents of one linear memory, built once and compared by identity."""

    @property
    def kind(self) -> str:
        """The name of this kind of image, for example "memfd" or "bytes"."""

    @property
    def byte_size(self) -> int:
        """The end of the last extent, in bytes; 0 for an image of only zeros."""

    @property
    def extents(self) -> tuple[Extent, ...]:
        """Page-aligned extents in ascending order, with zeros between them."""

    def close(self) -> None:
        """Free the image; mappings of it stay valid."""


@dataclass(frozen=True, slots=True)
class HostMapping:
    """An address range that a runtime mapped and owns, and that a slot may be made over.

    `[base, base + accessible)` is readable and writable, the rest of `reserved` bytes faults.  The
    range stays mapped while `owner` is alive.  The plugin calls `forget` when it will not use the
    range again.  `shape` is the `host_shape` of the request that the range was made for.
    """

    base: int
    accessible: int
    reserved: int
    owner: Any
    forget: Callable[[], None]
    shape: object = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRequest:
    """A host's request for a linear memory; one object serves all memories of its kind.

    With `growth` "decide" the host calls `memslot_grow_memory` before a growth; with "report" the
    runtime grows memories by itself, and only `memslot_memory_grown` is called.  `map_host_memory` is
    None if the plugin provides the address range.  Otherwise the runtime owns it: the function makes
    a new one, and a plugin may reuse a range that it keeps for a request of equal `host_shape`.
    `minimum` and `maximum` are 0 for a memory that the runtime makes itself: the answer counts
    against limits, and no byte of it is used.
    """

    minimum: int
    maximum: int | None
    reserved: int
    guard: int
    image: Image | None
    guest_id: str
    memory_index: int
    host: str
    tenant: str | None = None
    growth: Literal["decide", "report"] = "decide"
    bounds_checks: Literal["guard", "code"] = "guard"
    wait_timeout: float = 0.0
    map_host_memory: Callable[[], HostMapping] | None = None
    host_shape: object = None


class LinearMemory:
    """A leased linear memory: `byte_size` accessible bytes at `base`, until it is released.

    Plugins may subclass it.  `owner` is for the plugin that made the memory, to recognise it as its
    own.  `reset`, which the owner may set, resets the memory like `memslot_reset_memory`: a host binds it
    at the lease, and calls it instead of the hook while no other plugin is asked first, wraps the hook or
    watches resets.  `exposed` is true once the embedder has objects of the runtime's own that may reach the
    memory after its release; its `mapping` must not be leased again then.
    """

    __slots__ = (
        "__weakref__",
        "base",
        "byte_size",
        "exposed",
        "mapping",
        "owner",
        "request",
        "reset",
    )

    def __init__(
        self,
        request: MemoryRequest,
        base: int,
        byte_size: int,
        *,
        owner: object,
        mapping: HostMapping | None = None,
    ) -> None:
        self.request = request
        self.base = base
        self.byte_size = byte_size
        self.owner = owner
        self.mapping = mapping
        self.exposed = False
        self.reset: Callable[[], object] | None = None

    def record_growth(self, byte_size: int) -> None:
        """Record a growth that the runtime has made by itself; a plugin may override this."""
        self.byte_size = byte_size

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.byte_size} bytes at {self.base:#x}"
            f" for {self.request.guest_id}[{self.request.memory_index}]>"
        )


RETIRED = "retired"
"""The strategy of a release that destroyed the memory instead of resetting it."""


class ResetResult(NamedTuple):
    """The result of a reset.

    `dirty_bytes` is the size of the pages that were restored: those that differed from the image, or
    those that had become private if the strategy does not compare; None if it cannot know.
    `nanoseconds` is the duration.  `strategy` is "madvise", "pagemap", "copy", "remap" (MADV_DONTNEED
    does not work here) or `RETIRED` from the built-in allocators.  `reason` says why this reset was
    done in another way than usual, or is "".
    """

    dirty_bytes: int | None
    nanoseconds: int
    strategy: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A plugin's report to `memslot doctor`; `answers` is true if it will answer requests."""

    plugin: str
    answers: bool
    reason: str


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """The counters of one pool, read at once; totals count since the pool was made.

    `resets_by` counts resets by strategy, or by "strategy: reason" if there was a reason.
    """

    plugin: str
    limit: int
    in_use: int
    idle: int
    warm: int
    created: int
    destroyed: int
    leases: int
    affinity_hits: int
    remaps: int
    resets: int
    failed_resets: int
    exhausted: int
    purged: int
    audits: int = 0
    resets_by: Mapping[str, int] = field(default_factory=dict)
