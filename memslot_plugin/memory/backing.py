"""The places that images have their bytes in, readable at one address for as long as an image needs them.

    Memfd        a sealed memfd, mapped copy-on-write onto slots
    File         a file on disk, opened to be read, mapped in the same way
    HeapBacking  bytes in this process's own memory, copied onto slots (the fallback)

Several images may have extents in one backing: each acquires it, and the last release gives everything back.
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

from memslot_plugin._core import align_up, check, ffi, leak, lib
from memslot_plugin._core.limits import system_call_error
from memslot_plugin._core.proc import mappings
from memslot_plugin.errors import MemslotError

if TYPE_CHECKING:
    from typing_extensions import Self

MFD_CLOEXEC = 0x1
MFD_ALLOW_SEALING = 0x2
MFD_NOEXEC_SEAL = 0x8

_UNCHANGING = 0x2 | 0x4 | 0x8
"""F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_WRITE (fcntl(2))."""

_FS_IOC_GETFLAGS = 0x80086601
_FS_IMMUTABLE, _FS_VERITY = 0x10, 0x100000
"""ioctl_iflags(2): the file cannot be written any more; with fs-verity, what was written could not be read."""


_unset = ffi.new_allocator(should_clear_after_alloc=False)


class Holder:
    """A weakly referable object that needs a backing or an image for the length of a block."""

    __slots__ = ("__weakref__",)


class Backing:
    """The bytes that extents of images lie in (abstract; see the three kinds).

    `fd` is the descriptor that slots map, or -1 if there is nothing to map, and `inode` the number
    under which the kernel lists such mappings; `address` is where the bytes can be read.
    """

    inode = 0

    __slots__ = ("__weakref__", "_holders", "address", "byte_size", "fd")

    def __init__(self, address: int, byte_size: int, fd: int = -1) -> None:
        self.address = address
        self.byte_size = byte_size
        self.fd = fd
        # Weak: a holder whose making an exception cut short goes by itself.
        self._holders: weakref.WeakSet[object] = weakref.WeakSet()

    def view(self, file_offset: int, length: int) -> memoryview:
        """Return some of the bytes, valid until the last holder releases the backing."""
        at = ffi.cast("uint8_t *", self.address + file_offset)
        return memoryview(ffi.buffer(at, length)).toreadonly()

    def acquire(self, holder: object) -> None:
        """Keep the bytes until `holder` releases them or is collected."""
        self._holders.add(holder)

    def release(self, holder: object) -> None:
        """Give everything back once no other holder needs it."""
        self._holders.discard(holder)
        if not self._holders:
            self._free()

    def _free(self) -> None:
        """Give everything back, or leak it; a second call does nothing."""
        raise NotImplementedError


class Mapped(Backing):
    """One descriptor and one read-only mapping, from which a reset copies back."""

    __slots__ = ("_file", "_view", "inode", "name")

    def __init__(self, name: str, fd: int, byte_size: int) -> None:
        """Take over `fd`, also if this fails.  Raises SystemCallError."""
        # Owned by C code alone: an interrupt in `_free` or `__del__` loses nothing.
        self._file = ffi.gc(ffi.new("int *", fd), lib.ms_close_once)
        self._view = ffi.gc(ffi.new("ms_range *", {"length": byte_size}), lib.ms_unmap_once)
        self.name = name
        super().__init__(0, byte_size, fd)
        try:
            self.inode = os.fstat(fd).st_ino
        except OSError as error:
            what = f"looking at the image of {name}"
            raise system_call_error(error.errno or 0, what) from None
        address = ffi.addressof(self._view, "base")
        check(lib.ms_view(fd, byte_size, address), f"mapping the image of {name}")
        self.address = int(self._view.base)

    def _free(self) -> None:
        self.address, self.fd = 0, -1
        leak(lib.ms_unmap_once(self._view), f"the view of the image of {self.name}")
        leak(lib.ms_close_once(self._file), f"the image of {self.name}")

    def __del__(self) -> None:
        if hasattr(self, "_holders"):
            self._free()


class Memfd(Mapped):
    """A sealed memfd (memfd_create(2), Linux >= 3.17)."""

    __slots__ = ()

    @classmethod
    def of_pieces(cls, name: str, byte_size: int, pieces: Iterable[tuple[int, memoryview]]) -> Self:
        """Make one of `byte_size` bytes: each piece at its offset, zeros elsewhere, and sealed."""
        fd = new_memfd(name, byte_size, f"the image of {name}")
        try:
            for file_offset, piece in pieces:
                source = ffi.from_buffer("uint8_t[]", piece)
                written = lib.ms_write(fd, source, len(piece), file_offset)
                check(written, f"writing the image of {name}")
            check(lib.ms_seal(fd), f"sealing the image of {name}")
        except MemslotError:
            lib.ms_close(fd)
            raise
        return cls(name, fd, byte_size)


class File(Mapped):
    """A file on disk; a process that may write to it can change what is read here, or take it away (SIGBUS)."""

    __slots__ = ()

    def __init__(self, name: str, fd: int, byte_size: int) -> None:
        super().__init__(name, fd, byte_size)
        # If one file system lies over another (overlayfs), fstat(2) and the kernel's list of mappings may name
        # different files.
        with suppress(OSError):  # without /proc the two are never compared
            for mapping in mappings(self.address, self.address + 1):
                self.inode = mapping.inode


class HeapBacking(Backing):
    """Bytes in ordinary memory, for machines without memfd."""

    __slots__ = ("_bytes",)

    def __init__(self, byte_size: int, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """Make `byte_size` bytes: each piece at its offset, zeros elsewhere."""
        self._bytes: Any = new_bytes(byte_size, pieces)
        super().__init__(int(ffi.cast("uintptr_t", self._bytes)), byte_size)

    def _free(self) -> None:
        self._bytes = None


def new_bytes(byte_size: int, pieces: Iterable[tuple[int, memoryview]]) -> Any:
    """Return a `uint8_t[]`: the pieces at their offsets, later ones over earlier ones, zeros elsewhere."""
    made = _unset("uint8_t[]", byte_size)
    base = int(ffi.cast("uintptr_t", made))
    sources = [(offset, ffi.from_buffer("uint8_t[]", piece)) for offset, piece in pieces]
    extents = ffi.new("ms_extent[]", max(len(sources), 1))
    for extent, (offset, source) in zip(extents, sources, strict=False):
        extent.offset, extent.length, extent.bytes = offset, len(source), source
    # The core zeroes and copies, because it releases the GIL meanwhile.
    lib.ms_fill_bytes(base, byte_size, extents, len(sources))
    return made


def why_it_may_change(fd: int) -> str | None:
    """Return the reason why another user might change or shorten a file while it is mapped, or None.

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


def new_memfd(name: str, length: int, purpose: str, into: Any = None) -> int:
    """Return the descriptor of a new memfd of zeros that may be sealed; raises SystemCallError.

    It is closed on exec, and not executable if the kernel knows of that (Linux 6.3; with
    vm.memfd_noexec=2 no other memfd can be made).  `name` is for people who read /proc/self/maps.
    `into` is an `int *` that gets it, too, without an interrupt in between.
    """
    # memfd_create(2) takes at most 249 bytes, and a name may come from a path that is not text.
    label = f"memslot:{name}".encode(errors="replace")[:249].split(b"\0")[0]
    flags = MFD_CLOEXEC | MFD_ALLOW_SEALING
    fd = ffi.new("int *", -1) if into is None else into
    failed = lib.ms_memfd(label, flags | MFD_NOEXEC_SEAL, length, fd)
    if failed == -errno.EINVAL:
        failed = lib.ms_memfd(label, flags, length, fd)
    check(failed, f"creating a memfd of {align_up(length)} bytes for {purpose}")
    return int(fd[0])
