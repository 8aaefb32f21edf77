"""The tiers, the profiles of the property tests, and --require-hosts."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from memslot_plugin.tests import profiles

SAMPLE = """
import pytest
from hypothesis import given, settings, strategies
from memslot_plugin.tests import profiles

profiles.load()

@pytest.mark.gate
@pytest.mark.parametrize("cell", ["wasmtime-memfd"])
def test_host(cell):
    pass

@given(strategies.none())
def test_property(drawn):
    assert settings().max_examples == 100 and settings().derandomize

@pytest.mark.scales
def test_scaled():
    assert profiles.examples(3) == 12

@pytest.mark.long
def test_long():
    raise AssertionError

def test_plain():
    raise AssertionError

@pytest.mark.gate
@pytest.mark.parametrize("reason", ["impossible: an old kernel", "not installed"])
def test_skipped(reason):
    pytest.skip(reason)
"""


def gate(folder: Path, *options: str) -> tuple[int, str]:
    """Run the sample as `pytest -m gate` in a child; return its exit status and output."""
    (folder / "test_sample.py").write_text(SAMPLE)
    command = [sys.executable, "-m", "pytest", "-p", "memslot_plugin.tests.tiers", "-m", "gate"]
    done = subprocess.run(
        [*command, "-rA", "--rootdir", str(folder), "-c", os.devnull, *options, str(folder)],
        env={name: value for name, value in os.environ.items() if "PYTEST" not in name},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("profile", "factor"), [("", 1), ("gate", 4), ("long", 240)])
def test_profile_multiplies_the_examples_and_another_is_refused(
    monkeypatch: pytest.MonkeyPatch, profile: str, factor: int
) -> None:
    monkeypatch.setenv("MEMSLOT_PROFILE", profile)
    found = runpy.run_path(profiles.__file__)
    assert (found["examples"](7), found["LONG"]) == (7 * factor, profile == "long")
    monkeypatch.setenv("MEMSLOT_PROFILE", "cheap")
    with pytest.raises(ValueError, match="PROFILE=cheap is not allowed: it is gate or long"):
        runpy.run_path(profiles.__file__)


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.gate)])
def test_gate_selects_its_tests_and_fails_on_possible_skips_and_hosts(
    tmp_path: Path, workers: str
) -> None:
    status, output = gate(tmp_path, "-n", workers, "--require-hosts=wasmtime,wasmer")
    assert status == 1, output
    assert "3 passed, 2 skipped" in output
    assert "    1  impossible: an old kernel\n" in output
    faults = [line for line in output.splitlines() if line.startswith("ERROR")]
    assert faults == [
        "ERROR skipped, and not impossible: test_sample.py::test_skipped[not installed]: not installed",
        "ERROR no test passed on the required host wasmer",
    ]


def test_gate_allows_skips_that_are_impossible(tmp_path: Path) -> None:
    options = ("--require-hosts=wasmtime", "-k", "not installed", "-p", "no:xdist")
    status, output = gate(tmp_path, *options)
    assert status == 0, output
    assert "3 passed, 1 skipped, 3 deselected" in output
    assert "ERROR" not in output


@pytest.mark.gate
def test_worker_that_crashes_is_named_and_ends_the_run(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    crash = "import os\ndef test_crash(): os.kill(os.getpid(), 11)\n"
    for number in range(6):
        quiet = "".join(f"def test_{each}(): pass\n" for each in range(4))
        (tmp_path / f"test_{number}.py").write_text(crash if number == 3 else quiet)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", str(pytestconfig.inipath), "-n", "2", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode != 0
    assert "test_3.py::test_crash" in done.stdout
