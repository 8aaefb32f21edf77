"""Guests that try to leave a message for the next tenant, and accesses at each boundary."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

import memslot_plugin as memslot

from . import toy
from .toy import PAGE

MAXIMUM = 8
"""Most pages of a toy guest."""

STATE = """
  (global $l (mut i64) (i64.const 12)) (global $v (mut v128) (v128.const i64x2 15 16))
  (func (export "set_globals") (param i32)
    (global.set $l (i64.extend_i32_u (local.get 0)))
    (global.set $v (i32x4.splat (local.get 0))))
  (func (export "sum_of_globals") (result i64)
    (i64.add (global.get $l)
      (i64.add (i64x2.extract_lane 0 (global.get $v)) (i64x2.extract_lane 1 (global.get $v)))))
  (func $recurse (export "overflow") (param $at i32) (result i32)
    (i32.store8 (i32.and (local.get $at) (i32.const 0x1ffff)) (i32.const 0xEE))
    (i32.add (call $recurse (i32.add (local.get $at) (i32.const 1))) (i32.load8_u (i32.const 0))))
  (func (export "ask") (param i32)
    (call $fill (i32.const 0) (i32.const 70000) (i32.const 0xEE)) (call $help (local.get 0))
    (call $fill (i32.const 70000) (i32.const 100) (i32.const 0xEE)))
"""
"""Hidden globals, an endless recursion that writes, and a host function that is called between writes."""

TABLE = """
  (table $t 4 8 funcref) (elem (i32.const 0) $one) (elem $spare func $two) (data $words "secret")
  (func $one (result i32) (i32.const 1)) (func $two (result i32) (i32.const 2))
  (func (export "spoil")
    (table.init $t $spare (i32.const 0) (i32.const 0) (i32.const 1)) (elem.drop $spare)
    (memory.init $words (i32.const 0) (i32.const 0) (i32.const 6)) (data.drop $words))
  (func (export "ask_table") (param i32) (result i32) (call_indirect $t (result i32) (local.get 0)))
  (func (export "read_words") (memory.init $words (i32.const 0) (i32.const 0) (i32.const 6)))
