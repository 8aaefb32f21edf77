"""What a core module declares: its sections, and what stands in those that matter here.

Types, function bodies and element segments are counted and otherwise stepped over as one piece, so
that the time to read a module depends on what it declares and not on how much code it holds.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final, NamedTuple

from memslot_plugin.errors import printable
from memslot_plugin.wasm.expressions import Expression
from memslot_plugin.wasm.types import GlobalType, MemoryType, TableType


class SectionId(enum.IntEnum):
    """The sections of a core module by the number that announces them."""

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
    section: place
    for place, section in enumerate(
        (
            SectionId.TYPE,
            SectionId.IMPORT,
            SectionId.FUNCTION,
            SectionId.TABLE,
            SectionId.MEMORY,
            SectionId.TAG,
            SectionId.GLOBAL,
            SectionId.EXPORT,
            SectionId.START,
            SectionId.ELEMENT,
            SectionId.DATA_COUNT,
            SectionId.CODE,
            SectionId.DATA,
        )
    )
}
"""In which order sections follow each other; custom sections may stand anywhere."""


class ExternKind(enum.IntEnum):
    """What an import or an export is."""

    FUNCTION = 0
    TABLE = 1
    MEMORY = 2
    GLOBAL = 3
    TAG = 4


class ImportName(NamedTuple):
    """The two names under which an import is looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return printable(f"{self.module}.{self.name}")


@dataclass(frozen=True, slots=True)
class Section:
    """One section: `[start, end)` of the file, its contents from `payload` on."""

    id: SectionId
    start: int
    payload: int
    end: int


@dataclass(frozen=True, slots=True)
class Import:
    """An import; `index` counts within its kind, `type` is a type index for functions and tags."""

    name: ImportName
    kind: ExternKind
    index: int
    type: int | TableType | MemoryType | GlobalType


@dataclass(frozen=True, slots=True)
class Export:
    """An export: the `index`-th thing of its kind, imported ones counted first."""

    name: str
    kind: ExternKind
    index: int


@dataclass(frozen=True, slots=True)
class Memory:
    """A linear memory; `imported` is None for one that the module defines."""

    index: int
    type: MemoryType
    imported: ImportName | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table; `initializer` is what a defined one is filled with, None where it is null."""

    index: int
    type: TableType
    imported: ImportName | None = None
    initializer: Expression | None = None


@dataclass(frozen=True, slots=True)
class Global:
    """A global; `initializer` is None for imported ones, and for them only."""

    index: int
    type: GlobalType
    imported: ImportName | None = None
    initializer: Expression | None = None


@dataclass(frozen=True, slots=True)
class DataSegment:
    """A data segment; a passive one has neither memory nor offset.

    `head` are its bytes in the file up to the length of its data.
    """

    index: int
    memory: int | None
    offset: Expression | None
    head: bytes
    data: memoryview

    @property
    def active(self) -> bool:
        """Whether instantiation copies it into a memory."""
        return self.memory is not None


@dataclass(frozen=True, slots=True)
class Module:
    """A core module as `parse` read it; every index space counts imported things first."""

    source: bytes
    sections: tuple[Section, ...]
    custom_names: tuple[str, ...]
    imports: tuple[Import, ...]
    exports: tuple[Export, ...]
    memories: tuple[Memory, ...]
    tables: tuple[Table, ...]
    globals: tuple[Global, ...]
    data_segments: tuple[DataSegment, ...]
    type_count: int
    function_count: int
    tag_count: int
    element_segment_count: int
    data_count: int | None
    start: int | None

    def section(self, section_id: SectionId) -> Section | None:
        """The section of that number, which can exist once at most; custom ones cannot be asked for."""
        return next((each for each in self.sections if each.id is section_id), None)
