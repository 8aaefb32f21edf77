"""Guests that leave the process: what is written of one, and how it becomes a guest again.

    Guest -save->  container (a file)     -load->   Guest
    Guest -share-> container (a memfd) and descriptors -attach-> Guest

What is written is the same for every host.  What a guest may do is found out again from its module
when it is loaded; a file is believed only about the bytes of memories.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from memslot_hooks.types import InitialContent, Segment
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
from memslot_plugin.guest import plan as guests
from memslot_plugin.guest import portable
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
    from memslot_plugin.hosts.guest import Guest
    from memslot_plugin.hosts.host import Host
    from memslot_plugin.hosts.live import Binding

SHARES = ("auto", "on", "off")


@dataclass(frozen=True, slots=True)
class Loaded:
    """How a guest came out of a file.

    `shares_file` is whether its images are mapped from the file, `copied_because` why they are not, a
    sentence's end.  `compiled_because` is why its module was compiled again, or None where the file's
    code is used.  `authentic` is whether the file was proved to come from somebody who has the key.
    """

    path: str
    byte_size: int
    shares_file: bool
    copied_because: str | None
    compiled_because: str | None
    authentic: bool


# Saving


def save(guest: Guest, path: str | os.PathLike[str], *, key: bytes | None, with_code: bool) -> int:
    """See `Guest.save`."""
    guest.host._require_usable()
    with held(guest) as found:
        pieces: list[memoryview] = []
        stored = {}
        for index, image in found.items():  # no comprehension within a with block, as in the pool
            stored[index] = _packed(image, pieces)
        contents = contents_of(guest, stored, pieces, with_code=with_code)
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
def held(guest: Guest) -> Iterator[dict[int, images.Image]]:
    """The images of a guest by memory, which stay readable within the block whoever closes them."""
    holder, found = Holder(), dict(guest.images)
    kinds = {image.kind for image in found.values() if not isinstance(image, images.Image)}
    if kinds:
        raise Unsupported(
            f"{guest.name} has images of the kind {', '.join(sorted(kinds))}, which belong to another"
            " plugin; let memfd or anonymous build them"
        )
    ours = {index: image for index, image in found.items() if isinstance(image, images.Image)}
    try:
        for image in ours.values():
            image.acquire(holder)
        if guest.closed:
            raise UsedAfterClose(f"the guest {guest.name} was closed; prepare it again")
        yield ours
    finally:
        for image in ours.values():
            image.release(holder)


def _packed(image: images.Image, pieces: list[memoryview]) -> list[Stored]:
    """The extents one after the other, behind what is in `pieces` already; neighbours become one."""
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


def contents_of(
    guest: Guest,
    stored: Mapping[int, list[Stored]],
    pieces: list[memoryview],
    *,
    with_code: bool,
) -> Contents:
    """Everything of a guest, with extents that lie where `stored` says."""
    plan = guest.plan
    origin = portable.origin_of(plan)
    key = key_of_code(guest, sets_globals=guest.sets_globals) if with_code else None
    return Contents(
        about=About(
            writer=f"memslot on {guest.host.name}",
            name=guest.name,
            is_snapshot=plan.is_snapshot,
            reseed=guest.reseed,
            source_bytes=origin.source_bytes,
            segments=origin.segments,
            changes=origin.changes,
        ),
        source_sha256=origin.source_sha256,
        module=portable.portable_module(plan),
        code={} if key is None else {key: guest.host._serialise(guest)},
        images=stored,
        pieces=pieces,
    )


# Sharing


def share(guest: Guest) -> SharedGuest:
    """See `Guest.share`."""
    guest.host._require_usable()
    fds: list[int] = []
    try:
        with held(guest) as found:
            pieces: list[memoryview] = []
            files: dict[Backing, int] = {}
            stored: dict[int, list[Stored]] = {}
            for index, image in found.items():
                if all(each.backing.fd >= 0 for each in image.extents):
                    stored[index] = _in_files(image, files)
                else:
                    stored[index] = _packed(image, pieces)
            fds.append(_unnamed_file(guest.name))
            container.write_to(fds[0], contents_of(guest, stored, pieces, with_code=True))
            if lib.ms_seals(fds[0], ffi.new("int *")) == 0:
                check(lib.ms_seal(fds[0]), f"sealing what is shared of {guest.name}")
            fds.extend(os.dup(backing.fd) for backing in files)
        return SharedGuest(guest.name, fds)
    except BaseException as error:
        for fd in fds:
            os.close(fd)
        if isinstance(error, OSError) and not isinstance(error, MemslotError):
            raise system_call_error(error.errno or 0, f"sharing the guest {guest.name}") from None
        raise


def _in_files(image: images.Image, files: dict[Backing, int]) -> list[Stored]:
    """The pieces of an image whose files are passed on; new ones are numbered in `files`."""
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
    """An empty file without a name; a memfd where there are such."""
    try:
        return new_memfd(f"{name}, shared", 0, f"sharing {name}")
    except SystemCallError:
        import tempfile  # noqa: PLC0415 - costs 4 ms, and is needed only where there is no memfd

        with tempfile.TemporaryFile(buffering=0) as file:
            return os.dup(file.fileno())


def attach(
    host: Host,
    shared: SharedGuest,
    *,
    binding: Binding,
    name: str | None,
    reseed: str | None,
    trust_code: bool,
) -> Guest:
    """See `Host.attach`."""
    if not isinstance(shared, SharedGuest):
        raise ArgumentError(f"a shared guest is what Guest.share makes, and not {shown(shared)}")
    label = f"the shared guest {shared.name}"
    fds = shared.fds
    found = container.read(fds[0], label, keep=True, image_limit=host.settings.image_limit)
    why_copied = None
    files: dict[int, Backing] = {}
    try:
        # Copied once for each descriptor, one file would cost as much as many.
        statuses = map(os.fstat, fds[1:])
        if len({(each.st_dev, each.st_ino) for each in statuses}) < len(fds) - 1:
            raise InvalidContainer(f"{label} has two descriptors of one file")
        for number, fd in enumerate(fds[1:], start=1):
            files[number], why = _received(fd, label, _end_in_file(found, number))
            why_copied = why_copied or why
    except BaseException:
        for file in files.values():
            file.release(file)  # nobody holds it yet
        raise
    guest = guest_of(
        host, found, files, label=label, binding=binding, name=name, trust_code=trust_code
    )
    if reseed is not None:
        guest.reseed = reseed
    _record(guest, found, files, label, why_copied, trusted=trust_code)
    return guest


def _end_in_file(found: Container, number: int) -> int:
    """The end of the last extent in that file; 0 if none lies there."""
    extents = (each for image in found.images.values() for each in image if each.file == number)
    return max((each.file_offset + each.length for each in extents), default=0)


def _received(fd: int, label: str, byte_size: int) -> tuple[Backing, str | None]:
    """The first `byte_size` bytes behind a descriptor that a peer passed: mapped, or copied with the
    reason.
    """
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


def load(
    host: Host,
    path: str | os.PathLike[str],
    *,
    binding: Binding,
    name: str | None,
    reseed: str | None,
    share_file: Literal["auto", "on", "off"],
    trust_code: bool,
    key: bytes | None,
) -> Guest:
    """See `Host.load`."""
    if share_file not in SHARES:
        raise SettingError(f"share_file must be one of {', '.join(SHARES)}, not {share_file!r}")
    label = _decoded(path)
    fd = open_file(label)
    files: dict[int, Backing] = {}
    try:
        why_copied = "share_file is off" if share_file == "off" else None
        if share_file == "auto":
            why_copied = why_it_may_change(fd)
        found = container.read(
            fd,
            label,
            key=_checked(key),
            keep=why_copied is not None,
            image_limit=host.settings.image_limit,
        )
        if why_copied is None:
            owned, fd = fd, -1
            files[0] = File(label, owned, found.byte_size)
    finally:
        if fd >= 0:
            os.close(fd)
    trusted = trust_code or found.keyed
    guest = guest_of(
        host, found, files, label=label, binding=binding, name=name, trust_code=trusted
    )
    if reseed is not None:
        guest.reseed = reseed
    _record(guest, found, files, label, why_copied, trusted=trusted)
    return guest


def _record(
    guest: Guest,
    found: Container,
    files: Mapping[int, Backing],
    label: str,
    why_copied: str | None,
    *,
    trusted: bool,
) -> None:
    """Note how the guest came out of a file, or several."""
    ours = {each.backing for image in guest.images.values() for each in image.extents}
    if why_copied is None and ours.isdisjoint(files.values()):
        mapped = any(found.images.values())
        why_copied = "the plugin copies images" if mapped else "there is nothing to map"
    why_compiled = None
    if not found.code:
        why_compiled = "the file has no code"
    elif not trusted:
        why_compiled = "the file's code is not trusted (trust_code, or a key)"
    elif not guest.reused_code:
        why_compiled = "the file's code is for another runtime, machine or setting"
    guest.loaded = Loaded(
        path=label,
        byte_size=found.byte_size,
        shares_file=why_copied is None,
        copied_because=why_copied,
        compiled_because=why_compiled,
        authentic=found.keyed,
    )


def guest_of(
    host: Host,
    found: Container,
    files: Mapping[int, Backing],
    *,
    label: str,
    binding: Binding,
    name: str | None,
    trust_code: bool,
) -> Guest:
    """A guest of what was read; `files` are those that its extents lie in, and given back if it keeps
    none of them.
    """
    from memslot_plugin.hosts.guest import Guest  # noqa: PLC0415 - a guest saves itself by this module

    holder = Holder()
    for file in files.values():
        file.acquire(holder)
    try:
        about = found.about
        plan = portable.saved_plan(
            found.module,
            host.target,
            contents=contents_in(found, files, label),
            origin=found.origin,
            is_snapshot=about.is_snapshot,
        )
        code = found.code if trust_code else {}
        guest = Guest(host, name or about.name, plan, binding, code=code)
        guest.reseed = about.reseed
        return guest
    finally:
        for file in files.values():
            file.release(holder)


def contents_in(
    found: Container, files: Mapping[int, Backing], label: str
) -> dict[int, InitialContent]:
    """What the memories hold, by index, as far as their extents say; their sizes are the module's
    business.  Raises InvalidContainer for extents that are not there.
    """
    return {
        index: _content(found, index, extents, files, label)
        for index, extents in found.images.items()
    }


def _content(
    found: Container,
    index: int,
    extents: tuple[Stored, ...],
    files: Mapping[int, Backing],
    label: str,
) -> InitialContent:
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
    return InitialContent(0, tuple(segments))


def key_of_code(guest: Guest, *, sets_globals: bool) -> str | None:
    """What compiled code of this guest is found by: the host's circumstances, and the module, or the module
    whatever its saved globals begin with.  None where there can be no such code.
    """
    circumstances = guest.host._code_key(guest)
    module = guests.module_but_for_globals(guest.plan) if sets_globals else guest.plan.module
    if circumstances is None or module is None:
        return None
    which = "module but for its globals" if sets_globals else "module"
    return f"{circumstances}, {which} {hashlib.sha256(module).hexdigest()}"


def machine() -> str:
    """The kind of machine that code was compiled for, with everything that its processor can do."""
    try:
        described = Path("/proc/cpuinfo").read_bytes()
    except OSError:
        described = b""
    features = sorted(
        {line for line in described.splitlines() if line.startswith((b"flags", b"Features"))}
    )
    return f"{os.uname().machine} {hashlib.sha256(b''.join(features)).hexdigest()[:16]}"


def read_saved(label: str, key: bytes | None = None) -> Container:
    """Everything that stands in the file of a saved guest; raises GuestNotFound, InvalidContainer."""
    fd = open_file(label)
    try:
        return container.read(fd, label, key=_checked(key), keep=True)
    finally:
        os.close(fd)


def open_file(label: str) -> int:
    """A descriptor to read a saved guest from."""
    try:
        # Without O_NONBLOCK, opening a pipe waits for somebody to write to it.
        return os.open(label, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a zero byte is in no path
        raise GuestNotFound(f"there is no saved guest at {label}") from None
    except OSError as error:
        raise InvalidContainer(f"{label} cannot be read: {error.strerror}") from None


def read_module(path: Path) -> bytes:
    """The bytes of a .wasm or .wat file; raises GuestNotFound, InvalidModule."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode):  # a pipe brings what it brings
                reason = container.why_hollow(file.fileno(), status.st_size)
                if reason is not None:
                    raise InvalidModule(f"{path} {reason}")
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
