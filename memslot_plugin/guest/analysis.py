"""What the code of a module may do to its own state, and whether a reset in place can undo all of it.

The core walks every instruction; here its findings become a report and a verdict.  A reset in place
restores the bytes of memories and the values of globals.  The verdict is yes only where nothing
else can have changed, so that nobody can tell the instance from a new one; what is not understood
counts as changed.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from memslot_plugin import wasm
from memslot_plugin._core import ffi, lib
from memslot_plugin.errors import printable
from memslot_plugin.wasm import ExternKind, SectionId


class Instruction(str, enum.Enum):
    """The instructions that are looked for, in the order of the core's `enum ms_code_kind`."""

    TABLE_SET = "table.set"
    TABLE_GROW = "table.grow"
    TABLE_FILL = "table.fill"
    TABLE_COPY = "table.copy"
    TABLE_INIT = "table.init"
    ELEM_DROP = "elem.drop"
    DATA_DROP = "data.drop"
    MEMORY_INIT = "memory.init"
    STRUCT_SET = "struct.set"
    ARRAY_SET = "array.set"
    ARRAY_FILL = "array.fill"
    ARRAY_COPY = "array.copy"
    ARRAY_INIT_DATA = "array.init_data"
    ARRAY_INIT_ELEM = "array.init_elem"
    MEMORY_GROW = "memory.grow"
    GLOBAL_SET = "global.set"
    ATOMIC_WAIT = "memory.atomic.wait"
    ATOMIC_NOTIFY = "memory.atomic.notify"

    __str__ = str.__str__


