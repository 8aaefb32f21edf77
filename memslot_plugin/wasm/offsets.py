"""Places in the code of a rewritten module, as places in the module that was given."""

from __future__ import annotations

from memslot_plugin.wasm.binary import Reader
from memslot_plugin.wasm.module import Module, SectionId


class Offsets:
    """Offsets of a module's code before and after it was rewritten: no byte of code changes, and so the
    whole section moves at once.
    """

    def __init__(self, given: Module, rewritten: bytes) -> None:
        self._given = given
        section = given.section(SectionId.CODE)
        at = _code_of(rewritten)
        self._moved = 0 if section is None or at is None else section.payload - at
        self._ends: list[int] | None = None
        """The ends of functions in the given module; before the first stands where they begin."""

    def given(self, function: int, offset: int) -> int:
        """The offset in the given module of what is at `offset` in the rewritten one.  An offset outside of
        the function of that index is left as it is: it belongs to another module.
        """
        if self._ends is None:
            self._ends = self._found_ends()
        place = function - (self._given.function_count - len(self._ends) + 1)
        found = offset + self._moved
        if 0 <= place < len(self._ends) - 1 and self._ends[place] <= found <= self._ends[place + 1]:
            return found
        return offset

    def _found_ends(self) -> list[int]:
        section = self._given.section(SectionId.CODE)
        if section is None:
            return [0]
        reader = Reader(self._given.source, section.payload, section.end)
        count = reader.u32()
        ends = [reader.position]
        for _ in range(count):
            reader.skip(reader.u32())
            ends.append(reader.position)
        return ends


def _code_of(module: bytes) -> int | None:
    """The place where the contents of the code section begin; None if there is none."""
    reader = Reader(module, 8, len(module))
    while reader.left:
        kind, length = reader.byte(), reader.u32()
        if kind == SectionId.CODE:
            return reader.position
        reader.skip(length)
    return None
