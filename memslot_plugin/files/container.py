r"""Containers: a guest as one file, written whole or not at all, read only if every byte is right.

    offset  bytes
         0      8  b"\x93memslot"
         8      4  the version of this format, 1; all integers are little-endian
        12      4  how the digest was made: 0 SHA-256, 1 HMAC with SHA-256 and a key
        16      8  the page, in bytes, to which extents are aligned
        24      8  bytes of the whole file
        32      8  bytes of the head, a multiple of the page
        40      8  bytes of the metadata
        48     32  SHA-256 of the module that the guest was prepared from
        80     32  the digest of the whole file, with zeros in the place of this field
       112         metadata: a JSON object, which says what follows it, and what its writer wrote about it
                   the module: rewritten, without the data that the images hold, and with saved globals
                   as initial values; then what runtimes compiled of it, each with the key of its
                   circumstances; zeros up to the end of the head
      head         extents, each at a multiple of the page, so that they can be mapped

A digest tells damage from what was written.  It tells nothing about who wrote it: whoever can write
a file can write its digest, too, and compiled code does whatever its author wants.  Only a digest
made with a key does.

An extent can also lie in another file that travels beside the container: see `Stored.file`.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import secrets
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from memslot_plugin._core import PAGE_SIZE, align_up
from memslot_plugin._core.limits import system_call_error
from memslot_plugin.errors import ArgumentError, InvalidContainer, MemoryTooLarge

MAGIC = b"\x93memslot"
VERSION = 1
_HEADER = struct.Struct("<8sIIQQQQ32s32s")
_DIGEST_AT, _DIGEST_SIZE = 80, 32
_PLAIN, _KEYED = 0, 1
_CHUNK = 1 << 20


class Stored(NamedTuple):
    """`length` bytes at `offset` of a linear memory, at `file_offset` of file number `file`.

    File 0 is the container, whose extents count from the end of its head.
    """

    offset: int
    length: int
    file: int
    file_offset: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What goes into a container.

    `about` is the writer's, and anything that JSON can hold.  `code` is compiled code by its key.
    `images` has, by memory index, the extents in ascending order; `pieces` are the bytes of those
    that lie in file 0, one after the other, each a whole number of pages.
    """

    about: Mapping[str, Any]
    source_sha256: bytes
    module: bytes
    code: Mapping[str, bytes]
    images: Mapping[int, Sequence[Stored]]
    pieces: Sequence[memoryview]


@dataclass(frozen=True, slots=True)
class Container:
    """What was read of one: see `Contents`.

    `extents_at` is the offset of its first extent, `extents` their bytes if they were asked for.
    `keyed` is whether the digest was made with the key that the reader has.
    """

    about: Mapping[str, Any]
    source_sha256: bytes
    module: bytes
    code: Mapping[str, bytes]
    images: Mapping[int, tuple[Stored, ...]]
    byte_size: int
    extents_at: int
    extents: memoryview | None
    keyed: bool


# Writing


def write(path: Path, contents: Contents, *, key: bytes | None = None) -> int:
    """Make `path` a container with these contents, or leave what is there; how many bytes it has.

    Written beside it, synchronised and renamed, so that a reader sees the old file or the new one.
    Raises SystemCallError, and ArgumentError for a path at which there is something else than a file.
    """
    blocks, byte_size = _blocks(contents, key)
    _replace(path, byte_size, lambda fd: _write_all(fd, blocks))
    return byte_size


def write_to(fd: int, contents: Contents) -> int:
    """Write a container to an empty file; how many bytes it has.  Raises OSError."""
    blocks, byte_size = _blocks(contents, None)
    _write_all(fd, blocks)
    return byte_size


def _blocks(contents: Contents, key: bytes | None) -> tuple[list[bytes | memoryview], int]:
    """The whole file, in order, and its length."""
    code = list(contents.code.items())
    metadata = json.dumps(
        {
            "about": contents.about,
            "module": len(contents.module),
            "code": [[name, len(each)] for name, each in code],
            "images": [[index, list(map(list, each))] for index, each in contents.images.items()],
        },
        separators=(",", ":"),
    ).encode()
    body = [metadata, contents.module, *(each for _, each in code)]
    used = _HEADER.size + sum(map(len, body))
    head = align_up(used)
    byte_size = head + sum(map(len, contents.pieces))

    def header(digest: bytes) -> bytes:
        return _HEADER.pack(
            MAGIC,
            VERSION,
            _PLAIN if key is None else _KEYED,
            PAGE_SIZE,
            byte_size,
            head,
            len(metadata),
            contents.source_sha256,
            digest,
        )

    rest: list[bytes | memoryview] = [*body, bytes(head - used), *contents.pieces]
    digest = _hash(key)
    digest.update(header(bytes(_DIGEST_SIZE)))
    for block in rest:
        digest.update(block)
    return [header(digest.digest()), *rest], byte_size


