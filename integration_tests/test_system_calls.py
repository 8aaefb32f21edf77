"""System calls of a lease: counted in the core on the cells, and seen by strace for the whole process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin._core import PAGE_SIZE
from memslot_plugin.tests.slots import counted
from memslot_plugin.tests.tracing import Traced, trace

from . import toy
from .cells import PLAIN_CELLS, Cell
from .toy import PAGE

ROOT = Path(__file__).resolve().parents[1]
MAPPING = ("mmap", "munmap", "mprotect")


def mapping(made: dict[str, int]) -> dict[str, int]:
    return {name: made[name] for name in (*MAPPING, "ftruncate") if name in made}


def serve(guest: memslot.Guest, *, writes: int = 3) -> None:
    with guest.instantiate() as instance:
        for page in range(writes):
            instance.call("store", page * PAGE_SIZE, 255)


def test_lease_of_the_previous_guest_maps_nothing(pooling_cell: Cell) -> None:
    with pooling_cell.serving(slots=2) as host:
        guest = host.prepare(toy.A)
        serve(guest)
        with counted() as made:
            for writes in range(0, 32, 5):
                serve(guest, writes=writes)
            with guest.instantiate() as instance:
                for _ in range(8):
                    instance.call("store", 1, 1)
                    instance.reset()
        assert mapping(made) == {}


def test_growth_of_a_memory_changes_protection_once_and_maps_nothing(cell: Cell) -> None:
    with cell.serving(slots=2) as host:
        guest = host.prepare(toy.A)
        serve(guest)
        with guest.instantiate() as instance:
            with counted() as made:
                assert instance.call("grow", 3) == 2
            # wasmer makes this call
            assert mapping(made) == ({} if cell.host == "wasmer" else {cell.growth: 1})


def test_lease_of_another_guest_maps_once_per_image_that_goes_and_comes(pooling_cell: Cell) -> None:
    with pooling_cell.serving(slots=1) as host:
        guests = [host.prepare(module) for module in (toy.A, toy.B)]
        extents = sum(len(guest.images[0].extents) for guest in guests)
        for guest in guests:
            serve(guest)
        with counted() as made:
            for guest in guests:
                serve(guest)
        # Zeros are mapped over the old image; the new one is mapped, or copied by the fallback.
        # Sizes are equal: protections stay.
        assert mapping(made) == {"mmap": (2 if pooling_cell.backend == "memfd" else 1) * extents}


def test_on_demand_memory_without_an_image_makes_no_mprotect(on_demand_cell: Cell) -> None:
    expected = {}  # wasmer makes calls of its own
    if on_demand_cell.host != "wasmer":
        reserved_and_accessible = 2 + (on_demand_cell.growth == "ftruncate")
        expected = {"mmap": reserved_and_accessible, "munmap": 1}
    with on_demand_cell.serving(slots=2) as host:
        guest = host.prepare(toy.ZEROS)
        serve(guest)
        with counted() as made:
            serve(guest)
        assert {name: made[name] for name in MAPPING if name in made} == expected


# The whole process, runtime and interpreter included

PROGRAM = """
import json, sys
from integration_tests import toy
from integration_tests.cells import Cell

def serve(guest, times):
    for _ in range(times):
        with guest.instantiate() as instance:
            instance.call("store", 0, 255)

told = {}
for name, backend in json.loads(sys.argv[1]):
    host = Cell(name, backend).open(slots=1)
    guests = [host.prepare(module) for module in (toy.A, toy.B)]
    for guest in (*guests, *guests):
        serve(guest, 300)
    with guests[0].instantiate() as instance:
        base = instance.live.memories[0].base
    serve(guests[0], 300)
    mark(f"{name}-{backend} same")
    serve(guests[0], 300)
    mark(f"{name}-{backend} other")
    for _ in range(10):
        serve(guests[1], 1)
        serve(guests[0], 1)
    mark("end")
    told[f"{name}-{backend}"] = base, [
        (each.offset, each.length) for guest in guests for each in guest.images[0].extents]
    host.close()
print(json.dumps(told))
"""

Traces = tuple[dict[str, list[Traced]], dict[str, Any]]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """Return the calls that change mappings, by section, and the output of the program."""
    served = [(cell.host, cell.backend) for cell in PLAIN_CELLS if not cell.missing]
    printed, sections = trace(
        PROGRAM,
        json.dumps(served),
        calls=(*MAPPING, "mremap"),
        log=tmp_path_factory.mktemp("traced") / "log",
        cwd=ROOT,
        # malloc and not CPython's allocator, which maps an arena at any moment.
        env={**os.environ, "PYTHONMALLOC": "malloc"},
    )
    return sections, json.loads(printed)


def test_process_traced_by_strace_maps_nothing_for_the_previous_guest_and_images_for_another(
    traces: Traces, plain_cell: Cell
) -> None:
    sections, told = traces
    name = f"{plain_cell.host}-{plain_cell.backend}"
    base, extents = told[name]
    assert sections[f"{name} same"] == []
    seen = {(call.name, call.address - base, call.length) for call in sections[f"{name} other"]}
    assert seen == {("mmap", *extent) for extent in extents}
    assert max(offset + length for offset, length in extents) <= 2 * PAGE
