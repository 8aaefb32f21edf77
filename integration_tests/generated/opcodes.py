"""Opcodes by operands and results, and values to try. An opcode above 0xff is a prefix and a number."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

PAGE = 65536
ADD = {"i32": 0x6A, "i64": 0x7C}
SUBTRACT = {"i32": 0x6B, "i64": 0x7D}
MULTIPLY = {"i32": 0x6C, "i64": 0x7E}
AND = {"i32": 0x71, "i64": 0x83}

# Operations without traps and with determined bits: floats are moved, compared and converted alone.
# The result, the operands, and opcodes.
_SAFE: tuple[tuple[str, str, Sequence[int]], ...] = (
    ("i32", "i32", (0x45, 0x67, 0x68, 0x69, 0xC0, 0xC1)),
    ("i32", "i32 i32", (0x6A, 0x6B, 0x6C, *range(0x71, 0x79), *range(0x46, 0x50))),
    ("i32", "i64", (0x50, 0xA7)),
    ("i32", "i64 i64", range(0x51, 0x5B)),
    ("i32", "f32", (0xBC, 0xFC0000, 0xFC0001)),
    ("i32", "f64 f64", range(0x61, 0x67)),
    ("i32", "v128", (0xFD0053, 0xFD0063, 0xFD0064, 0xFD00A3, 0xFD00C4)),
    ("i32", "funcref", (0xD1,)),
    ("i32", "externref", (0xD1,)),
    ("i64", "i64", (0x79, 0x7A, 0x7B, 0xC2, 0xC3, 0xC4)),
    ("i64", "i64 i64", (0x7C, 0x7D, 0x7E, *range(0x83, 0x8B))),
    ("i64", "i32", (0xAC, 0xAD)),
    ("i64", "f64", (0xBD, 0xFC0006, 0xFC0007)),
    ("f32", "f32", (0x8B, 0x8C)),
    ("f32", "i32", (0xB2, 0xB3, 0xBE)),
    ("f64", "f64 f64", (0xA6,)),
    ("f64", "i64", (0xB9, 0xBA, 0xBF)),
    ("v128", "v128 v128", (0xFD000E, 0xFD004E, 0xFD0050, 0xFD006E, 0xFD00AE, 0xFD00CE)),
    ("v128", "i32", (0xFD000F, 0xFD0010, 0xFD0011)),
    ("v128", "f32", (0xFD0013,)),
)
SAFE: dict[str, list[tuple[tuple[str, ...], Sequence[int]]]] = defaultdict(list)
"""Types of operands and their opcodes, by result."""
for _result, _operands, _codes in _SAFE:
    SAFE[_result].append((tuple(_operands.split()), _codes))

LOADS = {  # opcode, bytes
    "i32": ((0x28, 4), (0x2C, 1), (0x2D, 1), (0x2E, 2), (0x2F, 2)),
    "i64": ((0x29, 8), (0x30, 1), (0x31, 1), (0x32, 2), (0x33, 2), (0x34, 4), (0x35, 4)),
    "f32": ((0x2A, 4),),
    "f64": ((0x2B, 8),),
    "v128": ((0xFD0000, 16), (0xFD0001, 8), (0xFD0007, 1), (0xFD000A, 8), (0xFD005C, 4)),
}
STORES = {
    "i32": ((0x36, 4), (0x3A, 1), (0x3B, 2)),
    "i64": ((0x37, 8), (0x3C, 1), (0x3D, 2), (0x3E, 4)),
    "f32": ((0x38, 4),),
    "f64": ((0x39, 8),),
    "v128": ((0xFD000B, 16),),
}

INTERESTING = {
    "i32": (0, 1, 2, 3, 7, 8, 255, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 8),
    "i64": (0, 1, 5, 65536, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1),
    "f32": (0, 1 << 31, 0x3F800000, 0x7F800000, 0x7FC00000, 0x7F800001, 0x4F000000, 1, 0x42280000),
    "f64": (
        *(0, 1 << 63, 0x3FF0000000000000, 0x7FF0000000000000, 0x7FF8000000000000),
        *(0x7FF0000000000001, 0x41E0000000000000, 1, 0x4045000000000000),
    ),
}


def some_bits(rng: random.Random, kind: str) -> int:
    """Return a value of a number or vector as its bits."""
    if kind == "v128":
        return rng.choice((0, 2**128 - 1, rng.getrandbits(128)))
    if rng.random() < 0.5:
        return rng.choice(INTERESTING[kind])
    return rng.getrandbits(rng.choice((4, 8, 17, int(kind[1:]))))