def _hash(key: bytes | None) -> Any:
    return hashlib.sha256() if key is None else hmac.new(key, digestmod="sha256")


def _write_all(fd: int, blocks: Sequence[bytes | memoryview]) -> None:
    for block in blocks:
        left = memoryview(block)
        while left:
            left = left[os.write(fd, left[: 1 << 30]) :]


def _replace(path: Path, byte_size: int, fill: Callable[[int], None]) -> None:
    path = Path(os.path.realpath(path))
    what = f"writing {path} ({byte_size} bytes)"
    temporary = path.with_name(f".memslot-{secrets.token_hex(8)}")
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise ArgumentError(f"{path} is there and is no file; choose another path")
        try:
            # Nobody is meant to write to it: a guest that is saved again gets a new file.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(temporary, flags, 0o444)
            try:
                fill(fd)
                os.fsync(fd)
            finally:
                os.close(fd)
            temporary.rename(path)
        except BaseException:
            with suppress(OSError):  # what is being raised came first
                temporary.unlink()
            raise
        _synchronise(path.parent)
    except OSError as error:
        raise system_call_error(error.errno or 0, what + _free_space(error, path.parent)) from None


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


def _free_space(error: OSError, folder: Path) -> str:
    """What is left on a file system that is full, to follow what was attempted."""
    if error.errno != errno.ENOSPC:
        return ""
    try:
        found = os.statvfs(folder)
    except OSError:
        return ""
    return f" to a file system with {found.f_bavail * found.f_frsize} bytes left"


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

    Reads every byte once and maps nothing; the descriptor stays open, at any position.  No more is
    allocated or read than twice the bytes that are there, whatever the file claims.  Raises
    InvalidContainer with what is wrong with it, and MemoryTooLarge for an image of more than
    `image_limit` bytes.
    """
    try:
        return _read(fd, name, key, keep, image_limit)
    except OSError as error:
        raise InvalidContainer(f"{name} cannot be read: {error.strerror}") from None


def _read(fd: int, name: str, key: bytes | None, keep: bool, image_limit: int | None) -> Container:
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
    _, version, kind, page, byte_size, head, metadata, source, wanted = _HEADER.unpack(start)
    if version != VERSION:
        raise InvalidContainer(
            f"{name} has version {version} of the format, and this memslot reads version {VERSION}:"
            " save the guest again"
        )
    if page != PAGE_SIZE:
        raise InvalidContainer(
            f"{name} was saved where a page has {page} bytes, and here it has {PAGE_SIZE}:"
            " save the guest again on a machine like this"
        )
    if found.st_size != byte_size:
        what = "is cut off" if found.st_size < byte_size else "has something behind its end"
        raise InvalidContainer(
            f"{name} {what}: it has {found.st_size} bytes instead of {byte_size}"
        )
    if kind not in (_PLAIN, _KEYED):
        raise InvalidContainer(f"{name} has a digest of the unknown kind {kind}")
    if kind == _PLAIN and key is not None:
        raise InvalidContainer(
            f"{name} was saved without a key, so that anybody may have written it"
        )
    if kind == _KEYED and key is None:
        raise InvalidContainer(f"{name} was saved with a key, and can only be loaded with it")
    if not _HEADER.size + metadata <= head <= byte_size or head % PAGE_SIZE:
        raise InvalidContainer(f"{name} is damaged: its head has {head} bytes of {byte_size}")
    require_data(fd, name, byte_size)
    kept = bytearray().join(_chunks(fd, 0, head))
    try:
        parts = _Metadata.parse(bytes(kept[_HEADER.size : _HEADER.size + metadata]))
        parts.require_possible(head - _HEADER.size - metadata, byte_size - head)
    except _Nonsense as error:
        raise InvalidContainer(f"{name} makes no sense: {error}") from None
    parts.require_small(name, image_limit)
    digest = _hash(key)
    digest.update(kept[:_DIGEST_AT] + bytes(_DIGEST_SIZE))
    digest.update(memoryview(kept)[_HEADER.size :])
    for chunk in _chunks(fd, head, byte_size):
        digest.update(chunk)
        if keep:
            kept += chunk
    if not hmac.compare_digest(digest.digest(), wanted):
        why = "it is damaged, or was saved with another key" if key is not None else "it is damaged"
        raise InvalidContainer(f"{name} cannot be trusted: its digest is wrong, so {why}")
    held = memoryview(kept).toreadonly()
    blobs, at = [], _HEADER.size + metadata
    for length in (parts.module, *(length for _, length in parts.code)):
        blobs.append(bytes(held[at : at + length]))
        at += length
    return Container(
        about=parts.about,
        source_sha256=source,
        module=blobs[0],
        code={name: blob for (name, _), blob in zip(parts.code, blobs[1:], strict=True)},
        images=parts.images,
        byte_size=byte_size,
        extents_at=head,
        extents=held[head:] if keep else None,
        keyed=kind == _KEYED,
    )


def require_data(fd: int, name: str, byte_size: int) -> None:
    """Raise InvalidContainer for a file of which more than half is holes."""
    reason = why_hollow(fd, byte_size)
    if reason is not None:
        raise InvalidContainer(f"{name} {reason}")


def why_hollow(fd: int, byte_size: int) -> str | None:
    """The end of a sentence about a file of which more than half is holes; None for another file.

    Reading a hole costs as much as reading data, and takes nothing of the file's maker.  Ours
    have none, but a file system that compresses makes some of long runs of zeros (zfs), where the
    blocks of a file say nothing either.
    """
    data = end = 0
    try:
        while end < byte_size and 2 * data < byte_size:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            data += end - start
    except OSError as error:
        if error.errno == errno.EINVAL:  # lseek(2): a file system that knows of no holes
            return None
        if error.errno != errno.ENXIO:  # no data behind `end`
            raise
    if 2 * data >= byte_size:
        return None
    return f"claims {byte_size} bytes, and {data} of them are there: copy it without making holes"


def copied(fd: int, name: str, byte_size: int) -> Iterator[tuple[int, memoryview]]:
    """The first bytes of a file in pieces, each with its offset; raises InvalidContainer if there are
    fewer.
    """
    at = 0
    try:
        for chunk in _chunks(fd, 0, byte_size):
            yield at, memoryview(chunk)
            at += len(chunk)
    except OSError as error:
        raise InvalidContainer(f"{name} cannot be read: {error.strerror}") from None


def _chunks(fd: int, at: int, end: int) -> Iterator[bytearray]:
    """Exactly the bytes from `at` to `end`, as they are now."""
    while at < end:
        chunk = bytearray(min(_CHUNK, end - at))
        count = os.preadv(fd, [chunk], at)
        if count == 0:
            raise OSError(errno.EIO, "it became shorter while it was read")
        yield chunk[:count]
        at += count


class _Nonsense(Exception):
    """Metadata that nobody wrote by this format."""


@dataclass(frozen=True, slots=True)
class _Metadata:
    about: Mapping[str, Any]
    module: int
    code: tuple[tuple[str, int], ...]
    images: Mapping[int, tuple[Stored, ...]]

    @classmethod
    def parse(cls, text: bytes) -> _Metadata:
        try:
            found = json.loads(text)
            made = cls(
                about=found["about"],
                module=_number(found["module"]),
                code=tuple((_text(key), _number(length)) for key, length in found["code"]),
                images={
                    _number(index): tuple(Stored(*map(_number, each)) for each in extents)
                    for index, extents in found["images"]
                },
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _Nonsense(f"its metadata is not what belongs there ({error!r})") from None
        if not isinstance(made.about, dict):
            raise _Nonsense("what is written about it is no object")
        return made

    def require_possible(self, blobs: int, extents: int) -> None:
        """Everything lies where it can be: blobs in the head, extents in pages behind it, in order."""
        if self.module + sum(length for _, length in self.code) > blobs:
            raise _Nonsense("its module and code do not fit its head")
        for index, image in self.images.items():
            end = 0
            for offset, length, _, file_offset in image:
                if offset < end or not length or (offset | length | file_offset) % PAGE_SIZE:
                    raise _Nonsense(f"an extent of memory {index} is at {offset}, {length} bytes")
                end = offset + length
        found, last, end = 0, 0, 0
        for file, file_offset, length in sorted(
            (each.file, each.file_offset, each.length)
            for image in self.images.values()
            for each in image
        ):
            # Copied once for each extent, a small file would become a large image.
            if file == last and file_offset < end:
                raise _Nonsense(f"two extents share the bytes at {file_offset} of file {file}")
            last, end = file, file_offset + length
            if file == 0:
                found += length
                if end > extents:
                    raise _Nonsense(
                        f"an extent at {file_offset}, {length} bytes, ends behind the file"
                    )
        if found != extents:
            raise _Nonsense(f"{extents - found} bytes at its end belong to no memory")

    def require_small(self, name: str, image_limit: int | None) -> None:
        """Raise MemoryTooLarge for an image that spans more than `image_limit` bytes."""
        for index, image in self.images.items():
            span = image[-1].offset + image[-1].length - image[0].offset if image else 0
            if image_limit is not None and span > image_limit:
                raise MemoryTooLarge(
                    f"{name}: the image of memory {index} spans {span} bytes and the limit is"
                    f" {image_limit}; raise the setting image_limit"
                )


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise TypeError(f"{value!r} is no size")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
