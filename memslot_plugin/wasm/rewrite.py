"""`rewrite`: a module without the contents that an image provides, and with state exported.

A rewriting is a set of new section contents. `_assemble` puts them in the place of the old sections
and copies all other bytes, among them code, custom sections and sizes in unusual encodings.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from memslot_plugin.wasm.binary import Reader, encode_name, unsigned_leb128
from memslot_plugin.wasm.expressions import encode_constant
from memslot_plugin.wasm.module import (
    SECTION_ORDER,
    DataSegment,
    ExternKind,
    Global,
    ImportName,
    Memory,
    Module,
    SectionId,
    Table,
)
from memslot_plugin.wasm.types import MemoryType, TableType

_Item = TypeVar("_Item", Memory, Table, Global)

_EMPTY = b"\x00"


def rewrite(
    module: Module,
    *,
    emptied: Collection[int] = (),
    named_segments: int | None = None,
    import_memory: ImportName | None = None,
    memory_types: Mapping[int, MemoryType] | None = None,
    table_types: Mapping[int, TableType] | None = None,
    exports: Mapping[int, str] | None = None,
    initial_values: Mapping[int, int | None] | None = None,
    drop_start: bool = False,
) -> bytes:
    """Return the bytes of `module` with all of these changes. No index that code uses shifts.

    - `emptied`: active data segments that lose their data and keep their index and memory. A constant
      offset stays as it is encoded, so a runtime that refuses its encoding or type still refuses it.
      Another offset becomes 0.
    - `named_segments`: the number of leading data segments that code may name, None for all. Emptied
      segments behind them are left out, because a runtime visits each segment for each instance. A
      segment that a runtime could refuse stays.
    - `import_memory`: the import that replaces the single defined memory.
    - `memory_types`, `table_types`: new types of defined memories and tables, by index. Only limits
      differ from the old type, and the minimum of a memory does not shrink.
    - `exports`: additional exports of globals, by index; `state_exports` finds free names.
    - `initial_values`: first values of mutable globals, by index, as `encode_constant` takes them.
    - `drop_start`: no function runs at instantiation.

    Returns `module.source` itself if nothing changes. Raises ValueError for a change that the module
    cannot have, such as that of an item that does not exist.
    """
    contents: dict[SectionId, bytes | None] = {}  # None drops the section
    shrunk = _segments_to_empty(module, emptied)
    left_out = _segments_to_leave_out(module, emptied, named_segments)
    if shrunk or left_out:
        contents[SectionId.DATA] = _data(module, shrunk, left_out)
        if left_out and module.section(SectionId.DATA_COUNT) is not None:
            count = len(module.data_segments) - len(left_out)
            contents[SectionId.DATA_COUNT] = unsigned_leb128(count)
    memories = _memory_types(module, memory_types or {})
    if import_memory is not None:
        contents[SectionId.IMPORT] = _imports(module, import_memory, memories)
        contents[SectionId.MEMORY] = None
    elif memories != [each.type for each in module.memories]:
        defined = [memories[each.index].encode() for each in _defined(module.memories)]
        contents[SectionId.MEMORY] = _vector(defined)
    if table_types:
        contents[SectionId.TABLE] = _tables(module, table_types)
    if exports:
        contents[SectionId.EXPORT] = _exports(module, exports)
    if initial_values:
        contents[SectionId.GLOBAL] = _globals(module, initial_values)
        if displaced := _displaced(module, initial_values):
            contents[SectionId.ELEMENT] = _elements(module, displaced)
    if drop_start and module.start is not None:
        contents[SectionId.START] = None
    return _assemble(module, contents) if contents else module.source


def state_exports(module: Module, globals_: Iterable[int]) -> dict[int, str]:
    """Return free export names for globals, by index, such as "memslot:global:3".

    If the module has an export "memslot", or one that begins with "memslot:", the names begin with "memslot1:".
    """
    free = free_name({each.name.partition(":")[0] for each in module.exports})
    return {index: f"{free}:global:{index}" for index in globals_}


def free_name(taken: Collection[str]) -> str:
    """Return "memslot", or "memslot1" and so on if that is taken."""
    names = itertools.chain(["memslot"], (f"memslot{n}" for n in itertools.count(1)))
    return next(name for name in names if name not in taken)


# Data segments


def _segments_to_empty(module: Module, emptied: Collection[int]) -> frozenset[int]:
    """Return the `emptied` segments that emptying changes."""
    for index in emptied:
        if not 0 <= index < len(module.data_segments):
            raise ValueError(f"data segment {index} does not exist")
        if module.data_segments[index].memory is None:
            raise ValueError(f"data segment {index} is passive and cannot be emptied")
    return frozenset(
        index
        for index in emptied
        if module.data_segments[index].data or not _is_constant(module.data_segments[index])
    )


def _is_constant(segment: DataSegment) -> bool:
    return segment.offset is not None and segment.offset.value is not None


def _segments_to_leave_out(
    module: Module, emptied: Collection[int], named: int | None
) -> frozenset[int]:
    if named is None:
        return frozenset()
    return frozenset(
        index
        for index in emptied
        if index >= named and _is_accepted(module, module.data_segments[index])
    )


def _is_accepted(module: Module, segment: DataSegment) -> bool:
    """Return True if no runtime with an instance of the module refuses this segment.

    Every runtime accepts the encoding of WebAssembly 1.0: memory 0 unnamed, one constant as offset. An
    offset that is not constant has been evaluated before the instance exists.
    """
    if segment.offset is None or segment.offset.value is None:
        return True
    assert segment.memory is not None
    wide, code = module.memories[segment.memory].type.memory64, segment.offset.encoded
    return (segment.head[0] == 0) == (segment.memory == 0) and code[0] == (0x42 if wide else 0x41)


def _data(module: Module, emptied: frozenset[int], left_out: frozenset[int]) -> bytes:
    """Return the data section with some segments empty and some left out."""
    parts: list[bytes | memoryview] = [unsigned_leb128(len(module.data_segments) - len(left_out))]
    for segment in module.data_segments:
        if segment.index in left_out:
            continue
        if segment.index not in emptied:
            parts += segment.head, unsigned_leb128(len(segment.data)), segment.data
        elif _is_constant(segment):
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


# Memories, tables and globals


def _defined(items: Sequence[_Item]) -> list[_Item]:
    return [each for each in items if each.imported is None]


def _require_defined(
    what: str, items: Sequence[Memory | Table | Global], indices: Iterable[int]
) -> None:
    for index in indices:
        if not 0 <= index < len(items) or items[index].imported is not None:
            raise ValueError(f"{what} {index} is not one that the module defines")


def _vector(entries: Sequence[bytes]) -> bytes:
    return unsigned_leb128(len(entries)) + b"".join(entries)


def _memory_types(module: Module, changed: Mapping[int, MemoryType]) -> list[MemoryType]:
    _require_defined("memory", module.memories, changed)
    types = [each.type for each in module.memories]
    for index, new in changed.items():
        least, most = types[index].minimum_pages, new.maximum_pages
        if new.minimum_pages < least or (most is not None and new.minimum_pages > most):
            raise ValueError(
                f"memory {index} cannot have a minimum of {new.minimum_pages} pages: allowed are"
                f" {least} to {'any number' if most is None else most}"
            )
        types[index] = new
    return types


def _imports(module: Module, name: ImportName, memories: list[MemoryType]) -> bytes:
    """Return the import section with the memory as its last entry, which shifts no index."""
    if [each.imported for each in module.memories] != [None]:
        raise ValueError("only the single memory of a module, defined there, can become an import")
    entry = encode_name(name.module) + encode_name(name.name) + bytes([ExternKind.MEMORY])
    return _appended(module, SectionId.IMPORT, len(module.imports), [entry + memories[0].encode()])


def _tables(module: Module, changed: Mapping[int, TableType]) -> bytes:
    _require_defined("table", module.tables, changed)
    return _vector(
        [
            each.head
            + changed.get(each.index, each.type).encode_limits()
            + (b"" if each.initializer is None else each.initializer.encoded)
            for each in _defined(module.tables)
        ]
    )


def _globals(module: Module, values: Mapping[int, int | None]) -> bytes:
    _require_defined("global", module.globals, values)
    entries = []
    for each in _defined(module.globals):
        assert each.initializer is not None
        initial = each.initializer.encoded
        if each.index in values:
            if not each.type.mutable:
                raise ValueError(
                    f"global {each.index} is immutable: others may be computed from it"
                )
            initial = encode_constant(each.type.value, values[each.index])
        entries.append(each.head + initial)
    return _vector(entries)


def _displaced(module: Module, values: Mapping[int, int | None]) -> list[int]:
    """Return the functions that replaced initial values referred to."""
    initializers = (module.globals[index].initializer for index in values)
    return sorted({function for each in initializers if each for function in each.functions})


def _elements(module: Module, functions: list[int]) -> bytes:
    """Return the element section with a declarative segment for `functions` at its end.

    The segment does nothing at run time, but without it `ref.func` of these functions in code would be
    invalid (WebAssembly 3.0, section 3.4.1: the refs of a context come from outside of code).
    """
    declared = b"\x03\x00" + _vector([unsigned_leb128(function) for function in functions])
    return _appended(module, SectionId.ELEMENT, module.element_segment_count, [declared])


# Exports, and the module as a whole


def _exports(module: Module, names: Mapping[int, str]) -> bytes:
    """Return the export section with exports of globals at its end."""
    taken = {export.name for export in module.exports}
    entries = []
    for index, name in names.items():
        if name in taken:
            raise ValueError(f'the name "{name}" is exported already')
        if not 0 <= index < len(module.globals):
            raise ValueError(f"global {index} does not exist")
        taken.add(name)
        entries.append(encode_name(name) + bytes([ExternKind.GLOBAL]) + unsigned_leb128(index))
    return _appended(module, SectionId.EXPORT, len(module.exports), entries)


def _appended(module: Module, section_id: SectionId, count: int, added: list[bytes]) -> bytes:
    """Return a section of `count` entries, which are copied as encoded, with more at its end."""
    entries = b""
    section = module.section(section_id)
    if section is not None:
        reader = Reader(module.source, section.payload, section.end)
        reader.u32()
        entries = bytes(reader.take(reader.left))
    return unsigned_leb128(count + len(added)) + entries + b"".join(added)


def _assemble(module: Module, contents: Mapping[SectionId, bytes | None]) -> bytes:
    """Return the module with new `contents` of some sections.

    None drops a section. A section that the module lacks goes to its place in SECTION_ORDER.
    """
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
