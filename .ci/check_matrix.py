"""Puts the legs' matrices together, prints and keeps the whole one, and fails if a cell of it disappeared.

usage: check_matrix.py RESULTS KEPT PYTHON ...

RESULTS holds what .ci/run wrote: for each leg of the integration tests a file `LEG.matrix.json` with a row for every
cell of its backends.  KEPT is the folder that gets `matrix.json`, all rows, and `matrix.txt`, the table.  What the
matrix is stands here once more, so that a coordinate that is lost in the tests is missed.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

COORDINATES = {
    "host": ("fake", "wasmtime", "wasmer"),
    "backend": ("memfd", "anonymous"),
    "allocation": ("pooling", "on-demand"),
    "reset": ("madvise", "pagemap", "copy", "auto"),
    "growth": ("mprotect", "ftruncate"),
}
SIGNS = {"missing": "-", "refused": "x", "failed": "FAILED", "not run": "NOT RUN"}
"""How a state is shown in the table; a cell that passed shows how many tests did."""

Row = dict[str, Any]
Cell = tuple[str, ...]


def expected_state(python: str, cell: Cell) -> str:
    """What must have become of a cell; the tests say why one cannot exist, and this says which."""
    host, _, _, _, growth = cell
    if host == "wasmer" and tuple(map(int, python.split("."))) >= (3, 11):
        return "missing"
    if host == "wasmer" and growth == "ftruncate":
        return "refused"
    return "passed"


def read(results: Path, faults: list[str]) -> dict[tuple[str, Cell], Row]:
    """All rows by Python and cell."""
    rows: dict[tuple[str, Cell], Row] = {}
    for path in sorted(results.glob("*.matrix.json")):
        for row in json.loads(path.read_text()):
            python = row["python"].rpartition(".")[0]
            cell = tuple(row[coordinate] for coordinate in COORDINATES)
            if (python, cell) in rows:
                faults.append(f"{path.name} has {'-'.join(cell)} a second time")
            rows[python, cell] = row
    return rows


def judge(rows: dict[tuple[str, Cell], Row], pythons: list[str]) -> list[str]:
    """What is wrong with them."""
    faults = []
    wanted = list(itertools.product(pythons, itertools.product(*COORDINATES.values())))
    suite = {test for row in rows.values() if row["state"] == "passed" for test in row["suite"]}
    if not suite:
        faults.append("no cell passed the suite that every cell runs")
    for python, cell in wanted:
        name = f"{python} {'-'.join(cell)}"
        row = rows.get((python, cell))
        if row is None:
            faults.append(f"{name} disappeared")
            continue
        expected = expected_state(python, cell)
        if row["state"] != expected:
            faults.append(f"{name} is {row['state']}, expected: {expected}")
        elif expected != "passed" and not (row["reason"] or "").startswith("impossible: "):
            faults.append(f"{name} is {expected} for no reason that makes it impossible")
        elif expected == "passed" and (left_out := suite - set(row["suite"])):
            faults.append(f"{name} did not run {', '.join(sorted(left_out))}")
    for python, cell in sorted(set(rows) - set(wanted)):
        faults.append(f"{python} {'-'.join(cell)} is in no matrix that is known here")
    return faults


def table(rows: dict[tuple[str, Cell], Row], pythons: list[str]) -> str:
    """The whole matrix: how many tests passed in each cell, one Python after the other."""
    lines = [
        f"tests passed per cell on Python {', '.join(pythons)}; - missing, x refused, both with the reason below"
    ]
    *_, resets, growths = COORDINATES.values()
    for growth in growths:
        lines.append(f"{f'growth = {growth}':<30}" + "".join(f"{reset:>24}" for reset in resets))
        for where in itertools.product(*list(COORDINATES.values())[:3]):
            shown = []
            for reset in resets:
                found = [rows.get((python, (*where, reset, growth))) for python in pythons]
                shown.append(" ".join(map(_sign, found)))
            lines.append(f"{' '.join(where):<30}" + "".join(f"{each:>24}" for each in shown))
    reasons = Counter((row["state"], row["reason"]) for row in rows.values() if row["reason"])
    lines += [
        f"{state}: {count} cells, {reason}" for (state, reason), count in sorted(reasons.items())
    ]
    states = Counter(row["state"] for row in rows.values())
    lines.append(
        f"{len(rows)} cells: "
        + ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    )
    return "\n".join(lines) + "\n"


def _sign(row: Row | None) -> str:
    if row is None:
        return "GONE"
    return SIGNS.get(row["state"], str(row["passed"]))


def main() -> int:
    """Prints the table and what is wrong; 0 if nothing is."""
    results, kept, pythons = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    faults: list[str] = []
    rows = read(results, faults)
    faults += judge(rows, pythons)
    text = table(rows, pythons)
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "matrix.json").write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    (kept / "matrix.txt").write_text(text)
    print(text + f"kept as {kept / 'matrix.txt'} and matrix.json")
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
