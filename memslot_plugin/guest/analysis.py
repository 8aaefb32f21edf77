"""Effects of a module's code on its own state, as the core finds them in a walk over every instruction."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from memslot_plugin import wasm
from memslot_plugin._core import ffi, lib
from memslot_plugin.wasm import SectionId


class Instruction(str, enum.Enum):
    """The instructions that the core looks for, in the order of its `enum ms_code_kind`."""

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


@dataclass(frozen=True, slots=True)
class Occurrence:
    """All instructions of one kind in the code: their number, and the number of functions with one.

    `first_function` is an index that counts imported functions. `first_offset` is in bytes from the
    beginning of the module.
    """

    instruction: str
    count: int
    functions: int
    first_function: int
    first_offset: int


@dataclass(frozen=True, slots=True)
class CodeReport:
    """The instructions of a module, as far as they were understood.

    `not_understood` is a sentence about the place where the walk ended early, or None. The tuples are
    ascending indices: globals that code assigns to, segments that it reads from and segments that it drops.
    """

    bodies: int
    instructions: int
    not_understood: str | None
    occurrences: tuple[Occurrence, ...]
    globals_set: tuple[int, ...]
    data_used: tuple[int, ...]
    data_dropped: tuple[int, ...]
    elements_used: tuple[int, ...]
    elements_dropped: tuple[int, ...]

    @property
    def named_segments(self) -> int | None:
        """The number of leading data segments that code may name, or None if it was not understood."""
        if self.not_understood is not None:
            return None
        return max((*self.data_used, *self.data_dropped), default=-1) + 1

    def occurrence(self, instruction: str) -> Occurrence | None:
        """Return all instructions of this kind, or None if the code has none."""
        return next((each for each in self.occurrences if each.instruction == instruction), None)


def analyse(module: wasm.Module) -> CodeReport:
    """Walk every instruction of the module; costs about 3 ms per megabyte of code."""
    report, marks = _walk(module)
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
        globals_set=_marked(marks["globals"], lib.MS_CODE_CHANGED),
        data_used=_marked(marks["data"], lib.MS_CODE_USED),
        data_dropped=_marked(marks["data"], lib.MS_CODE_CHANGED),
        elements_used=_marked(marks["elements"], lib.MS_CODE_USED),
        elements_dropped=_marked(marks["elements"], lib.MS_CODE_CHANGED),
    )


def _walk(module: wasm.Module) -> tuple[Any, dict[str, bytearray]]:
    """Return the core's report about the code, and a byte of marks for each item that code can name."""
    elements = module.section(SectionId.ELEMENT)
    # The count is what the module claims, so bound it: an element segment takes at least one byte.
    size = 0 if elements is None else elements.end - elements.payload
    marks = {
        "globals": bytearray(len(module.globals)),
        "tables": bytearray(len(module.tables)),
        "memories": bytearray(len(module.memories)),
        "data": bytearray(len(module.data_segments)),
        "elements": bytearray(min(module.element_segment_count, size)),
    }
    asked = ffi.new("ms_code_marks *")
    asked.first_function = module.imported_function_count
    # A C struct keeps nothing alive: without this dict cffi frees the buffers before the walk.
    buffers = {name: ffi.from_buffer("uint8_t[]", space) for name, space in marks.items()}
    for name, buffer in buffers.items():
        space = getattr(asked, name)
        space.marks, space.count = buffer, len(buffer)
    report = ffi.new("ms_code_report *")
    code = module.section(SectionId.CODE)
    if code is not None:
        source = ffi.from_buffer(module.source)
        lib.ms_analyse_code(source, code.payload, code.end, asked, report)
    return report, marks


def _marked(space: bytearray, bit: int) -> tuple[int, ...]:
    return tuple(index for index, marks in enumerate(space) if marks & bit)


def _fault(module: wasm.Module, report: Any) -> str | None:
    """Return the reason if the walk ended early, or found another number of bodies than declared."""
    if report.fault == lib.MS_CODE_UNDERSTOOD:
        declared = module.function_count - module.imported_function_count
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
