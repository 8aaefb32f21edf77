"""Values between Python and wasmtime: signatures, and calls in both directions.

An argument or result is 16 bytes, so a signature is two `struct` formats.  Integers come back signed, as from
wasmtime-py; arguments may be signed or unsigned.  v128 is 16 bytes, little-endian.  wasmtime-py passes references.
"""

from __future__ import annotations

import ctypes
import operator
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from memslot_plugin._core import Export, ffi
from memslot_plugin.errors import ArgumentError, shown
from memslot_plugin.hosts.wasmtime.bridge import KEPT, HostFunction, wasmtime, wasmtime_ffi

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
NUMBERS = tuple(struct.Struct("<" + each) for each in _FORMATS)
"""The layout of a single value, by kind."""

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
"""The exceptions of `struct` for a value that does not fit as it is."""


def kind_of(value_type: wasmtime.ValType) -> int:
    """Return the kind of a type."""
    # Not by wasmtime-py's comparison of types, which ends the process for v128 and most references.
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


class Name:
    """An export's name.  The C half reads it for as long as the object lives."""

    __slots__ = ("length", "text", "utf8")

    def __init__(self, text: str) -> None:
        encoded = text.encode()
        self.text = text
        self.utf8 = ffi.new("char[]", encoded)
        self.length = len(encoded)


def _layout(kinds: Iterable[int]) -> struct.Struct:
    return struct.Struct("<" + "".join(_FORMATS[kind] for kind in kinds if kind <= V128))


@dataclass(frozen=True, slots=True)
class Signature:
    """The kinds of a function's parameters and results, and their layout."""

    parameters: tuple[int, ...]
    results: tuple[int, ...]
    taking: struct.Struct
    giving: struct.Struct

    @classmethod
    def of(cls, function_type: wasmtime.FuncType) -> Signature:
        """Return the signature of a function type of wasmtime-py's."""
        parameters = tuple(kind_of(each) for each in function_type.params)
        results = tuple(kind_of(each) for each in function_type.results)
        return cls(parameters, results, _layout(parameters), _layout(results))

    @property
    def direct(self) -> bool:
        """True if the bridge can pass every value; else wasmtime-py makes the call."""
        return max((*self.parameters, *self.results), default=0) <= V128

    def __str__(self) -> str:
        return f"({_named(self.parameters)}) -> ({_named(self.results)})"


def _named(kinds: Sequence[int]) -> str:
    return ", ".join(KIND_NAMES[kind] for kind in kinds)


def fitted(
    kinds: Sequence[int], values: Sequence[Any], what: str, home: int | None = None
) -> list[Any]:
    """Return `values` as `struct` takes them for `kinds`, and references as wasmtime-py takes them.

    Functions have to be of the store `home`, unless that is None.  Raises ArgumentError, which begins with `what`.
    """
    if len(values) != len(kinds):
        raise ArgumentError(
            f"{what} ({_named(kinds)}): {len(kinds)} values are wanted and {len(values)} were given"
        )
    fitted = []
    for place, (kind, value) in enumerate(zip(kinds, values, strict=True), 1):
        try:
            fitted.append(_fitted(kind, value, home))
        except _Misfit as error:
            raise ArgumentError(f"{what}: value {place} is {error}") from None
    return fitted


class _Misfit(Exception):
    """A value that does not fit, and why, to follow the words "value 1 is"."""


def _fitted(kind: int, value: Any, home: int | None) -> Any:
    name = KIND_NAMES[kind]
    if kind <= I64:
        bits = 32 if kind == I32 else 64
        try:
            number = operator.index(value)
        except TypeError:
            raise _Misfit(f"an {name}, and {value!r} is no integer") from None
        if not -(1 << bits - 1) <= number < 1 << bits:
            limits = f"-2**{bits - 1} to 2**{bits} - 1"
            raise _Misfit(f"an {name}, and {shown(number)} is not in {limits}")
        return number - (1 << bits) if number >> (bits - 1) == 1 else number
    if kind <= F64:
        if not isinstance(value, (int, float)):
            raise _Misfit(f"an {name}, and {value!r} is no number")
        try:
            return ctypes.c_float(value).value if kind == F32 else float(value)
        except OverflowError:
            raise _Misfit(f"an {name}, and the integer is too large") from None
    if kind == V128:
        if not isinstance(value, (bytes, bytearray, memoryview)) or len(bytes(value)) != 16:
            raise _Misfit(f"a v128, which is 16 bytes, and not {value!r}")
        return bytes(value)
    return _fitted_reference(kind, value, home)


