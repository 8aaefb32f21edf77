"""Opcodes by what they take and give, and values worth trying; above 0xff stand a prefix and a number."""

from __future__ import annotations

import random

PAGE = 65536
CANONICAL = {"f32": 0x7FC00000, "f64": 0x7FF8000000000000}

# What takes one operand, or two, and gives the type that it stands under: opcodes, and the type of the operands.
INTEGER_UNARY = {"i32": (0x67, 0x68, 0x69, 0xC0, 0xC1), "i64": (0x79, 0x7A, 0x7B, 0xC2, 0xC3, 0xC4)}
SAFE_BINARY = {
    "i32": (0x6A, 0x6B, 0x6C, 0x71, 0x72, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78),
    "i64": (0x7C, 0x7D, 0x7E, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A),
}
DIVISIONS = {"i32": (0x6D, 0x6E, 0x6F, 0x70), "i64": (0x7F, 0x80, 0x81, 0x82)}
COMPARISONS = {
    "i32": tuple(range(0x46, 0x50)),
    "i64": tuple(range(0x51, 0x5B)),
    "f32": tuple(range(0x5B, 0x61)),
    "f64": tuple(range(0x61, 0x67)),
}
TRUNCATIONS = {
    "i32": ((0xA8, "f32"), (0xA9, "f32"), (0xAA, "f64"), (0xAB, "f64")),
    "i64": ((0xAE, "f32"), (0xAF, "f32"), (0xB0, "f64"), (0xB1, "f64")),
}
SATURATIONS = {
    "i32": tuple((0xFC0000 + n, "f32" if n < 2 else "f64") for n in range(4)),
    "i64": tuple((0xFC0004 + n, "f32" if n < 2 else "f64") for n in range(4)),
}
BITS_OF_FLOATS = {
    "i32": (0xBC, "f32"),
    "i64": (0xBD, "f64"),
    "f32": (0xBE, "i32"),
    "f64": (0xBF, "i64"),
}
FLOAT_SIGNS = {"f32": (0x8B, 0x8C), "f64": (0x99, 0x9A)}
FLOAT_UNARY = {"f32": tuple(range(0x8D, 0x92)), "f64": tuple(range(0x9B, 0xA0))}
FLOAT_BINARY = {"f32": tuple(range(0x92, 0x98)), "f64": tuple(range(0xA0, 0xA6))}
COPYSIGN = {"f32": 0x98, "f64": 0xA6}
CONVERSIONS = {
    "f32": ((0xB2, "i32"), (0xB3, "i32"), (0xB4, "i64"), (0xB5, "i64"), (0xB6, "f64")),
    "f64": ((0xB7, "i32"), (0xB8, "i32"), (0xB9, "i64"), (0xBA, "i64"), (0xBB, "f32")),
}
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
VECTOR_UNARY = (0xFD004D, 0xFD0060, 0xFD0061, 0xFD0080, 0xFD00A0, 0xFD00C1)
VECTOR_BINARY = (
    0xFD004E,
    0xFD0050,
    0xFD0051,
    0xFD006E,
    0xFD0071,
    0xFD0095,
    0xFD00AE,
    0xFD00B5,
    0xFD00CE,
    0xFD000E,
)
SPLATS = (
    (0xFD000F, "i32"),
    (0xFD0010, "i32"),
    (0xFD0011, "i32"),
    (0xFD0012, "i64"),
    (0xFD0013, "f32"),
)
VECTOR_TESTS = (0xFD0053, 0xFD0063, 0xFD0064, 0xFD00A3, 0xFD00C4)

INTERESTING = {
    "i32": (0, 1, 2, 3, 7, 8, 255, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 8),
    "i64": (0, 1, 5, 65536, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1),
    "f32": (0, 0x80000000, 0x3F800000, 0x7F800000, 0x7FC00000, 0x7F800001, 0x4F000000, 1, 0x42280000),
    "f64": (
        *(0, 1 << 63, 0x3FF0000000000000, 0x7FF0000000000000, 0x7FF8000000000000),
        *(0x7FF0000000000001, 0x41E0000000000000, 1, 0x4045000000000000),
    ),
}  # fmt: skip


def some_bits(rng: random.Random, kind: str) -> int:
    """A value of a number or vector as its bits."""
    if kind == "v128":
        return rng.choice((0, 2**128 - 1, rng.getrandbits(128)))
    if rng.random() < 0.5:
        return rng.choice(INTERESTING[kind])
    return rng.getrandbits(rng.choice((4, 8, 17, int(kind[1:]))))
