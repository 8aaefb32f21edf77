"""Globals of a guest on wasmer, read and put back bit by bit, and all of them with one call.

Python would turn a signalling NaN into a quiet one, and setting a global from Python takes longer
than a call.  So a small module of ours imports the guest's globals and holds the code that does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memslot_plugin.hosts.wasmer.values import wasmer

_GETTERS = {
    "i32": (("i32", "{}"),),
    "i64": (("i64", "{}"),),
    "f32": (("i32", "(i32.reinterpret_f32 {})"),),
    "f64": (("i64", "(i64.reinterpret_f64 {})"),),
    "v128": (("i64", "(i64x2.extract_lane 0 {})"), ("i64", "(i64x2.extract_lane 1 {})")),
}
"""What the bits of a global are read as, lowest first."""

_WIDTHS = {"i32": 32, "i64": 64}


def state_text(types: Sequence[str], values: Sequence[int] | None) -> str:
    """The module for globals of these types, which puts back these bits if there are any."""
    imports, functions, sets = [], [], []
    for place, type_ in enumerate(types):
        imports.append(f'(import "guest" "{place}" (global $g{place} (mut {type_})))')
        for part, (kind, expression) in enumerate(_GETTERS[type_]):
            body = expression.format(f"(global.get $g{place})")
            functions.append(f'(func (export "get{place}_{part}") (result {kind}) {body})')
        if values is not None:
            sets.append(f"(global.set $g{place} {_constant(type_, values[place])})")
    functions.append(f'(func (export "restore") {" ".join(sets)})')
    return f"(module {' '.join(imports + functions)})"


def _constant(type_: str, bits: int) -> str:
    if type_ == "v128":
        return f"(v128.const i64x2 {bits & (1 << 64) - 1} {bits >> 64})"
    if type_ == "f32":
        return f"(f32.reinterpret_i32 (i32.const {bits}))"
    if type_ == "f64":
        return f"(f64.reinterpret_i64 (i64.const {bits}))"
    return f"({type_}.const {bits})"


def attach(module: Any, globals_: Sequence[Any]) -> Any:
    """An instance of the module on the globals of one guest's instance, which have to outlive it."""
    given = {str(place): each for place, each in enumerate(globals_)}
    return wasmer.Instance(module, {"guest": given} if given else {})


def read(attached: Any, types: Sequence[str]) -> tuple[int, ...]:
    """The bits that the globals hold now."""
    values = []
    for place, type_ in enumerate(types):
        value = shift = 0
        for part, (kind, _) in enumerate(_GETTERS[type_]):
            width = _WIDTHS[kind]
            found = getattr(attached.exports, f"get{place}_{part}")()
            value |= found % (1 << width) << shift
            shift += width
        values.append(value)
    return tuple(values)
