"""Images: the initial contents of one linear memory, built once and never changed again.

    MemfdImage    extents in a sealed memfd or in a file, mapped copy-on-write onto a slot
    BytesImage    extents in this process's own memory, copied onto a slot (the fallback)

An image is compared by identity, never by its descriptor's number, which the kernel reuses.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from memslot_hooks.types import Extent, InitialContent, Segment
from memslot_plugin._core import PAGE_SIZE, align_up, ffi, lib
from memslot_plugin.errors import UsedAfterClose
from memslot_plugin.memory.backing import Backing, HeapBacking, Memfd, new_bytes

if TYPE_CHECKING:
    from typing_extensions import Self

MIN_GAP = 16 * PAGE_SIZE
"""Interior zero runs shorter than this stay in the file: each further extent costs a mapping (VMA) per slot."""

MAX_EXTENTS = 16
"""With more runs than this the gaps are widened until they fit: a slot may not eat the process's map count."""

_CHUNK = 1 << 20
"""Bytes that are searched together for pages that are not zero."""


class Image:
    """The initial contents of one linear memory: page-aligned extents over zeros (abstract; see the two kinds).

    `byte_size` is where the last extent ends (0 for an image of only zeros, which is still an image),
    `extents` are in ascending order and do not overlap.  `inherited_bytes` of them lie in backings of
    another image, on which this one is layered.  A closed image cannot be mapped again; its bytes are
    given back when the last slot that has it mapped releases it, because a reset still needs them until then.
    """

    kind = "abstract"
    copied: ClassVar[bool] = False
    """True if the extents are copied onto a slot and not mapped."""

    __slots__ = (
        "__weakref__",
        "_backings",
        "_slots",
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
        if extents:
            backing = self._store(_packed(runs, extents))
            extents = tuple(replace(extent, backing=backing) for extent in extents)
        self._compose(extents, ())

    @classmethod
    def of_extents(
        cls, name: str, extents: Sequence[Extent], inherited: Collection[Backing] = ()
    ) -> Self:
        """Make an image of extents in ascending order, with backings; `inherited` are those of another image."""
        image = cls.__new__(cls)
        image.name = name
        image._compose(extents, inherited)  # noqa: SLF001 - of our own class
        return image

    @classmethod
    def layered(
        cls, name: str, kept: Sequence[Extent], own: Sequence[tuple[int, bytes | memoryview]]
    ) -> Self:
        """Make an image of another one's extents and of bytes of its own at their offsets.

        Own bytes are whole pages but for the end of the last; none of all these overlap.
        """
        image = cls.__new__(cls)
        image.name = name
        extents, packed, at = list(kept), [], 0
        for _, data in own:
            packed.append((at, memoryview(data)))
            at += align_up(len(data))
        if packed:
            backing = image._store(packed)  # noqa: SLF001 - of our own class
            for (offset, data), (file_offset, _) in zip(own, packed, strict=True):
                extents.append(Extent(offset, align_up(len(data)), file_offset, backing))
        extents.sort(key=lambda extent: extent.offset)
        image._compose(extents, {extent.backing for extent in kept})  # noqa: SLF001 - as above
        return image

    def _compose(self, extents: Sequence[Extent], inherited: Collection[Backing]) -> None:
        self.extents = tuple(_merged(extents))
        self.inherited_bytes = sum(each.length for each in extents if each.backing in inherited)
        self.c_count = len(self.extents)
        self.c_extents: Any = ffi.new("ms_extent[]", max(self.c_count, 1))
        for c_extent, each in zip(self.c_extents, self.extents, strict=False):
            c_extent.offset, c_extent.length = each.offset, each.length
            c_extent.file_offset, c_extent.fd = each.file_offset, each.backing.fd
            c_extent.bytes = ffi.cast("uint8_t *", each.backing.address + each.file_offset)
        self.closed = False
        self._slots: set[int] = set()
        self._backings = list(dict.fromkeys(each.backing for each in self.extents))
        for backing in self._backings:
            backing.acquire(self)

    def _store(self, pieces: list[tuple[int, memoryview]]) -> Backing:
        """Keep these pieces, the last of which may end within a page."""
        raise NotImplementedError

    @property
    def byte_size(self) -> int:
        """The end of the last extent, in bytes; 0 for an image of only zeros."""
        return self.extents[-1].offset + self.extents[-1].length if self.extents else 0

    @property
    def stored_bytes(self) -> int:
        """Bytes that the image itself stores: without zeros around its extents, and without what it inherits."""
        return sum(extent.length for extent in self.extents) - self.inherited_bytes

    def map(self, base: int) -> int:
        """Put the extents onto the zeros at `base`; 0 or -errno."""
        raise NotImplementedError

    def unmap(self, base: int) -> int:
        """Map zeros over the extents' ranges at `base`; 0 or -errno.

        A copied image's, too: if MADV_DONTNEED is ignored (old user-mode qemu), dropping them would leave its bytes
        to the next guest.
        """
        return lib.ms_zero_extents(base, self.c_extents, self.c_count) if self.c_count else 0

    def acquire(self, slot: object) -> None:
        """Note that a slot has this image mapped."""
        self._slots.add(id(slot))

    def release(self, slot: object) -> None:
        """Note that a slot does not have this image mapped any more."""
        self._slots.discard(id(slot))
        if self.closed and not self._slots:
            self._free()

    def close(self) -> None:
        """Give the bytes back, now or when the last slot releases the image."""
        self.closed = True
        if not self._slots:
            self._free()

    def _free(self) -> None:
        for backing in self._backings:
            backing.release(self)

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

    One descriptor and one read-only mapping per image, none per slot.  A reset copies back from that mapping.
    """

    kind = "memfd"

    __slots__ = ()

    def _store(self, pieces: list[tuple[int, memoryview]]) -> Backing:
        return Memfd.of_pieces(self.name, _end(pieces), pieces)

    @property
    def fd(self) -> int:
        """The descriptor of the first extent, or -1 for an image of only zeros; raises UsedAfterClose."""
        self.require_open()
        return self.extents[0].backing.fd if self.extents else -1

    def map(self, base: int) -> int:
        """Map the extents copy-on-write; 0 or -errno."""
        return int(lib.ms_map_extents(base, self.c_extents, self.c_count))


class BytesImage(Image):
    """An image in ordinary memory, for machines where memfd is missing or refused."""

    kind = "bytes"
    copied = True

    __slots__ = ()

    def _store(self, pieces: list[tuple[int, memoryview]]) -> Backing:
        return HeapBacking(_end(pieces), pieces)

    def map(self, base: int) -> int:
        """Copy the extents; 0."""
        lib.ms_copy_extents(base, self.c_extents, self.c_count)
        return 0


def _end(pieces: list[tuple[int, memoryview]]) -> int:
    """Return the end of the last piece, in whole pages."""
    offset, piece = pieces[-1]
    return align_up(offset + len(piece))


def _merged(extents: Sequence[Extent]) -> list[Extent]:
    """Join neighbours that are neighbours in their backing, too: the kernel makes one mapping (VMA) of them."""
    merged: list[Extent] = []
    for extent in extents:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.backing is extent.backing
            and last.offset + last.length == extent.offset
            and last.file_offset + last.length == extent.file_offset
        ):
            merged[-1] = replace(last, length=last.length + extent.length)
        else:
            merged.append(extent)
    return merged


_Runs = list[tuple[int, memoryview]]
"""Bytes at page-aligned offsets of a memory, in ascending order, none of which overlap."""


def extents_of(content: InitialContent | bytearray | bytes | memoryview) -> tuple[Extent, ...]:
    """Return the extents that an image of this content has; their backing is None."""
    return _laid_out(content)[1]


def span_of(content: InitialContent) -> int:
    """Return the bytes from the first page that is not zero to the end of the last, as an image spans them.

    The segments are in ascending order and begin with pages.  Only the zeros outside of the span are read.
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
    """Join those of the ascending runs (start, end) that are closer than `gap`."""
    found: list[tuple[int, int]] = []
    for start, end in runs:
        if found and start - found[-1][1] < gap:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def few(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ascending runs (start, end) until there are at most MAX_EXTENTS."""
    gap = MIN_GAP
    found = joined(runs, gap)
    while len(found) > MAX_EXTENTS:
        gap *= 2
        found = joined(found, gap)
    return found


def _laid_out(
    content: InitialContent | bytearray | bytes | memoryview,
) -> tuple[_Runs, tuple[Extent, ...]]:
    """Return the runs of pages that are not zero, and the extents that store them with some zeros between."""
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
    """Move the runs to the offsets that their extents have in the backing."""
    packed, places = [], iter(extents)
    extent = next(places)
    for at, data in runs:
        while at >= extent.offset + extent.length:
            extent = next(places)
        packed.append((extent.file_offset + at - extent.offset, data))
    return packed


def flat_runs(content: InitialContent) -> _Runs:
    """Return runs of the pages that segments reach, later segments over earlier ones.

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
    """Return the page-aligned runs of `content` that are not zero.

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
