"""Guests in files: from the record of a guest to a container, and from a container to a plan.

    Saved -save->  container (a file)                      -load->   Found
    Saved -share-> container (a memfd) and descriptors     -attach-> Found

The records are the same for every host; a host makes a guest of `Found`.  When a guest is loaded its module is
analysed again, because a file is believed only about the bytes of memories.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from memslot_hooks.types import Image, Segment
from memslot_plugin._core import check, ffi, lib
from memslot_plugin._core.limits import system_call_error
from memslot_plugin.errors import (
    ArgumentError,
    GuestNotFound,
    InvalidContainer,
    InvalidModule,
    MemslotError,
    SettingError,
    SystemCallError,
    Unsupported,
    UsedAfterClose,
    shown,
)
from memslot_plugin.files import container
from memslot_plugin.files.container import About, Container, Contents, Stored
from memslot_plugin.files.share import SharedGuest
from memslot_plugin.guest import portable
from memslot_plugin.guest.plan import Plan
from memslot_plugin.guest.target import Target
from memslot_plugin.memory import image as images
from memslot_plugin.memory.backing import (
    Backing,
    File,
    HeapBacking,
    Holder,
    new_memfd,
    why_it_may_change,
)

if TYPE_CHECKING:
    from typing_extensions import Self

SHARES = ("auto", "on", "off")


@dataclass(frozen=True, slots=True)
class Loaded:
    """The way in which a guest came out of a file.

    `shares_file` is true if its images are mapped from the file, and `copied_because` the reason if not, a
    sentence's end.  `compiled_because` is the reason why its module was compiled again, or None if the file's
    code is used.
    """

    shares_file: bool
    copied_because: str | None
    compiled_because: str | None


@dataclass(frozen=True, slots=True)
class Saved:
    """The record of a guest that is written; `code` is compiled code by its key."""

    name: str
    writer: str
    plan: Plan
    images: Mapping[int, Image]
    code: Mapping[str, bytes]
    reseed: str | None


@dataclass(frozen=True, slots=True)
class Found:
    """The record of a guest that was read; `plan` has contents that lie in `files`.

    `code` is the compiled code that is trusted, by its key.
    """

    container: Container
    name: str
    reseed: str | None
    plan: Plan
    code: Mapping[str, bytes]
    files: Mapping[int, Backing]
    why_copied: str | None

    @classmethod
    def of(  # for the two ways to read one
        cls,
        found: Container,
        label: str,
        target: Target,
        files: Mapping[int, Backing],
        why_copied: str | None,
        *,
        trusted: bool,
    ) -> Found:
        """Return the record of a container's guest."""
        about, code = found.about, found.code if trusted else {}
        plan = portable.saved_plan(
            found.module,
            target,
            contents=contents_in(found, files, label),
            origin=about.origin,
            is_snapshot=about.is_snapshot,
        )
        return cls(found, about.name, about.reseed, plan, code, files, why_copied)

    def loaded(self, built: Iterable[Image], *, code_reused: bool) -> Loaded:
        """Return the report for the guest with these images."""
        found, why_copied = self.container, self.why_copied
        ours = {
            each.backing
            for image in built
            if isinstance(image, images.Image)
            for each in image.extents
        }
        if why_copied is None and ours.isdisjoint(self.files.values()):
            mapped = any(found.images.values())
            why_copied = "the plugin copies images" if mapped else "there is nothing to map"
        why_compiled = None
        if not found.code:
            why_compiled = "the file has no code"
        elif not self.code:
            why_compiled = "the file's code is not trusted (trust_code, or a key)"
        elif not code_reused:
            why_compiled = "the file's code is for another runtime, machine or setting"
        return Loaded(
            shares_file=why_copied is None,
            copied_because=why_copied,
            compiled_because=why_compiled,
        )


# Saving


def save(saved: Saved, path: str | os.PathLike[str], *, key: bytes | None) -> int:
    """Write a guest to a file; return its bytes.  See `Guest.save`."""
    with _held(saved) as held:
        pieces: list[memoryview] = []
        stored = {index: _packed(image, pieces) for index, image in held.items()}
        contents = _contents_of(saved, stored, pieces)
        return container.write(Path(_decoded(path)), contents, key=_checked(key))


def _decoded(path: str | os.PathLike[str]) -> str:
    try:
        return os.fsdecode(path)
    except TypeError:
        raise ArgumentError(
            f"the path of a saved guest is a string or a path, and not {shown(path)}"
        ) from None


def _checked(key: bytes | None) -> bytes | None:
    if key is not None and (not isinstance(key, bytes) or len(key) < 16):
        raise SettingError("a key is at least 16 secret bytes, secrets.token_bytes(32) for example")
    return key


