"""The toy guest: the same functions as WebAssembly for the runtimes and as Python for the fake host."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from memslot_plugin.errors import GrowthRefused, GuestTrap
from memslot_plugin.hosts.fake import FakeLive

PAGE = 65536

CODE = """
  (global $bumped (mut i32) (i32.const 7))
  (func (export "load") (param i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "load64") (param i32) (result i64) (i64.load (local.get 0)))
  (func (export "store") (param i32 i32) (i32.store8 (local.get 0) (local.get 1)))
  (func (export "store64") (param i32 i64) (i64.store (local.get 0) (local.get 1)))
  (func $fill (export "fill") (param $at i32) (param $length i32) (param $value i32)
    (local $end i32)
    (local.set $end (i32.add (local.get $at) (local.get $length)))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $at) (local.get $end)))
        (i32.store8 (local.get $at) (local.get $value))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $next))))
  (func (export "fill_and_trap") (param i32 i32 i32)
    (call $fill (local.get 0) (local.get 1) (local.get 2))
    (unreachable))
  (func (export "different") (param $at i32) (param $length i32) (param $value i32) (result i32)
    (local $end i32) (local $count i32)
    (local.set $end (i32.add (local.get $at) (local.get $length)))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $at) (local.get $end)))
        (local.set $count (i32.add (local.get $count)
          (i32.ne (i32.load8_u (local.get $at)) (local.get $value))))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $next)))
    (local.get $count))
  (func (export "size") (result i32) (memory.size))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "bump") (result i32)
    (global.set $bumped (i32.add (global.get $bumped) (i32.const 1)))
    (global.get $bumped))
"""

SEGMENTS = {
    "a": [(16, "the words of a"), (20, "letters"), (PAGE, "x" * 5000), (2 * PAGE - 4, "last")],
    "b": [(40000, "only b says this")],
    "zeros": [],
    # The span exceeds the image limit of the tests: the runtime copies the data.
    "wide": [(8, "start"), (16 * PAGE - 3, "end")],
}
"""Initial data of the modules below."""


def text(name: str, limits: str = "2 8") -> str:
    """Return the text of the toy guest with the data of this name."""
    data = " ".join(f'(data (i32.const {at}) "{each}")' for at, each in SEGMENTS[name])
    return f'(module (memory (export "memory") {limits}) {data} {CODE})'


TEXT_OF_A = text("a")


@functools.cache
def assemble(text: str) -> bytes:
    """Assemble WebAssembly text with an installed runtime."""
    try:
        return bytes(importlib.import_module("wasmtime").wat2wasm(text))
    except ModuleNotFoundError:
        return bytes(importlib.import_module("wasmer").wat2wasm(text))


A = assemble(TEXT_OF_A)
B = assemble(text("b"))
ZEROS = assemble(text("zeros"))
WIDE = assemble(text("wide", "16 20"))


def laid(pages: int, segments: list[tuple[int, str]]) -> bytes:
    """Return the bytes of a memory of zeros with these segments, later ones over earlier ones."""
    memory = bytearray(pages * PAGE)
    for offset, data in segments:
        memory[offset : offset + len(data)] = data.encode()
    return bytes(memory)


def pristine(module: bytes, host: str = "") -> bytes:
    """Return the memory of a module above before its first instruction."""
    if module is WIDE:  # the fake host has no runtime to copy the data
        return laid(16, [] if host == "fake" else SEGMENTS["wide"])
    return laid(2, SEGMENTS[{A: "a", B: "b", ZEROS: "zeros"}[module]])


def _load(live: FakeLive, at: int, length: int = 1) -> int:
    return int.from_bytes(live.read(0, at % 2**32, length), "little")


def _store(live: FakeLive, at: int, value: int, length: int = 1) -> None:
    live.write(0, at % 2**32, (value % 256**length).to_bytes(length, "little"))


def _fill(live: FakeLive, at: int, length: int, value: int) -> None:
    _, byte_size = live.locate(0)
    fits = max(0, min(length, byte_size - at))
    live.write(0, at, bytes([value]) * fits)
    if fits < length:
        _load(live, at + fits)  # trap like the compiled loop, after the bytes within the memory


def _fill_and_trap(live: FakeLive, at: int, length: int, value: int) -> None:
    _fill(live, at, length, value)
    raise GuestTrap("unreachable")


def _different(live: FakeLive, at: int, length: int, value: int) -> int:
    return length - live.read(0, at, length).count(value)


def _size(live: FakeLive) -> int:
    return live.locate(0)[1] // PAGE


def _grow(live: FakeLive, pages: int) -> int:
    try:
        return live.grow(0, pages)
    except GrowthRefused:
        return -1


def _bump(live: Any) -> int:
    live.bumped = getattr(live, "bumped", 7) + 1
    return int(live.bumped)


FUNCTIONS = {
    each.__name__[1:]: each
    for each in (_load, _store, _fill, _fill_and_trap, _different, _size, _grow, _bump)
}
FUNCTIONS["load64"] = functools.partial(_load, length=8)
FUNCTIONS["store64"] = functools.partial(_store, length=8)
