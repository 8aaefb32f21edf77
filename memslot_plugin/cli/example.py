"""The bundled example guest: it factorises numbers with a precomputed table of one MiB, and tallies the primes it met.

    0x000000   smallest prime factor of each n < 2**19, as u16; 0 where n is itself prime (the module's data, 1 MiB)
    0x100000   how often each prime n < 2**19 was met, as u32 (zeros, 2 MiB); a request writes some 10 pages here

It exports `memory`, `factorise(first, count)`, which answers how many primes this instance met for the first time,
`times(prime)`, which answers how often, and `demo()`, which is `factorise(360360, 20)`.  A tally that an earlier
request left behind makes the answer smaller: only a fresh memory gives DEMO_ANSWER.

The module is encoded here, so that it can be inspected where no runtime, and so no assembler, is installed.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable

from memslot_plugin.wasm.binary import encode_name, unsigned_leb128

NAME = "example"
"""What stands for this guest where the command line wants a FILE."""

LIMIT = 1 << 19
"""The guest knows the numbers below this one, and traps on others."""

DEMO_ANSWER = 34
"""What `demo` answers: so many different primes divide the numbers from 360360 to 360379."""

TALLY = 0x100000
PAGES = 48
"""Three MiB of linear memory: the table and the tally."""

_FACTORISE = f"""
    block
      loop                        ;; for each number, from `first` (local 0) on
        local.get 1
        i32.eqz
        br_if 1                   ;; until `count` (local 1) is 0
        local.get 0
        i32.const 19
        i32.shr_u
        if
          unreachable             ;; the table ends at 2**19
        end
        local.get 0
        local.set 2               ;; what is left of the number (local 2)
        block
          loop                    ;; while it is more than 1
            local.get 2
            i32.const 2
            i32.lt_u
            br_if 1
            local.get 2
            i32.const 1
            i32.shl
            i32.load16_u 1 0
            local.tee 3           ;; its smallest prime factor (local 3)
            i32.eqz
            if
              local.get 2         ;; it is prime
              local.set 3
            end
            local.get 3
            i32.const 2
            i32.shl
            local.tee 4           ;; where its tally is (local 4)
            i32.load 2 {TALLY}
            local.tee 5           ;; how often it was met before (local 5)
            i32.eqz
            local.get 6
            i32.add
            local.set 6           ;; one new prime more (local 6) if never
            local.get 4
            local.get 5
            i32.const 1
            i32.add
            i32.store 2 {TALLY}
            local.get 2
            local.get 3
            i32.div_u
            local.set 2
            br 0
          end
        end
        local.get 0
        i32.const 1
        i32.add
        local.set 0
        local.get 1
        i32.const 1
        i32.sub
        local.set 1
        br 0
      end
    end
    local.get 6
"""

_TIMES = f"""
    local.get 0
    i32.const 19
    i32.shr_u
    if
      unreachable
    end
    local.get 0
    i32.const 2
    i32.shl
    i32.load 2 {TALLY}
"""

_DEMO = """
    i32.const 360360
    i32.const 20
    call 0
"""

# Opcodes of the core specification, 5.4; a block that leaves nothing on the stack has the type 0x40.
_OPCODES = {
    "unreachable": b"\x00",
    "block": b"\x02\x40",
    "loop": b"\x03\x40",
    "if": b"\x04\x40",
    "end": b"\x0b",
    "br": b"\x0c",
    "br_if": b"\x0d",
    "call": b"\x10",
    "local.get": b"\x20",
    "local.set": b"\x21",
    "local.tee": b"\x22",
    "i32.load": b"\x28",
    "i32.load16_u": b"\x2f",
    "i32.store": b"\x36",
    "i32.const": b"\x41",
    "i32.eqz": b"\x45",
    "i32.lt_u": b"\x49",
    "i32.add": b"\x6a",
    "i32.sub": b"\x6b",
    "i32.div_u": b"\x6e",
    "i32.shl": b"\x74",
    "i32.shr_u": b"\x76",
}
_I32 = b"\x7f"
_FUNCTION, _MEMORY = b"\x00", b"\x02"


@functools.cache
def module() -> bytes:
    """The module in the binary format, the same bytes each time."""
    types = [b"\x60" + _vector([_I32] * parameters) + _vector([_I32]) for parameters in (2, 1, 0)]
    exports = [
        encode_name("memory") + _MEMORY + b"\x00",
        encode_name("factorise") + _FUNCTION + b"\x00",
        encode_name("times") + _FUNCTION + b"\x01",
        encode_name("demo") + _FUNCTION + b"\x02",
    ]
    bodies = [_body(_FACTORISE, variables=5), _body(_TIMES), _body(_DEMO)]
    active_at_0 = b"\x00" + _OPCODES["i32.const"] + b"\x00" + _OPCODES["end"]
    return b"\0asm\x01\0\0\0" + b"".join(
        bytes([number]) + _sized(contents)
        for number, contents in (
            (1, _vector(types)),
            (3, _vector([b"\x00", b"\x01", b"\x02"])),
            (5, _vector([b"\x01" + unsigned_leb128(PAGES) * 2])),
            (7, _vector(exports)),
            (10, _vector(bodies)),
            (11, _vector([active_at_0 + _sized(smallest_factors())])),
        )
    )


def smallest_factors() -> bytes:
    """The table: a sieve that lets the smallest prime have the last word."""
    table = array("H", bytes(2 * LIMIT))
    root = int(LIMIT**0.5) + 1
    primes = [n for n in range(2, root + 1) if all(n % factor for factor in range(2, n))]
    for factor in reversed(primes):
        multiples = range(factor * factor, LIMIT, factor)
        table[factor * factor :: factor] = array("H", [factor]) * len(multiples)
    if table.itemsize != 2 or memoryview(table).cast("B")[8] != 2:
        table.byteswap()  # a linear memory is little-endian on every machine
    return table.tobytes()


def _body(text: str, variables: int = 0) -> bytes:
    """A function of i32 variables and these instructions."""
    code = bytearray(_vector([unsigned_leb128(variables) + _I32] if variables else []))
    for line in text.splitlines():
        words = line.partition(";;")[0].split()
        if words:
            code += _OPCODES[words[0]]
            encode = _signed_leb128 if words[0] == "i32.const" else unsigned_leb128
            for immediate in words[1:]:
                code += encode(int(immediate))
    return _sized(bytes(code) + _OPCODES["end"])


def _signed_leb128(value: int) -> bytes:
    """A signed integer, not negative: its last byte must not look like a sign."""
    encoded = unsigned_leb128(value)
    return encoded[:-1] + bytes([encoded[-1] | 0x80, 0]) if encoded[-1] & 0x40 else encoded


def _vector(items: Iterable[bytes]) -> bytes:
    listed = list(items)
    return unsigned_leb128(len(listed)) + b"".join(listed)


def _sized(contents: bytes) -> bytes:
    return unsigned_leb128(len(contents)) + contents
