"""Constant expressions: the initial values of globals and tables, and the offsets of segments.

Reading finds the end of an expression, and its value if the module alone says it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from memslot_plugin.wasm.binary import NotUnderstood, Reader
from memslot_plugin.wasm.module import Expression, Global
from memslot_plugin.wasm.types import read_heap_type


@dataclass(frozen=True, slots=True)
class _Operand:
    type: str | None
    value: int | None
    reason: str | None


_BITS = {"i32": 32, "i64": 64}
_ARITHMETIC: dict[int, tuple[str, Callable[[int, int], int]]] = {
    0x6A: ("i32", int.__add__),
    0x6B: ("i32", int.__sub__),
    0x6C: ("i32", int.__mul__),
    0x7C: ("i64", int.__add__),
    0x7D: ("i64", int.__sub__),
    0x7E: ("i64", int.__mul__),
}
_FLOATS = {0x43: ("f32", 4), 0x44: ("f64", 8)}
_V128_CONST = 12
_GC_OPERATORS = {
    0: "struct.new",
    1: "struct.new_default",
    6: "array.new",
    7: "array.new_default",
    8: "array.new_fixed",
    26: "any.convert_extern",
    27: "extern.convert_any",
    28: "ref.i31",
}

_INVALID = _Operand(None, None, "is not a valid constant expression")


def read_expression(reader: Reader, known: Sequence[Global]) -> Expression:
    """Read a constant expression up to its `end`; `known` are the globals in front of it."""
    start = reader.position
    stack: list[_Operand] = []
    functions: list[int] = []
    while (opcode := reader.byte()) != 0x0B:
        if opcode in _ARITHMETIC:
            right = stack.pop() if stack else _INVALID
            left = stack.pop() if stack else _INVALID
            stack.append(_calculate(opcode, left, right))
        elif opcode == 0x41:
            stack.append(_Operand("i32", reader.signed(32) & 0xFFFFFFFF, None))
        elif opcode == 0x42:
            stack.append(_Operand("i64", reader.signed(64) & 0xFFFFFFFFFFFFFFFF, None))
        elif opcode in _FLOATS:
            kind, byte_size = _FLOATS[opcode]
            stack.append(_Operand(kind, int.from_bytes(reader.take(byte_size), "little"), None))
        elif opcode == 0xFD and reader.u32() == _V128_CONST:
            stack.append(_Operand("v128", int.from_bytes(reader.take(16), "little"), None))
        elif opcode == 0x23:
            stack.append(_global(reader.u32(), known))
        elif opcode == 0xD2:
            functions.append(reader.u32())
            stack.append(_Operand(None, None, "is made by ref.func"))
        else:
            stack.append(_Operand(None, None, f"is made by {_skip_operator(reader, opcode)}"))
    result = stack[0] if len(stack) == 1 else _only_reason(stack)
    return Expression(
        reader.since(start), result.type, result.value, result.reason, tuple(functions)
    )


def _only_reason(stack: list[_Operand]) -> _Operand:
    """Return the last reason on a stack whose operators were partly skipped."""
    reasons = [operand.reason for operand in stack if operand.reason]
    return _Operand(None, None, reasons[-1]) if reasons else _INVALID


def _calculate(opcode: int, left: _Operand, right: _Operand) -> _Operand:
    kind, operation = _ARITHMETIC[opcode]
    for operand in (left, right):
        if operand.value is None:
            return operand
        if operand.type != kind:
            return _INVALID
    assert left.value is not None
    assert right.value is not None
    return _Operand(kind, operation(left.value, right.value) % (1 << _BITS[kind]), None)


def _global(index: int, known: Sequence[Global]) -> _Operand:
    if index >= len(known):
        return _Operand(None, None, f"is global {index}, which does not exist at this point")
    initializer, kind = known[index].initializer, known[index].type
    if initializer is None:
        return _Operand(None, None, f"is global {index}, which is imported")
    if kind.mutable:
        return _Operand(None, None, f"is global {index}, which is mutable")
    if initializer.value is None:
        return _Operand(None, None, f"is global {index}, whose value is known only when it runs")
    if initializer.type != kind.value.name:
        return _INVALID
    return _Operand(initializer.type, initializer.value, None)


def _skip_operator(reader: Reader, opcode: int) -> str:
    """Step over the immediates of an operator whose result is a reference; return its name."""
    if opcode == 0xD0:
        read_heap_type(reader)
        return "ref.null"
    if opcode == 0xFB and (code := reader.u32()) in _GC_OPERATORS:
        if code < 26:
            reader.u32()
        if code == 8:
            reader.u32()
        return _GC_OPERATORS[code]
    raise NotUnderstood(f"a constant expression has the unknown operator 0x{opcode:02x}")
