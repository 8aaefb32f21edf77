r"""Containers: a guest as one file, written whole or not at all, read only if every byte is right.

    offset  bytes
         0      8  b"\x93memslot"
         8      4  the version of this format, 1; all integers are little-endian
        12      4  the digest's kind: 0 SHA-256, 1 HMAC with SHA-256 and a key
        16      8  the page, in bytes, to which extents are aligned
        24      8  bytes of the whole file
        32      8  bytes of the head, a multiple of the page
        40      8  bytes of the metadata
        48     32  the digest of the whole file, with zeros in the place of this field
        80         metadata: `Metadata` as JSON
                   the module: rewritten, without the data that the images hold, and with saved globals
                   as initial values; then what runtimes compiled of it, each with the key of its
                   circumstances; zeros up to the end of the head
      head         extents, each at a multiple of the page, so that they can be mapped

A digest without a key detects damage, and proves nothing about the author: an attacker who can write the
file can write its digest too, and compiled code does whatever its author wants.  A digest with a key proves
that the author has the key.

An extent can also lie in another file that travels beside the container: see `Stored.file`.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from memslot_plugin._core import PAGE_SIZE, align_up
from memslot_plugin._core.limits import system_call_error
from memslot_plugin.errors import ArgumentError, InvalidContainer, MemoryTooLarge, MemslotError
from memslot_plugin.guest.plan import Origin
from memslot_plugin.guest.reasons import image_too_large

MAGIC = b"\x93memslot"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQQQ32s")
_DIGEST_AT, _DIGEST_SIZE = 48, 32
_PLAIN, _KEYED = 0, 1
_CHUNK = 1 << 20

MOST_METADATA = 1 << 20
"""The most bytes of metadata that are decoded; decoded, they take up to 12 times that."""

Size = Annotated[int, Meta(ge=0, lt=1 << 62)]


class Stored(NamedTuple):
    """`length` bytes at `offset` of a linear memory, at `file_offset` of file number `file`.

    File 0 is the container, whose extents count from the end of its head.
    """

    offset: Size
    length: Size
    file: Size
    file_offset: Size


class About(msgspec.Struct, frozen=True, kw_only=True):
    """The writer's statements about a guest, which no check depends on."""

    writer: str
    name: str
    is_snapshot: bool = msgspec.field(name="snapshot")
    reseed: str | None
    origin: Origin


class Metadata(msgspec.Struct, frozen=True):
    """The module's and the code's lengths in order, and the extents of each image in ascending order."""

    about: About
    module: Size
    code: tuple[tuple[str, Size], ...]
    images: tuple[tuple[Size, tuple[Stored, ...]], ...]


class Contents(msgspec.Struct, frozen=True):
    """The contents of a container to be written.

    `code` is compiled code by its key.  `images` has the extents by memory index, in ascending order.
    `pieces` are the bytes of those extents that lie in file 0, one after the other, each a whole number
    of pages.
    """

    about: About
    module: bytes
    code: Mapping[str, bytes]
    images: Mapping[int, Sequence[Stored]]
    pieces: Sequence[memoryview]


class Container(msgspec.Struct, frozen=True):
    """The contents that were read from a container.

    `extents_at` is the offset of its first extent, `extents` their bytes if the reader asked for them.
    """

    about: About
    module: bytes
    code: Mapping[str, bytes]
    images: Mapping[int, tuple[Stored, ...]]
    byte_size: int
    extents_at: int
    extents: memoryview | None


# Writing


