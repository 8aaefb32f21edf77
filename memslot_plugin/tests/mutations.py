"""Modules with something wrong in them: bytes changed, added, lost and cut, mostly where a reader comes to see it.

A change inside a section is followed by the right size of the section, more often than not: a wrong one is noticed at
once and by everybody, and hides what else is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable

HEADER = 8
ODD = (
    0,
    1,
    2,
    3,
    4,
    0x0B,
    0x23,
    0x40,
    0x41,
    0x6F,
    0x70,
    0x7F,
    0x80,
    0xD0,
    0xD2,
    0xFB,
    0xFC,
    0xFD,
    0xFE,
    0xFF,
)
"""Bytes that mean something in many places."""


def mutated(rng: random.Random, module: bytes) -> bytes:
    """The module after one to three changes."""
    changed = module
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        changed = rng.choice(CHANGES)(rng, changed)
    return changed


def sections(module: bytes) -> list[tuple[int, bytes]]:
    """The number and the contents of each section, as far as they can be told apart."""
    found, at = [], HEADER
    while at < len(module):
        number, at = module[at], at + 1
        size = shift = 0
        while at < len(module):
            byte, at = module[at], at + 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        found.append((number, module[at : at + size]))
        at += size
    return found


def leb128(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def joined(module: bytes, parts: list[tuple[int, bytes]]) -> bytes:
    return module[:HEADER] + b"".join(
        bytes([number]) + leb128(len(content)) + content for number, content in parts
    )


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """One thing happens to some bytes of these."""
    at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 1, 2, 5, 20))
    end = min(at + length, len(data))
    what = rng.choice(("set", "flip", "insert", "delete", "repeat", "longer", "cut"))
    if what == "set":
        return data[:at] + bytes(rng.choice(ODD) for _ in data[at:end]) + data[end:]
    if what == "flip":
        return data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at:end]) + data[end:]
    if what == "insert":
        return (
            data[:at]
            + bytes(rng.choice((*ODD, rng.randrange(256))) for _ in range(length))
            + data[at:]
        )
    if what == "delete":
        return data[:at] + data[end:]
    if what == "repeat":
        return data[:end] + data[at:]
    if what == "longer" and at < len(data):  # an integer that takes more bytes than it needs
        return data[:at] + bytes([data[at] | 0x80, 0]) + data[at + 1 :]
    return data[:at]


def _in_a_section(rng: random.Random, module: bytes) -> bytes:
    parts = sections(module)
    if not parts:
        return change_bytes(rng, module)
    place = rng.randrange(len(parts))
    number, content = parts[place]
    parts[place] = number, change_bytes(rng, content)
    return joined(module, parts)


def _count(rng: random.Random, module: bytes) -> bytes:
    """How many entries a section says that it has."""
    parts = sections(module)
    if not parts:
        return module
    place = rng.randrange(len(parts))
    number, content = parts[place]
    claimed = rng.choice((0, 1, 2, 3, 127, 1000, 2**32 - 1))
    parts[place] = number, leb128(claimed) + content[1:]
    return joined(module, parts)


def _whole_section(rng: random.Random, module: bytes) -> bytes:
    parts = sections(module)
    if not parts:
        return module
    place, other = rng.randrange(len(parts)), rng.randrange(len(parts))
    what = rng.choice(("drop", "twice", "swap", "another number", "a custom one"))
    if what == "drop":
        del parts[place]
    elif what == "twice":
        parts.insert(other, parts[place])
    elif what == "swap":
        parts[place], parts[other] = parts[other], parts[place]
    elif what == "another number":
        parts[place] = rng.randrange(16), parts[place][1]
    else:
        parts.insert(place, (0, b"\4note" + bytes(rng.randrange(256) for _ in range(5))))
    return joined(module, parts)


def _anywhere(rng: random.Random, module: bytes) -> bytes:
    return change_bytes(rng, module)


def _cut(rng: random.Random, module: bytes) -> bytes:
    return module[: rng.randrange(len(module) + 1)]


CHANGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(_in_a_section,) * 6,
    _count,
    _whole_section,
    _anywhere,
    _cut,
)
