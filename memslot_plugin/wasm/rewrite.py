"""`rewrite`: the same module, except for what an image, and not the runtime, provides.

A rewriting is a set of new section contents.  `_assemble` puts them in the place of the old ones and
copies every other byte, so whatever is not rewritten (code, custom sections and where they stand,
sizes written in an unusual way) is the same afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from memslot_plugin.wasm.binary import NotUnderstood, Reader, encode_name, unsigned_leb128
from memslot_plugin.wasm.constants import encode_constant
from memslot_plugin.wasm.expressions import read_expression
from memslot_plugin.wasm.module import (
    SECTION_ORDER,
    DataSegment,
    Export,
    ExternKind,
    ImportName,
    Memory,
    Module,
    SectionId,
    Table,
)
from memslot_plugin.wasm.types import read_global_type, read_reference_type, read_table_type

_EMPTY = b"\x00"


def rewrite(
    module: Module,
    *,
    emptied: Collection[int] = (),
    named_segments: int | None = None,
    import_memory: ImportName | None = None,
    minimums: Mapping[int, int] | None = None,
    most_bytes: int | None = None,
    most_elements: int | None = None,
    exports: Collection[Export] = (),
    initial_values: Mapping[int, int | None] | None = None,
    drop_start: bool = False,
) -> bytes:
    """The bytes of `module` with all of these changes, none of which shifts an index that code uses.

    - `emptied`: active data segments that keep their index, memory and place and lose their data.
      An offset that is constant stays as it was written, so that a runtime which refuses such an
      expression, or its type, still does; any other offset becomes 0.
    - `named_segments`: how many of the first data segments code may name, None for all.  What is
      emptied after those is left out, because a runtime visits each segment for each instance;
      except where the offset is more than one constant, which a runtime could refuse.
    - `import_memory`: the single defined memory is imported under this name instead.
    - `minimums`: a larger minimum, in pages, for defined memories by index.
    - `most_bytes`, `most_elements`: no defined memory, or table, declares a larger maximum, or none.
      A minimum stays.
    - `exports`: exported after the module's own; `state_exports` finds names that are free.
    - `initial_values`: what mutable globals start with, by index, as `encode_constant` takes it.
    - `drop_start`: no function runs at instantiation.

    Nothing to do gives `module.source` itself.  Raises `NotUnderstood` if `import_memory` is asked
    of a module with another number of memories or an imported one, and ValueError for what no
    module could mean: a segment that is passive or missing, a minimum that shrinks or passes the
    maximum, a memory that is missing or imported, an export of nothing or of a name that is taken,
    a value for a global that is imported, immutable or of another type.
    """
    contents: dict[SectionId, bytes | None] = {}
    shrunk = _segments_to_empty(module, emptied)
    left_out = _segments_to_leave_out(module, emptied, named_segments)
    if shrunk or left_out:
        contents[SectionId.DATA] = _data(module, shrunk, left_out)
        if left_out and module.section(SectionId.DATA_COUNT) is not None:
            count = len(module.data_segments) - len(left_out)
            contents[SectionId.DATA_COUNT] = unsigned_leb128(count)
    memories = _raised(module, minimums or {})
    if most_bytes is not None:
        memories = tuple(_lowered(memory, most_bytes) for memory in memories)
    if most_elements is not None and any(_may_pass(each, most_elements) for each in module.tables):
        contents[SectionId.TABLE] = _tables(module, most_elements)
    if import_memory is not None:
        contents[SectionId.IMPORT] = _imports(module, import_memory, memories)
        contents[SectionId.MEMORY] = None
    elif memories != module.memories:
        contents[SectionId.MEMORY] = _memories(memories)
    if exports:
        contents[SectionId.EXPORT] = _exports(module, exports)
    if initial_values:
        contents[SectionId.GLOBAL] = _globals(module, initial_values)
        if displaced := _displaced(module, initial_values):
            contents[SectionId.ELEMENT] = _elements(module, displaced)
    if drop_start and module.start is not None:
        contents[SectionId.START] = None
    return _assemble(module, contents) if contents else module.source


def state_exports(
    module: Module, *, globals_: Iterable[int] = (), tables: Iterable[int] = ()
) -> tuple[Export, ...]:
    """Exports of globals and tables under names like "memslot:global:3", none of which the module
    uses: where it has an export that begins so, the names begin with "memslot1:", and so on.
    """
    begins = itertools.chain(["memslot:"], (f"memslot{n}:" for n in itertools.count(1)))
    taken = {each.name.partition(":")[0] + ":" for each in module.exports if ":" in each.name}
    begin = next(begin for begin in begins if begin not in taken)
    return (
        *(Export(f"{begin}global:{index}", ExternKind.GLOBAL, index) for index in globals_),
        *(Export(f"{begin}table:{index}", ExternKind.TABLE, index) for index in tables),
    )


def _segments_to_empty(module: Module, emptied: Collection[int]) -> frozenset[int]:
    """Those of the `emptied` segments that are not what they should become already."""
    for index in emptied:
        if not 0 <= index < len(module.data_segments):
            raise ValueError(f"data segment {index} does not exist")
        if not module.data_segments[index].active:
            raise ValueError(f"data segment {index} is passive and cannot be emptied")
    return frozenset(
        index
        for index in emptied
        if module.data_segments[index].data or not _constant(module.data_segments[index])
    )


def _constant(segment: DataSegment) -> bool:
    return segment.offset is not None and segment.offset.value is not None


def _segments_to_leave_out(
    module: Module, emptied: Collection[int], named: int | None
) -> frozenset[int]:
    if named is None:
        return frozenset()
    return frozenset(
        index
        for index in emptied
        if index >= named and _nobody_refuses(module, module.data_segments[index])
    )


def _nobody_refuses(module: Module, segment: DataSegment) -> bool:
    """Whether the segment is written as WebAssembly 1.0 has it, or its offset is not constant, so that
    a runtime that has an instance has evaluated it already.
    """
    if segment.offset is None or segment.offset.value is None:
        return True
    assert segment.memory is not None
    wide, code = module.memories[segment.memory].type.memory64, segment.offset.encoded
    return (
        (segment.head[0] == 0) == (segment.memory == 0)
        and code[0] == (0x42 if wide else 0x41)
        and all(byte & 0x80 for byte in code[1:-2])  # one number, and then the end
        and not code[-2] & 0x80
    )


def _data(module: Module, emptied: frozenset[int], left_out: frozenset[int]) -> bytes:
    """The data section with some segments empty and some left out."""
    parts: list[bytes | memoryview] = [unsigned_leb128(len(module.data_segments) - len(left_out))]
    for segment in module.data_segments:
        if segment.index in left_out:
            continue
        if segment.index not in emptied:
            parts += segment.head, unsigned_leb128(len(segment.data)), segment.data
        elif _constant(segment):
            parts += segment.head, _EMPTY
        else:
            parts += _head_at_zero(module, segment), _EMPTY
    return b"".join(parts)


def _head_at_zero(module: Module, segment: DataSegment) -> bytes:
    assert segment.memory is not None
    const = b"\x42\x00\x0b" if module.memories[segment.memory].type.memory64 else b"\x41\x00\x0b"
    if segment.memory == 0:
        return b"\x00" + const
    return b"\x02" + unsigned_leb128(segment.memory) + const


def _raised(module: Module, minimums: Mapping[int, int]) -> tuple[Memory, ...]:
    """The module's memories with larger minimums."""
    memories = list(module.memories)
    for index, pages in minimums.items():
        if not 0 <= index < len(memories) or memories[index].imported is not None:
            raise ValueError(f"memory {index} is not one that the module defines")
        old = memories[index].type
        largest = old.maximum_pages
        if pages < old.minimum_pages or (largest is not None and pages > largest):
            raise ValueError(
                f"memory {index} cannot have a minimum of {pages} pages: allowed are"
                f" {old.minimum_pages} to {'any number' if largest is None else largest}"
            )
        memories[index] = Memory(index, replace(old, minimum_pages=pages))
    return tuple(memories)


