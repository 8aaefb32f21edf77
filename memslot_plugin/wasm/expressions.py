"""Constant expressions: the initial values of globals and tables, and the offsets of segments.

Reading finds the end of an expression, and its value if the module alone says it. A value is the
unsigned number whose bits it has, for every type: an f32 is 32 bits and keeps the payload of a NaN, a
v128 is the little-endian number of its 16 bytes. None is the null reference when it is written, and an
unknown value when it was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from memslot_plugin.wasm.binary import NotUnderstood, Reader, signed_leb128
from memslot_plugin.wasm.module import Expression, Global
from memslot_plugin.wasm.types import ValueType, encode_heap_type, read_heap_type

_BITS = {"i32": 32, "i64": 64, "f32": 32, "f64": 64, "v128": 128}
_END = 0x0B
_I32_CONST, _I64_CONST, _F32_CONST, _F64_CONST = 0x41, 0x42, 0x43, 0x44
_GLOBAL_GET, _REF_NULL, _REF_FUNC = 0x23, 0xD0, 0xD2
_GC, _VECTOR = 0xFB, 0xFD
"""Prefixes of two-part operators."""
_V128_CONST = 12
_FIXED = {
    "f32": bytes([_F32_CONST]),
    "f64": bytes([_F64_CONST]),
    "v128": bytes([_VECTOR, _V128_CONST]),
}
"""Opcodes of constants whose immediates have a fixed size."""
_ARITHMETIC = frozenset({0x6A, 0x6B, 0x6C, 0x7C, 0x7D, 0x7E})
"""Operators of the extended constants: additions, subtractions and products."""
_GC_IMMEDIATES = {0: 1, 1: 1, 6: 1, 7: 1, 8: 2, 26: 0, 27: 0, 28: 0}
"""Numbers of immediates of the operators that make structs, arrays and other references."""


class _Operand(NamedTuple):
    """The result of an instruction, or the reason why it is unknown."""

    type: str | None = None
    value: int | None = None
    reason: str | None = None


_INVALID = _Operand(reason="is not a valid constant expression")
_REFERENCE = _Operand(reason="is a reference")
_COMPUTED = _Operand(reason="is not a single constant")


def read_expression(reader: Reader, known: Sequence[Global]) -> Expression:
    """Read a constant expression up to its `end`; `known` are the globals in front of it.

    An expression of several instructions has no value here: compilers write them only for what the embedder decides.
    """
    start = reader.position
    operands: list[_Operand] = []
    functions: list[int] = []
    while (opcode := reader.byte()) != _END:
        if opcode == _GLOBAL_GET:
            operands.append(_global(reader.u32(), known))
        elif opcode == _REF_FUNC:
            functions.append(reader.u32())
            operands.append(_REFERENCE)
        else:
            operands.append(_read_constant(reader, opcode))
    result = operands[0] if len(operands) == 1 else _COMPUTED
    return Expression(reader.since(start), *result, tuple(functions))


def _read_constant(reader: Reader, opcode: int) -> _Operand:
    """Read the immediates of a constant, or step over those of another operator."""
    if opcode == _I32_CONST:
        return _Operand("i32", reader.signed(32) & 0xFFFFFFFF)
    if opcode == _I64_CONST:
        return _Operand("i64", reader.signed(64) & 0xFFFFFFFFFFFFFFFF)
    if opcode == _F32_CONST:
        return _Operand("f32", int.from_bytes(reader.take(4), "little"))
    if opcode == _F64_CONST:
        return _Operand("f64", int.from_bytes(reader.take(8), "little"))
    if opcode == _VECTOR and reader.u32() == _V128_CONST:
        return _Operand("v128", int.from_bytes(reader.take(16), "little"))
    if opcode in _ARITHMETIC:
        return _COMPUTED
    if opcode == _REF_NULL:
        read_heap_type(reader)
        return _REFERENCE
    if opcode == _GC and (code := reader.u32()) in _GC_IMMEDIATES:
        for _ in range(_GC_IMMEDIATES[code]):
            reader.u32()
        return _REFERENCE
    raise NotUnderstood(f"a constant expression has the unknown operator 0x{opcode:02x}")


def _global(index: int, known: Sequence[Global]) -> _Operand:
    if index >= len(known):
        return _Operand(reason=f"is global {index}, which does not exist at this point")
    initializer, kind = known[index].initializer, known[index].type
    if initializer is None:
        return _Operand(reason=f"is global {index}, which is imported")
    if kind.mutable:
        return _Operand(reason=f"is global {index}, which is mutable")
    if initializer.value is None:
        return _Operand(reason=f"is global {index}, whose value is known only when it runs")
    if initializer.type != kind.value.name:
        return _INVALID
    return _Operand(initializer.type, initializer.value)


def encode_constant(kind: ValueType, value: int | None) -> bytes:
    """Return the constant expression, with its `end`, whose result has the bits `value`.

    Raises ValueError if the type has no such value: too many bits, a number for a reference, or
    None for a number.
    """
    if kind.is_reference:
        if value is not None or not kind.is_nullable:
            raise ValueError(
                f"a global of type {kind.name} can only be saved if it may be null and is"
            )
        heap_type = encode_heap_type(kind.name[len("(ref null ") : -1])
        return bytes([_REF_NULL]) + heap_type + bytes([_END])
    bits = _BITS[kind.name]
    if value is None or not 0 <= value < 1 << bits:
        raise ValueError(
            f"a global of type {kind.name} is saved as {bits} bits, and not as {value}"
        )
    if kind.name in _FIXED:
        return _FIXED[kind.name] + value.to_bytes(bits // 8, "little") + bytes([_END])
    opcode = _I32_CONST if bits == 32 else _I64_CONST
    signed = value - (value >> (bits - 1) << bits)
    return bytes([opcode]) + signed_leb128(signed) + bytes([_END])
