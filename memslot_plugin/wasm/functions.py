"""Types of the functions that a module exports, read from its type and function sections on demand."""

from __future__ import annotations

from contextlib import suppress
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
    types: list[FunctionType] = []
    indices = [each.type for each in module.imports if each.kind is ExternKind.FUNCTION]
    with suppress(NotUnderstood):
        reader = _contents(module, SectionId.TYPE)
        for _ in range(reader.u32()):
            if reader.byte() != _PLAIN_FUNCTION:
                break
            types.append(FunctionType(_read_names(reader), _read_names(reader)))
    with suppress(NotUnderstood):
        reader = _contents(module, SectionId.FUNCTION)
        indices += [reader.u32() for _ in range(reader.u32())]
    type_of, index_of = dict[object, FunctionType](enumerate(types)), dict(enumerate(indices))
    return {
        export.name: type_of.get(index_of.get(export.index))
        for export in module.exports
        if export.kind is ExternKind.FUNCTION
    }


def _contents(module: Module, section_id: SectionId) -> Reader:
    section = module.section(section_id)
    if section is None:
        return Reader(b"\0", 0, 1)  # no entries
    return Reader(module.source, section.payload, section.end)


def _read_names(reader: Reader) -> tuple[str, ...]:
    return tuple(read_value_type(reader).name for _ in range(reader.u32()))
