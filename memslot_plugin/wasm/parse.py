"""`parse`: read the declarations of a core module from its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from memslot_plugin.errors import InvalidModule
from memslot_plugin.wasm.binary import NotUnderstood, Reader
from memslot_plugin.wasm.expressions import read_expression
from memslot_plugin.wasm.module import (
    SECTION_ORDER,
    DataSegment,
    Export,
    ExternKind,
    Global,
    Import,
    ImportName,
    Memory,
    Module,
    Section,
    SectionId,
    Table,
)
from memslot_plugin.wasm.types import (
    GlobalType,
    MemoryType,
    TableType,
    read_global_type,
    read_memory_type,
    read_reference_type,
    read_table_limits,
)

MAGIC = b"\0asm"
HEADER = MAGIC + b"\x01\0\0\0"
_SECTION_NUMBERS = frozenset(SectionId)
_ALLOWED = "allowed is a core WebAssembly module in the binary format"


def parse(data: bytes) -> Module:
    """Read the declarations of a core module.

    Raises InvalidModule for bytes that are no core module or were cut off. Raises NotUnderstood, which
    the caller must catch, for a module with an unknown part. Code and data are neither walked nor
    copied; the result refers to `data`.
    """
    _check_header(data)
    return _Parser(data).run()


def read_sections(data: bytes) -> Iterator[Section]:
    """Yield the sections of a module one after the other; raises as `parse` does."""
    size = len(data)
    reader = Reader(data, len(HEADER), size)
    place = -1
    while reader.left:
        start = reader.position
        number = reader.byte()
        if number not in _SECTION_NUMBERS:
            raise NotUnderstood(f"the module has a section of the unknown kind {number}")
        section_id = SectionId(number)
        title = _title(section_id)
        if section_id is not SectionId.CUSTOM:
            if SECTION_ORDER[section_id] <= place:
                raise NotUnderstood(f"the {title} section stands twice or in the wrong order")
            place = SECTION_ORDER[section_id]
        try:
            length = reader.u32()
        except NotUnderstood as error:
            if reader.left:
                raise NotUnderstood(f"the size of the {title} section: {error.reason}") from None
            raise InvalidModule(
                f"the module is truncated: it ends at byte {size}, in the middle of the size of its"
                f" {title} section; {_ALLOWED}"
            ) from None
        if length > reader.left:
            raise InvalidModule(
                f"the module is truncated: its {title} section needs {length} bytes and"
                f" {reader.left} are left; {_ALLOWED}"
            )
        payload = reader.position
        reader.skip(length)
        yield Section(section_id, start, payload, reader.position)


def _check_header(data: bytes) -> None:
    if not data:
        raise InvalidModule(f"the module is empty (0 bytes); {_ALLOWED}")
    if data[:4] != MAGIC[: len(data)]:
        if data.lstrip()[:1] in (b"(", b";"):
            raise InvalidModule(
                f"the module looks like WebAssembly text; {_ALLOWED}, so assemble it first"
            )
        raise InvalidModule(
            f"the module starts with {data[:4].hex(' ')} and not with {MAGIC.hex(' ')}; {_ALLOWED}"
        )
    if len(data) < len(HEADER):
        raise InvalidModule(
            f"the module is truncated: {len(data)} bytes are given, its header alone has"
            f" {len(HEADER)}; {_ALLOWED}"
        )
    version, layer = (int.from_bytes(data[at : at + 2], "little") for at in (4, 6))
    if layer == 1:
        raise InvalidModule(
            f"a WebAssembly component was given; {_ALLOWED}, which a component may contain"
        )
    if data[4:8] != HEADER[4:]:
        raise InvalidModule(
            f"the module is of WebAssembly version {version}, layer {layer}; {_ALLOWED},"
            " version 1, layer 0"
        )


class _Parser:
    """The index spaces of a module while its sections are read.

    An expression may refer only to globals that are already in `globals`.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.sections: list[Section] = []
        self.custom_names: list[str] = []
        self.imports: list[Import] = []
        self.exports: list[Export] = []
        self.memories: list[Memory] = []
        self.tables: list[Table] = []
        self.globals: list[Global] = []
        self.data_segments: list[DataSegment] = []
        self.counts = dict.fromkeys(SectionId, 0)
        self.imported = dict.fromkeys(ExternKind, 0)
        self.data_count: int | None = None
        self.start: int | None = None

    def run(self) -> Module:
        readers: dict[SectionId, Callable[[Reader], None]] = {
            SectionId.CUSTOM: self.read_custom,
            SectionId.IMPORT: self.read_imports,
            SectionId.TABLE: self.read_tables,
            SectionId.MEMORY: self.read_memories,
            SectionId.GLOBAL: self.read_globals,
            SectionId.EXPORT: self.read_exports,
            SectionId.START: self.read_start,
            SectionId.DATA_COUNT: self.read_data_count,
            SectionId.DATA: self.read_data,
        }
        for section in read_sections(self.data):
            self.sections.append(section)
            reader = Reader(self.data, section.payload, section.end)
            try:
                if section.id in readers:
                    readers[section.id](reader)
                    if reader.left and section.id is not SectionId.CUSTOM:
                        raise NotUnderstood(f"{reader.left} bytes are left after its last entry")
                else:
                    self.counts[section.id] = reader.u32()
            except NotUnderstood as error:
                raise NotUnderstood(
                    f"the {_title(section.id)} section is not understood: {error.reason}"
                ) from None
        self.check_end()
        return Module(
            source=self.data,
            sections=tuple(self.sections),
            custom_names=tuple(self.custom_names),
            imports=tuple(self.imports),
            exports=tuple(self.exports),
            memories=tuple(self.memories),
            tables=tuple(self.tables),
            globals=tuple(self.globals),
            data_segments=tuple(self.data_segments),
            type_count=self.counts[SectionId.TYPE],
            function_count=self.imported[ExternKind.FUNCTION] + self.counts[SectionId.FUNCTION],
            imported_function_count=self.imported[ExternKind.FUNCTION],
            tag_count=self.imported[ExternKind.TAG] + self.counts[SectionId.TAG],
            element_segment_count=self.counts[SectionId.ELEMENT],
            data_count=self.data_count,
            start=self.start,
        )

    def check_end(self) -> None:
        """Raise InvalidModule if a later section that an earlier one announced is missing.

        The file was then cut between two sections.
        """
        present = {section.id for section in self.sections}
        functions = self.counts[SectionId.FUNCTION]
        if functions and SectionId.CODE not in present:
            raise InvalidModule(
                f"the module is truncated: it declares functions ({functions}) and has no"
                f" code section; {_ALLOWED}"
            )
        if self.data_count and SectionId.DATA not in present:
            raise InvalidModule(
                f"the module is truncated: it declares data segments ({self.data_count}) and"
                f" has no data section; {_ALLOWED}"
            )
        if self.data_count is not None and self.data_count != len(self.data_segments):
            raise NotUnderstood(
                f"the module declares {self.data_count} data segments and has"
                f" {len(self.data_segments)}"
            )

    def read_custom(self, reader: Reader) -> None:
        self.custom_names.append(reader.name())

    def read_imports(self, reader: Reader) -> None:
        for _ in range(reader.u32()):
            name = ImportName(reader.name(), reader.name())
            kind = _kind(reader)
            index = self.imported[kind]
            self.imported[kind] += 1
            imported: int | TableType | MemoryType | GlobalType
            if kind is ExternKind.TABLE:
                imported = read_table_limits(reader, read_reference_type(reader))
                self.tables.append(Table(index, imported, name))
            elif kind is ExternKind.MEMORY:
                imported = read_memory_type(reader)
                self.memories.append(Memory(index, imported, name))
            elif kind is ExternKind.GLOBAL:
                imported = read_global_type(reader)
                self.globals.append(Global(index, imported, name))
            else:
                if kind is ExternKind.TAG and (attribute := reader.byte()):
                    raise NotUnderstood(f"a tag has the unknown attribute {attribute}")
                imported = reader.u32()
            self.imports.append(Import(name, kind, index, imported))

    def read_tables(self, reader: Reader) -> None:
        for _ in range(reader.u32()):
            start = reader.position
            filled = reader.left > 1 and self.data[start] == 0x40
            if filled:
                reader.skip(1)
                if reserved := reader.byte():
                    raise NotUnderstood(f"a table has the unknown prefix 0x40 0x{reserved:02x}")
            element = read_reference_type(reader)
            head = reader.since(start)
            table_type = read_table_limits(reader, element)
            initializer = read_expression(reader, self.globals) if filled else None
            self.tables.append(Table(len(self.tables), table_type, None, initializer, head))

    def read_memories(self, reader: Reader) -> None:
        for _ in range(reader.u32()):
            self.memories.append(Memory(len(self.memories), read_memory_type(reader)))

    def read_globals(self, reader: Reader) -> None:
        for _ in range(reader.u32()):
            start = reader.position
            global_type = read_global_type(reader)
            head = reader.since(start)
            initializer = read_expression(reader, self.globals)
            self.globals.append(Global(len(self.globals), global_type, None, initializer, head))

    def read_exports(self, reader: Reader) -> None:
        for _ in range(reader.u32()):
            self.exports.append(Export(reader.name(), _kind(reader), reader.u32()))

    def read_start(self, reader: Reader) -> None:
        self.start = reader.u32()

    def read_data_count(self, reader: Reader) -> None:
        self.data_count = reader.u32()

    def read_data(self, reader: Reader) -> None:
        for index in range(reader.u32()):
            start = reader.position
            mode = reader.u32()
            if mode > 2:
                raise NotUnderstood(f"data segment {index} is of the unknown kind {mode}")
            memory = (None if mode == 1 else 0) if mode < 2 else reader.u32()
            offset = None
            if memory is not None:
                if memory >= len(self.memories):
                    raise NotUnderstood(
                        f"data segment {index} is for memory {memory} and the module has"
                        f" {len(self.memories)}"
                    )
                offset = read_expression(reader, self.globals)
            head = reader.since(start)
            data = reader.take(reader.u32())
            self.data_segments.append(DataSegment(index, memory, offset, head, data))


def _kind(reader: Reader) -> ExternKind:
    number = reader.byte()
    try:
        return ExternKind(number)
    except ValueError:
        raise NotUnderstood(f"an import or export has the unknown kind {number}") from None


def _title(section: SectionId) -> str:
    return section.name.lower().replace("_", " ")
