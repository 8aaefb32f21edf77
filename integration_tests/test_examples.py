"""The examples run, and print what they say."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from .cells import PLAIN_CELLS, Cell

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
    # It needs what wasmer has not.
    "asyncio_calls.py": """\
sums: 1 3 6 10 15 21 28 36 45 55
deadline: interrupt
gave up before the deadline: True
and then: 5050
leased at the end: 0
""",
}


def test_every_program_has_an_expectation() -> None:
    programs = {path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("test_")}
    assert programs == set(PRINTED)


@pytest.mark.parametrize(
    ("runtime", "name"),
    [
        # T0 runs each with the default allocator, but for asyncio_calls.py, which takes two seconds.
        pytest.param(
            *(runtime, name),
            id=f"{runtime.host}-{runtime.backend}-{name}",
            marks=[pytest.mark.gate] * (runtime.backend != "memfd" or name == "asyncio_calls.py"),
        )
        for runtime, name in product(PLAIN_CELLS, PRINTED)
        if runtime.host != "fake" and (runtime.host, name) != ("wasmer", "asyncio_calls.py")
    ],
)
def test_example_prints_what_it_says(
    runtime: Cell, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if runtime.missing:
        pytest.skip(runtime.missing)
    monkeypatch.setenv("MEMSLOT_PLUGINS", runtime.backend)
    monkeypatch.setenv("MEMSLOT_HOST", runtime.host)
    command = [sys.executable, "-W", "error", EXAMPLES / name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    bob = "refused" if runtime.host == "wasmtime" else "granted"  # wasmer grows before it tells
    said = {"host": runtime.host, "backend": runtime.backend, "bob": bob}
    assert done.stdout == PRINTED[name].format(**said)
