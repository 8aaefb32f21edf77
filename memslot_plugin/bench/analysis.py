"""Family `analysis`: reading 30 MB of code while a guest is prepared, against hashing the same bytes.

MD5 is the yardstick: its speed follows the processor's clock, because no processor has instructions for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from memslot_plugin import wasm
from memslot_plugin.bench.results import Grid, Limit, Row, listed
from memslot_plugin.bench.runner import Bench, timed
from memslot_plugin.guest import analysis
from memslot_plugin.wasm.binary import unsigned_leb128

NAME = "analysis"

BYTES = 30_000_000

LIMITS = [
    Limit("30 MB of code, {what}: as fast as hashing them", {"what": what}, least)
    for what, least in {"parsed": 10, "analysed": 0.25}.items()  # parsing skips the code
]

_BODY = bytes.fromhex(
    "01017f230041a0016b2202240002400340200028020c450d012002200141c0843d6a36020820012d00002000410374"
    "732101200244000000000000e03f20012b0300a23903200c000b0b410140001a2000200110000b"
)
"""A function as compilers write it: mostly locals, constants, loads, stores and branches."""


def module(byte_size: int) -> bytes:
    """Return a module of one memory, one global, and about `byte_size` bytes of functions."""
    count = byte_size // (len(_BODY) + 1)
    functions = unsigned_leb128(count)
    sections = {
        1: bytes.fromhex("0160027f7f017f"),
        3: functions + bytes(count),
        5: bytes.fromhex("010001"),
        6: bytes.fromhex("017f0141000b"),
        10: functions + (unsigned_leb128(len(_BODY)) + _BODY) * count,
    }
    return b"\0asm\1\0\0\0" + b"".join(
        bytes([number]) + unsigned_leb128(len(content)) + content
        for number, content in sections.items()
    )


def measure(bench: Bench, seconds: float = 2.0) -> Iterator[Row]:
    """Parse, analyse and hash in turns."""
    bench.say("analysis: 30 MB of code")
    data = module(BYTES)
    parsed = wasm.parse(data)
    subjects = {
        "parsed": timed(lambda: wasm.parse(data)),
        "analysed": timed(lambda: analysis.analyse(parsed)),
        "hashed": timed(lambda: hashlib.md5(data, usedforsecurity=False)),
    }
    samples = bench.rounds(subjects, seconds)
    for what in ("parsed", "analysed"):
        yield Row.compare({"what": what}, samples[what], "MD5", samples["hashed"], gain=True)


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """Show one line per case."""
    return listed("30 MB of code: times as fast as hashing them with MD5", rows, "what", "as fast")
