"""The adversary's guests: each has one word of its own at known places, and functions that write, read and grow."""

from __future__ import annotations

import struct

PAGE = 65536
COUNT = 5
"""The global's value at the start."""

CODE = """
  (global $count (export "count") (mut i32) (i32.const 5))
  (func $fill (export "fill") (param $at i32) (param $words i32) (param $word i32)
    (loop $next (if (local.get $words) (then
      (i32.store (local.get $at) (local.get $word))
      (local.set $at (i32.add (local.get $at) (i32.const 4)))
      (local.set $words (i32.sub (local.get $words) (i32.const 1)))
      (br $next)))))
  (func (export "fill_and_trap") (param i32 i32 i32)
    (call $fill (local.get 0) (local.get 1) (local.get 2)) unreachable)
  (func (export "get") (param i32) (result i32) (i32.load (local.get 0)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "bump") (result i32)
    (global.set $count (i32.add (global.get $count) (i32.const 1))) (global.get $count))"""

KINDS = {
    "plain": "",
    "drops": """(data $once "\\00\\00\\00\\00")
      (func (export "once") (memory.init $once (i32.const 0) (i32.const 0) (i32.const 4)) (data.drop $once))""",
    "asks": '(func (export "ask") (result i32) (call $help (i32.const 1)))',
    "prints": """(func (export "print") (param i32)
        (i32.store (i32.const 0) (local.get 0)) (i32.store (i32.const 4) (i32.const 4))
        (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
        (call $fill (i32.const 0) (i32.const 3) (i32.const 0)))""",
}
IMPORTS = {
    "asks": '(import "env" "help" (func $help (param i32) (result i32)))',
    "prints": """(import "wasi_snapshot_preview1" "fd_write"
        (func $write (param i32 i32 i32 i32) (result i32)))""",
}
PLACES = (4096, 12288, PAGE + 8192, 2 * PAGE - 256)
"""Offsets of a guest's own words, 64 of them each."""


def text(kind: str, word: int) -> str:
    """The guest of this kind, whose own word is `word`."""
    escaped = "".join(f"\\{byte:02x}" for byte in struct.pack("<I", word)) * 64
    data = " ".join(f'(data (i32.const {place}) "{escaped}")' for place in PLACES)
    memory = '(memory (export "memory") 2 5)'
    return f"(module {IMPORTS.get(kind, '')} {memory} {data} {CODE} {KINDS[kind]})"


def content(word: int) -> bytes:
    """Return the bytes of a new memory of a guest whose own word is `word`."""
    memory = bytearray(2 * PAGE)
    for place in PLACES:
        memory[place : place + 256] = struct.pack("<I", word) * 64
    return bytes(memory)
