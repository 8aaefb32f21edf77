"""Every instruction that the decoder knows, in the text format and grouped by proposal.

Each stands between two `unreachable`, where any operands are valid.
"""

from __future__ import annotations

import re
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
"""Items that the instructions name, one imported function among them."""


def module(texts: Iterable[str]) -> str:
    """Return a module with one function per instruction, each between two `unreachable`."""
    bodies = (f"(func (local i32) unreachable {text} unreachable)" for text in texts)
    return f"(module {PREAMBLE} {' '.join(bodies)})"


def expand(patterns: str) -> list[str]:
    """Return one text per combination of the alternatives in braces. Lines or semicolons end a pattern."""
    found: list[str] = []
    for pattern in filter(None, map(str.strip, re.split("[;\n]", patterns))):
        parts = re.split("[{}]", pattern)  # alternatives in braces have an odd place
        choices = [part.split() if place % 2 else [part] for place, part in enumerate(parts)]
        found += map("".join, product(*choices))
    return found


MVP = """
unreachable; nop; br 0; br_if 0; br_table 0; br_table 0 0 0 0 0; return; drop
call $imported; call_indirect (type $i); call_indirect $u (type $f)
select; select (result i32); select (result (ref null $s))
local.{get set tee} 0; global.{get set} $g
memory.size; memory.grow
i32.const {0 -1 63 64 2147483647 -2147483648}
i64.const {0 -1 1099511627776 9223372036854775807 -9223372036854775808}
f32.const 1.5; f64.const -nan:0x8000000000001
{i32 i64}.{clz ctz popcnt add sub mul div_s div_u rem_s rem_u and or xor shl shr_s shr_u rotl rotr}
{i32 i64}.{eqz eq ne lt_s lt_u gt_s gt_u le_s le_u ge_s ge_u}
{f32 f64}.{abs neg ceil floor trunc nearest sqrt add sub mul div min max copysign}
{f32 f64}.{eq ne lt gt le ge}
i32.wrap_i64; i64.extend_i32_{s u}; f32.demote_f64; f64.promote_f32
{i32 i64}.trunc_{f32 f64}_{s u}; {f32 f64}.convert_{i32 i64}_{s u}
i32.reinterpret_f32; i64.reinterpret_f64; f32.reinterpret_i32; f64.reinterpret_i64
"""

ACCESSES = """
{i32 i64 f32 f64}.{load store}
{i32 i64}.load{8 16}_{s u}; i64.load32_{s u}; {i32 i64}.store{8 16}; i64.store32
"""

LATER = """
i32.extend{8 16}_s; i64.extend{8 16 32}_s
{i32 i64}.trunc_sat_{f32 f64}_{s u}
memory.init $d; memory.init $o $c; data.drop $d; memory.copy; memory.copy $o $m
memory.fill; memory.fill $o; table.init $x; table.init $u $y; elem.drop $x
table.copy; table.copy $u $t; table.{get set} {$t $u}
table.grow $t; table.size $u; table.fill $t
ref.null {func extern exn any $s}; ref.is_null; ref.func $imported
return_call $imported; return_call_indirect $u (type $f)
call_ref $f; return_call_ref $f; ref.as_non_null; br_on_null 0
memory.size $o; memory.grow $o; i32.load $o offset=5; i64.store8 $o
i32.load $w offset=0xffffffffff; memory.size $w; v128.load $o align=16
i64.{add128 sub128 mul_wide_s mul_wide_u}
throw $e; throw_ref
"""
"""Instructions up to references, several memories, 64-bit addresses, wide arithmetic and exceptions."""

GC = """
ref.eq; struct.new $s; struct.new_default $s; struct.get $s $a; struct.get_{s u} $s $b
struct.set $s {$a $b}; array.new $n; array.new_default $n; array.new_fixed $n 3
array.new_data $n $d; array.new_elem $r $x; array.get $n; array.get_{s u} $p; array.set $n
array.len; array.fill $n; array.copy $n $n; array.init_data $n $c; array.init_elem $r $y
ref.test (ref $s); ref.test (ref null any); ref.cast (ref $s); ref.cast (ref null i31)
any.convert_extern; extern.convert_any; ref.i31; i31.get_{s u}
"""

