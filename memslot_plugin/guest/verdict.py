"""The verdict about a module: the state that a reset in place restores, and the state that it would miss.

A reset in place restores the bytes of memories and the values of globals. The verdict allows it only if
nothing else can have changed, so that the instance behaves as a new one does. Code that is not
understood counts as changing everything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from memslot_plugin import wasm
from memslot_plugin.errors import printable
from memslot_plugin.guest.analysis import CodeReport, Instruction, Occurrence
from memslot_plugin.wasm import ExternKind

_TABLES = "the elements of a table cannot be put back"
_SEGMENTS = "a segment that was dropped does not come back"
_UNSEEN = "whether its segment is still there cannot be seen from outside"
_OBJECTS = "an object that the instance keeps cannot be put back"
IRREVERSIBLE = {
    Instruction.TABLE_SET: _TABLES,
    Instruction.TABLE_GROW: "a table cannot shrink",
    Instruction.TABLE_FILL: _TABLES,
    Instruction.TABLE_COPY: _TABLES,
    Instruction.TABLE_INIT: _TABLES,
    Instruction.ELEM_DROP: _SEGMENTS,
    Instruction.DATA_DROP: _SEGMENTS,
    Instruction.MEMORY_INIT: _UNSEEN,
    Instruction.STRUCT_SET: _OBJECTS,
    Instruction.ARRAY_SET: _OBJECTS,
    Instruction.ARRAY_FILL: _OBJECTS,
    Instruction.ARRAY_COPY: _OBJECTS,
    Instruction.ARRAY_INIT_DATA: _OBJECTS,
    Instruction.ARRAY_INIT_ELEM: _OBJECTS,
}
"""Instructions that rule out a reset in place wherever the code has one, and the reason."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The kind of reset after which an instance behaves as a new one does.

    - `in_place`: true if restoring memories and globals is enough. Otherwise a reset makes a new
      instance, because of `reasons`.
    - `conditions`: events while running after which a reset in place is not enough.
    - `foreign`: state that belongs to the embedder and that no reset touches.

    All but the first are sentences.
    """

    in_place: bool
    reasons: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()


def changing_globals(module: wasm.Module, report: CodeReport) -> tuple[int, ...]:
    """Return the defined globals whose value may change.

    These are the mutable ones that code assigns to or that the embedder can reach. If the code was
    not understood, all mutable ones count.
    """
    reached = {export.index for export in module.exports if export.kind is ExternKind.GLOBAL}
    reached.update(report.globals_set)
    return tuple(
        each.index
        for each in module.globals
        if each.type.mutable
        and each.imported is None
        and (each.index in reached or report.not_understood is not None)
    )


def judge(module: wasm.Module, report: CodeReport, *, start_dropped: bool = False) -> Verdict:
    """Return the verdict about an instance of `module`, as far as its code and declarations decide it.

    `start_dropped` is true if the start function does not run, because its effect is saved. The caller
    adds the reasons that come from memories without an image.
    """
    names = _export_names(module)
    reasons = [
        *_code_reasons(report, names),
        *_global_reasons(module, changing_globals(module, report), names),
        *_instantiation_reasons(module, start_dropped=start_dropped),
    ]
    return Verdict(
        in_place=not reasons,
        reasons=tuple(reasons),
        conditions=tuple(_conditions(module, report, names)),
        foreign=tuple(
            f"The {kind} that is imported as {imported} belongs to the embedder and stays as it is at"
            " every kind of reset."
            for kind, imported in _imported_state(module)
        ),
    )


_Names = Mapping[tuple[ExternKind, int], str]


def uncaptured_state(
    module: wasm.Module, report: CodeReport, *, native_exposed: bool
) -> str | None:
    """Return a sentence about state of an instance that no snapshot captures, or None.

    A snapshot captures memories and globals. `native_exposed` is true if the embedder has the
    runtime's own objects, and so may have changed everything that the module exports.
    """
    names = _export_names(module)
    if report.not_understood is not None:
        return next(_code_reasons(report, names))
    for instruction, why in IRREVERSIBLE.items():
        found = report.occurrence(instruction)
        if found is not None and why not in (_SEGMENTS, _UNSEEN):
            return (
                f"The code has {_place(found, names)}, and what that changes cannot be saved; use the guest"
                " without a snapshot."
            )
    for kind, dropped, used in (
        ("Data", report.data_dropped, report.data_used),
        ("Element", report.elements_dropped, report.elements_used),
    ):
        both = sorted(set(dropped) & set(used))
        if both:
            return (
                f"{kind} segment {both[0]} may have been dropped, and code still uses it; a new"
                " instance would have it again; use the guest without a snapshot."
            )
    for table, name in _exported_tables(module, names):
        if native_exposed:
            return (
                f"Table {table} is exported as {name}, and the embedder may have changed it through the"
                " runtime's own objects; take the snapshot before."
            )
    for kind, imported in _imported_state(module):
        return (
            f"The {kind} that is imported as {imported} is not the guest's own, and no snapshot holds"
            " its contents; let the module define it, or use the guest without a snapshot."
        )
    return None


def _export_names(module: wasm.Module) -> _Names:
    """Return the quoted export names of every exported item."""
    names: dict[tuple[ExternKind, int], list[str]] = defaultdict(list)
    for export in module.exports:
        names[export.kind, export.index].append(f'"{printable(export.name)}"')
    return {key: " and ".join(found) for key, found in names.items()}


def _imported_state(module: wasm.Module) -> Iterator[tuple[str, wasm.ImportName]]:
    """Yield kind and name of each import that has state: memories, tables and mutable globals."""
    mutable = [each for each in module.globals if each.type.mutable]
    kinds: Iterable[tuple[str, Iterable[wasm.Memory | wasm.Table | wasm.Global]]] = (
        ("memory", module.memories),
        ("table", module.tables),
        ("mutable global", mutable),
    )
    for kind, items in kinds:
        for item in items:
            if item.imported is not None:
                yield kind, item.imported


def _exported_tables(module: wasm.Module, names: _Names) -> Iterator[tuple[int, str]]:
    for table in module.tables:
        name = names.get((ExternKind.TABLE, table.index))
        if name is not None and table.imported is None:
            yield table.index, name


def _code_reasons(report: CodeReport, names: _Names) -> Iterator[str]:
    if report.not_understood is not None:
        yield (
            "What the code does cannot be proven:"
            f" {report.not_understood[0].lower()}{report.not_understood[1:]}"
        )
    for instruction, why in IRREVERSIBLE.items():
        found = report.occurrence(instruction)
        if found is not None:
            yield f"The code has {_place(found, names)}; {why}."


def _place(found: Occurrence, names: _Names) -> str:
    """Return the place of the first occurrence as a disassembly shows it."""
    name = names.get((ExternKind.FUNCTION, found.first_function))
    function = f"function {found.first_function}" + (f" (exported as {name})" if name else "")
    where = f"{found.instruction} in {function}, at byte 0x{found.first_offset:x}"
    if found.count == 1:
        return where
    others = f", and {found.count - 1} more"
    return where + others + (f" in {found.functions} functions" if found.functions > 1 else "")


def _global_reasons(module: wasm.Module, changing: tuple[int, ...], names: _Names) -> Iterator[str]:
    for index in changing:
        held = module.globals[index].type.value
        if held.is_reference:
            name = names.get((ExternKind.GLOBAL, index))
            how = f"is exported as {name}" if name else "is assigned to"
            yield (
                f"Global {index} holds references, {held.name}, and {how}; a reference cannot be"
                " saved."
            )


def _instantiation_reasons(module: wasm.Module, *, start_dropped: bool) -> Iterator[str]:
    """Yield the effects of instantiation that a reset in place does not repeat."""
    if module.start is not None and not start_dropped:
        yield (
            f"Function {module.start} starts each new instance and does not run at a reset in place;"
            " a snapshot taken after it needs it no more."
        )
    written = {segment.memory for segment in module.data_segments if segment.data}
    for memory in module.memories:
        if memory.imported is not None and memory.index in written:
            yield (
                f"Each new instance copies data into the memory that is imported as"
                f" {memory.imported}; let the module define its memory."
            )
    for table in module.tables if module.element_segment_count else ():
        if table.imported is not None:
            yield (
                "Each new instance may put its functions into the table that is imported as"
                f" {table.imported}; let the module define its table."
            )


def _conditions(module: wasm.Module, report: CodeReport, names: _Names) -> Iterator[str]:
    grow = report.occurrence(Instruction.MEMORY_GROW)
    if grow is not None:
        yield (
            f"The code has {_place(grow, names)}; after a growth only a new instance has the right"
            " size."
        )
    for table, name in _exported_tables(module, names):
        yield (
            f"Table {table} is exported as {name}; after the embedder was given the runtime's own"
            " objects, only a new instance surely has the first elements."
        )