@contextmanager
def _held(saved: Saved) -> Iterator[dict[int, images.Image]]:
    """Return the images of a guest by memory; they stay readable within the block, also if the guest is closed."""
    kinds = {image.kind for image in saved.images.values() if not isinstance(image, images.Image)}
    if kinds:
        raise Unsupported(
            f"{saved.name} has images of the kind {', '.join(sorted(kinds))}, which belong to another"
            " plugin; let memfd or anonymous build them"
        )
    holder = Holder()
    ours = {
        index: image for index, image in saved.images.items() if isinstance(image, images.Image)
    }
    try:
        for image in ours.values():
            image.acquire(holder)
        if any(image.closed for image in ours.values()):
            raise UsedAfterClose(f"the guest {saved.name} was closed; prepare it again")
        yield ours
    finally:
        for image in ours.values():
            image.release(holder)


def _packed(image: images.Image, pieces: list[memoryview]) -> list[Stored]:
    """Append the extents to `pieces`, and return where they lie; neighbours become one."""
    stored: list[Stored] = []
    at = sum(map(len, pieces))
    for each in image.extents:
        if stored and stored[-1].offset + stored[-1].length == each.offset:
            stored[-1] = stored[-1]._replace(length=stored[-1].length + each.length)
        else:
            stored.append(Stored(each.offset, each.length, 0, at))
        pieces.append(each.backing.view(each.file_offset, each.length))
        at += each.length
    return stored


def _contents_of(
    saved: Saved, stored: Mapping[int, list[Stored]], pieces: list[memoryview]
) -> Contents:
    """Return a guest as the contents of a container, with extents that lie where `stored` says."""
    plan = saved.plan
    return Contents(
        about=About(
            writer=saved.writer,
            name=saved.name,
            is_snapshot=plan.is_snapshot,
            reseed=saved.reseed,
            origin=portable.origin_of(plan),
        ),
        module=portable.portable_module(plan),
        code=saved.code,
        images=stored,
        pieces=pieces,
    )


# Sharing


def share(saved: Saved) -> SharedGuest:
    """Return a guest as descriptors for another process.  See `Guest.share`."""
    try:
        with _held(saved) as held, ExitStack() as undo:
            pieces: list[memoryview] = []
            files: dict[Backing, int] = {}
            stored: dict[int, list[Stored]] = {}
            for index, image in held.items():
                if all(each.backing.fd >= 0 for each in image.extents):
                    stored[index] = _in_files(image, files)
                else:
                    stored[index] = _packed(image, pieces)
            fds = [_unnamed_file(saved.name)]
            undo.callback(os.close, fds[0])
            container.write_to(fds[0], _contents_of(saved, stored, pieces))
            if lib.ms_seals(fds[0], ffi.new("int *")) == 0:
                check(lib.ms_seal(fds[0]), f"sealing what is shared of {saved.name}")
            for backing in files:
                fds.append(os.dup(backing.fd))
                undo.callback(os.close, fds[-1])
            undo.pop_all()
            return SharedGuest(saved.name, fds)
    except OSError as error:
        if isinstance(error, MemslotError):
            raise
        raise system_call_error(error.errno or 0, f"sharing the guest {saved.name}") from None


def _in_files(image: images.Image, files: dict[Backing, int]) -> list[Stored]:
    """Return the extents of an image whose files are passed on; new files are numbered in `files`."""
    return [
        Stored(
            each.offset,
            each.length,
            files.setdefault(each.backing, len(files) + 1),
            each.file_offset,
        )
        for each in image.extents
    ]


def _unnamed_file(name: str) -> int:
    """Return an empty file without a name, a memfd if the kernel has them."""
    try:
        return new_memfd(f"{name}, shared", 0, f"sharing {name}")
    except SystemCallError:
        import tempfile  # noqa: PLC0415 - costs 4 ms, and is needed only where there is no memfd

        with tempfile.TemporaryFile(buffering=0) as file:
            return os.dup(file.fileno())


@contextmanager
def attach(shared: SharedGuest, target: Target, *, trust_code: bool) -> Iterator[Found]:
    """Read a shared guest; its files stay open within the block.  See `Host.attach`."""
    if not isinstance(shared, SharedGuest):
        raise ArgumentError(f"a shared guest is what Guest.share makes, and not {shown(shared)}")
    label = f"the shared guest {shared.name}"
    fds = shared.fds
    found = container.read(fds[0], label, keep=True, image_limit=target.settings.image_limit)
    why_copied = None
    with _Files() as files:
        # Copied once for each descriptor, one file would cost as much as many.
        statuses = map(os.fstat, fds[1:])
        if len({(each.st_dev, each.st_ino) for each in statuses}) < len(fds) - 1:
            raise InvalidContainer(f"{label} has two descriptors of one file")
        extents = [each for image in found.images.values() for each in image]
        for number, fd in enumerate(fds[1:], start=1):
            ends = (each.file_offset + each.length for each in extents if each.file == number)
            files[number], why = _received(fd, label, max(ends, default=0))
            why_copied = why_copied or why
        yield Found.of(found, label, target, files, why_copied, trusted=trust_code)


