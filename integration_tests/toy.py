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

TEXT_OF_A = f"""(module (memory (export "memory") 2 8)
  (data (i32.const 16) "the words of a") (data (i32.const 20) "letters")
  (data (i32.const {PAGE}) "{"x" * 5000}") (data (i32.const {2 * PAGE - 4}) "last")
  {CODE})"""
TEXT_OF_B = f"""(module (memory (export "memory") 2 8) (data (i32.const 40000) "only b says this") {CODE})"""
TEXT_OF_ZEROS = f'(module (memory (export "memory") 2 8) {CODE})'
TEXT_OF_WIDE = f"""(module (memory (export "memory") 16 20)
  (data (i32.const 8) "start") (data (i32.const {16 * PAGE - 3}) "end") {CODE})"""
"""Its data spans more than the image limit of the tests, so that the runtime copies it."""


@functools.cache
def assemble(text: str) -> bytes:
    """WebAssembly text as bytes, by whichever runtime is there."""
    try:
        return bytes(importlib.import_module("wasmtime").wat2wasm(text))
    except ModuleNotFoundError:
        return bytes(importlib.import_module("wasmer").wat2wasm(text))


A = assemble(TEXT_OF_A)
B = assemble(TEXT_OF_B)
ZEROS = assemble(TEXT_OF_ZEROS)
WIDE = assemble(TEXT_OF_WIDE)


def pristine(module: bytes, host: str = "") -> bytes:
    """What the whole memory of one of the modules above holds before its first instruction."""
    memory = bytearray((16 if module is WIDE else 2) * PAGE)
    segments = {
        A: [
            (16, b"the words of a"),
            (20, b"letters"),
            (PAGE, b"x" * 5000),
            (2 * PAGE - 4, b"last"),
        ],
        B: [(40000, b"only b says this")],
        ZEROS: [],
        # Nobody copies data for the fake host, which has no runtime.
        WIDE: [] if host == "fake" else [(8, b"start"), (16 * PAGE - 3, b"end")],
    }
    for offset, data in segments[module]:
        memory[offset : offset + len(data)] = data
    return bytes(memory)


def _load(live: FakeLive, at: int, length: int = 1) -> int:
    return int.from_bytes(live.read(0, at % 2**32, length), "little")


def _store(live: FakeLive, at: int, value: int, length: int = 1) -> None:
    live.write(0, at % 2**32, (value % 256**length).to_bytes(length, "little"))


def _fill(live: FakeLive, at: int, length: int, value: int) -> None:
    _, byte_size = live.locate(0)
    fits = max(0, min(length, byte_size - at))
    live.write(0, at, bytes([value]) * fits)
    if fits < length:
        _load(live, at + fits)  # traps where the compiled loop does, after it wrote the rest


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
    "load": _load,
    "load64": functools.partial(_load, length=8),
    "store": _store,
    "store64": functools.partial(_store, length=8),
    "fill": _fill,
    "fill_and_trap": _fill_and_trap,
    "different": _different,
    "size": _size,
    "grow": _grow,
    "bump": _bump,
}
