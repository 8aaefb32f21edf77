"""A linear memory as the embedder sees it: bounds-checked bytes, and growth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memslot_plugin._core import ffi
from memslot_plugin.errors import AccessOutOfBounds, ArgumentError

if TYPE_CHECKING:
    from memslot_plugin.hosts.instance import Instance

WASM_PAGE = 65536
"""Bytes per page of a linear memory (WebAssembly core specification, 4.2.8)."""

# Looked up once: a request reads and writes as often as it calls.
_BYTES = ffi.typeof("char *")
_cast, _unpack, _memmove = ffi.cast, ffi.unpack, ffi.memmove


class Memory:
    """One linear memory of a live instance; offsets and sizes are bytes."""

    __slots__ = ("_instance", "index")

    def __init__(self, instance: Instance, index: int) -> None:
        self._instance = instance
        self.index = index

    @property
    def byte_size(self) -> int:
        """How many bytes are accessible now."""
        return self._instance._live().locate(self.index)[1]

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`.  Raises AccessOutOfBounds, ArgumentError."""
        content: bytes = _unpack(_cast(_BYTES, self._require(offset, length)), length)
        return content

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at `offset`.  Raises AccessOutOfBounds, ArgumentError, and writes nothing then."""
        source: Any = data
        if type(data) is not bytes:
            try:
                source = ffi.from_buffer(data)
            except (TypeError, BufferError) as error:
                raise ArgumentError(f"what is written are bytes: {error}") from None
        length = len(source)
        _memmove(_cast(_BYTES, self._require(offset, length)), source, length)

    def grow(self, pages: int) -> int:
        """Grow by `pages` of 64 KiB as memory.grow does, and return the size in pages before.

        Raises GrowthRefused where the guest would see -1.
        """
        return self._instance._live().grow(self.index, pages)

    def _require(self, offset: int, length: int) -> int:
        """The address of `length` bytes at `offset`."""
        base, byte_size = self._instance._live().locate(self.index)
        if not (isinstance(offset, int) and isinstance(length, int)):
            raise ArgumentError(
                f"offset and length are integers, in bytes, and not {offset!r} and {length!r}"
            )
        if offset < 0 or length < 0 or offset + length > byte_size:
            raise AccessOutOfBounds(
                f"bytes [{offset}, {offset + length}) are outside memory {self.index} of {byte_size} bytes"
            )
        return base + offset

    def __len__(self) -> int:
        return self.byte_size

    def __repr__(self) -> str:
        return f"<Memory {self.index} of {self._instance!r}>"