def write(path: Path, contents: Contents, *, key: bytes | None = None) -> int:
    """Replace the file at `path` by a container, or leave it unchanged; return the container's size in bytes.

    The container is written beside it, synchronised and renamed, so that a reader sees the old file or
    the new one.  Raises SystemCallError, and ArgumentError for a path at which there is something else
    than a file.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".memslot-{os.urandom(8).hex()}")
    blocks, byte_size = _blocks(contents, key)
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise ArgumentError(f"{path} is there and is no file; choose another path")
        try:
            # Read-only: loaded guests map this file, and a guest that is saved again gets a new one.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(temporary, flags, 0o444)
            try:
                _write_all(fd, blocks)
                os.fsync(fd)
            finally:
                os.close(fd)
            temporary.rename(path)
        finally:
            with suppress(OSError):  # after the rename there is nothing of that name
                temporary.unlink()
        _synchronise(path.parent)
    except OSError as error:
        raise system_call_error(error.errno or 0, f"writing {path} ({byte_size} bytes)") from None
    return byte_size


def write_to(fd: int, contents: Contents) -> int:
    """Write a container to an empty file and return its size in bytes; raises OSError."""
    blocks, byte_size = _blocks(contents, None)
    _write_all(fd, blocks)
    return byte_size


def _blocks(contents: Contents, key: bytes | None) -> tuple[list[bytes | memoryview], int]:
    """Return the whole file in order, and its length."""
    metadata = msgspec.json.encode(
        Metadata(
            contents.about,
            len(contents.module),
            tuple((name, len(each)) for name, each in contents.code.items()),
            tuple((index, tuple(each)) for index, each in contents.images.items()),
        )
    )
    body = [metadata, contents.module, *contents.code.values()]
    used = _HEADER.size + sum(map(len, body))
    head = align_up(used)
    byte_size = head + sum(map(len, contents.pieces))
    kind = _PLAIN if key is None else _KEYED
    fields = (MAGIC, VERSION, kind, PAGE_SIZE, byte_size, head, len(metadata))
    rest: list[bytes | memoryview] = [*body, bytes(head - used), *contents.pieces]
    digest = _hash(key)
    digest.update(_HEADER.pack(*fields, bytes(_DIGEST_SIZE)))
    for block in rest:
        digest.update(block)
    return [_HEADER.pack(*fields, digest.digest()), *rest], byte_size


def _hash(key: bytes | None) -> Any:
    return hashlib.sha256() if key is None else hmac.new(key, digestmod="sha256")


def _write_all(fd: int, blocks: Sequence[bytes | memoryview]) -> None:
    for block in blocks:
        left = memoryview(block)
        while left:
            left = left[os.write(fd, left[: 1 << 30]) :]


def _synchronise(folder: Path) -> None:
    """Let the renaming survive a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # fsync(2): a file system that cannot do this for a folder
            raise
    finally:
        os.close(fd)


# Reading


def read(
    fd: int,
    name: str,
    *,
    key: bytes | None = None,
    keep: bool = False,
    image_limit: int | None = None,
) -> Container:
    """Read and verify the container behind a descriptor; `keep` its extents' bytes, too.

    Reads every byte once and maps nothing; the descriptor stays open, at any position.  Allocates at most
    twice the bytes that are there, whatever the file claims, and what its metadata takes (`MOST_METADATA`).
    Raises InvalidContainer with what is wrong with it, also if its digest was not made with this `key`,
    and MemoryTooLarge for an image of more than `image_limit` bytes.
    """
    try:
        return _read(fd, name, key, keep, image_limit)
    except OSError as error:
        raise InvalidContainer(f"{name} cannot be read: {error.strerror}") from None


def _read(fd: int, name: str, key: bytes | None, keep: bool, image_limit: int | None) -> Container:
    header = _read_header(fd, name, key)
    require_data(fd, name, header.byte_size)
    body = _HEADER.size + header.metadata
    kept = bytearray().join(_chunks(fd, 0, header.head))
    try:
        metadata = msgspec.json.decode(kept[_HEADER.size : body], type=Metadata)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidContainer(f"{name} makes no sense: its metadata is wrong: {error}") from None
    wrong = _contradiction(metadata, header.head - body, header.byte_size - header.head)
    if wrong is not None:
        raise InvalidContainer(f"{name} makes no sense: {wrong}")
    images = dict(metadata.images)
    for index, image in images.items():
        span = image[-1].offset + image[-1].length - image[0].offset if image else 0
        if image_limit is not None and span > image_limit:
            raise MemoryTooLarge(
                f"{name}: the image of memory {index} {image_too_large(span, image_limit)}"
            )
    digest = _hash(key)
    digest.update(kept[:_DIGEST_AT] + bytes(_DIGEST_SIZE))
    digest.update(memoryview(kept)[_HEADER.size :])
    for chunk in _chunks(fd, header.head, header.byte_size):
        digest.update(chunk)
        if keep:
            kept += chunk
    if not hmac.compare_digest(digest.digest(), header.digest):
        why = "it is damaged, or was saved with another key" if key is not None else "it is damaged"
        raise InvalidContainer(f"{name} cannot be trusted: its digest is wrong, so {why}")
    held = memoryview(kept).toreadonly()
    blobs, at = [], body
    for length in (metadata.module, *(length for _, length in metadata.code)):
        blobs.append(bytes(held[at : at + length]))
        at += length
    return Container(
        about=metadata.about,
        module=blobs[0],
        code={name: blob for (name, _), blob in zip(metadata.code, blobs[1:], strict=True)},
        images=images,
        byte_size=header.byte_size,
        extents_at=header.head,
        extents=held[header.head :] if keep else None,
    )


class _Header(NamedTuple):
    magic: bytes
    version: int
    kind: int
    page: int
    byte_size: int
    head: int
    metadata: int
    digest: bytes


