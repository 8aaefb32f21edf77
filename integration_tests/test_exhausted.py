"""Processes that run out of something: an error that names the limit, no loss, and service as before afterwards."""

from __future__ import annotations

import functools
import itertools
import json
from typing import Any

import pytest

from memslot_plugin.tests.profiles import FACTOR

from . import cells
from .cells import Cell
from .children import output

LIMITS = {
    "descriptors": "RLIMIT_NOFILE (ulimit -n) is 200",
    "mappings": " mappings in use",
    "address_space": "RLIMIT_AS (ulimit -v) is ",
    "data": "RLIMIT_DATA (ulimit -d) is ",
    "file_size": "RLIMIT_FSIZE (ulimit -f) is ",
}


@functools.cache
def told(cell: Cell) -> dict[str, Any]:
    """Return errors by way and amount, of a process that runs out of each in turn."""
    every = "2" if FACTOR == 1 else "1"
    return dict(
        json.loads(output("-m", "integration_tests.exhausted", cell.host, cell.backend, every))
    )


@pytest.mark.scales
@pytest.mark.parametrize("way", LIMITS)
def test_process_that_runs_out_gets_an_error_with_the_limit_and_serves_on(
    plain_cell: Cell, way: str
) -> None:
    rounds = told(plain_cell)[way]
    for error in itertools.chain(*rounds):
        assert error == "grow: -1" or (": SystemCallError: " in error and LIMITS[way] in error)
    assert rounds[-1] == []
    assert any(rounds) == takes(plain_cell, way)


def takes(cell: Cell, way: str) -> bool:
    """Return True if a host takes any of it: an image is a file, and a runtime maps its code."""
    if way in {"descriptors", "file_size"}:
        return cell.backend == "memfd"
    if way == "data":  # growth counts here alone
        return True
    if cell.host == "wasmer" and way == "mappings" and cell.backend == "anonymous":
        return False  # the fake host compiles nothing
    return cell.backend == "memfd" or cell.host in cells.REAL_HOSTS


def test_probe_without_descriptors_raises_and_finds_out_later() -> None:
    assert "RLIMIT_NOFILE (ulimit -n) is 200" in told(Cell("fake", "anonymous"))["probe"]
