"""Names that a module gives to itself and its functions, which a runtime repeats for each frame of a trap."""

from __future__ import annotations

from memslot_plugin.wasm.binary import NotUnderstood, Reader
from memslot_plugin.wasm.module import SectionId

_MODULE, _FUNCTIONS = 0, 1
"""Parts of a name section."""


def without_long_names(module: bytes, longest: int) -> bytes:
    """The module with its name sections under another title, if a name in them has more bytes than `longest`.

    No runtime reads them then, and no byte of the module moves.
    """
    if b"name" not in module:
        return module
    titles, is_long = [], False
    reader = Reader(module, 8, len(module))
    while reader.left:
        kind, length = reader.byte(), reader.u32()
        section = Reader(module, reader.position, reader.position + length)
        reader.skip(length)
        if kind == SectionId.CUSTOM and section.name() == "name":
            titles.append(section.position - len(b"name"))
            is_long = is_long or _has_long_name(section, longest)
    if not is_long:
        return module
    hidden = bytearray(module)
    for at in titles:
        hidden[at : at + len(b"name")] = b"long"
    return bytes(hidden)


def _has_long_name(section: Reader, longest: int) -> bool:
    """True also for what is not understood."""
    try:
        while section.left:
            kind, length = section.byte(), section.u32()
            part = Reader(section.data, section.position, section.position + length)
            section.skip(length)
            if kind == _MODULE and part.u32() > longest:
                return True
            for _ in range(part.u32() if kind == _FUNCTIONS else 0):
                part.u32()
                if len(part.take(part.u32())) > longest:
                    return True
    except NotUnderstood:
        return True
    return False
