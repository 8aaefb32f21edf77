"""Types of the functions that a module exports, read from its type and function sections on demand."""

from __future__ import annotations

from dataclasses import dataclass

from memslot_plugin.wasm.binary import NotUnderstood, Reader
from memslot_plugin.wasm.module import ExternKind, Module, SectionId
from memslot_plugin.wasm.types import read_value_type

_PLAIN_FUNCTION = 0x60


@dataclass(frozen=True, slots=True)
class FunctionType:
    """Parameters and results of a function, each the name of a value type in the text format."""

    parameters: tuple[str, ...]
    results: tuple[str, ...]

    def __str__(self) -> str:
        results = f" -> {', '.join(self.results)}" if self.results else ""
        return f"({', '.join(self.parameters)}){results}"


def exported_functions(module: Module) -> dict[str, FunctionType | None]:
    """Return the type of each exported function by export name, in the module's order.

    The type is None if it stands behind a type that this reader does not understand.
    """
    types = _function_types(module)
    imported = [each.type for each in module.imports if each.kind is ExternKind.FUNCTION]
    type_indices = dict(enumerate([*imported, *_type_indices_of_defined(module)]))
    return {
        export.name: types.get(type_indices.get(export.index))
        for export in module.exports
        if export.kind is ExternKind.FUNCTION
    }


def _function_types(module: Module) -> dict[object, FunctionType]:
    """Return the function types by index, up to the first type that is not understood."""
    types: dict[object, FunctionType] = {}
    section = module.section(SectionId.TYPE)
    if section is None:
        return types
    reader = Reader(module.source, section.payload, section.end)
    try:
        for index in range(reader.u32()):
            if reader.byte() != _PLAIN_FUNCTION:
                break
            types[index] = FunctionType(_read_names(reader), _read_names(reader))
    except NotUnderstood:
        pass
    return types


def _read_names(reader: Reader) -> tuple[str, ...]:
    return tuple(read_value_type(reader).name for _ in range(reader.u32()))


def _type_indices_of_defined(module: Module) -> list[int]:
    section = module.section(SectionId.FUNCTION)
    if section is None:
        return []
    reader = Reader(module.source, section.payload, section.end)
    try:
        return [reader.u32() for _ in range(reader.u32())]
    except NotUnderstood:
        return []
