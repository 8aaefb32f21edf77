"""Offsets in the code of a rewritten module, translated to offsets in the given module."""

from __future__ import annotations

from functools import cached_property

from memslot_plugin.wasm.binary import Reader
from memslot_plugin.wasm.module import Module, SectionId
from memslot_plugin.wasm.parse import read_sections


class Offsets:
    """The distance by which rewriting moved the code section.

    Rewriting changes no byte of code, so one distance is right for all functions.
    """

    def __init__(self, given: Module, rewritten: bytes) -> None:
        self._given = given
        self._code = given.section(SectionId.CODE)
        payloads = (each.payload for each in read_sections(rewritten) if each.id is SectionId.CODE)
        moved_to = next(payloads, None)
        self._moved = 0 if self._code is None or moved_to is None else self._code.payload - moved_to

    def given(self, function: int, offset: int) -> int:
        """Return the offset in the given module of the byte at `offset` in the rewritten one.

        An offset outside of `function` comes back unchanged: it belongs to another module.
        """
        boundaries = self._boundaries
        place = function - self._given.imported_function_count
        found = offset + self._moved
        if 0 <= place < len(boundaries) - 1 and boundaries[place] <= found <= boundaries[place + 1]:
            return found
        return offset

    @cached_property
    def _boundaries(self) -> list[int]:
        """The start of the first function body in the given module, then the end of each body."""
        if self._code is None:
            return []
        reader = Reader(self._given.source, self._code.payload, self._code.end)
        count = reader.u32()
        boundaries = [reader.position]
        for _ in range(count):
            reader.skip(reader.u32())
            boundaries.append(reader.position)
        return boundaries
