"""Saved values of globals as constant expressions.

A saved value is the unsigned number whose bits the global has, for every type. So an f32 is 32 bits
and keeps the payload of a NaN; a v128 is the little-endian number of its 16 bytes. None is the null
reference. Other references cannot be saved.
"""

from __future__ import annotations

from memslot_plugin.wasm.binary import signed_leb128
from memslot_plugin.wasm.types import ValueType, encode_heap_type

_BITS = {"i32": 32, "i64": 64, "f32": 32, "f64": 64, "v128": 128}
_PREFIXES = {"f32": b"\x43", "f64": b"\x44", "v128": b"\xfd\x0c"}
_END = b"\x0b"


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
        return b"\xd0" + encode_heap_type(kind.name[len("(ref null ") : -1]) + _END
    bits = _BITS[kind.name]
    if value is None or not 0 <= value < 1 << bits:
        raise ValueError(
            f"a global of type {kind.name} is saved as {bits} bits, and not as {value}"
        )
    if kind.name in _PREFIXES:
        return _PREFIXES[kind.name] + value.to_bytes(bits // 8, "little") + _END
    signed = value - (value >> (bits - 1) << bits)
    return (b"\x41" if bits == 32 else b"\x42") + signed_leb128(signed) + _END
