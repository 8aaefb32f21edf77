"""The declarations of a core module: its sections, imports, exports, memories, tables, globals and data.

Types, function bodies and element segments are only counted. So the time to read a module depends on
the number of its declarations, not on the size of its code.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from memslot_plugin.errors import printable
from memslot_plugin.wasm.types import GlobalType, MemoryType, TableType


class SectionId(enum.IntEnum):
    """The sections of a core module, by the number in front of each."""

    CUSTOM = 0
    TYPE = 1
    IMPORT = 2
    FUNCTION = 3
    TABLE = 4
    MEMORY = 5
    GLOBAL = 6
    EXPORT = 7
    START = 8
    ELEMENT = 9
    CODE = 10
    DATA = 11
    DATA_COUNT = 12
    TAG = 13


SECTION_ORDER: Final = {
    SectionId(number): place
    for place, number in enumerate((1, 2, 3, 4, 5, 13, 6, 7, 8, 9, 12, 10, 11))
}
"""The place of each section in a module. Custom sections may stand anywhere."""


class ExternKind(enum.IntEnum):
    """The kind of an import or an export."""

    FUNCTION = 0
    TABLE = 1
    MEMORY = 2
    GLOBAL = 3
    TAG = 4


class ImportName(NamedTuple):
    """The module name and the field name of an import."""

    module: str
    name: str

    def __str__(self) -> str:
        return printable(f"{self.module}.{self.name}")


@dataclass(frozen=True, slots=True)
class Section:
    """One section: the bytes `[start, end)` of the module, with its contents from `payload` on."""

    id: SectionId
    start: int
    payload: int
    end: int


@dataclass(frozen=True, slots=True)
class Import:
    """An import; `type` is a type index for functions and tags."""

    name: ImportName
    kind: ExternKind
    type: int | TableType | MemoryType | GlobalType


@dataclass(frozen=True, slots=True)
class Export:
    """An export of item `index` of its kind, imported items counted first."""

    name: str
    kind: ExternKind
    index: int


@dataclass(frozen=True, slots=True)
class Expression:
    """One constant expression: its bytes with the final `end`, and its value.

    `value` is the unsigned number whose bits a value of this `type` has. It is None for a reference and
    if only instantiation knows it; `reason` then completes "the offset ...". `functions` are the indices
    of functions that the expression refers to.
    """

    encoded: bytes
    type: str | None = None
    value: int | None = None
    reason: str | None = None
    functions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Memory:
    """A linear memory; `imported` is None if the module defines it."""

    index: int
    type: MemoryType
    imported: ImportName | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table; `imported` is None if the module defines it.

    `initializer` is the first value of each element, or None for null. `head` is the encoded entry of
    a defined table up to its limits.
    """

    index: int
    type: TableType
    imported: ImportName | None = None
    initializer: Expression | None = None
    head: bytes = b""


@dataclass(frozen=True, slots=True)
class Global:
    """A global; `imported` is None, and `initializer` is not None, if the module defines it.

    `head` is the encoded type of a defined global.
    """

    index: int
    type: GlobalType
    imported: ImportName | None = None
    initializer: Expression | None = None
    head: bytes = b""


@dataclass(frozen=True, slots=True)
class DataSegment:
    """A data segment; a passive one has neither memory nor offset.

    `head` is the encoded segment up to the length of its data.
    """

    index: int
    memory: int | None
    offset: Expression | None
    head: bytes
    data: memoryview


@dataclass(slots=True, eq=False)
class Module:
    """A core module as `parse` read it, and unchanged since; every index space counts imports first.

    `function_count` includes the `imported_function_count` imported functions. `data_count` is the number
    in the data count section, and None without that section.
    """

    source: bytes
    sections: list[Section] = field(default_factory=list)
    imports: list[Import] = field(default_factory=list)
    exports: list[Export] = field(default_factory=list)
    memories: list[Memory] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    globals: list[Global] = field(default_factory=list)
    data_segments: list[DataSegment] = field(default_factory=list)
    function_count: int = 0
    imported_function_count: int = 0
    element_segment_count: int = 0
    data_count: int | None = None
    start: int | None = None

    def section(self, section_id: SectionId) -> Section | None:
        """Return the section with this number, or None. Do not ask for CUSTOM, which may occur often."""
        return next((each for each in self.sections if each.id is section_id), None)
