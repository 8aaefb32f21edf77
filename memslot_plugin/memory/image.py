"""Images: the initial contents of one linear memory, built once and never changed again.

    MemfdImage    extents in a sealed memfd or in a file, mapped copy-on-write onto a slot
    BytesImage    extents in this process's own memory, copied onto a slot (the fallback)

An image is compared by identity, never by its descriptor's number, which the kernel reuses.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from memslot_hooks.types import Extent, InitialContent, Segment
from memslot_plugin._core import PAGE_SIZE, align_up, ffi, lib
from memslot_plugin.errors import SystemCallError, UsedAfterClose
from memslot_plugin.memory.backing import Backing, Held, Memfd, new_bytes

if TYPE_CHECKING:
    from typing_extensions import Self

MIN_GAP = 16 * PAGE_SIZE
"""Interior zero runs shorter than this stay in the file: each further extent costs a mapping (VMA)
per slot.
"""

_CHUNK = 1 << 20
"""Bytes that are looked at together for pages that are not zero."""

MAX_EXTENTS = 16
"""With more runs than this the gaps are widened until they fit: a slot may not eat the process's
map count.
"""


class Piece(NamedTuple):
    """`length` bytes at `offset` of a linear memory, which are those at `file_offset` of the backing."""

    offset: int
    length: int
    backing: Backing
    file_offset: int


class Image:
    """The initial contents of one linear memory: page-aligned extents over zeros (abstract; see the
    two kinds).

    `byte_size` is where the last extent ends (0 for an image of only zeros, which is still an
    image), `extents` are in ascending order and do not overlap, and `backings` are what each of them
    lies in.  `inherited_bytes` of them lie in what another image brought, on which this one is
    layered.  A closed image cannot be laid again; what it holds is given back when the last slot
    that it lies in has let go of it, because a reset still needs it until then.
    """

    kind = "abstract"
    copied: ClassVar[bool] = False
    """Whether the extents are copied onto a slot and not mapped."""

    __slots__ = (
        "__weakref__",
        "_held",
        "_holders",
        "backings",
        "c_count",
        "c_extents",
        "closed",
        "extents",
        "inherited_bytes",
        "name",
    )

    def __init__(self, name: str, content: InitialContent | bytearray | bytes | memoryview) -> None:
        self.name = name
        runs, extents = _laid_out(content)
        pieces: list[Piece] = []
        if extents:
            backing = self._store(_packed(runs, extents))
            pieces = [
                Piece(each.offset, each.length, backing, each.file_offset) for each in extents
            ]
        self._compose(pieces, ())

    @classmethod
    def of_pieces(
        cls, name: str, pieces: Sequence[Piece], inherited: Collection[Backing] = ()
    ) -> Self:
        """An image of pieces in ascending order; `inherited` are the backings that are not its own."""
        image = cls.__new__(cls)
        image.name = name
        image._compose(pieces, inherited)  # noqa: SLF001 - of our own class
        return image

    @classmethod
    def layered(
        cls, name: str, kept: Sequence[Piece], own: Sequence[tuple[int, bytes | memoryview]]
    ) -> Self:
        """An image of what it inherits, and of bytes of its own at their offsets, whole pages but for the
        end of the last; none of all these overlap.
        """
        image = cls.__new__(cls)
        image.name = name
        pieces, packed, at = list(kept), [], 0
        for _, data in own:
            packed.append((at, memoryview(data)))
            at += align_up(len(data))
        if packed:
            backing = image._store(packed)  # noqa: SLF001 - of our own class
            for (offset, data), (file_offset, _) in zip(own, packed, strict=True):
                pieces.append(Piece(offset, align_up(len(data)), backing, file_offset))
        image._compose(sorted(pieces), {piece.backing for piece in kept})  # noqa: SLF001 - as above
        return image

    def _compose(self, pieces: Sequence[Piece], inherited: Collection[Backing]) -> None:
        pieces = _merged(pieces)
        self.extents = tuple(Extent(each.offset, each.length, each.file_offset) for each in pieces)
        self.backings = tuple(each.backing for each in pieces)
        self.inherited_bytes = sum(each.length for each in pieces if each.backing in inherited)
        self.c_extents: Any = ffi.new("ms_extent[]", max(len(pieces), 1))
        self.c_count = len(pieces)
        for c_extent, each in zip(self.c_extents, pieces, strict=False):
            c_extent.offset, c_extent.length = each.offset, each.length
            c_extent.file_offset, c_extent.fd = each.file_offset, each.backing.fd
            c_extent.bytes = ffi.cast("uint8_t *", each.backing.address + each.file_offset)
        self.closed = False
        self._holders: set[int] = set()
        self._held = list(dict.fromkeys(self.backings))
        for backing in self._held:
            backing.acquire(self)

    def _store(self, pieces: list[tuple[int, memoryview]]) -> Backing:
        """Keep these pieces, the last of which may end within a page."""
        raise NotImplementedError

    @property
    def byte_size(self) -> int:
        """Where the last extent ends, in bytes; 0 for an image of only zeros."""
        return self.extents[-1].offset + self.extents[-1].length if self.extents else 0

    @property
    def stored_bytes(self) -> int:
        """Bytes that the image itself holds: without the zeros around and between its extents, and
        without what it inherits.
        """
        return sum(extent.length for extent in self.extents) - self.inherited_bytes

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The extents with their backings."""
        return tuple(
            Piece(extent.offset, extent.length, backing, extent.file_offset)
            for extent, backing in zip(self.extents, self.backings, strict=True)
        )

    def lay(self, base: int) -> int:
        """Put the extents onto the zeros at `base`; 0 or -errno."""
        raise NotImplementedError

    def lift(self, base: int) -> int:
        """Map zeros over the extents' ranges at `base`; 0 or -errno."""
        # Also over a copied image: where MADV_DONTNEED is ignored, the next guest would see its bytes.
        return lib.ms_zero_extents(base, self.c_extents, self.c_count) if self.c_count else 0

    def acquire(self, holder: object) -> None:
        """A slot says that this image lies in it."""
        self._holders.add(id(holder))

    def release(self, holder: object) -> None:
        """A slot says that this image no longer lies in it."""
        self._holders.discard(id(holder))
        if self.closed and not self._holders:
            self._free()

    def close(self) -> None:
        """Give back what the image holds, now or when the last slot lets go of it; twice is a
        no-op.
        """
        self.closed = True
        if not self._holders:
            self._free()

    def _free(self) -> None:
        """Let go of every backing, also when one of them cannot be given back; twice is a no-op."""
        failure: SystemCallError | None = None
        for backing in tuple(self._held):
            try:
                backing.release(self)
            except SystemCallError as error:
                failure = failure or error  # closing again tries again
            else:
                with suppress(ValueError):  # another slot let go at once, on another thread
                    self._held.remove(backing)
        if failure is not None:
            raise failure

    def require_open(self) -> None:
        """Raise UsedAfterClose if the image was closed."""
        if self.closed:
            raise UsedAfterClose(f"the image of {self.name} was closed; prepare the guest again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.name}: {self.stored_bytes} bytes in {len(self.extents)} extents>"


class MemfdImage(Image):
    """An image in a sealed memfd (memfd_create(2), Linux >= 3.17), or in a file that it was loaded from.

    One descriptor and one read-only mapping per image, none per slot.  The view is what a reset
    copies back from.
    """

    kind = "memfd"

    __slots__ = ()

    def _store(self, pieces: list[tuple[int, memoryview]]) -> Backing:
        return Memfd.of_pieces(self.name, _end(pieces), pieces)

    @property
    def fd(self) -> int:
        """The descriptor of the first extent, or -1 for an image of only zeros."""
        self.require_open()
        return self.backings[0].fd if self.backings else -1

    def lay(self, base: int) -> int:
        """Map the extents copy-on-write; 0 or -errno."""
        failed: int = lib.ms_map_extents(base, self.c_extents, self.c_count)
        return failed


class BytesImage(Image):
    """An image in ordinary memory, for machines where memfd is missing or refused."""

    kind = "bytes"
    copied = True

    __slots__ = ()

    def _store(self, pieces: list[tuple[int, memoryview]]) -> Backing:
        return Held(_end(pieces), pieces)

    def lay(self, base: int) -> int:
        """Copy the extents; 0."""
        lib.ms_copy_extents(base, self.c_extents, self.c_count)
        return 0


def _end(pieces: list[tuple[int, memoryview]]) -> int:
    """Where the last piece ends, in whole pages."""
    offset, piece = pieces[-1]
    return align_up(offset + len(piece))


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """The same with neighbours that are neighbours in their backing, too, as one: the kernel makes one
    mapping of them.
    """
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.backing is piece.backing
            and last.offset + last.length == piece.offset
            and last.file_offset + last.length == piece.file_offset
        ):
            merged[-1] = last._replace(length=last.length + piece.length)
        else:
            merged.append(piece)
    return merged


