"""Modules of every shape, each with calls that tell whether it computes what it should."""

from __future__ import annotations

from dataclasses import dataclass

from memslot_plugin.tests.encode import custom

from . import cells, native, toy
from .generated import Import

ACCESS = """
  (func (export "load") (param i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "load64") (param i32) (result i64) (i64.load (local.get 0)))
  (func (export "store") (param i32 i32) (i32.store8 (local.get 0) (local.get 1)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "size") (result i32) (memory.size))
"""
WALK = (
    *(("size",), ("load", 0), ("load", 8), ("load64", 65528), ("load64", 65529)),
    *(("store", 65535, 7), ("store", 65536, 7), ("load", 65535)),
    *(("grow", 1), ("store", 65536, 9), ("load", 65536), ("load", -1)),
    *(("grow", 1), ("grow", -1), ("size",), ("store", 0, 255), ("load", 0)),
)
"""Calls that touch both ends of the first page, grow, and touch what is new."""

MEMORY = '(memory (export "memory") 1 3)'
MANY = 100  # parameters: few frames exhaust a stack then, and wasmer looks each of them up
EMBEDDED = (Import("memory", "memory", (1, 3)),)


@dataclass(frozen=True)
class Module:
    """The fields of a module beside its memory and the functions above; without a memory all of its fields.

    `reason` is a part of what the report says if there is no image.
    """

    fields: str = ""
    calls: tuple[native.Call, ...] = WALK
    memory: str | None = MEMORY
    images: tuple[bool, ...] | None = None
    """For each memory: true if it has an image. By default one memory, with an image if there is no reason."""
    reason: str = ""
    imports: tuple[Import, ...] = ()
    trailer: bytes = b""
    native_on: tuple[str, ...] = ()
    """Hosts that cannot have any slot for it."""
    probes: tuple[native.Call, ...] = ()

    @property
    def snapshot_at(self) -> int:
        return min(2, len(self.calls))

    @property
    def binary(self) -> bytes:
        others = "" if self.memory is None else f"{self.memory} {ACCESS}"
        return toy.assemble(f"(module {self.fields} {others})") + self.trailer


