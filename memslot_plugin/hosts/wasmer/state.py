"""The globals of a guest on wasmer that a reset restores, bit by bit and all with one call.

Python would make a signalling NaN a quiet one, and setting one global from Python takes longer than a call.  So a
small WebAssembly module imports the guest's globals, reads them and restores them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import wasmer

from memslot_plugin.guest.plan import Plan
from memslot_plugin.hosts.wasmer.errors import Boundary, at_instantiate
from memslot_plugin.hosts.wasmer.values import compiled, export_of, new_store

_READ = {
    "i32": ((32, "{}"),),
    "i64": ((64, "{}"),),
    "f32": ((32, "(i32.reinterpret_f32 {})"),),
    "f64": ((64, "(i64.reinterpret_f64 {})"),),
    "v128": ((64, "(i64x2.extract_lane 0 {})"), (64, "(i64x2.extract_lane 1 {})")),
}
"""The integers that have the bits of a global, lowest first: their widths, and the expressions that give them."""

_CONSTANT = {
    "i32": "(i32.const {})",
    "i64": "(i64.const {})",
    "f32": "(f32.reinterpret_i32 (i32.const {}))",
    "f64": "(f64.reinterpret_i64 (i64.const {}))",
    "v128": "(v128.const i64x2 {} {})",
}
"""The value that has these integers."""


class SavedGlobals:
    """The globals that a reset of one guest restores, and the modules compiled for them.

    `initial` are the bits that they start with, as far as the guest's module tells them.
    """

    def __init__(self, plan: Plan, guest_name: str) -> None:
        saved = [
            each
            for each in plan.saved_globals
            if each.export_name is not None and not each.type.startswith("(ref ")
        ]
        self._names = [each.export_name or "" for each in saved]
        self._types = [each.type for each in saved]
        self._what = f"the globals of {guest_name}"
        self.initial = tuple(each.initial or 0 for each in saved)
        self._modules: dict[tuple[int, ...] | None, Any] = {}
        if plan.verdict.in_place and all(each.initial is not None for each in saved):
            self._module(self.initial)  # A child of a fork cannot compile it later.

    def attach(self, exports: Any, values: tuple[int, ...] | None) -> AttachedGlobals:
        """Return access to the globals of an instance; `values` are the bits that `restore` sets, if any."""
        module = self._module(values)
        given = {str(i): export_of(exports, name) for i, name in enumerate(self._names)}
        with Boundary(at_instantiate, self._what):
            instance = wasmer.Instance(module, {"guest": given} if given else {})
        return AttachedGlobals(instance, given, self._types)

    def _module(self, values: tuple[int, ...] | None) -> Any:
        if values not in self._modules:
            # Captured values serve every later instance of the guest, or are never seen again.
            self._modules = {
                each: module
                for each, module in self._modules.items()
                if each is None or each == self.initial
            }
            text = _state_text(self._types, values)
            self._modules[values] = compiled(
                new_store(), text, f"the module that restores {self._what}"
            )
        return self._modules[values]


class AttachedGlobals:
    """The saved globals of one instance; `restore` sets them to the values that they were attached with."""

    __slots__ = ("_globals", "_instance", "_types", "restore")

    def __init__(self, instance: Any, globals_: dict[str, Any], types: Sequence[str]) -> None:
        # wasmer keeps neither the instance behind `restore` alive nor the globals that it imports.
        self._instance = instance
        self._globals = globals_
        self._types = types
        self.restore: Callable[[], None] = instance.exports.restore

    def read(self) -> tuple[int, ...]:
        """Return the bits that the globals hold now."""
        values = []
        for index, type_ in enumerate(self._types):
            value = shift = 0
            for part, (width, _) in enumerate(_READ[type_]):
                found = getattr(self._instance.exports, f"get{index}_{part}")()
                value |= found % (1 << width) << shift
                shift += width
            values.append(value)
        return tuple(values)


def _state_text(types: Sequence[str], values: Sequence[int] | None) -> str:
    """Return the module for globals of these types; its `restore` sets these bits."""
    imports, functions, sets = [], [], []
    for index, type_ in enumerate(types):
        imports.append(f'(import "guest" "{index}" (global $g{index} (mut {type_})))')
        for part, (width, expression) in enumerate(_READ[type_]):
            body = expression.format(f"(global.get $g{index})")
            functions.append(f'(func (export "get{index}_{part}") (result i{width}) {body})')
        if values is not None:
            bits, integers = values[index], []
            for width, _ in _READ[type_]:
                integers.append(bits % (1 << width))
                bits >>= width
            sets.append(f"(global.set $g{index} {_CONSTANT[type_].format(*integers)})")
    functions.append(f'(func (export "restore") {" ".join(sets)})')
    return f"(module {' '.join(imports + functions)})"
