"""Saved values: the bits of a global, and the constant expression that makes a new global hold them.

A value is a number of as many bits as its type has, whatever the type: an f32 is its 32 bits, so that
no payload of a NaN is lost, a v128 the little-endian number of its 16 bytes.  None is the null
reference; no other reference can be written down.
"""

from __future__ import annotations

from memslot_plugin.wasm.binary import signed_leb128
from memslot_plugin.wasm.expressions import Expression
from memslot_plugin.wasm.types import ValueType, encode_heap_type

_BITS = {"i32": 32, "i64": 64, "f32": 32, "f64": 64, "v128": 128}
_PREFIXES = {"f32": b"\x43", "f64": b"\x44", "v128": b"\xfd\x0c"}
_END = b"\x0b"


def encode_constant(held: ValueType, value: int | None) -> bytes:
    """The constant expression, with its `end`, that gives `value`.

    Raises ValueError where the type has no such value: too many bits, a number for a reference,
    null for something else.
    """
    if held.is_reference:
        if value is not None or not held.is_nullable:
            raise ValueError(
                f"a global of type {held.name} can only be saved if it may be null and is"
            )
        return b"\xd0" + encode_heap_type(held.name[len("(ref null ") : -1]) + _END
    bits = _BITS[held.name]
    if value is None or not 0 <= value < 1 << bits:
        raise ValueError(
            f"a global of type {held.name} is saved as {bits} bits, and not as {value}"
        )
    if held.name in _PREFIXES:
        return _PREFIXES[held.name] + value.to_bytes(bits // 8, "little") + _END
    signed = value - (value >> (bits - 1) << bits)
    return (b"\x41" if bits == 32 else b"\x42") + signed_leb128(signed) + _END


def constant_bits(held: ValueType, expression: Expression) -> int | None:
    """The bits that an expression gives a global of type `held`, or None where they are not known
    from the module alone, or are a reference.
    """
    if expression.type == held.name:
        return expression.value
    prefix = _PREFIXES.get(held.name)
    if prefix is None or not expression.encoded.startswith(prefix):
        return None
    value = expression.encoded[len(prefix) : -1]
    return int.from_bytes(value, "little") if len(value) * 8 == _BITS[held.name] else None
