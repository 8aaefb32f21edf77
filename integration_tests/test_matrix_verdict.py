"""The gate's judge of the matrix: it passes the whole one, and fails where a cell disappeared or changed its state."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from . import cells, conftest
from .cells import Cell

JUDGE = Path(__file__).parents[1] / ".ci" / "check_matrix.py"
PYTHONS = ("3.10", "3.12")
Rows = dict[tuple[str, str], list[dict[str, Any]]]

if not JUDGE.exists():
    pytest.skip(
        "impossible: the gate is in the repository and in no release", allow_module_level=True
    )


def whole_matrix() -> Rows:
    """What the legs of a run in which everything passed have written."""
    found: Rows = {}
    for python, backend in itertools.product(PYTHONS, ("memfd", "anonymous")):
        rows = found[python, backend] = []
        coordinates = (cells.HOSTS, (backend,), cells.ALLOCATIONS, cells.RESETS, cells.GROWTHS)
        for cell in (Cell(*each) for each in itertools.product(*coordinates)):
            missing = cell.host == "wasmer" and python != "3.10"
            state = "missing" if missing else "refused" if cell.refused else "passed"
            reason = "impossible: no build" if missing else cell.refused
            suite = ["test_life", "test_growth"] if state == "passed" else []
            row = {"python": f"{python}.9", **vars(cell), "state": state, "reason": reason}
            rows.append({**row, "passed": len(suite), "failed": 0, "suite": suite})
    return found


def verdict(found: Rows, folder: Path) -> tuple[int, str]:
    """The judge's exit status and what it printed; the table is kept in `folder`."""
    for (python, backend), rows in found.items():
        (folder / f"{python}-{backend}.matrix.json").write_text(json.dumps(rows))
    done = subprocess.run(
        [sys.executable, str(JUDGE), str(folder), str(folder / "kept"), *PYTHONS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.stderr
    return done.returncode, done.stdout


def find(found: Rows, python: str, name: str) -> dict[str, Any]:
    return next(
        row
        for row in found[python, name.split("-")[1]]
        if str(Cell(*(row[each] for each in Cell.__dataclass_fields__))) == name
    )


def test_a_whole_matrix_passes_and_is_kept(tmp_path: Path) -> None:
    found = whole_matrix()
    status, said = verdict(found, tmp_path)
    assert status == 0, said
    kept = json.loads((tmp_path / "kept" / "matrix.json").read_text())
    assert len(kept) == len(PYTHONS) * len(conftest.cells.HOSTS) * 2 * 2 * 4 * 2
    assert sorted(map(str, kept)) == sorted(map(str, itertools.chain(*found.values())))
    text = (tmp_path / "kept" / "matrix.txt").read_text()
    assert said.startswith(text)
    assert "wasmtime memfd on-demand" in text
    assert "missing: 32 cells, impossible: no build" in text
    assert text.endswith("192 cells: 32 missing, 144 passed, 16 refused\n")


NAME = "wasmtime-anonymous-on-demand-copy-ftruncate"


def disappear(found: Rows) -> None:
    found["3.12", "anonymous"].remove(find(found, "3.12", NAME))


def lose_a_coordinate(found: Rows) -> None:
    for rows in found.values():
        rows[:] = [row for row in rows if row["reset"] != "copy"]


def lose_a_leg(found: Rows) -> None:
    del found["3.12", "anonymous"]


def run_twice(found: Rows) -> None:
    found["3.10", "anonymous"].append(find(found, "3.10", NAME))


def be_of_another_python(found: Rows) -> None:
    find(found, "3.12", NAME)["python"] = "3.9.9"


def fail(found: Rows) -> None:
    find(found, "3.12", NAME)["state"] = "failed"


def not_run(found: Rows) -> None:
    find(found, "3.12", NAME).update(state="not run", passed=0, suite=[])


def be_skipped_where_it_is_possible(found: Rows) -> None:
    find(found, "3.12", NAME).update(state="missing", reason="impossible: says who", suite=[])


def lose_a_test(found: Rows) -> None:
    find(found, "3.12", NAME)["suite"].remove("test_growth")


def have_no_good_reason(found: Rows) -> None:
    find(found, "3.12", "wasmer-memfd-pooling-auto-mprotect")["reason"] = "wasmer is not installed"


def become_possible(found: Rows) -> None:
    find(found, "3.10", "wasmer-memfd-pooling-auto-ftruncate").update(state="passed", reason=None)


def be_of_another_matrix(found: Rows) -> None:
    found["3.12", "anonymous"].append({**find(found, "3.12", NAME), "reset": "reboot"})


def run_nothing(found: Rows) -> None:
    for row in itertools.chain(*found.values()):
        row["suite"] = []


WRONG = {
    disappear: f"3.12 {NAME} disappeared",
    lose_a_coordinate: f"3.12 {NAME} disappeared",
    lose_a_leg: f"3.12 {NAME} disappeared",
    run_twice: f"3.10-anonymous.matrix.json has {NAME} a second time",
    be_of_another_python: f"3.12 {NAME} disappeared",
    fail: f"3.12 {NAME} is failed, expected: passed",
    not_run: f"3.12 {NAME} is not run, expected: passed",
    be_skipped_where_it_is_possible: f"3.12 {NAME} is missing, expected: passed",
    lose_a_test: f"3.12 {NAME} did not run test_growth",
    have_no_good_reason: "3.12 wasmer-memfd-pooling-auto-mprotect is missing for no reason",
    become_possible: "3.10 wasmer-memfd-pooling-auto-ftruncate is passed, expected: refused",
    be_of_another_matrix: "wasmtime-anonymous-on-demand-reboot-ftruncate is in no matrix",
    run_nothing: "no cell passed the suite",
}


@pytest.mark.parametrize("happen", WRONG, ids=lambda each: each.__name__)
def test_a_matrix_fails_whose_cells(happen: Callable[[Rows], None], tmp_path: Path) -> None:
    found = whole_matrix()
    happen(found)
    status, said = verdict(found, tmp_path)
    assert status == 1
    assert WRONG[happen] in said
    assert (tmp_path / "kept" / "matrix.txt").exists()


def test_what_the_tests_write_is_what_the_judge_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One leg's summary has a row for each of its cells, under the judge's names."""
    namespace: dict[str, Any] = {"__name__": "judge"}
    exec(compile(JUDGE.read_text(), str(JUDGE), "exec"), namespace)
    for row in conftest.summary():
        assert set(namespace["COORDINATES"]) < set(row)
        for coordinate, values in namespace["COORDINATES"].items():
            assert row[coordinate] in values
        cell = tuple(row[each] for each in namespace["COORDINATES"])
        expected = namespace["expected_state"](".".join(row["python"].split(".")[:2]), cell)
        assert (expected == "missing") is (row["state"] == "missing")