def _read_header(fd: int, name: str, key: bytes | None) -> _Header:
    """Return the header; raises InvalidContainer if it does not fit this machine, the file or the key."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise InvalidContainer(f"{name} is no file")
    start = os.pread(fd, _HEADER.size, 0)
    if start[:4] == b"\0asm":
        raise InvalidContainer(f"{name} is a module and no saved guest; prepare it")
    if not start or not start.startswith(MAGIC[: len(start)]):
        raise InvalidContainer(f"{name} is no saved guest: it does not begin as one")
    if len(start) < _HEADER.size:
        raise InvalidContainer(f"{name} is cut off: it ends within its first {_HEADER.size} bytes")
    header = _Header(*_HEADER.unpack(start))
    wrong = None
    if header.version != VERSION:
        wrong = (
            f"has version {header.version} of the format, and this memslot reads version {VERSION}:"
            " save the guest again"
        )
    elif header.page != PAGE_SIZE:
        wrong = (
            f"was saved where a page has {header.page} bytes, and here it has {PAGE_SIZE}:"
            " save the guest again on a machine like this"
        )
    elif found.st_size != header.byte_size:
        what = "is cut off" if found.st_size < header.byte_size else "has something behind its end"
        wrong = f"{what}: it has {found.st_size} bytes instead of {header.byte_size}"
    elif header.kind not in (_PLAIN, _KEYED):
        wrong = f"has a digest of the unknown kind {header.kind}"
    elif header.kind == _PLAIN and key is not None:
        wrong = "was saved without a key, so that anybody may have written it"
    elif header.kind == _KEYED and key is None:
        wrong = "was saved with a key, and can only be loaded with it"
    elif not _HEADER.size + header.metadata <= header.head <= header.byte_size:
        wrong = f"is damaged: its head has {header.head} bytes of {header.byte_size}"
    elif header.head % PAGE_SIZE:
        wrong = f"is damaged: its head has {header.head} bytes, which are no pages"
    elif header.metadata > MOST_METADATA:
        wrong = f"has {header.metadata} bytes of metadata, and {MOST_METADATA} are allowed"
    if wrong is not None:
        raise InvalidContainer(f"{name} {wrong}")
    return header


def _contradiction(metadata: Metadata, blobs: int, extents: int) -> str | None:
    """Return why the file cannot hold what its metadata says; `blobs` and `extents` are the bytes that it has."""
    if metadata.module + sum(length for _, length in metadata.code) > blobs:
        return "its module and code do not fit its head"
    for index, image in metadata.images:
        end = 0
        for offset, length, _, file_offset in image:
            if offset < end or not length or (offset | length | file_offset) % PAGE_SIZE:
                return f"an extent of memory {index} is at {offset}, {length} bytes"
            end = offset + length
    found, last, end = 0, 0, 0
    stored = (each for _, image in metadata.images for each in image)
    for file, at, length in sorted((each.file, each.file_offset, each.length) for each in stored):
        # Extents are copied one by one: if they shared bytes, a small file would become a large image.
        if file == last and at < end:
            return f"two extents share the bytes at {at} of file {file}"
        last, end = file, at + length
        if file == 0:
            found += length
            if end > extents:
                return f"an extent at {at}, {length} bytes, ends behind the file"
    return None if found == extents else f"{extents - found} bytes at its end belong to no memory"


def require_data(
    fd: int, name: str, byte_size: int, error: type[MemslotError] = InvalidContainer
) -> None:
    """Raise `error` for a file of which more than half is holes.

    Reading a hole costs as much as reading data, and costs the file's maker nothing.  Containers have no
    holes when written, but a compressing file system makes some of long runs of zeros (zfs), and the block
    count of a file is no better measure there.
    """
    data = end = 0
    try:
        while end < byte_size and 2 * data < byte_size:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            data += end - start
    except OSError as failed:
        if failed.errno == errno.EINVAL:  # lseek(2): a file system that knows of no holes
            return
        if failed.errno != errno.ENXIO:  # no data behind `end`
            raise
    if 2 * data < byte_size:
        raise error(
            f"{name} claims {byte_size} bytes, and {data} of them are there: copy it without making holes"
        )


def copied(fd: int, name: str, byte_size: int) -> Iterator[tuple[int, memoryview]]:
    """Yield the first bytes of a file in pieces, each with its offset; raises InvalidContainer if the file
    has fewer.
    """
    at = 0
    try:
        for chunk in _chunks(fd, 0, byte_size):
            yield at, memoryview(chunk)
            at += len(chunk)
    except OSError as error:
        raise InvalidContainer(f"{name} cannot be read: {error.strerror}") from None


def _chunks(fd: int, at: int, end: int) -> Iterator[bytearray]:
    """Yield exactly the bytes from `at` to `end`, as they are now."""
    while at < end:
        chunk = bytearray(min(_CHUNK, end - at))
        count = os.preadv(fd, [chunk], at)
        if count == 0:
            raise OSError(errno.EIO, "it became shorter while it was read")
        yield chunk[:count]
        at += count
