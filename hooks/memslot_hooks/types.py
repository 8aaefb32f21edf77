"""What travels through the hooks: requests, memories, images and results.

Nothing here maps memory or knows a runtime; a plugin author needs this file, `specs` and pluggy.
Sizes are bytes throughout, addresses are integers.
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

    In a snapshot `data` looks into a live memory: whoever keeps it beyond the call copies it.  Where
    `backing` is not None, the same bytes are at `file_offset` of it, both offsets are multiples of
    the page, and a plugin may map them instead.
    """

    offset: int
    data: bytes | memoryview
    backing: Backing | None = None
    file_offset: int = 0


@dataclass(frozen=True, slots=True)
class InitialContent:
    """The initial contents of one linear memory: `segments` laid in order (later over earlier) over
    zeros.

    `byte_size` is the memory's minimum in bytes; no segment reaches past it.  `name` is for people,
    who find it in /proc/self/maps and in errors.  `memory` is the live memory of which this is the
    state now, where it is one: it began as its request's image, and who made both may keep only what
    differs.
    """

    byte_size: int
    segments: tuple[Segment, ...] = ()
    name: str = "guest"
    memory: LinearMemory | None = None


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes at `offset` of the linear memory, found at `file_offset` of the image; all
    page multiples.
    """

    offset: int
    length: int
    file_offset: int


@runtime_checkable
class Image(Protocol):
    """The initial contents of one linear memory, built once and compared by identity."""

    @property
    def kind(self) -> str:
        """Which plugin's kind of image this is, for example "memfd" or "bytes"."""

    @property
    def byte_size(self) -> int:
        """Where the last extent ends, in bytes; 0 for an image of only zeros."""

    @property
    def extents(self) -> tuple[Extent, ...]:
        """Page-aligned extents in ascending order; what lies between them is zero."""

    def close(self) -> None:
        """Give back what the image holds; mappings of it stay valid."""


@dataclass(frozen=True, slots=True)
class HostMapping:
    """An address range that a runtime made and owns, onto which a slot may be laid.

    `[base, base + accessible)` is readable and writable, the rest of `reserved` bytes faults.  The
    range stays mapped for as long as `owner` is alive.  `forget` is called when the plugin will not
    use the range again.
    """

    base: int
    accessible: int
    reserved: int
    owner: Any
    forget: Callable[[], None]
    shape: object = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRequest:
    """Everything a plugin is told when a host needs a linear memory; one object serves all memories
    of its kind.

    `growth` says what `memslot_grow_memory` means on this host: "decide" before the growth happens,
    "report" when the host can only tell afterwards.  `map_host_memory` is None where the plugin
    provides the address range, and makes a new range of the runtime's own where the runtime insists
    on owning it; a plugin that keeps such ranges may hand the same one out again for an equal
    `host_shape`.  `minimum` and `maximum` are 0 for a memory that the runtime makes itself: it takes
    the place of one, and no byte of it is used.
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
    """A linear memory that a plugin handed out: `byte_size` accessible bytes at `base`, until it is
    released.

    Plugins may subclass it; `owner` is for the plugin that made it, and tells it whether a memory
    is its own.  `exposed` is true once the embedder has objects of the runtime's own that may reach
    the memory after its release; a plugin must not hand a `mapping` on then.
    """

    __slots__ = ("__weakref__", "base", "byte_size", "exposed", "mapping", "owner", "request")

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

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.byte_size} bytes at {self.base:#x}"
            f" for {self.request.guest_id}[{self.request.memory_index}]>"
        )


RETIRED = "retired"
"""The strategy of a release whose memory was not reset but destroyed: nobody gets it again."""


class ResetResult(NamedTuple):
    """What a reset did.

    `dirty_bytes` were put back (None where the strategy cannot know): pages that differed from the
    image, or, where nothing was compared, pages that had become private.  `nanoseconds` is what it
    took, `strategy` how it was done, and `reason` why something else than usual was done, or "".
    The built-in allocators say "madvise", "pagemap", "copy", "remap" (where MADV_DONTNEED does not
    work) or `RETIRED`.
    """

    dirty_bytes: int | None
    nanoseconds: int
    strategy: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a plugin says about itself to `memslot doctor`: whether it will answer requests, and
    why.
    """

    plugin: str
    answers: bool
    reason: str


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """The counters of one pool, read at once; totals count since the pool was made.

    `resets_by` counts resets by strategy and, after a colon, the reason where there was one.
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
