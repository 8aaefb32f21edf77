"""The examples run, and print what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .cells import Cell, backends

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

PRINTED = {
    "first_steps.py": """\
next: 42 43
its first bytes: 2b 00 00 00
next after a reset: 42
next in another instance: 42
{host}: 2 leases of 1 slot, memory by {backend}
""",
    "tenants.py": """\
bob reads: 0
ann asks for 3 more pages: granted
bob asks for 3 more pages: {bob}
eve has to come back later: 2 of 2 slots are in use
shed: 2 of 2
eve reads: 0 of 1 page
""",
}


PRINTED_ON_WASMTIME = {
    "asyncio_calls.py": """\
sums: 1 3 6 10 15 21 28 36 45 55
deadline: interrupt
gave up before the deadline: True
and then: 5050
leased at the end: 0
""",
}
"""Those that need what wasmer has not."""


def test_every_program_is_here() -> None:
    programs = {path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("test_")}
    assert programs == set(PRINTED) | set(PRINTED_ON_WASMTIME)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("name", PRINTED_ON_WASMTIME)
def test_an_example_for_wasmtime_prints_what_it_says(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMSLOT_PLUGINS", backend)
    command = [sys.executable, "-W", "error", EXAMPLES / name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == PRINTED_ON_WASMTIME[name]


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_prints_what_it_says(
    real_cell: Cell, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMSLOT_PLUGINS", real_cell.backend)
    monkeypatch.setenv("MEMSLOT_HOST", real_cell.host)
    command = [sys.executable, "-W", "error", EXAMPLES / name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bob = "refused" if real_cell.host == "wasmtime" else "granted"  # wasmer grows before it tells
    assert done.stdout == PRINTED[name].format(
        host=real_cell.host, backend=real_cell.backend, bob=bob
    )
    assert done.stderr == ""
