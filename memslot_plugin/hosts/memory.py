"""A linear memory as the embedder sees it: bounds-checked bytes, and growth."""

from __future__ import annotations

from typing import Any, NoReturn

from memslot_plugin._core import ffi
from memslot_plugin.errors import ArgumentError, shown
from memslot_plugin.hosts.leases import Handle


class Memory:
    """One linear memory of a live instance; offsets and sizes are bytes."""

    __slots__ = ("_handle", "index")

    def __init__(self, handle: Handle, index: int) -> None:
        self._handle = handle
        self.index = index

    @property
    def byte_size(self) -> int:
        """The number of bytes that are accessible now."""
        index = self.index
        return self._handle.seen(lambda live: live.locate(index)[1])

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`.  Raises AccessOutOfBounds, ArgumentError, UsedAfterClose, InUse."""
        if not (isinstance(offset, int) and isinstance(length, int)):
            _refuse(offset, length)
        handle = self._handle
        return handle.enter().read_memory(handle.generation, self.index, offset, length)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` at `offset`.  Raises AccessOutOfBounds, ArgumentError, UsedAfterClose, InUse, and writes
        nothing then.
        """
        source: Any = data
        if type(data) is not bytes:
            try:
                source = ffi.from_buffer(data)
            except (TypeError, BufferError):
                raise ArgumentError(
                    f"what is written are bytes, or a contiguous buffer of them, and not a {type(data).__name__}"
                ) from None
        length = len(source)
        if not isinstance(offset, int):
            _refuse(offset, length)
        handle = self._handle
        handle.enter().write_memory(handle.generation, self.index, offset, source, length)

    def grow(self, pages: int) -> int:
        """Grow by `pages` of 64 KiB as memory.grow does, and return the size in pages before.

        Raises GrowthRefused where the guest would see -1, UsedAfterClose, InUse.
        """
        if not isinstance(pages, int):
            raise ArgumentError(f"a number of pages is an integer, and not {pages!r}")
        handle = self._handle
        return handle.enter().grow(self.index, pages, handle.generation)

    def __len__(self) -> int:
        return self.byte_size

    def __repr__(self) -> str:
        return f"<Memory {self.index} of {self._handle.guest_name}>"


def _refuse(offset: object, length: object) -> NoReturn:
    raise ArgumentError(
        f"offset and length are integers, in bytes, and not {shown(offset)} and {shown(length)}"
    )