def _fitted_reference(kind: int, value: Any, home: int | None) -> Any:
    if isinstance(value, wasmtime.Val):
        given = getattr(value._kind, "value", value._kind)  # wasmtime-py keeps either
        if given != _VAL_KINDS[kind]:
            raise _Misfit(
                f"of the type {KIND_NAMES[kind]}, and a wasmtime.Val of another kind was given"
            )
        value = value.value
    if kind == EXTERNREF:
        return wasmtime.Val.externref(value)
    if value is None:
        return value
    if not isinstance(value, wasmtime.Func):
        raise _Misfit(f"a funcref, and {value!r} is no wasmtime.Func and not None")
    # wasmtime ends the process if it meets a function of another store.
    if home is not None and value._func.store_id != home:
        raise _Misfit(
            "a function of another store than the instance's; give one that this instance, or another one in its"
            " store, handed out since its last reset"
        )
    return value


def bare(value: Any) -> Any:
    """Return a value of wasmtime-py's as a caller of memslot gets it."""
    return value.value if isinstance(value, wasmtime.Val) else value


# -- calls of exported functions -----------------------------------------------------------------

Maker = Callable[[Any], Callable[..., Any]]
"""Makes an exported function of one live instance, to be called with the generation of a handle and the arguments."""


def direct_call(label: Name, signature: Signature, what: str) -> Maker:
    """Return the maker of a call of numbers, which is one call into C."""
    parameters = signature.parameters
    return Export(
        label.text.encode(),
        bytes(parameters),
        bytes(signature.results),
        lambda arguments: fitted(parameters, arguments, what),
        KEPT,
    ).bind


def indirect_call(label: Name, signature: Signature, what: str) -> Maker:
    """Return the maker of a call with references, which wasmtime-py makes."""

    def make(live: Any) -> Callable[..., Any]:
        def call(generation: int, *arguments: Any) -> Any:
            taken = fitted(signature.parameters, arguments, what, int(live.cell.instance[0]))
            return live.entered(
                generation, lambda: live.native_export(label.text)(live.store(), *taken)
            )

        return call

    return make


# -- host functions ------------------------------------------------------------------------------


def checked_results(kinds: Sequence[int], result: Any, what: str) -> list[Any]:
    """Return the results of a host function, as `fitted` does; raises ArgumentError."""
    if not kinds and result is not None:
        raise ArgumentError(f"{what}: nothing is wanted and {result!r} was given")
    if len(kinds) <= 1:
        return fitted(kinds, [result] if kinds else [], what)
    if not isinstance(result, Sequence):
        raise ArgumentError(
            f"{what}: a sequence of {len(kinds)} values is wanted and {result!r} was given"
        )
    return fitted(kinds, result, what)


def host_function(signature: Signature, function: Callable[..., Any], what: str) -> HostFunction:
    """Return `function` over a buffer of values; it raises ArgumentError if its result is not of the signature."""
    unpack, pack = signature.taking.unpack_from, signature.giving.pack_into
    results = signature.results
    returned = f"what {what} returned"

    def one(values: Any) -> None:
        result = function(*unpack(values))
        try:
            pack(values, 0, result)
        except PACKING:
            pack(values, 0, *checked_results(results, result, returned))

    def checked(values: Any) -> None:
        result = function(*unpack(values))
        if results or result is not None:
            pack(values, 0, *checked_results(results, result, returned))

    return one if len(results) == 1 and results != (V128,) else checked
