"""Every instruction that the decoder knows, in the text format and grouped by proposal.

Each stands between two `unreachable`, where any operands are valid.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

PREAMBLE = """
  (type $f (func)) (type $i (func (param i32) (result i32)))
  (type $s (struct (field $a (mut i32)) (field $b (mut i8))))
  (type $n (array (mut i32))) (type $p (array (mut i8))) (type $r (array (mut funcref)))
  (import "env" "imported" (func $imported))
  (memory $m 1) (memory $o 1) (memory $w i64 1)
  (table $t 1 funcref) (table $u 1 funcref)
  (tag $e)
  (global $g (mut i32) (i32.const 0)) (global $h (mut i64) (i64.const 0))
  (data $d "data") (data $c "more")
  (elem $x funcref (ref.func $imported)) (elem $y funcref (ref.func $imported))
"""
"""What the instructions refer to.  There is one imported function, and another before the tests."""


def module(texts: Iterable[str]) -> str:
    """One function per instruction, which stands between two `unreachable`, where any operands are valid."""
    bodies = (f"(func (local i32) unreachable {text} unreachable)" for text in texts)
    return f"(module {PREAMBLE} {' '.join(bodies)})"


INTEGERS = {"i32": 32, "i64": 64}
FLOATS = ("f32", "f64")


def integers(kind: str) -> list[str]:
    arithmetic = (
        "clz ctz popcnt add sub mul div_s div_u rem_s rem_u and or xor shl shr_s shr_u rotl"
    )
    comparison = "rotr eqz eq ne lt_s lt_u gt_s gt_u le_s le_u ge_s ge_u"
    return [f"{kind}.{name}" for name in f"{arithmetic} {comparison}".split()]


def floats(kind: str) -> list[str]:
    arithmetic = "abs neg ceil floor trunc nearest sqrt add sub mul div min max copysign"
    return [f"{kind}.{name}" for name in f"{arithmetic} eq ne lt gt le ge".split()]


ACCESSES = [
    *(f"{kind}.{access}" for kind in (*INTEGERS, *FLOATS) for access in ("load", "store")),
    *(
        f"{kind}.load{bits}_{sign}"
        for kind, size in INTEGERS.items()
        for bits in (8, 16, 32)
        if bits < size
        for sign in "su"
    ),
    *(
        f"{kind}.store{bits}"
        for kind, size in INTEGERS.items()
        for bits in (8, 16, 32)
        if bits < size
    ),
]

MVP = [
    "unreachable",
    "nop",
    "br 0",
    "br_if 0",
    "br_table 0",
    "br_table 0 0 0 0 0",
    "return",
    "call $imported",
    "call_indirect (type $i)",
    "call_indirect $u (type $f)",
    "drop",
    "select",
    "select (result i32)",
    "select (result (ref null $s))",
    *(f"local.{what} 0" for what in ("get", "set", "tee")),
    "global.get $g",
    "global.set $g",
    *ACCESSES,
    *(f"{access} offset=70000 align=1" for access in ACCESSES),
    "memory.size",
    "memory.grow",
    *(f"i32.const {value}" for value in (0, -1, 63, 64, 0x7FFFFFFF, -0x80000000)),
    *(f"i64.const {value}" for value in (0, -1, 1 << 40, (1 << 63) - 1, -(1 << 63))),
    "f32.const 1.5",
    "f64.const -nan:0x8000000000001",
    *integers("i32"),
    *integers("i64"),
    *floats("f32"),
    *floats("f64"),
    "i32.wrap_i64",
    "i64.extend_i32_s",
    "i64.extend_i32_u",
    "f32.demote_f64",
    "f64.promote_f32",
    *(f"{a}.trunc_{b}_{sign}" for a, b, sign in product(INTEGERS, FLOATS, "su")),
    *(f"{b}.convert_{a}_{sign}" for a, b, sign in product(INTEGERS, FLOATS, "su")),
    "i32.reinterpret_f32",
    "i64.reinterpret_f64",
    "f32.reinterpret_i32",
    "f64.reinterpret_i64",
]

LATER = [
    # sign extension
    *("i32.extend8_s", "i32.extend16_s", "i64.extend8_s", "i64.extend16_s", "i64.extend32_s"),
    # saturating conversions
    *(f"{a}.trunc_sat_{b}_{sign}" for a, b, sign in product(INTEGERS, FLOATS, "su")),
    # bulk memory and reference types
    *("memory.init $d", "memory.init $o $c", "data.drop $d", "memory.copy", "memory.copy $o $m"),
    *("memory.fill", "memory.fill $o", "table.init $x", "table.init $u $y", "elem.drop $x"),
    *("table.copy", "table.copy $u $t", "table.get $t", "table.get $u", "table.set $t"),
    *("table.set $u", "table.grow $t", "table.size $u", "table.fill $t"),
    *("ref.null func", "ref.null extern", "ref.null exn", "ref.null any", "ref.null $s"),
    *("ref.is_null", "ref.func $imported"),
    # tail calls
    *("return_call $imported", "return_call_indirect $u (type $f)"),
    # typed function references
    *("call_ref $f", "return_call_ref $f", "ref.as_non_null", "br_on_null 0"),
    # several memories, 64-bit addresses
    *("memory.size $o", "memory.grow $o", "i32.load $o offset=5", "i64.store8 $o"),
    *("i32.load $w offset=0xffffffffff", "memory.size $w", "v128.load $o align=16"),
    # wide arithmetic
    *("i64.add128", "i64.sub128", "i64.mul_wide_s", "i64.mul_wide_u"),
    # exceptions
    *("throw $e", "throw_ref"),
]

GC = [
    *("ref.eq", "struct.new $s", "struct.new_default $s", "struct.get $s $a"),
    *("struct.get_s $s $b", "struct.get_u $s $b", "struct.set $s $a", "struct.set $s $b"),
    *("array.new $n", "array.new_default $n", "array.new_fixed $n 3", "array.new_data $n $d"),
    *("array.new_elem $r $x", "array.get $n", "array.get_s $p", "array.get_u $p", "array.set $n"),
    *("array.len", "array.fill $n", "array.copy $n $n", "array.init_data $n $c"),
    *("array.init_elem $r $y", "ref.test (ref $s)", "ref.test (ref null any)"),
    *("ref.cast (ref $s)", "ref.cast (ref null i31)", "any.convert_extern"),
    *("extern.convert_any", "ref.i31", "i31.get_s", "i31.get_u"),
]

SHAPES = {"i8x16": 16, "i16x8": 8, "i32x4": 4, "i64x2": 2, "f32x4": 4, "f64x2": 2}


def lanes(shape: str, names: str) -> list[str]:
    return [f"{shape}.{name}" for name in names.split()]


COMPARE = "eq ne lt_s lt_u gt_s gt_u le_s le_u ge_s ge_u"
SHIFT = "shl shr_s shr_u"
SATURATE = "add_sat_s add_sat_u sub_sat_s sub_sat_u"
WHOLE = "abs neg all_true bitmask"
REAL = "eq ne lt gt le ge ceil floor trunc nearest abs neg sqrt add sub mul div min max pmin pmax"


def halves(name: str, shape: str) -> str:
    return " ".join(
        f"{name}_{half}_{shape}_{sign}" for half, sign in product(("low", "high"), "su")
    )


SIMD = [
    *("v128.load offset=3", "v128.store"),
    *(f"v128.load{shape}_{sign}" for shape, sign in product(("8x8", "16x4", "32x2"), "su")),
    *(f"v128.load{bits}_splat" for bits in (8, 16, 32, 64)),
    *(f"v128.load{bits}_zero" for bits in (32, 64)),
    *(f"v128.{what}{bits}_lane 1" for what in ("load", "store") for bits in (8, 16, 32, 64)),
    *("v128.load8_lane $o offset=300 15", "v128.const i64x2 1 -1"),
    "i8x16.shuffle 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 31",
    "i8x16.swizzle",
    *(f"{shape}.splat" for shape in SHAPES),
    *(f"{shape}.replace_lane {count - 1}" for shape, count in SHAPES.items()),
    *(f"{shape}.extract_lane_{sign} 7" for shape, sign in product(("i8x16", "i16x8"), "su")),
    *(f"{shape}.extract_lane 1" for shape in ("i32x4", "i64x2", "f32x4", "f64x2")),
    *lanes("i8x16", f"{COMPARE} {WHOLE} {SHIFT} {SATURATE} add sub min_s min_u max_s max_u"),
    *lanes("i8x16", "avgr_u popcnt narrow_i16x8_s narrow_i16x8_u"),
    *lanes("i16x8", f"{COMPARE} {WHOLE} {SHIFT} {SATURATE} add sub mul min_s min_u max_s max_u"),
    *lanes("i16x8", "avgr_u q15mulr_sat_s narrow_i32x4_s narrow_i32x4_u"),
    *lanes("i16x8", "extadd_pairwise_i8x16_s extadd_pairwise_i8x16_u"),
    *lanes("i16x8", f"{halves('extend', 'i8x16')} {halves('extmul', 'i8x16')}"),
    *lanes("i32x4", f"{COMPARE} {WHOLE} {SHIFT} add sub mul min_s min_u max_s max_u dot_i16x8_s"),
    *lanes("i32x4", "extadd_pairwise_i16x8_s extadd_pairwise_i16x8_u"),
    *lanes("i32x4", f"{halves('extend', 'i16x8')} {halves('extmul', 'i16x8')}"),
    *lanes("i32x4", "trunc_sat_f32x4_s trunc_sat_f32x4_u"),
    *lanes("i32x4", "trunc_sat_f64x2_s_zero trunc_sat_f64x2_u_zero"),
    *lanes("i64x2", f"eq ne lt_s gt_s le_s ge_s {WHOLE} {SHIFT} add sub mul"),
    *lanes("i64x2", f"{halves('extend', 'i32x4')} {halves('extmul', 'i32x4')}"),
    *lanes("f32x4", f"{REAL} convert_i32x4_s convert_i32x4_u demote_f64x2_zero"),
    *lanes("f64x2", f"{REAL} convert_low_i32x4_s convert_low_i32x4_u promote_low_f32x4"),
    *lanes("v128", "not and andnot or xor bitselect any_true"),
    # relaxed
    "i8x16.relaxed_swizzle",
    *lanes("i32x4", "relaxed_trunc_f32x4_s relaxed_trunc_f32x4_u"),
    *lanes("i32x4", "relaxed_trunc_f64x2_s_zero relaxed_trunc_f64x2_u_zero"),
    *(
        f"{shape}.relaxed_{name}"
        for shape, name in product(("f32x4", "f64x2"), ("madd", "nmadd", "min", "max"))
    ),
    *(f"{shape}.relaxed_laneselect" for shape in ("i8x16", "i16x8", "i32x4", "i64x2")),
    *("i16x8.relaxed_q15mulr_s", "i16x8.relaxed_dot_i8x16_i7x16_s"),
    "i32x4.relaxed_dot_i8x16_i7x16_add_s",
]

WIDTHS = [
    (kind, bits) for kind, size in INTEGERS.items() for bits in (8, 16, 32, 64) if bits <= size
]

ATOMICS = [
    *("memory.atomic.notify", "memory.atomic.wait32 offset=8", "memory.atomic.wait64"),
    "atomic.fence",
    *(
        f"{kind}.atomic.load{'' if bits == INTEGERS[kind] else f'{bits}_u'}"
        for kind, bits in WIDTHS
    ),
    *(f"{kind}.atomic.store{'' if bits == INTEGERS[kind] else bits}" for kind, bits in WIDTHS),
    *(
        f"{kind}.atomic.rmw.{name}"
        if bits == INTEGERS[kind]
        else f"{kind}.atomic.rmw{bits}.{name}_u"
        for name in ("add", "sub", "and", "or", "xor", "xchg", "cmpxchg")
        for kind, bits in WIDTHS
    ),
]

STRUCTURED = {
    "block end": "02 0b",
    "block (type $i) unreachable end": "02 00 0b",
    "block (result (ref null $s)) unreachable end": "02 00 0b",
    "block (result (ref func)) unreachable end": "02 00 0b",
    "loop br 0 end": "03 0c 0b",
    "loop (result v128) unreachable end": "03 00 0b",
    "if nop else nop end": "04 01 05 01 0b",
    "if (result i32) unreachable else block unreachable end unreachable end": "04 00 05 02 00 0b 00 0b",
    "block (result funcref) unreachable br_on_non_null 0 unreachable end": "02 00 d6 00 0b",
    "block (result anyref) unreachable br_on_cast 0 anyref (ref $s) unreachable end": "02 00 fb18 00 0b",
    "block (result anyref) unreachable br_on_cast_fail 0 anyref (ref null $s) unreachable end": "02 00 fb19 00 0b",
    "try_table end": "1f 0b",
    "block try_table (catch $e 0) (catch_all 0) nop end end": "02 1f 01 0b 0b",
    "block (result exnref) try_table (catch_ref $e 0) (catch_all_ref 0) end unreachable end": (
        "02 1f 0b 00 0b"
    ),
}
"""Blocks, with the opcode of each instruction in hexadecimal."""

LEGACY = {
    "try nop catch $e nop catch_all rethrow 0 end": "06 01 07 01 19 09 0b",
    "try try nop delegate 0 catch_all end": "06 06 01 18 19 0b",
}
"""Of the first exceptions, which wasmtime assembles and does not run."""

PLAIN = list(dict.fromkeys([*MVP, *LATER, *GC, *SIMD, *ATOMICS]))
