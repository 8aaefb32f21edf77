"""Modules with something wrong: bytes changed, added, lost and cut, mostly where a reader notices.

A change inside a section mostly keeps the section size right: a reader that finds a wrong size looks no further.
"""

from __future__ import annotations

import random

from memslot_plugin.tests.encode import HEADER, name, section, unsigned

ODD = b"\x00\x01\x02\x03\x04\x0b\x23\x40\x41\x6f\x70\x7f\x80\xd0\xd2\xfb\xfc\xfd\xfe\xff"
"""Bytes with a meaning in many places."""


def mutated(rng: random.Random, module: bytes) -> bytes:
    """Return the module after one to three changes."""
    changed = module
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        changed = rng.choice((*(_in_a_section,) * 8, change_bytes, _cut))(rng, changed)
    return changed


def sections(module: bytes) -> list[tuple[int, bytes]]:
    """Return number and contents of each section, up to the first that cannot be read."""
    found, at = [], len(HEADER)
    while at < len(module):
        number, at = module[at], at + 1
        size = shift = 0
        more = True
        while more and at < len(module):
            size |= (module[at] & 0x7F) << shift
            more, shift, at = module[at] >= 0x80, shift + 7, at + 1
        found.append((number, module[at : at + size]))
        at += size
    return found


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return the bytes after one change."""
    at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 1, 2, 5, 20))
    end = min(at + length, len(data))
    what = rng.choice(("set", "flip", "insert", "delete", "repeat", "longer", "cut"))
    if what == "set":
        return data[:at] + bytes(rng.choice(ODD) for _ in data[at:end]) + data[end:]
    if what == "flip":
        return data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at:end]) + data[end:]
    if what == "insert":
        new = bytes(rng.choice((*ODD, rng.randrange(256))) for _ in range(length))
        return data[:at] + new + data[at:]
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
    place, other = rng.randrange(len(parts)), rng.randrange(len(parts))
    number, content = parts[place]
    what = rng.choice((*("bytes",) * 6, "count", "whole"))
    if what == "whole":
        what = rng.choice(("drop", "twice", "swap", "number", "custom"))
    if what == "bytes":
        parts[place] = number, change_bytes(rng, content)
    elif what == "count":  # the number of entries
        claimed = rng.choice((0, 1, 2, 3, 127, 1000, 2**32 - 1))
        parts[place] = number, unsigned(claimed) + content[1:]
    elif what == "drop":
        del parts[place]
    elif what == "twice":
        parts.insert(other, parts[place])
    elif what == "swap":
        parts[place], parts[other] = parts[other], parts[place]
    elif what == "number":
        parts[place] = rng.randrange(16), content
    else:
        parts.insert(place, (0, name("note") + rng.randbytes(5)))
    return module[: len(HEADER)] + b"".join(section(*part) for part in parts)


def _cut(rng: random.Random, module: bytes) -> bytes:
    return module[: rng.randrange(len(module) + 1)]
