"""Guests that are measured: modules in WebAssembly text, assembled by any runtime."""

from __future__ import annotations

import functools

from memslot_plugin.bench.baseline import assemble
from memslot_plugin.settings import KIB, MIB

WRITTEN = (1, 4, 16, 64)
"""Numbers of pages that `touch_N` can write."""

_WASM_PAGE = 64 * KIB
_STRIDE = 8 * KIB
"""Bytes from one written page to the next."""


@functools.cache
def writer(data_bytes: int) -> bytes:
    """Return a guest of so much data; its exports `touch_N` write into N pages and return 0, as extism wants it."""
    pages = max(data_bytes, max(WRITTEN) * _STRIDE) // _WASM_PAGE
    filling = "0123456789abcdef" * (data_bytes // 16)  # nowhere zero
    functions = "\n".join(
        f'(func (export "touch_{count}") (result i32) (call $touch (i32.const {count})) (i32.const 0))'
        for count in WRITTEN
    )
    text = f"""
    (module
      (memory (export "memory") {pages} {pages})
      (data (i32.const 0) "{filling}")
      (func $touch (param $left i32)
        (local $at i32)
        (loop $next
          (i32.store (local.get $at) (i32.add (i32.load (local.get $at)) (i32.const 1)))
          (local.set $at (i32.add (local.get $at) (i32.const {_STRIDE})))
          (br_if $next (local.tee $left (i32.sub (local.get $left) (i32.const 1))))))
      {functions})
    """
    return assemble(text)


@functools.cache
def spinner() -> bytes:
    """Return a guest whose export `spin` counts to its argument and writes into one page."""
    return assemble("""
    (module
      (memory (export "memory") 1)
      (func (export "spin") (param $left i32) (result i32)
        (local $sum i32)
        (loop $next
          (local.set $sum (i32.xor (i32.mul (local.get $sum) (i32.const 31)) (local.get $left)))
          (br_if $next (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))
        (i32.store (i32.const 0) (local.get $sum))
        (local.get $sum)))
    """)


def size(data_bytes: int) -> str:
    """Write a guest's size for people."""
    return f"{data_bytes // MIB} MiB" if data_bytes >= MIB else f"{data_bytes // KIB} KiB"