_Runs = list[tuple[int, memoryview]]
"""Bytes at page-aligned offsets of a memory, in ascending order, none of which overlap."""


def extents_of(content: InitialContent | bytearray | bytes | memoryview) -> tuple[Extent, ...]:
    """The extents that an image of this content has."""
    return _laid_out(content)[1]


def span_of(content: InitialContent) -> int:
    """Bytes from the first page that is not zero to the end of the last, which an image of this content spans.

    The segments begin with pages, in ascending order.  No more is read than the zeros outside of the span.
    """
    chunks = [
        (segment.offset + at, segment.data, at)
        for segment in content.segments
        for at in range(0, len(segment.data), _CHUNK)
    ]
    ends = []
    for ordered, which in (chunks, 0), (reversed(chunks), -1):
        for offset, data, at in ordered:
            found = find_extents(memoryview(data)[at : at + _CHUNK])
            if found:
                extent = found[which]
                ends.append(offset + extent.offset - which * extent.length)
                break
    return ends[1] - ends[0] if ends else 0


def joined(runs: Sequence[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Join the runs (start, end), which are in ascending order, that are closer than `gap`."""
    found: list[tuple[int, int]] = []
    for start, end in runs:
        if found and start - found[-1][1] < gap:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def few(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join runs, which are in ascending order, until there are at most MAX_EXTENTS."""
    gap = MIN_GAP
    found = joined(runs, gap)
    while len(found) > MAX_EXTENTS:
        gap *= 2
        found = joined(found, gap)
    return found


def _laid_out(
    content: InitialContent | bytearray | bytes | memoryview,
) -> tuple[_Runs, tuple[Extent, ...]]:
    """The pages that are not zero, and the extents that hold them with some zeros between."""
    if isinstance(content, (bytes, bytearray, memoryview)):
        content = InitialContent(len(content), (Segment(0, memoryview(content).cast("B")),))
    runs = [
        (at + each.offset, data[each.offset : each.offset + each.length])
        for at, data in flat_runs(content)
        for each in find_extents(data)
    ]
    extents, file_offset = [], 0
    for start, end in few([(at, at + align_up(len(data))) for at, data in runs]):
        extents.append(Extent(start, end - start, file_offset))
        file_offset += end - start
    return runs, tuple(extents)


def _packed(runs: _Runs, extents: Sequence[Extent]) -> _Runs:
    """The runs at the offsets where their extents are in the backing."""
    packed, places = [], iter(extents)
    extent = next(places)
    for at, data in runs:
        while at >= extent.offset + extent.length:
            extent = next(places)
        packed.append((extent.file_offset + at - extent.offset, data))
    return packed


def flat_runs(content: InitialContent) -> _Runs:
    """The pages that segments reach, later segments over earlier ones; pages between are in none.

    A run that is one segment from the beginning of a page on is not copied.
    """
    segments = sorted(
        (each.offset, number, each.data)
        for number, each in enumerate(content.segments)
        if each.data
    )
    runs: _Runs = []
    first = 0
    while first < len(segments):
        start = segments[first][0] // PAGE_SIZE * PAGE_SIZE
        end, last = start, first
        while last < len(segments) and segments[last][0] < align_up(end + 1):
            end = max(end, segments[last][0] + len(segments[last][2]))
            last += 1
        parts = segments[first:last]
        if len(parts) == 1 and parts[0][0] == start:
            runs.append((start, memoryview(parts[0][2]).cast("B")))
        else:
            by_number = sorted(parts, key=lambda part: part[1])
            pieces = [(at - start, memoryview(data)) for at, _, data in by_number]
            runs.append((start, memoryview(ffi.buffer(new_bytes(end - start, pieces)))))
        first = last
    return runs


def find_extents(content: bytearray | bytes | memoryview) -> tuple[Extent, ...]:
    """The page-aligned runs of `content` that are not zero.

    Runs with fewer than MIN_GAP zero bytes between them are joined, and more are joined if they
    would be more than MAX_EXTENTS.
    """
    source = ffi.from_buffer("uint8_t[]", content)
    found = ffi.new("ms_extent[]", MAX_EXTENTS)
    gap = MIN_GAP
    while (
        count := lib.ms_find_extents(source, len(source), PAGE_SIZE, gap, found, MAX_EXTENTS)
    ) > MAX_EXTENTS:
        gap *= 2
    return tuple(
        Extent(found[i].offset, found[i].length, found[i].file_offset) for i in range(count)
    )
