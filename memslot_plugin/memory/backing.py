"""Where the bytes of images are: readable at one address for as long as an image has extents there.

    Memfd    a sealed memfd, mapped copy-on-write onto slots
    File     a file on disk, opened to be read, mapped in the same way
    Held     bytes in this process's own memory, copied onto slots (the fallback)

Several images may have extents in one backing: each holds it, and the last that lets go gives
everything back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from memslot_plugin._core import align_up, check, ffi, lib
from memslot_plugin._core.limits import system_call_error
from memslot_plugin._core.proc import mappings
from memslot_plugin.errors import SystemCallError

if TYPE_CHECKING:
    from typing_extensions import Self

MFD_CLOEXEC = 0x1
MFD_ALLOW_SEALING = 0x2
MFD_NOEXEC_SEAL = 0x8

_UNCHANGING = 0x2 | 0x4 | 0x8
"""F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_WRITE (fcntl(2))."""

_FS_IOC_GETFLAGS = 0x80086601
_FS_IMMUTABLE, _FS_VERITY = 0x10, 0x100000
"""ioctl_iflags(2): nobody may write to the file any more, and it could not be read if somebody had."""


_unset = ffi.new_allocator(should_clear_after_alloc=False)


class Holder:
    """Somebody who needs a backing or an image for the length of a block."""

    __slots__ = ("__weakref__",)


class Backing:
    """What extents of images lie in (abstract; see the three kinds).

    `fd` is the descriptor that slots map, or -1 where there is nothing to map, and `inode` the number
    under which the kernel lists such mappings; `address` is where the bytes can be read.
    """

    fd = -1
    inode = 0

    __slots__ = ("__weakref__", "_holders", "address", "byte_size")

    def __init__(self, address: int, byte_size: int) -> None:
        self.address = address
        self.byte_size = byte_size
        # Weak, so that nobody holds it whom an exception stopped before the end of its making.
        self._holders: weakref.WeakSet[object] = weakref.WeakSet()

    def view(self, file_offset: int, length: int) -> memoryview:
        """Some of its bytes, valid for as long as somebody holds it."""
        at = ffi.cast("uint8_t *", self.address + file_offset)
        return memoryview(ffi.buffer(at, length)).toreadonly()

    def acquire(self, holder: object) -> None:
        """Somebody needs it from now on."""
        self._holders.add(holder)

    def release(self, holder: object) -> None:
        """Somebody no longer needs it; twice is a no-op.  Raises SystemCallError where giving it back fails,
        and then asking again tries again.
        """
        self._holders.discard(holder)
        if not self._holders:
            self._free()

    def _free(self) -> None:
        """Give everything back; twice is a no-op."""
        raise NotImplementedError


class Mapped(Backing):
    """One descriptor and one read-only mapping, from which a reset copies back."""

    __slots__ = ("_fd", "_view", "inode", "name")

    def __init__(self, name: str, fd: int | Any, byte_size: int) -> None:
        """Take over `fd`, a descriptor or an `int *` that holds one, also if this fails."""
        # The core writes here what it gives, and takes it out again as it gives it back: whatever
        # interrupts us, and whichever thread is faster, both are given back once.
        self.name, self.byte_size = name, byte_size
        self._fd = ffi.new("int *", fd) if isinstance(fd, int) else fd
        self._view = ffi.new("uintptr_t *")
        try:
            try:
                self.inode = os.fstat(self._fd[0]).st_ino
            except OSError as error:
                what = f"looking at the image of {name}"
                raise system_call_error(error.errno or 0, what) from None
            check(lib.ms_view(self._fd[0], byte_size, self._view), f"mapping the image of {name}")
        except BaseException:
            lib.ms_close_held(self._fd)
            raise
        super().__init__(self._view[0], byte_size)

    @property
    def fd(self) -> int:  # type: ignore[override]
        """The descriptor, which belongs to this object; -1 once it was given back."""
        return int(self._fd[0])

    def _free(self) -> None:
        unmapped = lib.ms_unmap_held(self._view, self.byte_size)
        closed = lib.ms_close_held(self._fd)
        check(unmapped, f"unmapping the image of {self.name}")
        check(closed, f"closing the image of {self.name}")

    def __del__(self) -> None:
        # No image can hold what nobody can reach, also if its making was cut short.
        if hasattr(self, "_view"):
            self._free()


class Memfd(Mapped):
    """A memfd that nobody can change (memfd_create(2), Linux >= 3.17)."""

    __slots__ = ()

    @classmethod
    def of_pieces(cls, name: str, byte_size: int, pieces: Iterable[tuple[int, memoryview]]) -> Self:
        """A new one of `byte_size` bytes: each piece at its offset, zeros elsewhere, and sealed."""
        fd = ffi.new("int *", -1)
        try:
            fill_memfd(fd, name, byte_size, f"the image of {name}")
            for file_offset, piece in pieces:
                source = ffi.from_buffer("uint8_t[]", piece)
                written = lib.ms_write(fd[0], source, len(piece), file_offset)
                check(written, f"writing the image of {name}")
            check(lib.ms_seal(fd[0]), f"sealing the image of {name}")
            return cls(name, fd, byte_size)
        except BaseException:
            lib.ms_close_held(fd)
            raise


class File(Mapped):
    """A file on disk; whoever may write to it can change what is read here, or take it away (SIGBUS)."""

    __slots__ = ()

    def __init__(self, name: str, fd: int, byte_size: int) -> None:
        super().__init__(name, fd, byte_size)
        # Where a file system lies over another one (overlayfs), fstat(2) and the kernel's list of mappings
        # may name different files.
        with suppress(OSError):  # without /proc nobody can compare them anyway
            for mapping in mappings(self.address, self.address + 1):
                self.inode = mapping.inode


class Held(Backing):
    """Bytes in ordinary memory, for machines where memfd is missing or refused."""

    __slots__ = ("_bytes",)

    def __init__(self, byte_size: int, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """`byte_size` bytes: each piece at its offset, zeros elsewhere."""
        self._bytes: Any = new_bytes(byte_size, pieces)
        super().__init__(int(ffi.cast("uintptr_t", self._bytes)), byte_size)

    def _free(self) -> None:
        self._bytes = None


def new_bytes(byte_size: int, pieces: Iterable[tuple[int, memoryview]]) -> Any:
    """A `uint8_t[]` of `byte_size` bytes: the pieces at their offsets, later ones over earlier ones, zeros
    elsewhere.  The core zeroes and copies, because it lets other threads run meanwhile.
    """
    made = _unset("uint8_t[]", byte_size)
    base = int(ffi.cast("uintptr_t", made))
    sources = [(offset, ffi.from_buffer("uint8_t[]", piece)) for offset, piece in pieces]
    extents = ffi.new("ms_extent[]", max(len(sources), 1))
    for extent, (offset, source) in zip(extents, sources, strict=False):
        extent.offset, extent.length, extent.bytes = offset, len(source), source
    lib.ms_fill_bytes(base, byte_size, extents, len(sources))
    return made


def why_it_may_change(fd: int) -> str | None:
    """Who might change or shorten the file behind a descriptor while it is mapped, or None where
    nobody can but this user and root.

    The file itself decides.  A mount that is read-only does not: the file may be writable through
    another one, or by another of its names.  Folders do not either: with a descriptor open,
    writing to one can only put another file in this one's place.  Rights that an ACL grants to
    write show in the group's bits, which are its mask then (acl(5)).  A descriptor that was opened
    for writing before the mode was changed is not seen: make the file with the mode that it keeps.
    """
    seals = ffi.new("int *")
    if lib.ms_seals(fd, seals) == 0 and seals[0] & _UNCHANGING == _UNCHANGING:
        return None
    try:
        (flags,) = struct.unpack(
            "l", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(struct.calcsize("l")))
        )
    except OSError:  # of a file system that has no such flags
        flags = 0
    if flags & (_FS_IMMUTABLE | _FS_VERITY):
        return None
    found = os.fstat(fd)
    if found.st_uid not in (0, os.geteuid()):
        return f"it belongs to the user {found.st_uid}"
    if found.st_mode & 0o022:
        return f"others than its owner may write to it (mode {found.st_mode & 0o777:04o})"
    return None


def fill_memfd(fd: Any, name: str, length: int, what_for: str) -> None:
    """Put into `fd`, an `int *`, a memfd that may be sealed, closed on exec, and not executable where the kernel knows
    of that (6.3; with vm.memfd_noexec=2 it makes no other).
    """
    # 249 is the longest name that memfd_create(2) takes; it is only for people who read
    # /proc/self/maps.  A name may come from a path that is not text.
    label = f"memslot:{name}".encode(errors="replace")[:249].split(b"\0")[0]
    flags = MFD_CLOEXEC | MFD_ALLOW_SEALING
    what = f"creating a memfd of {align_up(length)} bytes for {what_for}"
    try:
        check(lib.ms_memfd(label, flags | MFD_NOEXEC_SEAL, length, fd), what)
    except SystemCallError as error:
        if error.errno != errno.EINVAL:
            raise
        check(lib.ms_memfd(label, flags, length, fd), what)


def new_memfd(name: str, length: int, what_for: str) -> int:
    """The same as a number, for whoever closes it by that."""
    fd = ffi.new("int *", -1)
    fill_memfd(fd, name, length, what_for)
    return int(fd[0])
