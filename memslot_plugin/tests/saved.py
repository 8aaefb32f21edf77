"""Files of guests for tests: valid ones, and ones as an attacker writes them."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import memslot_plugin as memslot
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import align_up
from memslot_plugin.files import container
from memslot_plugin.files.container import Container, Contents, Stored

WASM_PAGE = 65536
# (module (memory 3 9) (global (mut i32) (i32.const 5)) (data (i32.const 70000) "data"))
MODULE = (
    b"\0asm\1\0\0\0"
    b"\x05\x04\x01\x01\x03\x09"
    b"\x06\x06\x01\x7f\x01\x41\x05\x0b"
    b"\x0b\x0c\x01\x00\x41\xf0\xa2\x04\x0b\x04data"
)
TWO_MEMORIES = b"\0asm\1\0\0\0\x05\x05\x02\x00\x01\x00\x02"
EMPTIED = MODULE.replace(b"\x0b\x0c", b"\x0b\x08").replace(b"\x04data", b"\x00")
# (module (func) (memory 3 9) (start 0))
STARTS = b"\0asm\1\0\0\0\1\4\1\x60\0\0\3\2\1\0\5\4\1\1\3\x09\x08\1\0\x0a\4\1\2\0\x0b"

ORIGIN: dict[str, Any] = {"source_bytes": 1, "source_sha256": "00"}
ABOUT: dict[str, Any] = {"writer": "w", "name": "x", "snapshot": True, "reseed": None}
ABOUT |= {"origin": ORIGIN}


def opened(backend: str = "memfd", *plugins: object) -> memslot.FakeHost:
    settings = memslot.Settings(plugins=(backend,), slots=4, reserved="1MiB", audit=1.0)
    return memslot.FakeHost(settings, plugins=plugins)


def content(guest: memslot.Guest, memory: int = 0) -> bytes:
    with guest.instantiate() as instance:
        found = instance.memories[memory]
        before = found.read(0, found.byte_size)
        found.write(0, b"\xee" * found.byte_size)
        instance.reset()
        assert found.read(0, found.byte_size) == before
        return before


def write(path: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {"about": ABOUT, "module": EMPTIED}
    values |= {"code": {}, "images": {0: [Stored(0, P, 0, 0)]}, "pieces": [memoryview(b"x" * P)]}
    container.write(path, Contents(**{**values, **changes}))
    return path


@contextmanager
def memfd(data: bytes = b"") -> Iterator[int]:
    fd = os.memfd_create("it")
    try:
        os.write(fd, data)
        yield fd
    finally:
        os.close(fd)


def read_bytes(data: bytes, **options: Any) -> Container:
    with memfd(data) as fd:
        return container.read(fd, "it", **options)


def with_right_digest(data: bytes) -> bytes:
    """Return the file with a right digest, as an attacker writes it."""
    plain = data[:48] + bytes(32) + data[80:]
    return data[:48] + hashlib.sha256(plain).digest() + data[80:]


def with_metadata(metadata: bytes, body: bytes = b"", extents: bytes = b"") -> bytes:
    used = 80 + len(metadata) + len(body)
    head = align_up(used)
    start = struct.pack(
        "<8sIIQQQQ", b"\x93memslot", 1, 0, P, head + len(extents), head, len(metadata)
    )
    return with_right_digest(start + bytes(32) + metadata + body + bytes(head - used) + extents)