SIMD = """
v128.load offset=3; v128.store; v128.load{8x8 16x4 32x2}_{s u}; v128.load{8 16 32 64}_splat
v128.load{32 64}_zero; v128.{load store}{8 16 32 64}_lane 1
v128.load8_lane $o offset=300 15; v128.const i64x2 1 -1
i8x16.shuffle 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 31; i8x16.swizzle
{i8x16 i16x8 i32x4 i64x2 f32x4 f64x2}.splat
i8x16.replace_lane 15; i16x8.replace_lane 7; {i32x4 f32x4}.replace_lane 3
{i64x2 f64x2}.replace_lane 1; {i8x16 i16x8}.extract_lane_{s u} 7
{i32x4 i64x2 f32x4 f64x2}.extract_lane 1
{i8x16 i16x8 i32x4}.{eq ne lt_s lt_u gt_s gt_u le_s le_u ge_s ge_u min_s min_u max_s max_u}
{i8x16 i16x8 i32x4 i64x2}.{abs neg all_true bitmask shl shr_s shr_u add sub}
{i8x16 i16x8}.{add_sat_s add_sat_u sub_sat_s sub_sat_u avgr_u}; i8x16.popcnt
{i16x8 i32x4 i64x2}.mul; i64x2.{eq ne lt_s gt_s le_s ge_s}
i8x16.narrow_i16x8_{s u}; i16x8.narrow_i32x4_{s u}; i16x8.q15mulr_sat_s; i32x4.dot_i16x8_s
i16x8.extadd_pairwise_i8x16_{s u}; i32x4.extadd_pairwise_i16x8_{s u}
i16x8.{extend extmul}_{low high}_i8x16_{s u}; i32x4.{extend extmul}_{low high}_i16x8_{s u}
i64x2.{extend extmul}_{low high}_i32x4_{s u}
i32x4.trunc_sat_f32x4_{s u}; i32x4.trunc_sat_f64x2_{s u}_zero
{f32x4 f64x2}.{eq ne lt gt le ge ceil floor trunc nearest abs neg sqrt add sub mul div}
{f32x4 f64x2}.{min max pmin pmax}; f32x4.convert_i32x4_{s u}; f32x4.demote_f64x2_zero
f64x2.convert_low_i32x4_{s u}; f64x2.promote_low_f32x4
v128.{not and andnot or xor bitselect any_true}
i8x16.relaxed_swizzle; i32x4.relaxed_trunc_f32x4_{s u}; i32x4.relaxed_trunc_f64x2_{s u}_zero
{f32x4 f64x2}.relaxed_{madd nmadd min max}; {i8x16 i16x8 i32x4 i64x2}.relaxed_laneselect
i16x8.relaxed_q15mulr_s; i16x8.relaxed_dot_i8x16_i7x16_s; i32x4.relaxed_dot_i8x16_i7x16_add_s
"""

ATOMICS = expand("""
memory.atomic.notify; memory.atomic.wait32 offset=8; memory.atomic.wait64; atomic.fence
{i32 i64}.atomic.{load load8_u load16_u store store8 store16}; i64.atomic.{load32_u store32}
{i32 i64}.atomic.rmw.{add sub and or xor xchg cmpxchg}
{i32 i64}.atomic.rmw{8 16}.{add sub and or xor xchg cmpxchg}_u
i64.atomic.rmw32.{add sub and or xor xchg cmpxchg}_u
""")

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
"""Instructions of the first exceptions proposal, which wasmtime assembles and does not run."""

_ACCESSES = expand(ACCESSES)
PLAIN = [
    *expand(MVP + LATER + GC + SIMD),
    *_ACCESSES,
    *(f"{access} offset=70000 align=1" for access in _ACCESSES),
    *ATOMICS,
]
