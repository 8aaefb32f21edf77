"""A linear memory as the embedder sees it: bounds-checked bytes, and growth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from memslot_plugin._core import ffi
from memslot_plugin.errors import ArgumentError, shown

if TYPE_CHECKING:
    from memslot_plugin.hosts.instance import Instance

WASM_PAGE = 65536
"""Bytes per page of a linear memory (WebAssembly core specification, 4.2.8)."""


class Memory:
    """One linear memory of a live instance; offsets and sizes are bytes."""

    __slots__ = ("_instance", "index")

    def __init__(self, instance: Instance, index: int) -> None:
        self._instance = instance
        self.index = index

    @property
    def byte_size(self) -> int:
        """How many bytes are accessible now."""
        index = self.index
        return self._instance._seen(lambda live: live.locate(index)[1])

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`.  Raises AccessOutOfBounds, ArgumentError, UsedAfterClose, InUse."""
        if not (isinstance(offset, int) and isinstance(length, int)):
            self._refuse(offset, length)
        instance = self._instance
        return instance._live().read_memory(instance._generation, self.index, offset, length)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at `offset`.  Raises AccessOutOfBounds, ArgumentError, UsedAfterClose, InUse, and writes
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
            self._refuse(offset, length)
        instance = self._instance
        instance._live().write_memory(instance._generation, self.index, offset, source, length)

    def grow(self, pages: int) -> int:
        """Grow by `pages` of 64 KiB as memory.grow does, and return the size in pages before.

        Raises GrowthRefused where the guest would see -1, UsedAfterClose, InUse.
        """
        if not isinstance(pages, int):
            raise ArgumentError(f"a number of pages is an integer, and not {pages!r}")
        instance = self._instance
        return instance._live().grow(self.index, pages, instance._generation)

    def _refuse(self, offset: object, length: object) -> NoReturn:
        raise ArgumentError(
            f"offset and length are integers, in bytes, and not {shown(offset)} and {shown(length)}"
        )

    def __len__(self) -> int:
        return self.byte_size

    def __repr__(self) -> str:
        return f"<Memory {self.index} of {self._instance!r}>"
