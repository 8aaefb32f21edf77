"""What a lease costs in system calls: counted in the core on every cell, and seen by strace for the whole process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin import _core
from memslot_plugin._core import PAGE_SIZE

from . import toy
from .cells import Cell
from .toy import PAGE

ROOT = Path(__file__).resolve().parents[1]
MAPPING = ("mmap", "munmap", "mprotect")


@contextlib.contextmanager
def counted() -> Iterator[Callable[[str], int]]:
    """How often the core made a system call since the block began."""
    before = _core.counters()
    yield lambda call: _core.counters()[call] - before[call]


def serve(guest: memslot.Guest, *, writes: int = 3) -> None:
    with guest.instantiate() as instance:
        for page in range(writes):
            instance.call("store", page * PAGE_SIZE, 255)


def test_the_same_guest_again_maps_nothing(pooling_cell: Cell) -> None:
    with pooling_cell.serving(slots=2) as host:
        guest = host.prepare(toy.A)
        serve(guest)
        with counted() as count:
            for writes in range(32):
                serve(guest, writes=writes)
            assert {call: count(call) for call in MAPPING} == dict.fromkeys(MAPPING, 0)
        with guest.instantiate() as instance, counted() as count:
            for _ in range(8):
                instance.call("store", 1, 1)
                instance.reset()
            assert {call: count(call) for call in MAPPING} == dict.fromkeys(MAPPING, 0)


def test_growth_changes_protection_once_and_maps_nothing(cell: Cell) -> None:
    with cell.serving(slots=2) as host:
        guest = host.prepare(toy.A)
        serve(guest)
        with guest.instantiate() as instance, counted() as count:
            assert instance.call("grow", 3) == 2
            assert (count("mmap"), count("munmap")) == (0, 0)
            by_us = cell.host != "wasmer"  # wasmer makes the call itself
            assert count("mprotect") == (by_us and cell.growth == "mprotect")
            assert count("ftruncate") == (by_us and cell.growth == "ftruncate")


def test_another_guest_costs_a_mapping_for_each_image_that_goes_and_comes(
    pooling_cell: Cell,
) -> None:
    with pooling_cell.serving(slots=1) as host:
        guests = [host.prepare(module) for module in (toy.A, toy.B)]
        extents = sum(len(guest.images[0].extents) for guest in guests)
        for guest in guests:
            serve(guest)
        with counted() as count:
            for guest in guests:
                serve(guest)
            # Zeros are mapped over each image that goes; the one that comes is mapped, or copied in the fallback.
            # Sizes are equal, so that protections stay.
            assert count("mmap") == (2 if pooling_cell.backend == "memfd" else 1) * extents
            assert (count("mprotect"), count("munmap"), count("ftruncate")) == (0, 0, 0)


def test_on_demand_a_memory_without_an_image_costs_no_mprotect(on_demand_cell: Cell) -> None:
    if on_demand_cell.host == "wasmer":
        expected = {"mmap": 0, "munmap": 0, "mprotect": 0}  # all of it is wasmer's own
    else:
        expected = {
            "mmap": 2,
            "munmap": 1,
            "mprotect": 0,
        }  # the reservation, and what is accessible of it
        if on_demand_cell.growth == "ftruncate":
            expected["mmap"] += 1
    with on_demand_cell.serving(slots=2) as host:
        guest = host.prepare(toy.ZEROS)
        serve(guest)
        with counted() as count:
            serve(guest)
            assert {call: count(call) for call in MAPPING} == expected


# The whole process, runtime and interpreter included

PROGRAM = """
import json, os, sys
from integration_tests import toy
from integration_tests.cells import Cell

host = Cell(sys.argv[1], sys.argv[2]).open(slots=1)
guests = [host.prepare(module) for module in (toy.A, toy.B)]

def serve(guest, times):
    for _ in range(times):
        with guest.instantiate() as instance:
            instance.call("store", 0, 255)

for guest in (*guests, *guests):
    serve(guest, 300)
with guests[0].instantiate() as instance:
    base = instance.memory._require(0, 0)
serve(guests[0], 300)
os.access("/mark/same", 0)
serve(guests[0], 300)
os.access("/mark/other", 0)
for _ in range(10):
    serve(guests[1], 1)
    serve(guests[0], 1)
os.access("/mark/end", 0)
print(json.dumps({"base": base, "extents": [
    [(extent.offset, extent.length) for extent in guest.images[0].extents] for guest in guests]}))
host.close()
"""


@pytest.fixture
def traced(
    plain_cell: Cell, tmp_path: Path
) -> tuple[dict[str, list[tuple[str, int, int]]], dict[str, Any]]:
    """The calls that change mappings between the marks (name, address, length), and what the program said."""
    if shutil.which("strace") is None:
        pytest.skip("impossible: strace is not installed")
    log = tmp_path / "strace.log"
    command = [
        "strace",
        "-f",
        "-o",
        str(log),
        "-e",
        "trace=mmap,munmap,mprotect,mremap,access,faccessat",
    ]
    command += [sys.executable, "-c", PROGRAM, plain_cell.host, plain_cell.backend]
    # The interpreter's own allocator maps an arena whenever it happens to need one; malloc has the heap for that.
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONMALLOC": "malloc"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if "PTRACE" in done.stderr:
        pytest.skip("impossible: this machine does not let strace trace")
    assert done.returncode == 0, done.stderr
    phases: dict[str, list[tuple[str, int, int]]] = {}
    current: list[tuple[str, int, int]] = []
    for line in log.read_text().splitlines():
        if mark := re.search(r'"/mark/(\w+)"', line):
            current = phases.setdefault(mark[1], [])
        elif found := re.search(r"(m\w+)\((0x[0-9a-f]+|NULL), (\d+)", line):
            address = 0 if found[2] == "NULL" else int(found[2], 16)
            current.append((found[1], address, int(found[3])))
    return phases, json.loads(done.stdout)


def test_the_process_maps_nothing_for_the_same_guest_and_the_images_range_for_another(
    traced: tuple[dict[str, list[tuple[str, int, int]]], dict[str, Any]],
) -> None:
    phases, told = traced
    assert phases["same"] == []
    extents = {tuple(extent) for guest in told["extents"] for extent in guest}
    seen = {(name, address - told["base"], length) for name, address, length in phases["other"]}
    assert seen == {("mmap", *extent) for extent in extents}
    assert max(offset + length for offset, length in extents) <= 2 * PAGE
