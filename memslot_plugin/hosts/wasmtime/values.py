"""Values between Python and wasmtime: signatures, and the calls in both directions that keep them.

Arguments and results travel as 16 bytes each, so a signature is two `struct` formats.  Integers come back signed, as
wasmtime-py gives them; arguments may be signed or unsigned.  v128 is 16 bytes, little-endian.  References
go the way of wasmtime-py.
"""

from __future__ import annotations

import ctypes
import operator
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memslot_plugin.errors import ArgumentError, shown
from memslot_plugin.hosts.wasmtime.bridge import HostFunction, wasmtime, wasmtime_ffi

I32, I64, F32, F64, V128, EXTERNREF, FUNCREF, OTHER = range(8)
"""Kinds of values; the first five as wasmtime numbers them."""

KIND_NAMES = (
    "i32",
    "i64",
    "f32",
    "f64",
    "v128",
    "externref",
    "funcref",
    "a reference that wasmtime-py does not know",
)

_FORMATS = ("i12x", "q8x", "f12x", "d8x", "16s")
_REFERENCE = 5
"""wasmtime_valtype_kind_t of all references."""
_HEAP_KINDS = {0: EXTERNREF, 2: FUNCREF}
"""wasmtime_heaptype_kind_t: those that wasmtime-py can pass."""

_VAL_KINDS = {
    EXTERNREF: wasmtime_ffi.WASMTIME_EXTERNREF.value,
    FUNCREF: wasmtime_ffi.WASMTIME_FUNCREF.value,
}
"""wasmtime_valkind_t of the references that wasmtime-py can pass."""

PACKING = (struct.error, OverflowError, TypeError)
"""What `struct` raises for a value that does not fit as it is."""


def kind_of(value_type: wasmtime.ValType) -> int:
    """The kind of a type.  wasmtime-py's own comparison of types ends the process for v128 and most references."""
    found = wasmtime_ffi.wasmtime_valtype_t()
    wasmtime_ffi.wasmtime_valtype_new(value_type.ptr(), ctypes.byref(found))
    try:
        kind = int(found.kind)
        if kind != _REFERENCE:
            return kind if kind < _REFERENCE else OTHER
        if not found.reftype.nullable:
            return OTHER
        return _HEAP_KINDS.get(int(found.reftype.heaptype.kind), OTHER)
    finally:
        wasmtime_ffi.wasmtime_valtype_delete(ctypes.byref(found))


@dataclass(frozen=True, slots=True)
class Signature:
    """The kinds of a function's parameters and results, and how they are laid out."""

    parameters: tuple[int, ...]
    results: tuple[int, ...]
    pack_into: Callable[..., None]
    unpack_parameters: Callable[..., tuple[Any, ...]]
    pack_results: Callable[..., None]
    unpack_from: Callable[..., tuple[Any, ...]]

    @classmethod
    def of(cls, function_type: wasmtime.FuncType) -> Signature:
        """The signature of a function type of wasmtime-py's."""
        parameters = tuple(kind_of(each) for each in function_type.params)
        results = tuple(kind_of(each) for each in function_type.results)
        taking, giving = (
            struct.Struct("<" + "".join(_FORMATS[kind] for kind in kinds if kind <= V128))
            for kinds in (parameters, results)
        )
        return cls(
            parameters,
            results,
            taking.pack_into,
            taking.unpack_from,
            giving.pack_into,
            giving.unpack_from,
        )

    @property
    def count(self) -> int:
        """How many values a call needs room for."""
        return max(len(self.parameters), len(self.results))

    @property
    def direct(self) -> bool:
        """Whether calls need nobody but the bridge."""
        return max((*self.parameters, *self.results), default=0) <= V128

    @property
    def packs_as_given(self) -> bool:
        """Whether `struct` finds every wrong argument (it cuts and pads bytes)."""
        return V128 not in self.parameters

    def __str__(self) -> str:
        return f"({_named(self.parameters)}) -> ({_named(self.results)})"


def _named(kinds: Sequence[int]) -> str:
    return ", ".join(KIND_NAMES[kind] for kind in kinds)