def _lowered(memory: Memory, most: int) -> Memory:
    """The memory with a maximum of at most so many bytes, if it is the module's own."""
    pages = max(most // memory.type.page_size, memory.type.minimum_pages)
    declared = memory.type.maximum_pages
    if memory.imported is not None or (declared is not None and declared <= pages):
        return memory
    return replace(memory, type=replace(memory.type, maximum_pages=pages))


def _may_pass(table: Table, most: int) -> bool:
    return table.imported is None and (table.type.maximum is None or table.type.maximum > most)


def _tables(module: Module, most: int) -> bytes:
    """The table section with maximums of at most so many elements."""
    section = module.section(SectionId.TABLE)
    assert section is not None
    reader = Reader(module.source, section.payload, section.end)
    parts = [unsigned_leb128(reader.u32())]
    for table in module.tables:
        if table.imported is not None:
            continue
        start = reader.position
        if table.initializer is not None:
            reader.skip(2)
        read_reference_type(reader)
        parts.append(reader.since(start))
        reader.position = start + (2 if table.initializer is not None else 0)
        read_table_type(reader)
        kind = table.type
        if _may_pass(table, most):
            kind = replace(kind, maximum=max(most, kind.minimum))
        parts.append(kind.encode_limits())
        if table.initializer is not None:
            parts.append(table.initializer.encoded)
            reader.skip(len(table.initializer.encoded))
    return b"".join(parts)


def _memories(memories: tuple[Memory, ...]) -> bytes:
    """The memory section."""
    defined = [memory.type.encode() for memory in memories if memory.imported is None]
    return unsigned_leb128(len(defined)) + b"".join(defined)


def _imports(module: Module, name: ImportName, memories: tuple[Memory, ...]) -> bytes:
    """The import section with the memory as its last entry, where it shifts no index."""
    if len(memories) != 1:
        raise NotUnderstood(
            f"the module has {len(memories)} memories and only a single one can become an import"
        )
    if memories[0].imported is not None:
        raise NotUnderstood(f"the memory is already an import, {memories[0].imported}")
    entry = (
        encode_name(name.module)
        + encode_name(name.name)
        + bytes([ExternKind.MEMORY])
        + memories[0].type.encode()
    )
    return unsigned_leb128(len(module.imports) + 1) + _entries(module, SectionId.IMPORT) + entry


def _exports(module: Module, added: Collection[Export]) -> bytes:
    """The export section with more entries at its end."""
    counts = {
        ExternKind.FUNCTION: module.function_count,
        ExternKind.TABLE: len(module.tables),
        ExternKind.MEMORY: len(module.memories),
        ExternKind.GLOBAL: len(module.globals),
        ExternKind.TAG: module.tag_count,
    }
    taken = {export.name for export in module.exports}
    entries = bytearray()
    for export in added:
        if export.name in taken:
            raise ValueError(f'the name "{export.name}" is exported already')
        if not 0 <= export.index < counts[export.kind]:
            raise ValueError(f"{export.kind.name.lower()} {export.index} does not exist")
        taken.add(export.name)
        entries += encode_name(export.name) + bytes([export.kind]) + unsigned_leb128(export.index)
    return (
        unsigned_leb128(len(module.exports) + len(added))
        + _entries(module, SectionId.EXPORT)
        + entries
    )


def _globals(module: Module, values: Mapping[int, int | None]) -> bytes:
    """The global section with some initial values replaced, all other bytes as they were."""
    for index in values:
        if not 0 <= index < len(module.globals) or module.globals[index].imported is not None:
            raise ValueError(f"global {index} is not one that the module defines")
        if not module.globals[index].type.mutable:
            raise ValueError(f"global {index} is immutable: others may be computed from it")
    section = module.section(SectionId.GLOBAL)
    assert section is not None
    reader = Reader(module.source, section.payload, section.end)
    parts = [unsigned_leb128(reader.u32())]
    for defined in module.globals:
        if defined.imported is not None:
            continue
        start = reader.position
        read_global_type(reader)
        head = reader.since(start)
        read_expression(reader, ())
        if defined.index in values:
            parts += head, encode_constant(defined.type.value, values[defined.index])
        else:
            parts.append(reader.since(start))
    return b"".join(parts)


def _displaced(module: Module, values: Mapping[int, int | None]) -> list[int]:
    """Functions that a replaced initial value referred to."""
    initializers = (module.globals[index].initializer for index in values)
    return sorted({function for each in initializers if each for function in each.functions})


def _elements(module: Module, functions: list[int]) -> bytes:
    """The element section with a declarative segment at its end, which does nothing: code may
    contain `ref.func` of functions only that something outside of code refers to (WebAssembly 3.0,
    section 3.4.1, the context's refs).
    """
    declared = b"\x03\x00" + unsigned_leb128(len(functions))
    declared += b"".join(map(unsigned_leb128, functions))
    entries = _entries(module, SectionId.ELEMENT)
    return unsigned_leb128(module.element_segment_count + 1) + entries + declared


def _entries(module: Module, section_id: SectionId) -> bytes:
    """What follows the count in a section, as it was encoded; nothing where there is none."""
    section = module.section(section_id)
    if section is None:
        return b""
    reader = Reader(module.source, section.payload, section.end)
    reader.u32()
    return bytes(reader.take(reader.left))


def _assemble(module: Module, contents: Mapping[SectionId, bytes | None]) -> bytes:
    """The module with new `contents` for some sections; None drops one, a new one finds its place."""
    view = memoryview(module.source)
    missing = set(contents) - {section.id for section in module.sections}
    pending = sorted(missing, key=SECTION_ORDER.__getitem__)
    parts: list[bytes | memoryview] = []
    copied = 0

    def put(section_id: SectionId) -> None:
        payload = contents[section_id]
        if payload is not None:
            parts.extend((bytes([section_id]), unsigned_leb128(len(payload)), payload))

    for section in module.sections:
        if section.id is SectionId.CUSTOM:
            continue
        while pending and SECTION_ORDER[pending[0]] < SECTION_ORDER[section.id]:
            parts.append(view[copied : section.start])
            copied = section.start
            put(pending.pop(0))
        if section.id in contents:
            parts.append(view[copied : section.start])
            put(section.id)
            copied = section.end
    parts.append(view[copied:])
    for section_id in pending:
        put(section_id)
    return b"".join(parts)
