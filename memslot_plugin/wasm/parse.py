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

HEADER = b"\0asm\x01\0\0\0"
_SECTION_NUMBERS = frozenset(SectionId)
_ALLOWED = "allowed is a core WebAssembly module in the binary format"


def parse(data: bytes) -> Module:
    """Read the declarations of a core module.

    Raises InvalidModule for bytes that do not begin as a core module. Raises NotUnderstood, which the
    caller must catch, for a module that was cut off or has an unknown part. Code and data are neither walked nor
    copied; the result refers to `data`.
    """
    _check_header(data)
    module = Module(data)
    for section in read_sections(data):
        module.sections.append(section)
        _read_section(section, module)
    if module.data_count not in (None, len(module.data_segments)):
        raise NotUnderstood(
            f"the module declares {module.data_count} data segments and has {len(module.data_segments)}"
        )
    return module


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
            payload = reader.position
            reader.skip(length)
        except NotUnderstood as error:
            raise NotUnderstood(f"the {title} section is cut off: {error.reason}") from None
        yield Section(section_id, start, payload, reader.position)


def _check_header(data: bytes) -> None:
    if data.startswith(HEADER):
        return
    if data.lstrip()[:1] in (b"(", b";"):
        raise InvalidModule(
            f"the module looks like WebAssembly text; {_ALLOWED}, so assemble it first"
        )
    if data.startswith(b"\0asm") and data[6:8] == b"\x01\0":
        raise InvalidModule(
            f"a WebAssembly component was given; {_ALLOWED}, which a component may contain"
        )
    raise InvalidModule(
        f"the module starts with {data[:8].hex(' ') or 'nothing'} and not with {HEADER.hex(' ')};"
        f" {_ALLOWED}"
    )


# The sections; each reader knows the index spaces of all sections in front of its own.


def _read_section(section: Section, module: Module) -> None:
    reader = Reader(module.source, section.payload, section.end)
    try:
        if section.id is SectionId.CUSTOM:
            reader.name()
        elif section.id is SectionId.FUNCTION:
            module.function_count += reader.u32()
        elif section.id is SectionId.ELEMENT:
            module.element_segment_count = reader.u32()
        elif section.id not in _READERS:
            reader.u32()  # the number of its entries
        else:
            _READERS[section.id](reader, module)
            if reader.left:
                raise NotUnderstood(f"{reader.left} bytes are left after its last entry")
    except NotUnderstood as error:
        raise NotUnderstood(
            f"the {_title(section.id)} section is not understood: {error.reason}"
        ) from None


def _read_imports(reader: Reader, module: Module) -> None:
    for _ in range(reader.u32()):
        name = ImportName(reader.name(), reader.name())
        kind = _kind(reader)
        imported: int | TableType | MemoryType | GlobalType
        if kind is ExternKind.TABLE:
            imported = read_table_limits(reader, read_reference_type(reader))
            module.tables.append(Table(len(module.tables), imported, name))
        elif kind is ExternKind.MEMORY:
            imported = read_memory_type(reader)
            module.memories.append(Memory(len(module.memories), imported, name))
        elif kind is ExternKind.GLOBAL:
            imported = read_global_type(reader)
            module.globals.append(Global(len(module.globals), imported, name))
        else:
            if kind is ExternKind.TAG and (attribute := reader.byte()):
                raise NotUnderstood(f"a tag has the unknown attribute {attribute}")
            imported = reader.u32()
            module.imported_function_count += kind is ExternKind.FUNCTION
            module.function_count = module.imported_function_count
        module.imports.append(Import(name, kind, imported))


def _read_tables(reader: Reader, module: Module) -> None:
    for _ in range(reader.u32()):
        start = reader.position
        filled = reader.left > 1 and module.source[start] == 0x40
        if filled:
            reader.skip(1)
            if reserved := reader.byte():
                raise NotUnderstood(f"a table has the unknown prefix 0x40 0x{reserved:02x}")
        element = read_reference_type(reader)
        head = reader.since(start)
        table_type = read_table_limits(reader, element)
        initializer = read_expression(reader, module.globals) if filled else None
        module.tables.append(Table(len(module.tables), table_type, None, initializer, head))


def _read_memories(reader: Reader, module: Module) -> None:
    for _ in range(reader.u32()):
        module.memories.append(Memory(len(module.memories), read_memory_type(reader)))


def _read_globals(reader: Reader, module: Module) -> None:
    for _ in range(reader.u32()):
        start = reader.position
        global_type = read_global_type(reader)
        head = reader.since(start)
        initializer = read_expression(reader, module.globals)
        module.globals.append(Global(len(module.globals), global_type, None, initializer, head))


def _read_exports(reader: Reader, module: Module) -> None:
    for _ in range(reader.u32()):
        module.exports.append(Export(reader.name(), _kind(reader), reader.u32()))


def _read_start(reader: Reader, module: Module) -> None:
    module.start = reader.u32()


def _read_data_count(reader: Reader, module: Module) -> None:
    module.data_count = reader.u32()


def _read_data(reader: Reader, module: Module) -> None:
    for index in range(reader.u32()):
        start = reader.position
        mode = reader.u32()
        if mode > 2:
            raise NotUnderstood(f"data segment {index} is of the unknown kind {mode}")
        memory = (None if mode == 1 else 0) if mode < 2 else reader.u32()
        offset = None
        if memory is not None:
            if memory >= len(module.memories):
                raise NotUnderstood(
                    f"data segment {index} is for memory {memory} and the module has"
                    f" {len(module.memories)}"
                )
            offset = read_expression(reader, module.globals)
        head = reader.since(start)
        data = reader.take(reader.u32())
        module.data_segments.append(DataSegment(index, memory, offset, head, data))


_READERS: dict[SectionId, Callable[[Reader, Module], None]] = {
    SectionId.IMPORT: _read_imports,
    SectionId.TABLE: _read_tables,
    SectionId.MEMORY: _read_memories,
    SectionId.GLOBAL: _read_globals,
    SectionId.EXPORT: _read_exports,
    SectionId.START: _read_start,
    SectionId.DATA_COUNT: _read_data_count,
    SectionId.DATA: _read_data,
}


def _kind(reader: Reader) -> ExternKind:
    number = reader.byte()
    try:
        return ExternKind(number)
    except ValueError:
        raise NotUnderstood(f"an import or export has the unknown kind {number}") from None


def _title(section: SectionId) -> str:
    return section.name.lower().replace("_", " ")