class _Files(dict[int, Backing]):
    """Open files by number; leaving the block frees those that no image has acquired."""

    def __enter__(self) -> Self:
        self._holder = Holder()
        return self

    def __setitem__(self, number: int, file: Backing) -> None:
        file.acquire(self._holder)
        super().__setitem__(number, file)

    def __exit__(self, *_: object) -> None:
        for file in self.values():
            file.release(self._holder)


def _received(fd: int, label: str, byte_size: int) -> tuple[Backing, str | None]:
    """Return the first `byte_size` bytes of a file that a peer passed: mapped, or copied with the reason."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or not 0 < byte_size <= status.st_size:
        raise InvalidContainer(f"{label} has a descriptor that is no file of an image")
    try:
        container.require_data(fd, label, byte_size)
        why = why_it_may_change(fd)
        if why is None:
            return File(label, os.dup(fd), byte_size), None
    except OSError as error:
        if isinstance(error, SystemCallError):
            raise
        raise system_call_error(error.errno or 0, f"attaching {label}") from None
    return HeapBacking(byte_size, container.copied(fd, label, byte_size)), why


# Loading


@contextmanager
def load(
    path: str | os.PathLike[str],
    target: Target,
    *,
    share_file: Literal["auto", "on", "off"],
    trust_code: bool,
    key: bytes | None,
) -> Iterator[Found]:
    """Read a saved guest; its file stays open within the block.  See `Host.load`."""
    if share_file not in SHARES:
        raise SettingError(f"share_file must be one of {', '.join(SHARES)}, not {share_file!r}")
    label = _decoded(path)
    fd = open_file(label)
    with _Files() as files:
        try:
            why_copied = "share_file is off" if share_file == "off" else None
            if share_file == "auto":
                why_copied = why_it_may_change(fd)
            found = container.read(
                fd,
                label,
                key=_checked(key),
                keep=why_copied is not None,
                image_limit=target.settings.image_limit,
            )
            if why_copied is None:
                owned, fd = fd, -1
                files[0] = File(label, owned, found.byte_size)
        finally:
            if fd >= 0:
                os.close(fd)
        trusted = trust_code or key is not None  # then the digest proves the writer
        yield Found.of(found, label, target, files, why_copied, trusted=trusted)


def contents_in(
    found: Container, files: Mapping[int, Backing], label: str
) -> dict[int, tuple[Segment, ...]]:
    """Return the contents of the memories, by index.

    Raises InvalidContainer for extents that are not there.
    """
    contents = {}
    for index, extents in found.images.items():
        if len(extents) > images.MAX_EXTENTS:
            raise InvalidContainer(
                f"{label} has {len(extents)} extents for memory {index}, and {images.MAX_EXTENTS} are allowed"
            )
        segments = []
        for offset, length, number, file_offset in extents:
            if number == 0 and found.extents is not None:
                segments.append(Segment(offset, found.extents[file_offset : file_offset + length]))
                continue
            file = files.get(number)
            at = file_offset + (0 if number else found.extents_at)
            if file is None or at + length > file.byte_size:
                raise InvalidContainer(
                    f"{label} has an extent for memory {index} in file {number}, which did not come with it"
                )
            segments.append(Segment(offset, file.view(at, length), file, at))
        contents[index] = tuple(segments)
    return contents


def read_saved(label: str, key: bytes | None = None) -> Container:
    """Return the container of a saved guest; raises GuestNotFound, InvalidContainer."""
    fd = open_file(label)
    try:
        return container.read(fd, label, key=_checked(key), keep=True)
    finally:
        os.close(fd)


def open_file(label: str) -> int:
    """Return a descriptor to read a saved guest from."""
    try:
        # Without O_NONBLOCK, opening a pipe waits for a writer.
        return os.open(label, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a zero byte is in no path
        raise GuestNotFound(f"there is no saved guest at {label}") from None
    except OSError as error:
        raise InvalidContainer(f"{label} cannot be read: {error.strerror}") from None


def read_module(path: Path) -> bytes:
    """Return the bytes of a .wasm or .wat file; raises GuestNotFound, InvalidModule."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode):  # the size of a pipe is not known
                container.require_data(file.fileno(), str(path), status.st_size, InvalidModule)
                file.seek(0)
            return file.read()
    except MemslotError:
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a zero byte is in no path
        raise GuestNotFound(f"there is no guest at {path}") from None
    except OSError as error:
        raise InvalidModule(
            f"{path} cannot be read: {error.strerror}; a guest is a .wasm or .wat file"
        ) from None
