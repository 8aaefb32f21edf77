"""Processes that run out of something: an error that names the limit, nothing lost, and served as before afterwards."""

from __future__ import annotations

import json

import pytest

from . import cells
from .cells import Cell
from .children import run

AMOUNTS = {
    "descriptors": (0, 1, 2),
    "mappings": (0, 1, 2, 3, 5, 8, 64),
    "address_space": (0, 1_000_000, 3_000_000, 70_000_000, 600_000_000),
    "data": (0, 100_000, 400_000, 1_000_000, 100_000_000),
    "file_size": (0, 4096, 200_000),
}
"""How much is left (bytes, or things), the last of which is enough."""

LIMITS = {
    "descriptors": "RLIMIT_NOFILE (ulimit -n) is 200",
    "mappings": " mappings in use",
    "address_space": "RLIMIT_AS (ulimit -v) is ",
    "data": "RLIMIT_DATA (ulimit -d) is ",
    "file_size": "RLIMIT_FSIZE (ulimit -f) is ",
}


@pytest.mark.parametrize("way", AMOUNTS)
def test_a_process_that_runs_out_is_told_of_what_and_serves_on(plain_cell: Cell, way: str) -> None:
    amounts = [str(amount) for amount in AMOUNTS[way]]
    done = run(
        "-m", "integration_tests.exhausted", plain_cell.host, plain_cell.backend, way, *amounts
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["limits"] == [2]
    rounds = told["rounds"]
    for each in rounds:
        assert each["lost"] == [], each
        for error in each["errors"]:
            assert error == "grow: -1" or ": SystemCallError: " in error, error
            assert error == "grow: -1" or LIMITS[way] in error, error
    assert rounds[-1]["errors"] == []
    met = any(each["errors"] for each in rounds)
    assert met == needs(plain_cell, way)


def needs(cell: Cell, way: str) -> bool:
    """Whether anything of a host's life takes some of it: an image is a file, and a runtime maps its code."""
    if way in {"descriptors", "file_size"}:
        return cell.backend == "memfd"
    if way == "data":  # which is where every growth counts
        return True
    if cell.host == "wasmer" and way == "mappings" and cell.backend == "anonymous":
        return False  # it compiles nothing here
    return cell.backend == "memfd" or cell.host in cells.REAL_HOSTS
