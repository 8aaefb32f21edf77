"""What the exported functions of a module take and return, and command-line words as such arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memslot_plugin.errors import ArgumentError
from memslot_plugin.wasm import ExternKind, Module, NotUnderstood, SectionId
from memslot_plugin.wasm.binary import Reader
from memslot_plugin.wasm.types import read_value_type

_FUNCTION_TYPE = 0x60


@dataclass(frozen=True, slots=True)
class Signature:
    """Parameters and results of a function, each the name of a value type."""

    parameters: tuple[str, ...]
    results: tuple[str, ...]

    def __str__(self) -> str:
        results = f" -> {', '.join(self.results)}" if self.results else ""
        return f"({', '.join(self.parameters)}){results}"


def exported_functions(module: Module) -> dict[str, Signature | None]:
    """The exported functions in the module's order; None where a type is not understood here."""
    types = _function_types(module)
    declared = [each.type for each in module.imports if each.kind is ExternKind.FUNCTION]
    declared += _declared_functions(module)
    found: dict[str, Signature | None] = {}
    for export in module.exports:
        if export.kind is ExternKind.FUNCTION:
            number = declared[export.index] if export.index < len(declared) else None
            known = isinstance(number, int) and number < len(types)
            found[export.name] = types[number] if known and isinstance(number, int) else None
    return found


def parse_arguments(
    name: str, signature: Signature | None, words: Sequence[str]
) -> list[int | float]:
    """The words as arguments of the function `name`; raises ArgumentError."""
    if signature is None:
        raise ArgumentError(
            f"the type of {name} is not understood here, so it cannot be called from the command line"
        )
    if len(words) != len(signature.parameters):
        raise ArgumentError(
            f"{name}{signature} takes {len(signature.parameters)} arguments and {len(words)} are given"
        )
    return [
        _parse(name, place, kind, word)
        for place, (kind, word) in enumerate(zip(signature.parameters, words, strict=True), start=1)
    ]


def _parse(name: str, place: int, kind: str, word: str) -> int | float:
    try:
        if kind in ("f32", "f64"):
            return float(word)
        if kind in ("i32", "i64"):
            bits = int(kind[1:])
            value = int(word, 0)
            if not -(1 << (bits - 1)) <= value < 1 << bits:
                raise ValueError
            return value - (1 << bits) if value >> (bits - 1) > 0 else value
    except ValueError:
        raise ArgumentError(
            f"argument {place} of {name} is an {kind}, which {word!r} is not"
        ) from None
    raise ArgumentError(
        f"argument {place} of {name} is of type {kind}, which the command line cannot write; call it from Python"
    )


def _function_types(module: Module) -> list[Signature]:
    """The types up to the first one that is not a plain function type."""
    section = module.section(SectionId.TYPE)
    if section is None:
        return []
    reader = Reader(module.source, section.payload, section.end)
    types: list[Signature] = []
    try:
        for _ in range(reader.u32()):
            if reader.byte() != _FUNCTION_TYPE:
                break
            parameters = tuple(read_value_type(reader).name for _ in range(reader.u32()))
            types.append(
                Signature(
                    parameters, tuple(read_value_type(reader).name for _ in range(reader.u32()))
                )
            )
    except NotUnderstood:
        pass
    return types


def _declared_functions(module: Module) -> list[int]:
    section = module.section(SectionId.FUNCTION)
    if section is None:
        return []
    reader = Reader(module.source, section.payload, section.end)
    try:
        return [reader.u32() for _ in range(reader.u32())]
    except NotUnderstood:
        return []