# fmt: off  # a table: one call per line would be ten times as long
MODULES = {
    "no-memory": Module(
        """(global $g (mut i32) (i32.const 5))
           (func (export "f") (param i32) (result i32)
             (global.set $g (i32.add (global.get $g) (local.get 0))) (global.get $g))
           (func (export "divide") (param i32 i32) (result i32) (i32.div_s (local.get 0) (local.get 1)))""",
        (("f", 37), ("f", 1), ("divide", 7, 2), ("divide", 7, 0), ("divide", -(2**31), -1)),
        memory=None,
        images=(),
    ),
    "nothing-at-all": Module(calls=(), memory=None, images=()),
    "plain": Module('(data (i32.const 8) "data")'),
    "without-data": Module(),
    "not-exported": Module('(data (i32.const 8) "data")', memory="(memory 1 3)"),
    "without-a-maximum": Module('(data (i32.const 8) "d")', memory='(memory (export "memory") 1)'),
    "exported-twice": Module(
        '(data (i32.const 8) "data")', memory='(memory (export "one") (export "two") 1 3)'
    ),
    "names-that-python-would-mind": Module(
        """(data (i32.const 8) "d") (func (export "") (result i32) (i32.const 3))
           (func (export "caf\u00e9 \u2615") (result i32) (i32.const 4))""",
        (*WALK, ("",), ("caf\u00e9 \u2615",)),
        memory='(memory (export "__class__") 1 3)',
    ),
    "ends-at-the-last-byte": Module('(data (i32.const 65531) "tail!")'),
    "overlapping-segments": Module(
        """(data (i32.const 4) "first one") (data (i32.const 8) "second")
           (data (i32.const 0) "zeroth") (data (i32.const 5) "")"""
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
    "far-out-of-bounds": Module('(data (i32.const -1) "a")', reason="instantiation traps"),
    **{
        name: Module(
            """(import "env" "base" (global i32)) (data (i32.const 0) "constant")
               (data (global.get 0) "dynamic")""",
            reason="place it at a constant",
            imports=(Import("base", "i32", (base,)),),
        )
        for name, base in (("a-dynamic-offset", 1000), ("a-dynamic-offset-out-of-bounds", 65530))
    },
    "an-offset-that-is-computed": Module(
        '(data (offset (i32.add (i32.const 6) (i32.mul (i32.const 2) (i32.const 3)))) "sum")'
    ),
    "an-import-missing": Module('(import "env" "f" (func)) (data (i32.const 8) "x")'),
    "passive-segments": Module(
        """(data $p "passive bytes") (data (i32.const 3) "active") (data $q "")
           (func (export "init") (param i32 i32 i32)
             (memory.init $p (local.get 0) (local.get 1) (local.get 2)))
           (func (export "init_empty") (param i32) (memory.init $q (local.get 0) (i32.const 0) (i32.const 0)))
           (func (export "drop") (data.drop $p))""",
        (
            ("load", 100),
            ("init", 100, 0, 13),
            ("load", 100),
            ("init", 65530, 0, 13),
            ("load", 65535),
            ("init", 200, 5, 9),
            ("init", 200, 8, 5),
            ("init_empty", 65536),
            ("init_empty", 65537),
            ("drop",),
            ("init", 300, 0, 0),
            ("init", 300, 0, 1),
            ("drop",),
            *WALK,
        ),
    ),
    "active-segments-used-as-passive": Module(
        """(data $a (i32.const 3) "active")
           (func (export "init") (param i32) (memory.init $a (i32.const 50) (i32.const 0) (local.get 0)))
           (func (export "drop") (data.drop $a))""",
        (("init", 0), ("init", 1), ("init", 6), ("drop",), ("init", 1), ("load", 3), ("load", 50)),
    ),
    "bulk-operations": Module(
        """(data (i32.const 10) "to be copied")
           (func (export "copy") (param i32 i32 i32) (memory.copy (local.get 0) (local.get 1) (local.get 2)))
           (func (export "fill") (param i32 i32 i32) (memory.fill (local.get 0) (local.get 1) (local.get 2)))""",
        (
            ("copy", 14, 10, 12),
            ("copy", 65530, 10, 12),
            ("fill", 65000, 5, 536),
            ("fill", 65000, 6, 537),
            ("copy", 0, 65536, 0),
            ("copy", 0, 65537, 0),
            ("fill", -1, 0, 2),
            *WALK,
        ),
    ),
    "minimum-0": Module(
        calls=(
            ("size",),
            ("load", 0),
            ("grow", 1),
            ("load", 0),
            ("store", 65535, 3),
            ("load", 65536),
            ("grow", 2),
            ("size",),
        ),
        memory='(memory (export "memory") 0 2)',
    ),
    "minimum-0-with-an-empty-segment": Module(
        '(data (i32.const 0) "")',
        (("size",), ("load", 0), ("grow", 1), ("load", 0)),
        memory='(memory (export "memory") 0 2)',
    ),
    "minimum-0-with-data": Module(
        '(data (i32.const 0) "a")',
        memory='(memory (export "memory") 0 2)',
        reason="instantiation traps",
    ),
    "minimum-and-maximum-0": Module(
        calls=(("size",), ("load", 0), ("grow", 0), ("grow", 1)),
        memory='(memory (export "memory") 0 0)',
    ),
    "an-imported-memory": Module(
        '(import "env" "memory" (memory 1 3)) (export "memory" (memory 0)) (data (i32.const 8) "data")',
        memory="",
        reason="It is imported as env.memory and belongs to whoever provides it",
        imports=EMBEDDED,
    ),
    "an-imported-memory-too-small": Module(
        '(import "env" "memory" (memory 2 3)) (data (i32.const 8) "x")',
        memory="",
        reason="belongs to whoever provides it",
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
        (
            ("load", 0, 131070),
            ("load", 65536, 0),
            ("load", 0, 131072),
            ("store", 3, 4),
            ("copy",),
            ("grow", 2),
            ("store", 262143, 1),
            ("grow", 1),
            ("grow_c", 1),
            ("grow_c", 70000),
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
        (("sum",), ("store",), ("sum",)),
        memory=None,
        images=(False, True),
        imports=EMBEDDED,
        native_on=("wasmer",),
    ),
    "a-shared-memory": Module(
        """(data (i32.const 8) "shared")
           (func (export "add") (param i32) (result i32) (i32.atomic.rmw.add (i32.const 16) (local.get 0)))""",
        (*WALK, ("add", 3), ("add", 4)),
        memory="(memory 1 2 shared)",
        reason="shared between threads",
        native_on=cells.HOSTS,
    ),
    "64-bit-addresses": Module(
        """(memory (export "memory") i64 1 3) (data (i64.const 8) "wide")
           (func (export "load") (param i64) (result i32) (i32.load8_u (local.get 0)))
           (func (export "store") (param i64 i32) (i32.store8 (local.get 0) (local.get 1)))
           (func (export "grow") (param i64) (result i64) (memory.grow (local.get 0)))""",
        (
            ("load", 8),
            ("load", 65535),
            ("load", 65536),
            ("load", 2**32 + 8),
            ("load", 2**63),
            ("load", -1),
            ("store", 65535, 1),
            ("grow", 1),
            ("store", 131071, 1),
            ("store", 131072, 1),
            ("grow", 2**40),
            ("grow", 1),
            ("grow", 1),
        ),
        memory=None,
    ),
    "64-bit-addresses-without-a-maximum": Module(
        """(memory (export "memory") i64 1) (data (i64.const 8) "wide")
           (func (export "load") (param i64) (result i32) (i32.load8_u (local.get 0)))
           (func (export "grow") (param i64) (result i64) (memory.grow (local.get 0)))""",
        (("load", 8), ("load", 65536), ("grow", 1), ("load", 65536)),
        memory=None,
        reason="64-bit addresses and no maximum",
        native_on=cells.HOSTS,
    ),
    "custom-sections": Module(
        '(data (i32.const 8) "data") (func $inner)',
        trailer=custom("producers", b"\0") + custom("x", b"\1\2\3") + custom("x", b""),
    ),
    "a-start-function": Module(
        """(data (i32.const 8) "data") (global $seen (mut i32) (i32.const 0)) (start $start)
           (func $start (global.set $seen (i32.load (i32.const 8))) (i32.store (i32.const 400) (i32.const 77)))
           (func (export "seen") (result i32) (global.get $seen))""",
        (("seen",), *WALK),
    ),
    "a-start-function-that-grows": Module(
        """(data (i32.const 8) "data") (start $start)
           (func $start (drop (memory.grow (i32.const 1))) (i32.store (i32.const 131068) (i32.const 77)))"""
    ),
    "a-start-function-that-traps": Module(
        """(data (i32.const 8) "data") (start $start)
           (func $start (i32.store (i32.const 4) (i32.const 77)) (unreachable))"""
    ),
    "tables-and-references": Module(
        """(data (i32.const 8) "data") (type $t (func (result i32)))
           (table (export "table") 4 8 funcref) (elem (i32.const 0) $one $two)
           (func $one (result i32) (i32.const 1)) (func $two (result i32) (i32.load8_u (i32.const 8)))
           (func $odd (param i32)) (elem (i32.const 2) $odd)
           (func (export "through") (param i32) (result i32) (call_indirect (type $t) (local.get 0)))""",
        (("through", 0), ("through", 1), ("through", 2), ("through", 3), ("through", 4), *WALK),
    ),
    "host-functions": Module(
        """(import "env" "twice" (func $twice (param i32) (result i32))) (data (i32.const 8) "data")
           (func (export "f") (param i32) (result i32) (i32.store (i32.const 0) (call $twice (local.get 0)))
             (i32.load (i32.const 0)))""",
        (("f", 21), *WALK),
        imports=(Import("twice", "function", ("i32",)),),
    ),
    "several-results": Module(
        """(func (export "divide") (param i32 i32) (result i32 i64)
             (i32.div_u (local.get 0) (local.get 1)) (i64.extend_i32_s (i32.rem_u (local.get 0) (local.get 1))))
           (func (export "floats") (param f32 f64) (result f64)
             (f64.add (f64.promote_f32 (local.get 0)) (local.get 1)))""",
        (("divide", 17, 5), ("divide", 1, 0), ("floats", 0.5, 0.25), *WALK),
    ),
    "every-way-to-trap": Module(
        f"""(data (i32.const 8) "data") (func (export "unreachable") (unreachable))
           (func $wide (param {"i64 " * MANY}) (result i64)
             (i64.add (i64.const 1) (call $wide {" ".join(f"(local.get {n})" for n in range(MANY))})))
           (func (export "deep") (result i64) (call $wide {"(i64.const 1)" * MANY}))
           (func (export "to_int") (param f64) (result i32) (i32.trunc_f64_s (local.get 0)))""",
        (("deep",), ("unreachable",), ("to_int", 1e30), ("to_int", float("nan")), *WALK),
    ),
}
# fmt: on
