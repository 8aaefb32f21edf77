"""Names in the custom section "name", which a runtime repeats for each frame of a trap."""

from __future__ import annotations

from memslot_plugin.wasm.binary import NotUnderstood, Reader
from memslot_plugin.wasm.module import SectionId
from memslot_plugin.wasm.parse import read_sections

_MODULE_NAME, _FUNCTION_NAMES = 0, 1
"""Numbers of subsections."""


def without_long_names(module: bytes, longest: int) -> bytes:
    """Rename the name sections of a module that `parse` understands, if a name exceeds `longest` bytes.

    A runtime ignores a section that is not called "name". No byte of the module moves.
    """
    titles, is_long = [], False
    for section in read_sections(module) if b"name" in module else ():
        reader = Reader(module, section.payload, section.end)
        if section.id is SectionId.CUSTOM and reader.name() == "name":
            titles.append(reader.position - len(b"name"))
            is_long = is_long or _has_long_name(reader, longest)
    if not is_long:
        return module
    renamed = bytearray(module)
    for at in titles:
        renamed[at : at + len(b"name")] = b"long"
    return bytes(renamed)


def _has_long_name(section: Reader, longest: int) -> bool:
    """Return True if a name is too long, or the section is not understood."""
    try:
        while section.left:
            kind, length = section.byte(), section.u32()
            part = Reader(section.data, section.position, section.position + length)
            section.skip(length)
            if kind == _MODULE_NAME and part.u32() > longest:
                return True
            for _ in range(part.u32() if kind == _FUNCTION_NAMES else 0):
                part.u32()
                if len(part.take(part.u32())) > longest:
                    return True
    except NotUnderstood:
        return True
    return False
