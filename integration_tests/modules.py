"""Modules of shapes that the generator misses, each with calls whose results can be compared.

Each lies at an exact boundary, or runs natively for a reason, or has names that a generator would not choose.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import cells, native, toy
from .generated import Import

ACCESS = """
  (func (export "load") (param i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "load64") (param i32) (result i64) (i64.load (local.get 0)))
  (func (export "store") (param i32 i32) (i32.store8 (local.get 0) (local.get 1)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "size") (result i32) (memory.size))
"""


def calls(text: str) -> tuple[native.Call, ...]:
    """Parse calls written as "function number number; function"."""
    words = map(str.split, text.split(";"))
    return tuple((function, *map(int, numbers)) for function, *numbers in words)


WALK = calls(
    "size; load 0; load 8; load64 65528; load64 65529; store 65535 7; store 65536 7; load 65535;"
    "grow 1; store 65536 9; load 65536; load -1; grow 1; grow -1; size; store 0 255; load 0"
)
"""Calls that touch both ends of the first page, grow, and touch the new page."""

MANY = 100  # many parameters: few frames exhaust the stack, and wasmer looks up each frame
EMBEDDED = (Import("memory", "memory", (1, 3)),)


@dataclass(frozen=True)
class Module:
    """Fields of a module beside its memory and the functions above; without a memory all of its fields.

    `reason` is a part of the sentence in the report if there is no image.
    """

    fields: str = ""
    calls: tuple[native.Call, ...] = WALK
    memory: str | None = '(memory (export "memory") 1 3)'
    images: tuple[bool, ...] | None = None
    """For each memory, true if it has an image. The default is one memory, with an image unless there is a reason."""
    reason: str = ""
    imports: tuple[Import, ...] = ()
    native_on: tuple[str, ...] = ()
    """Hosts on which no slot can serve it."""
    probes: tuple[native.Call, ...] = ()
    snapshot_at: int = 2

    @property
    def binary(self) -> bytes:
        others = "" if self.memory is None else f"{self.memory} {ACCESS}"
        return toy.assemble(f"(module {self.fields} {others})")


MODULES = {
    "nothing-at-all": Module(calls=(), memory=None, images=(), snapshot_at=0),
    "exported-twice": Module(
        '(data (i32.const 8) "data")', memory='(memory (export "one") (export "two") 1 3)'
    ),
    "names-that-python-would-mind": Module(
        """(data (i32.const 8) "d") (func (export "") (result i32) (i32.const 3))
           (func (export "caf\u00e9 \u2615") (result i32) (i32.const 4))""",
        (*WALK, ("",), ("caf\u00e9 \u2615",)),
        memory='(memory (export "__class__") 1 3)',
    ),
    "overlapping-segments-to-the-last-byte": Module(
        """(data (i32.const 4) "first one") (data (i32.const 8) "second") (data (i32.const 0) "zeroth")
           (data (i32.const 5) "") (data (i32.const 65531) "tail!")"""
    ),
    "zero-length-segments": Module(
        '(data (i32.const 0) "") (data (i32.const 65536) "") (data (i32.const 77) "")'
    ),
    "zero-length-beyond-the-end": Module(
        '(data (i32.const 65537) "")', reason="instantiation traps"
    ),
    "out-of-bounds": Module(
        '(data (i32.const 0) "written first") (data (i32.const 65530) "too long")',
        reason="Data segment 1 ends at byte 65538 and the memory starts with 65536",
    ),
    "a-dynamic-offset-at-the-end": Module(
        """(import "env" "base" (global i32)) (data (i32.const 0) "constant")
           (data (global.get 0) "dynamic")""",
        reason="place it at a constant",
        imports=(Import("base", "i32", (65529,)),),
    ),
    "an-import-missing": Module('(import "env" "f" (func)) (data (i32.const 8) "x")'),
    "minimum-0": Module(
        '(data (i32.const 0) "")',
        calls("size; load 0; grow 1; load 0; store 65535 3; load 65536; grow 2; size"),
        memory='(memory (export "memory") 0 2)',
    ),
    "minimum-0-with-data": Module(
        '(data (i32.const 0) "a")',
        memory='(memory (export "memory") 0 2)',
        reason="instantiation traps",
    ),
    "minimum-and-maximum-0": Module(
        calls=calls("size; load 0; grow 0; grow 1"), memory='(memory (export "memory") 0 0)'
    ),
    "an-imported-memory-too-small": Module(
        '(import "env" "memory" (memory 2 3)) (data (i32.const 8) "x")',
        memory="",
        reason="It is imported as env.memory and belongs to the embedder",
        imports=EMBEDDED,
    ),
    "two-memories": Module(
        """(memory $a (export "a") 1 2) (memory $b (export "b") 2 4) (memory $c (export "c") 1)
           (data (memory $a) (i32.const 0) "first") (data (memory $b) (i32.const 131070) "22")
           (func (export "load") (param i32 i32) (result i32)
             (i32.add (i32.load8_u $a (local.get 0)) (i32.load8_u $b (local.get 1))))
           (func (export "store") (param i32 i32) (i32.store8 $b (local.get 0) (local.get 1)))
           (func (export "copy") (memory.copy $c $a (i32.const 9) (i32.const 0) (i32.const 5)))
           (func (export "grow") (param i32) (result i32) (memory.grow $b (local.get 0)))
           (func (export "grow_c") (param i32) (result i32) (memory.grow $c (local.get 0)))""",
        calls(
            "load 0 131070; load 65536 0; load 0 131072; store 3 4; copy; grow 2; store 262143 1;"
            "grow 1; grow_c 1; grow_c 70000"
        ),
        memory=None,
        images=(True, True, True),
        native_on=("wasmer",),
    ),
    "an-imported-and-a-defined-memory": Module(
        """(import "env" "memory" (memory $a 1 3)) (memory $b (export "b") 1 2)
           (data (memory $a) (i32.const 0) "theirs") (data (memory $b) (i32.const 0) "ours")
           (func (export "sum") (result i32) (i32.add (i32.load $a (i32.const 0)) (i32.load $b (i32.const 0))))
           (func (export "store") (i32.store $b (i32.const 65532) (i32.load $a (i32.const 2))))""",
        calls("sum; store; sum"),
        memory=None,
        images=(False, True),
        imports=EMBEDDED,
        native_on=("wasmer",),
    ),
    "a-shared-memory": Module(
        """(data (i32.const 8) "shared")
           (func (export "add") (param i32) (result i32) (i32.atomic.rmw.add (i32.const 16) (local.get 0)))""",
        (*WALK, *calls("add 3; add 4")),
        memory="(memory 1 2 shared)",
        reason="shared between threads",
        native_on=cells.HOSTS,
    ),
    "64-bit-addresses": Module(
        """(memory (export "memory") i64 1 3) (data (i64.const 8) "wide")
           (func (export "load") (param i64) (result i32) (i32.load8_u (local.get 0)))
           (func (export "store") (param i64 i32) (i32.store8 (local.get 0) (local.get 1)))
           (func (export "grow") (param i64) (result i64) (memory.grow (local.get 0)))""",
        calls(
            "load 8; load 65535; load 65536; load 4294967304; load 9223372036854775808; load -1;"
            "store 65535 1; grow 1; store 131071 1; store 131072 1; grow 1099511627776; grow 1;"
            "grow 1"
        ),
        memory=None,
    ),
    "64-bit-addresses-without-a-maximum": Module(
        """(memory (export "memory") i64 1) (data (i64.const 8) "wide")
           (func (export "load") (param i64) (result i32) (i32.load8_u (local.get 0)))
           (func (export "grow") (param i64) (result i64) (memory.grow (local.get 0)))""",
        calls("load 8; load 65536; grow 1; load 65536"),
        memory=None,
        reason="64-bit addresses and no maximum",
        native_on=cells.HOSTS,
    ),
    "a-start-function-that-grows": Module(
        """(data (i32.const 8) "data") (start $start)
           (func $start (drop (memory.grow (i32.const 1))) (i32.store (i32.const 131068) (i32.const 77)))"""
    ),
    "a-start-function-that-traps": Module(
        """(data (i32.const 8) "data") (start $start)
           (func $start (i32.store (i32.const 4) (i32.const 77)) (unreachable))"""
    ),
    "an-exhausted-stack": Module(
        f"""(func $wide (param {"i64 " * MANY}) (result i64)
             (i64.add (i64.const 1) (call $wide {" ".join(f"(local.get {n})" for n in range(MANY))})))
           (func (export "deep") (result i64) (call $wide {"(i64.const 1)" * MANY}))""",
        (("deep",), *WALK),
    ),
}
