"""System calls of a child, recorded by strace, by section."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PREAMBLE = "import os\ndef mark(name): os.access('MARK ' + name, 0)\n"
MARKS = ("?access", "faccessat", "?faccessat2")


@dataclass(frozen=True)
class Traced:
    """One system call; `address` and `length` are 0 if the call has none."""

    name: str
    address: int
    length: int
    line: str


def trace(
    source: str, *arguments: str, calls: tuple[str, ...], log: Path, **options: Any
) -> tuple[str, dict[str, list[Traced]]]:
    """Run Python source under strace; return its output, and its calls by section.

    In the source, `mark(name)` begins a section.
    """
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    filters = f"trace={','.join([*calls, *MARKS])}"
    command = ["strace", "-f", "--seccomp-bpf", "-o", str(log), "-e", filters, sys.executable]
    done = subprocess.run(
        [*command, "-W", "error", "-c", PREAMBLE + source, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **options,
    )
    if "PTRACE" in done.stderr:
        pytest.skip("impossible: this machine does not let strace trace")
    assert done.returncode == 0, done.stderr
    sections: dict[str, list[Traced]] = {}
    section: list[Traced] = []
    pattern = re.compile(r"(\w+)\((0x[0-9a-f]+|NULL)?(?:, (\d+))?.*?(?:= (0x[0-9a-f]+))?$")
    for line in log.read_text(errors="replace").splitlines():
        if marked := re.search(r'"MARK ([^"]*)"', line):
            section = sections.setdefault(marked[1], [])
        elif (found := pattern.search(line)) and "access" not in found[1]:
            address = found[4] if found[2] == "NULL" else found[2]
            section.append(Traced(found[1], int(address or "0", 16), int(found[3] or 0), line))
    return done.stdout, sections
