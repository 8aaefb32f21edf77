"""Growth by ftruncate(2), the original's first strategy.

                base          base + initial    base + accessible      initial + extended
                 |  image, zeros  |  grown bytes     |  SIGBUS on access    |  faults on access |
                 |                |  a file of the slot's own, mapped once to the maximum       |

Growing makes the file longer and costs no mprotect(2).  An access past the file's end raises SIGBUS,
which no runtime turns into a trap: for hosts that check bounds in code only.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from memslot_plugin._core import FastRegion, align_up, catch_up, check, ffi, leak, lib
from memslot_plugin.errors import InvariantBroken, Unsupported
from memslot_plugin.memory.backing import new_memfd
from memslot_plugin.memory.region import CLEAN, DIRTY, UNKNOWN
from memslot_plugin.memory.slot import Slot

if TYPE_CHECKING:
    from memslot_hooks.types import ResetResult
    from memslot_plugin.memory.image import Image
    from memslot_plugin.memory.reset import Reset

_private: Any = FastRegion.accessible
"""The bytes below the file, which is all that the core resets."""


class ExtensionSlot(Slot):
    """A slot whose memory grows in a file of its own, which is emptied by a reset and kept open until it is destroyed.

    `extended` bytes from `initial` on map the file, of which `grown` are there.
    """

    __slots__ = ("_file", "extended", "grown")

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Take over a range as any slot; Unsupported for a runtime's own mapping."""
        # Owned by C code alone: an interrupt in `_map_file`, `_close_file` or `__del__` loses nothing.
        self._file = ffi.gc(ffi.new("int *", -1), lib.ms_close_once)
        self.extended = self.grown = 0
        super().__init__(*arguments, **named)
        if self.mapping is not None:
            raise Unsupported(
                "growth by ftruncate is impossible if the runtime owns the mapping and grows it itself"
            )

    @property
    def fd(self) -> int:
        """The descriptor of the file, or -1."""
        return int(self._file[0])

    @property
    def accessible(self) -> int:
        """Bytes that the guest can use: below the file, and in it."""
        return int(_private.__get__(self)) + self.grown

    @accessible.setter
    def accessible(self, below: int) -> None:
        _private.__set__(self, below)

    @property
    def growable(self) -> int:
        """Bytes that this slot can grow to."""
        return self.initial + self.extended

    def instantiate(
        self, image: Image | None, byte_size: int, *, maximum: int | None = None
    ) -> bool:
        """Do what any slot does, and map the file from `byte_size` to `maximum`."""
        accessible = align_up(byte_size)
        limit = self.reserved if maximum is None else min(align_up(maximum), self.reserved)
        extended = max(limit - accessible, 0)
        if self.state is CLEAN and (accessible, extended) == (self.initial, self.extended):
            return super().instantiate(image, accessible)
        self._checked(image, byte_size)
        if self.state is UNKNOWN:
            self.cover()
        self.state = UNKNOWN
        self._unmap_file()
        self.state = CLEAN
        super().instantiate(image, accessible)
        self.state = UNKNOWN
        self._map_file(extended)
        self.state = DIRTY
        return True

    def grow(self, byte_size: int) -> None:
        """Do what any slot does, by one ftruncate(2)."""
        catch_up()  # in a child of a fork the file is the parent's until then, whose memory would grow
        super().grow(byte_size)

    def _extend(self, accessible: int) -> int:
        grown = accessible - self.initial
        failed = int(lib.ms_resize(self.fd, grown))
        if not failed:
            self.grown = grown
            # The core would reset what lies below the file, and leave the file.  None could be a (wrong) strategy.
            del self.strategy
        return failed

    def _slow_reset(self, strategy: Reset, answer: int) -> ResetResult:
        catch_up()  # as in grow: the parent's memory would shrink
        return super()._slow_reset(strategy, answer)

    def _shrink(self) -> None:
        if self.grown:
            check(lib.ms_resize(self.fd, 0), "emptying a slot's extension")
            self.grown = 0

    def cover(self) -> None:
        """From any state but destroyed to clean, with nothing accessible: map over the whole range."""
        self.extended = self.grown = 0
        self._close_file()
        super().cover()

    def forget(self) -> None:
        """From any state to destroyed without a system call for the range."""
        self._close_file()
        super().forget()

    def privatise(self) -> None:
        """In a forked child: replace the file, which the parent's guest goes on using, by a copy.

        Raises SystemCallError: the slot is unknown then.
        """
        if self.fd < 0 or self.state is UNKNOWN:
            return
        state, self.state = self.state, UNKNOWN
        extended, grown = self.extended, self.grown
        written = bytes(ffi.buffer(ffi.cast("uint8_t *", self.base + self.initial), grown))
        self._unmap_file()
        self._close_file()
        if state is DIRTY and extended:
            self._map_file(extended)
            check(lib.ms_resize(self.fd, grown), "sizing a slot's extension")
            check(lib.ms_write(self.fd, written, grown, 0), "copying a slot's extension")
            self.grown = grown
        self.state = state

    def check(self) -> None:
        """Check the invariant, and the length of the file."""
        length = os.fstat(self.fd).st_size if self.extended and self.state is not UNKNOWN else 0
        if length != self.grown and self.state is not UNKNOWN:
            raise InvariantBroken(f"a slot's extension has {length} bytes, not {self.grown}")
        super().check()

    def mapped_at(self, at: int) -> tuple[int, str, int, int]:
        """Return what must be mapped at byte `at`, as any region, and the file above `initial`."""
        if at >= self.initial + self.extended:
            return self.reserved, "---p", 0, 0
        if at >= self.initial:
            inode = os.fstat(self.fd).st_ino
            return self.initial + self.extended, "rw-p", inode, at - self.initial
        return super().mapped_at(at)

    def _map_file(self, extended: int) -> None:
        """Map an empty file above the initial size, to the maximum, once for all growth to come."""
        if not extended:
            return
        if self.fd < 0:
            new_memfd("extension", 0, "a slot's extension", self._file)
        check(
            lib.ms_map_extension(self.base + self.initial, extended, self.fd),
            "mapping a slot's extension",
        )
        self.extended = extended

    def _unmap_file(self) -> None:
        """Cover the file's range; the file stays open for the next guest."""
        if self.extended:
            check(
                lib.ms_cover(self.base + self.initial, self.extended), "covering a slot's extension"
            )
            self.extended = self.grown = 0

    def _close_file(self) -> None:
        leak(lib.ms_close_once(self._file), "the extension of a slot")

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # else an exception came before it was set
            self._close_file()