"""
"""Code that changes a table and drops segments."""

SUM_OF_GLOBALS = 12 + 15 + 16

DATA = [(16, "the words of a"), (PAGE, "x" * 5000), (2 * PAGE - 4, "last")]
GUESTS = {
    "attacker": (2, DATA, ""),
    "spoiler": (2, DATA, TABLE),
    "other image": (2, [(40000, "only b says this")], ""),
    "no image": (2, [], ""),
    "smaller": (1, [(65532, "tiny")], ""),
    "larger": (6, [(5 * PAGE, "big")], ""),
}
"""Pages, data and further code of guests. Each has the functions of the toy guest too."""


def text(name: str) -> str:
    pages, segments, more = GUESTS[name]
    data = " ".join(f'(data (i32.const {at}) "{each}")' for at, each in segments)
    return f"""(module (import "env" "help" (func $help (param i32)))
      (memory (export "memory") {pages} {MAXIMUM}) {data} {STATE} {more} {toy.CODE})"""


def pristine(name: str) -> bytes:
    pages, segments, _ = GUESTS[name]
    return toy.laid(pages, segments)


IMPORTS = {"env": {"help": lambda _: 1 // 0}}


# -- attacks: each traps or returns, and the tenant then goes


def traps(instance: memslot.Instance, *call: Any) -> None:
    with pytest.raises(memslot.GuestTrap):
        instance.call(*call)


def every_byte(instance: memslot.Instance) -> None:
    instance.call("fill", 0, instance.memory.byte_size, 0xEE)
    instance.call("bump")


def grown(instance: memslot.Instance) -> None:
    size = instance.call("size")
    instance.call("grow", 1)
    instance.call("fill", 0, (size + 1) * PAGE, 0xEE)


def grown_to_the_maximum_and_trapped(instance: memslot.Instance) -> None:
    instance.call("grow", MAXIMUM - instance.call("size"))
    assert instance.call("grow", 1) == -1
    traps(instance, "fill_and_trap", 0, MAXIMUM * PAGE, 0xEE)


def trapped_in_mid_write(instance: memslot.Instance) -> None:
    traps(instance, "fill", 3000, instance.memory.byte_size, 0xEE)


def wrote_out_of_bounds(instance: memslot.Instance) -> None:
    size = instance.memory.byte_size
    for at in (size, size + 4096, MAXIMUM * PAGE, -1, -(2**31)):
        traps(instance, "store", at, 0xEE)
        traps(instance, "store64", at, -1)
    traps(instance, "store64", size - 7, -1)
    instance.call("store64", size - 8, -1)


def through_the_embedder(instance: memslot.Instance) -> None:
    memory = instance.memory
    memory.grow(2)
    memory.write(0, b"\xee" * memory.byte_size)
    with pytest.raises(memslot.AccessOutOfBounds):
        memory.write(memory.byte_size - 1, b"\xee\xee")


def set_globals(instance: memslot.Instance) -> None:
    instance.call("set_globals", 77)


def overflowed_the_stack(instance: memslot.Instance) -> None:
    traps(instance, "overflow", 0)


def host_function_raised(instance: memslot.Instance) -> None:
    with pytest.raises(ZeroDivisionError):
        instance.call("ask", 1)


def spoilt_the_table(instance: memslot.Instance) -> None:
    instance.call("spoil")
    assert instance.call("ask_table", 0) == 2
    traps(instance, "read_words")


Attack = Callable[[memslot.Instance], None]
ANYWHERE: tuple[Attack, ...] = (
    every_byte, grown, grown_to_the_maximum_and_trapped, trapped_in_mid_write, wrote_out_of_bounds,
    through_the_embedder,
)  # fmt: skip
IN_CODE: tuple[Attack, ...] = (set_globals, overflowed_the_stack, host_function_raised)


def attacks(host: str) -> list[tuple[str, Attack]]:
    """Return guests with their attacks. The fake host runs no code."""
    found = [("attacker", attack) for attack in ANYWHERE]
    found += [("no image", every_byte), ("no image", grown)]
    if host != "fake":
        found += [("attacker", attack) for attack in IN_CODE]
        found += [("spoiler", spoilt_the_table), ("spoiler", grown)]
    return found


# -- out of bounds

ACCESSES = {
    "i32.load8_u": 1, "i32.load16_s": 2, "i32.load": 4, "i64.load32_u": 4, "i64.load": 8, "f32.load": 4, "f64.load": 8,
    "v128.load": 16, "i32.store8": 1, "i32.store16": 2, "i32.store": 4, "i64.store32": 4, "i64.store": 8,
    "f32.store": 4, "f64.store": 8, "v128.store": 16,
}  # fmt: skip
"""Instructions, and the number of bytes that each reads or writes."""
OFFSETS = (0, 1, PAGE, 0x7FFFFFFF, 0xFFFFFFFF)
"""Static offsets."""


def accesses() -> str:
    """Return a module with a function per access, width and static offset, and per bulk operation."""
    functions = []
    for name, offset in itertools.product(ACCESSES, OFFSETS):
        kind, _, verb = name.partition(".")
        value = f"({kind}.const {'i64x2 -1 -1' if kind == 'v128' else -1})"
        code = f"({name} offset={offset} (local.get 0) {value if 'store' in verb else ''})"
        code = code if "store" in verb else f"(drop {code})"
        functions.append(f'(func (export "{name}+{offset}") (param i32) {code})')
    return f"""(module (memory (export "memory") 2 {MAXIMUM}) (data $words "0123456789")
      (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
      (func (export "fill") (param i32 i32)
        (memory.fill (local.get 0) (i32.const 0xEE) (local.get 1)))
      (func (export "copy") (param i32 i32 i32)
        (memory.copy (local.get 0) (local.get 1) (local.get 2)))
      (func (export "init") (param i32 i32 i32)
        (memory.init $words (local.get 0) (local.get 1) (local.get 2)))
      {" ".join(functions)})"""


def signed(address: int) -> int:
    """Return an address as an i32 argument."""
    return address - 2**32 if address >= 2**31 else address


def edges(size: int, width: int) -> list[int]:
    """Return effective addresses with at least one byte outside of `size`, the nearest first."""
    page = memslot.probe().page_size
    return [
        *(size - width + 1 + each for each in range(width)),
        size + page - 1, size + page, size + PAGE, MAXIMUM * PAGE - 1, MAXIMUM * PAGE,
        2**31 - width, 2**31 - 1, 2**31, 2**32 - 65536, 2**32 - width, 2**32 - 1, 2**32, 2**32 + 1,
        2**32 + 0x2000000 - 1, 2**32 + 0x2000000, 2**32 + size, 2**33 - 2,
    ]  # fmt: skip


def out_of_bounds(size: int) -> list[tuple[str, int]]:
    """Yield (function, address argument) of accesses that have to trap in a memory of `size` bytes."""
    found = []
    for (name, width), offset in itertools.product(ACCESSES.items(), OFFSETS):
        for edge in edges(size, width):
            address = edge - offset
            if 0 <= address < 2**32 and edge + width > size:
                found.append((f"{name}+{offset}", signed(address)))
    return found
