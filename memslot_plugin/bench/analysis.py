"""Family `analysis`: reading 30 MB of code while a guest is prepared, against hashing the same bytes.

MD5 is the yardstick: its speed follows the processor's clock, because no processor has instructions for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from memslot_plugin import wasm
from memslot_plugin.bench.results import Claim, Family, Grid, Row, spread
from memslot_plugin.bench.runner import CLOCK, Bench, Subject
from memslot_plugin.guest import analysis
from memslot_plugin.wasm.binary import unsigned_leb128

NAME = "analysis"
TITLE = "30 MB of code: times as fast as hashing them with MD5"

BYTES = 30_000_000

LEAST = {"parsed": 10.0, "analysed": 0.25}
"""Limits, times as fast as the hash.  Parsing skips the code; analysis walks it."""

_BODY = bytes.fromhex(
    "01017f230041a0016b2202240002400340200028020c450d012002200141c0843d6a36020820012d00002000410374"
    "732101200244000000000000e03f20012b0300a23903200c000b0b410140001a2000200110000b"
)
"""A function as compilers write it: mostly locals, constants, loads, stores and branches."""


def module(byte_size: int) -> bytes:
    """A module of one memory, one global, and about `byte_size` bytes of functions."""
    count = byte_size // (len(_BODY) + 1)
    functions = unsigned_leb128(count)
    code = functions + (unsigned_leb128(len(_BODY)) + _BODY) * count
    sections = {
        1: bytes.fromhex("0160027f7f017f"),
        3: functions + bytes(count),
        5: bytes.fromhex("010001"),
        6: bytes.fromhex("017f0141000b"),
        10: code,
    }
    return b"\0asm\1\0\0\0" + b"".join(
        bytes([number]) + unsigned_leb128(len(content)) + content
        for number, content in sections.items()
    )


def measure(bench: Bench, seconds: float = 2.0) -> Family:
    """Parse, analyse and hash in turns."""
    bench.say("analysis: 30 MB of code")
    data = module(BYTES)
    parsed = wasm.parse(data)
    samples = bench.rounds(
        {
            "parsed": _timed(lambda: wasm.parse(data)),
            "analysed": _timed(lambda: analysis.analyse(parsed)),
            "hashed": _timed(lambda: hashlib.md5(data, usedforsecurity=False)),
        },
        seconds,
    )
    rows = [
        Row.compare({"what": what}, samples[what], "MD5", samples["hashed"], gain=True)
        for what in LEAST
    ]
    return Family(NAME, tuple(rows), tuple(claims(rows)))


def _timed(action: Callable[[], Any]) -> Subject:
    def subject() -> float:
        started = CLOCK()
        action()
        return CLOCK() - started

    return subject


def claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """One limit per row."""
    for row in rows:
        what = str(row.labels["what"])
        says = f"30 MB of code, {what}: as fast as hashing them"
        yield Claim(says, row.ratio.median, LEAST[what], at_least=True)


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """One line per case."""
    lines = tuple((str(row.labels["what"]), spread(row)) for row in rows)
    yield Grid(TITLE, ("what", "as fast"), lines)