_TABLES = "the elements of a table cannot be put back"
_SEGMENTS = "a segment that was dropped does not come back"
_UNSEEN = "whether its segment is still there cannot be seen from outside"
_OBJECTS = "an object that the instance keeps cannot be put back"
_IRREVERSIBLE = {
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
"""What one occurrence of these anywhere in the code costs: the reset in place."""


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One kind of instruction in the code: how often, in how many functions, and the first of them.

    `first_function` is an index that counts imported functions; `first_offset` counts bytes from
    the beginning of the module.
    """

    instruction: str
    count: int
    functions: int
    first_function: int
    first_offset: int


@dataclass(frozen=True, slots=True)
class Site:
    """One instruction that was looked for."""

    instruction: str
    function: int
    offset: int


@dataclass(frozen=True, slots=True)
class CodeReport:
    """What the instructions of a module do, as far as they were understood.

    With `not_understood`, a sentence, everything else is what was found up to there.  The tuples are
    indices, ascending: globals that code assigns to, memories that it grows, tables that it changes
    in any way, segments that it reads from and segments that it drops.
    """

    bodies: int
    instructions: int
    not_understood: str | None
    occurrences: tuple[Occurrence, ...]
    globals_set: tuple[int, ...]
    memories_grown: tuple[int, ...]
    tables_changed: tuple[int, ...]
    data_used: tuple[int, ...]
    data_dropped: tuple[int, ...]
    elements_used: tuple[int, ...]
    elements_dropped: tuple[int, ...]

    @property
    def named_segments(self) -> int | None:
        """How many of the first data segments the code may name; None where it was not understood."""
        if self.not_understood is not None:
            return None
        return max((*self.data_used, *self.data_dropped), default=-1) + 1

    def occurrence(self, instruction: str) -> Occurrence | None:
        """All of this kind, or None where the code has none."""
        return next((each for each in self.occurrences if each.instruction == instruction), None)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an instance can be reset so that it behaves as a new one does.

    - `in_place`: restoring memories and globals is enough; otherwise a new instance is needed,
      because of `reasons`.
    - `conditions`: what must be watched while running, for `in_place` to hold.
    - `foreign`: state that belongs to the embedder and that no kind of reset touches.
    - `vector_globals`: globals of type v128 that have to be restored, which not every host can do.

    All but the last are sentences.
    """

    in_place: bool
    reasons: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    vector_globals: tuple[int, ...] = ()


# The walk


def analyse(module: wasm.Module) -> CodeReport:
    """Walk every instruction of the module; costs about 3 ms per megabyte of code."""
    marks = _Marks(module)
    report = marks.walk()
    found = zip(Instruction, report.found, strict=True)
    return CodeReport(
        bodies=report.bodies,
        instructions=report.instructions,
        not_understood=_fault(module, report),
        occurrences=tuple(
            Occurrence(
                kind.value, all_.count, all_.functions, all_.first_function, all_.first_offset
            )
            for kind, all_ in found
            if all_.count
        ),
        globals_set=marks.having("globals", lib.MS_CODE_CHANGED),
        memories_grown=marks.having("memories", lib.MS_CODE_CHANGED),
        tables_changed=marks.having("tables", lib.MS_CODE_CHANGED),
        data_used=marks.having("data", lib.MS_CODE_USED),
        data_dropped=marks.having("data", lib.MS_CODE_CHANGED),
        elements_used=marks.having("elements", lib.MS_CODE_USED),
        elements_dropped=marks.having("elements", lib.MS_CODE_CHANGED),
    )


def find_sites(
    module: wasm.Module, instructions: Collection[str] = tuple(_IRREVERSIBLE)
) -> tuple[Site, ...]:
    """Each single instruction of these kinds, in the order of the code; by default those that cost a
    module the reset in place.
    """
    kinds = sum(1 << number for number, kind in enumerate(Instruction) if kind in instructions)
    marks = _Marks(module)
    marks.site_kinds = kinds
    capacity = marks.walk().sites
    sites = ffi.new("ms_code_site[]", max(capacity, 1))
    marks.site_room(sites, capacity)
    marks.walk()
    names = [kind.value for kind in Instruction]
    return tuple(Site(names[s.kind], s.function, s.offset) for s in sites[0:capacity])


class _Marks:
    """The core's view of a module, kept alive together, and what it marks there."""

    def __init__(self, module: wasm.Module) -> None:
        elements = module.section(SectionId.ELEMENT)
        # A count that nobody has checked: a segment takes a byte at least.
        element_count = (
            min(module.element_segment_count, elements.end - elements.payload) if elements else 0
        )
        counts = {
            "globals": len(module.globals),
            "tables": len(module.tables),
            "memories": len(module.memories),
            "data": len(module.data_segments),
            "elements": element_count,
        }
        self._module = module
        self._spaces = {name: bytearray(count) for name, count in counts.items()}
        self._marks = ffi.new("ms_code_marks *")
        self._held: list[Any] = []
        self._marks.first_function = sum(
            each.kind is ExternKind.FUNCTION for each in module.imports
        )
        for name, marked in self._spaces.items():
            space = getattr(self._marks, name)
            space.marks = self._hold(ffi.from_buffer("uint8_t[]", marked))
            space.count = len(marked)

    def _hold(self, given: Any) -> Any:
        self._held.append(given)
        return given

    @property
    def site_kinds(self) -> int:
        """Bits of the kinds whose sites are asked for."""
        return int(self._marks.site_kinds)

    @site_kinds.setter
    def site_kinds(self, kinds: int) -> None:
        self._marks.site_kinds = kinds

    def site_room(self, sites: Any, capacity: int) -> None:
        """Where the sites go."""
        self._marks.sites = self._hold(sites)
        self._marks.site_capacity = capacity

    def walk(self) -> Any:
        """The core's report; all zeros for a module without code."""
        report = ffi.new("ms_code_report *")
        code = self._module.section(SectionId.CODE)
        if code is not None:
            source = ffi.from_buffer(self._module.source)
            lib.ms_analyse_code(source, code.payload, code.end, self._marks, report)
        return report

    def having(self, space: str, bit: int) -> tuple[int, ...]:
        """The indices of a space that were marked with this bit."""
        return tuple(index for index, marks in enumerate(self._spaces[space]) if marks & bit)


def _fault(module: wasm.Module, report: Any) -> str | None:
    """Why the walk ended early, or ended with another number of bodies than was declared."""
    if report.fault == lib.MS_CODE_UNDERSTOOD:
        declared = module.function_count - sum(
            each.kind is ExternKind.FUNCTION for each in module.imports
        )
        if report.bodies != declared:
            return f"{declared} functions are declared and {report.bodies} have code."
        return None
    where = f"at byte {report.offset}, in function {report.function}"
    if report.opcode == lib.MS_CODE_NO_OPCODE:
        what = "The code"
    elif 0xFB <= report.opcode <= 0xFE:
        what = f"The opcode 0x{report.opcode:02x} {report.sub}"
    else:
        what = f"The opcode 0x{report.opcode:02x}"
    return {
        lib.MS_CODE_CUT: f"{what} is cut off {where}.",
        lib.MS_CODE_OPCODE: f"{what} is not known here ({where}).",
        lib.MS_CODE_TYPE: f"{what} names a type that is not known here ({where}).",
        lib.MS_CODE_FLAGS: f"{what} has flags that are not known here ({where}).",
        lib.MS_CODE_INTEGER: f"{what} has an integer of too many bits ({where}).",
        lib.MS_CODE_INDEX: f"{what} has an index that does not exist ({where}).",
        lib.MS_CODE_BODY: f"{what} is followed by bytes that belong to nothing ({where}).",
    }[report.fault]


# The verdict


def changing_globals(module: wasm.Module, report: CodeReport) -> tuple[int, ...]:
    """The module's own globals whose value may change: code assigns to them, or the embedder can.

    All mutable ones where code was not understood.
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


def verdict(module: wasm.Module, report: CodeReport, *, start_dropped: bool = False) -> Verdict:
    """Whether restoring memories and globals makes an instance of `module` as good as new.

    `start_dropped` is for a module whose start function will not run, because its effect is saved.
    What depends on images (a memory that the runtime initialises) is for the caller to add.
    """
    names = _exported_as(module)
    reasons = [
        *_code_reasons(report, names),
        *_global_reasons(module, report, names),
        *_instantiation_reasons(module, start_dropped=start_dropped),
    ]
    return Verdict(
        in_place=not reasons,
        reasons=tuple(reasons),
        conditions=tuple(_conditions(module, report, names)),
        foreign=tuple(_foreign(module)),
        vector_globals=tuple(
            index
            for index in changing_globals(module, report)
            if module.globals[index].type.value.name == "v128"
        ),
    )


_Names = Mapping[tuple[ExternKind, int], str]


def reason_against_snapshots(
    module: wasm.Module, report: CodeReport, *, given_away: bool
) -> str | None:
    """Why an instance may have state besides memories and globals that a new one has not, or None.

    `given_away` says that the embedder may have changed whatever the module exports.
    """
    names = _exported_as(module)
    if report.not_understood is not None:
        return next(_code_reasons(report, names))
    for instruction, why in _IRREVERSIBLE.items():
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
    for table in module.tables:
        name = names.get((ExternKind.TABLE, table.index))
        if given_away and name is not None and table.imported is None:
            return (
                f"Table {table.index} is exported as {name}, and who was given the runtime's own"
                " objects may have changed it; take the snapshot before."
            )
    for kind, imported in (
        *(("memory", each.imported) for each in module.memories),
        *(("table", each.imported) for each in module.tables),
        *(("mutable global", each.imported) for each in module.globals if each.type.mutable),
    ):
        if imported is not None:
            return (
                f"The {kind} that is imported as {imported} is not the guest's own, and no snapshot holds"
                " what is in it; let the module define it, or use the guest without a snapshot."
            )
    return None


def _exported_as(module: wasm.Module) -> _Names:
    """The quoted export names of everything that has one."""
    names: dict[tuple[ExternKind, int], list[str]] = defaultdict(list)
    for export in module.exports:
        names[export.kind, export.index].append(f'"{printable(export.name)}"')
    return {key: " and ".join(found) for key, found in names.items()}


def _code_reasons(report: CodeReport, names: _Names) -> Iterator[str]:
    if report.not_understood is not None:
        yield (
            "What the code does cannot be proven:"
            f" {report.not_understood[0].lower()}{report.not_understood[1:]}"
        )
    for instruction, why in _IRREVERSIBLE.items():
        found = report.occurrence(instruction)
        if found is not None:
            yield f"The code has {_place(found, names)}; {why}."


def _place(found: Occurrence, names: _Names) -> str:
    """Where it is, so that a person finds it in a disassembly."""
    name = names.get((ExternKind.FUNCTION, found.first_function))
    function = f"function {found.first_function}" + (f" (exported as {name})" if name else "")
    where = f"{found.instruction} in {function}, at byte 0x{found.first_offset:x}"
    if found.count == 1:
        return where
    others = f", and {found.count - 1} more"
    return where + others + (f" in {found.functions} functions" if found.functions > 1 else "")


def _global_reasons(module: wasm.Module, report: CodeReport, names: _Names) -> Iterator[str]:
    for index in changing_globals(module, report):
        held = module.globals[index].type.value
        if held.is_reference:
            name = names.get((ExternKind.GLOBAL, index))
            how = f"is exported as {name}" if name else "is assigned to"
            yield (
                f"Global {index} holds references, {held.name}, and {how}; a reference cannot be"
                " saved."
            )


def _instantiation_reasons(module: wasm.Module, *, start_dropped: bool) -> Iterator[str]:
    """What only a new instance does again."""
    if module.start is not None and not start_dropped:
        yield (
            f"Function {module.start} starts each new instance and does not run at a reset in place;"
            " a snapshot taken after it needs it no more."
        )
    yield from _copies(module)


def _copies(module: wasm.Module) -> Iterator[str]:
    """What each new instance writes into what is not its own."""
    written = {segment.memory for segment in module.data_segments if segment.data}
    for memory in module.memories:
        if memory.imported is not None and memory.index in written:
            yield (
                f"Each new instance copies data into the memory that is imported as"
                f" {memory.imported}; let the module define its memory."
            )
    if module.element_segment_count:
        for table in module.tables:
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
    for table in module.tables:
        name = names.get((ExternKind.TABLE, table.index))
        if name is not None and table.imported is None:
            yield (
                f"Table {table.index} is exported as {name}; who was given the runtime's own objects"
                " may have changed it, and then needs a new instance."
            )


def _foreign(module: wasm.Module) -> Iterator[str]:
    for kind, things in (
        ("memory", module.memories),
        ("table", module.tables),
        ("global", module.globals),
    ):
        for thing in things:
            if thing.imported is None:
                continue
            if isinstance(thing, wasm.Global) and not thing.type.mutable:
                continue
            yield (
                f"The {kind} that is imported as {thing.imported} belongs to whoever provides it and"
                " stays as it is at every kind of reset."
            )