def fitted(
    kinds: Sequence[int], values: Sequence[Any], what: str, home: int | None = None
) -> list[Any]:
    """`values` as `struct` takes them for `kinds`, and wasmtime-py the references among them.

    Functions have to be of the store `home`, where that is given.  Raises ArgumentError with `what`,
    which names where they come from.
    """
    if len(values) != len(kinds):
        raise ArgumentError(
            f"{what} ({_named(kinds)}): {len(kinds)} values are wanted and {len(values)} were given"
        )
    return [
        _fitted(kind, value, what, place, home)
        for place, (kind, value) in enumerate(zip(kinds, values, strict=True), 1)
    ]


def _fitted(kind: int, value: Any, what: str, place: int, home: int | None) -> Any:
    if kind <= I64:
        bits = 32 if kind == I32 else 64
        try:
            number = operator.index(value)
        except TypeError:
            raise ArgumentError(
                f"{what}: value {place} is an {KIND_NAMES[kind]}, and {value!r} is no integer"
            ) from None
        if not -(1 << bits - 1) <= number < 1 << bits:
            raise ArgumentError(
                f"{what}: value {place} is an {KIND_NAMES[kind]}, and {shown(number)} is not in"
                f" -2**{bits - 1} to 2**{bits} - 1"
            )
        return number - (1 << bits) if number >> (bits - 1) == 1 else number
    if kind <= F64:
        if not isinstance(value, (int, float)):
            raise ArgumentError(
                f"{what}: value {place} is an {KIND_NAMES[kind]}, and {value!r} is no number"
            )
        try:
            real = float(value)
        except OverflowError:
            raise ArgumentError(
                f"{what}: value {place} is an {KIND_NAMES[kind]}, and the integer is too large"
            ) from None
        return ctypes.c_float(real).value if kind == F32 else real
    if kind == V128:
        if not isinstance(value, (bytes, bytearray, memoryview)) or len(bytes(value)) != 16:
            raise ArgumentError(
                f"{what}: value {place} is a v128, which is 16 bytes, and not {value!r}"
            )
        return bytes(value)
    if isinstance(value, wasmtime.Val):
        given = getattr(value._kind, "value", value._kind)  # wasmtime-py keeps either
        if given != _VAL_KINDS[kind]:
            raise ArgumentError(
                f"{what}: value {place} is of the type {KIND_NAMES[kind]}, and a wasmtime.Val of another"
                " kind was given"
            )
        value = value.value
    if kind == EXTERNREF:
        return wasmtime.Val.externref(value)
    if value is None:
        return value
    if not isinstance(value, wasmtime.Func):
        raise ArgumentError(
            f"{what}: value {place} is a funcref, and {value!r} is no wasmtime.Func and not None"
        )
    if home is not None and value._func.store_id != home:
        raise ArgumentError(
            f"{what}: value {place} is a function of another store than the instance's; give one that"
            " this instance, or another one in its store, handed out since its last reset"
        )
    return value


def checked_result(signature: Signature, result: Any, what: str) -> Any:
    """The result of a host function with references, as wasmtime-py takes it; raises ArgumentError."""
    kinds = signature.results
    if len(kinds) == 1:
        return fitted(kinds, [result], what)[0]
    if not kinds and result is not None:
        raise ArgumentError(f"{what}: nothing is wanted and {result!r} was given")
    return fitted(kinds, _several(kinds, result, what), what) if kinds else None


def _several(kinds: Sequence[int], result: Any, what: str) -> Sequence[Any]:
    if not isinstance(result, Sequence):
        raise ArgumentError(
            f"{what}: a sequence of {len(kinds)} values is wanted and {result!r} was given"
        )
    return result


def host_function(signature: Signature, function: Callable[..., Any], what: str) -> HostFunction:
    """`function` over a buffer of values.

    Its result is checked against the signature, and ArgumentError says what is wrong.
    """
    unpack, pack = signature.unpack_parameters, signature.pack_results
    results = signature.results
    returned = f"what {what} returned"

    def nothing(values: Any) -> None:
        result = function(*unpack(values))
        if result is not None:
            raise ArgumentError(f"{returned}: nothing is wanted and {result!r} was given")

    def one(values: Any) -> None:
        result = function(*unpack(values))
        try:
            pack(values, 0, result)
        except PACKING:
            pack(values, 0, *fitted(results, [result], returned))

    def checked(values: Any) -> None:
        result = function(*unpack(values))
        result = [result] if len(results) == 1 else _several(results, result, returned)
        pack(values, 0, *fitted(results, result, returned))

    if not results:
        return nothing
    return one if results != (V128,) and len(results) == 1 else checked
