"""The gate's judge of the legs: it passes what ran to its end everywhere, and says of the rest which test, and why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

JUDGE = Path(__file__).parents[1] / ".ci" / "check_legs.py"
TIMED = "3.10-memfd"
EXPECTED = {
    "3.10-unit": "",
    TIMED: "wasmer,wasmtime",
    "3.10-anonymous": "wasmer,wasmtime",
    "3.12-unit": "",
    "3.12-memfd": "wasmtime",
    "3.12-anonymous": "wasmtime",
}

if not JUDGE.exists():
    pytest.skip(
        "impossible: the gate is in the repository and in no release", allow_module_level=True
    )

WELL = """
import pytest

@pytest.mark.parametrize("host", ["wasmer-madvise", "wasmtime-madvise"])
def test_serves(host): pass

@pytest.mark.skip(reason="impossible: no such thing here")
def test_of_another_machine(): pass

@pytest.mark.xfail(reason="known")
def test_of_a_known_fault(): assert False
"""
WHOLE_MODULE = 'import pytest; pytest.skip("{reason}", allow_module_level=True)'
ILL = {
    "test_failure": (
        "def test_fails(): assert 1 == 2",
        "failed: test_failure::test_fails: assert 1 == 2",
    ),
    "test_error": (
        "def test_errs(nobody_has_this): pass",
        "failed: test_error::test_errs: failed on setup",
    ),
    "test_skip": (
        "import pytest\n@pytest.mark.skip(reason='no time')\ndef test_skips(): pass",
        "skipped: test_skip::test_skips: no time",
    ),
    "test_skipped_module": (
        WHOLE_MODULE.format(reason="no time"),
        "skipped: ::test_skipped_module: no time",
    ),
    "test_broken_module": ("no python", "failed: ::test_broken_module: collection failure"),
}
"""Modules, and what the judge says of each."""


def pytest_run(folder: Path, **modules: str) -> tuple[bytes, str]:
    """What pytest itself writes about such test modules: the JUnit file, and its exit status."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    command = ("-m", "pytest", "-c", "none.toml", "--continue-on-collection-errors")
    (folder / "none.toml").write_text("[tool.pytest.ini_options]\n")
    done = subprocess.run(
        [sys.executable, *command, "--junit-xml", "junit.xml", *(f"{name}.py" for name in modules)],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr
    return (folder / "junit.xml").read_bytes(), str(done.returncode)


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    folder = tmp_path_factory.mktemp("well")
    skipped = WHOLE_MODULE.format(reason="impossible: no kernel of that kind")
    return pytest_run(folder, test_well=WELL, test_elsewhere=skipped)


@pytest.fixture
def results(tmp_path: Path, well: tuple[bytes, str]) -> Path:
    """Of a run in which every leg did what it should."""
    for leg in (*EXPECTED, f"{TIMED}.timing"):
        (tmp_path / f"{leg}.xml").write_bytes(well[0])
        (tmp_path / f"{leg}.rc").write_text(well[1] + "\n")
    return tmp_path


def verdict(results: Path) -> tuple[int, str]:
    expected = [f"{leg}={hosts}" for leg, hosts in EXPECTED.items()]
    done = subprocess.run(
        [sys.executable, str(JUDGE), str(results), TIMED, *expected],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr
    return done.returncode, done.stdout


def test_legs_that_did_what_they_should_pass(results: Path) -> None:
    status, said = verdict(results)
    assert status == 0, said
    assert said.count(" ok\n") == len(EXPECTED)
    # Of each leg, and of the timing tests of one of them.
    assert "allowed skip, 7 times: impossible: no such thing here\n" in said
    assert "allowed skip, 7 times: impossible: no kernel of that kind\n" in said
    assert said.splitlines()[2].split()[:5] == [TIMED, "4", "0", "4", "2"]


def test_a_leg_fails_of_which_a_test_failed_or_should_have_run(
    results: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    modules = {name: text for name, (text, _) in ILL.items()}
    junit, code = pytest_run(tmp_path_factory.mktemp("ill"), test_well=WELL, **modules)
    (results / "3.12-memfd.xml").write_bytes(junit)
    (results / "3.12-memfd.rc").write_text(code)
    status, said = verdict(results)
    assert status == 1
    for _, sentence in ILL.values():
        assert f"3.12-memfd: {sentence}" in said
    assert said.count(" FAILED\n") == 1
    assert said.count("3.12-memfd: ") == len(ILL) + 1, "and pytest's exit status"


def lose_a_leg(results: Path) -> None:
    (results / "3.12-memfd.xml").unlink()


def lose_a_status(results: Path) -> None:
    (results / "3.12-memfd.rc").unlink()


def be_ended(results: Path) -> None:
    (results / "3.12-memfd.rc").write_text("124\n")


def lose_the_timing_tests(results: Path) -> None:
    (results / f"{TIMED}.timing.xml").unlink()


def collect_nothing(results: Path) -> None:
    (results / "3.12-memfd.rc").write_text("5\n")


def run_on_one_host_alone(results: Path) -> None:
    path = results / "3.10-anonymous.xml"
    path.write_bytes(path.read_bytes().replace(b"[wasmer-", b"[other-"))


def pass_no_test(results: Path) -> None:
    path = results / "3.12-unit.xml"
    path.write_bytes(b'<testsuites><testsuite time="0.1"/></testsuites>')


WRONG = {
    lose_a_leg: "3.12-memfd: 3.12-memfd.xml is missing: the leg did not run to its end",
    lose_a_status: "3.12-memfd: pytest's exit status in 3.12-memfd.xml is None",
    be_ended: "3.12-memfd: pytest's exit status in 3.12-memfd.xml is 124",
    collect_nothing: "3.12-memfd: pytest's exit status in 3.12-memfd.xml is 5",
    lose_the_timing_tests: f"{TIMED}: {TIMED}.timing.xml is missing",
    run_on_one_host_alone: "3.10-anonymous: no test passed on wasmer",
    pass_no_test: "3.12-unit: no test passed",
}


@pytest.mark.parametrize("happen", WRONG, ids=lambda each: each.__name__)
def test_a_run_fails_whose_legs(happen: Callable[[Path], None], results: Path) -> None:
    happen(results)
    status, said = verdict(results)
    assert status == 1
    assert WRONG[happen] in said


def test_a_timed_leg_may_have_no_timing_tests_but_one_must(results: Path) -> None:
    (results / f"{TIMED}.timing.rc").write_text("5\n")
    assert verdict(results)[0] == 0
    (results / f"{TIMED}.timing.xml").write_bytes(b"<testsuites/>")
    status, said = verdict(results)
    assert status == 1
    assert "no timing test passed in any leg" in said
