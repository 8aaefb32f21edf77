"""The benchmark: what it measures with, how a run is kept and shown; its figures are nobody's business here."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import lib
from memslot_plugin.bench import FAMILIES, Bench, cycle, grids, report, request, reset, run, warm
from memslot_plugin.bench import results as r
from memslot_plugin.bench.memory import Guestless, Pages, guestless, image_of, strategy
from memslot_plugin.bench.worker import received
from memslot_plugin.cli import main
from memslot_plugin.errors import MemslotError
from memslot_plugin.image import MemfdImage
from memslot_plugin.probe import probe

MIB = 1 << 20

pytestmark = [
    pytest.mark.skipif(not probe().memfd.works, reason="impossible: no memfd, no image to measure"),
    pytest.mark.skipif(not probe().pagemap.works, reason="impossible: no PAGEMAP_SCAN here"),
]

needs_a_runtime = pytest.mark.skipif(
    not (importlib.util.find_spec("wasmtime") or importlib.util.find_spec("wasmer")),
    reason="no runtime is installed",
)


@pytest.fixture(scope="module")
def image() -> Iterator[MemfdImage]:
    with image_of(MIB) as made:
        yield made


@pytest.fixture
def guest(image: MemfdImage) -> Iterator[Guestless]:
    with guestless(image, MIB) as made:
        yield made


# What it measures with


def content(guest: Guestless) -> bytes:
    return ctypes.string_at(guest.slot.base, guest.byte_size)


def changed(before: bytes, after: bytes) -> list[int]:
    return [
        page for page in range(len(after) // P) if before[page * P :][:P] != after[page * P :][:P]
    ]


def test_pages_are_written_each_time_anew_and_no_others(guest: Guestless) -> None:
    pages, before = Pages([0, 3, 255]), content(guest)
    for _ in range(2):
        pages.write(guest.slot.base)
        after = content(guest)
        assert changed(before, after) == [0, 3, 255]
        before = after


@pytest.mark.parametrize("count", [0, 1, 7, 256])
def test_spread_pages_are_different_and_inside(count: int) -> None:
    pages = Pages.spread(count, MIB)  # kept: a slice of its array does not own the numbers
    offsets = set(pages.offsets[0:count])
    assert len(offsets) == count
    assert all(offset < MIB and offset % P == 0 for offset in offsets)
    assert Pages.spread(1000, MIB).count == 256


@pytest.mark.parametrize("how", ["pagemap", "madvise", "auto"])
def test_the_floor_and_the_reset_do_the_same(guest: Guestless, how: str) -> None:
    pristine, pages = content(guest), Pages.spread(16, MIB)
    pages.write(guest.slot.base)
    floor = guest.floor_by_madvise() if how == "madvise" else guest.floor_by_pagemap(pages)
    assert content(guest) == pristine
    pages.write(guest.slot.base)
    assert content(guest) != pristine
    took = guest.reset(strategy(how))
    assert content(guest) == pristine
    assert floor > 0
    assert took > 0


def test_reading_makes_nothing_private(guest: Guestless) -> None:
    assert lib.ms_bench_read(guest.slot.base, MIB) > 0
    assert guest.slot.private_runs() == []


def test_a_received_image_is_the_same_file_and_closes_only_its_own() -> None:
    with image_of(MIB) as made:
        descriptor = made.fd
        copy = received(os.dup(descriptor), MIB)
        try:
            with guestless(copy, MIB) as one, guestless(made, MIB) as other:
                assert content(one) == content(other)
                Pages([5]).write(one.slot.base)
                assert changed(content(other), content(one)) == [5]
        finally:
            copy.close()
        assert made.fd == descriptor


# Rows, claims, runs


def test_a_spread_is_a_median_with_quartiles() -> None:
    assert r.Spread.of([4, 1, 3, 2, 5]) == r.Spread(3, 2, 4, 5)
    assert r.Spread.of([7.5]) == r.Spread(7.5, 7.5, 7.5, 1)


def test_ratios_are_taken_round_by_round() -> None:
    ours, theirs = [1.0, 10.0, 100.0], [2.0, 20.0, 200.0]
    assert r.Row.compare({}, ours, "x", theirs).ratio.median == 0.5
    assert r.Row.compare({}, ours, "x", theirs, gain=True).ratio == r.Spread(2, 2, 2, 3)
    with pytest.raises(ValueError, match="zip"):
        r.Row.compare({}, ours, "x", theirs[:2])


@pytest.mark.parametrize(
    ("measured", "limit", "at_least", "holds"),
    [
        (1.2, 1.25, False, True),
        (1.3, 1.25, False, False),
        (4, 4, True, True),
        (3.9, 4, True, False),
    ],
)
def test_a_claim_holds_up_to_its_limit(
    measured: float, limit: float, at_least: bool, holds: bool
) -> None:
    assert r.Claim("", measured, limit, at_least=at_least).holds is holds


def test_numbers_for_people() -> None:
    assert [r.times(number) for number in (0.9, 1.066, 12.34, 1234)] == [
        "0.90x",
        "1.07x",
        "12.3x",
        "1,234x",
    ]
    assert r.claimed(r.Claim("", 371.0, 500.0, kind="nanoseconds")) == "0.37 us"
    assert r.claimed(r.Claim("", 2.004, 4.0, kind="count")) == "2"


@pytest.fixture(scope="module")
def measured(image: MemfdImage) -> r.Run:
    """A little of several families."""
    bench = Bench(quick=True)
    rows = tuple(reset.cases(bench, image, 1, 16, reads=["nothing", "300 pages"], seconds=0.02))
    with image_of(warm.GUEST) as larger:
        warmed = tuple(warm.cases(bench, larger, 1, seconds=0.02))
    families = (r.Family("reset", rows, (reset.over_the_floor(rows),)), r.Family("warm", warmed))
    names = ("date", "processor", "processors", "kernel", "python")
    return r.Run({"versions": {"memslot": "1"}, **dict.fromkeys(names, "?")}, True, families)


def test_every_way_to_reset_is_measured_and_copy_where_the_guest_is_small(
    image: MemfdImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(mebibytes: int) -> set[r.Label]:
        rows = reset.cases(Bench(quick=True), image, mebibytes, 1, reads=["nothing"], seconds=0.002)
        return {row.labels["strategy"] for row in rows}

    assert named(1) == {"madvise", "pagemap", "auto", "copy"}
    monkeypatch.setattr(reset, "COPIED", 0)
    assert named(1) == {"madvise", "pagemap", "auto"}


def test_a_run_survives_json(measured: r.Run) -> None:
    text = json.dumps(measured.document())
    assert r.Run.read(json.loads(text)) == measured
    assert json.loads(text)["families"][0]["claims"][0]["holds"] in (True, False)


def test_every_row_has_its_place_in_a_table(measured: r.Run) -> None:
    for family in measured.families:
        cells = [cell for grid in grids(family) for row in grid.rows for cell in row]
        assert len([cell for cell in cells if cell.endswith(("x", ")"))]) == len(family.rows)


def test_the_report_replaces_its_section_and_nothing_else(measured: r.Run) -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.insert(page, measured)
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "old" not in once
    assert "| read | MiB | 16 |" in once
    assert " us" not in report.section(measured)  # ratios, never bare times
    assert report.insert(once, measured) == once
    with pytest.raises(ValueError, match="section"):
        report.insert("no markers", measured)


def test_every_family_says_what_it_is() -> None:
    assert list(FAMILIES) == ["reset", "cycle", "request", "density", "warm", "scaling"]
    for name, family in FAMILIES.items():
        assert (family.__doc__ or "").startswith(f"Family `{name}`: ")


def test_a_workload_measures_all_strategies() -> None:
    with image_of(cycle.GUEST) as large:
        rows = list(cycle.workload(Bench(quick=True), large, f"steady {cycle.FEW} pages", 0.05))
    assert [row.labels["strategy"] for row in rows] == ["madvise", "pagemap", "auto"]
    assert any(row.ratio == r.Spread(1, 1, 1, row.ratio.count) for row in rows)


@needs_a_runtime
def test_requests_are_compared_with_every_peer_that_is_here() -> None:
    host = "wasmtime" if importlib.util.find_spec("wasmtime") else "wasmer"
    rows = list(request.cases(Bench(quick=True), host, 64 * 1024, 1, seconds=0.05))
    assert {row.labels["memslot"] for row in rows} == {request.NEW, request.RESET}
    assert f"{host} alone" in {row.baseline for row in rows}
    if host == "wasmtime":
        assert "its pool, the better" in {row.baseline for row in rows}


def test_a_run_stops_where_it_is_told_to() -> None:
    def stop() -> None:
        raise MemslotError("enough")

    with pytest.raises(MemslotError, match="enough"):
        run(Bench(quick=True, check=stop), only=["warm"])


# The command


def bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_the_command_prints_a_run_as_json() -> None:
    result = bench("--quick", "--only", "warm", "--json")
    assert result.exit_code == 0, result.output
    found = r.Run.read(json.loads(result.stdout))
    assert [family.name for family in found.families] == ["warm"]
    assert found.quick
    assert found.machine["versions"]["memslot"]


def test_the_command_prints_tables() -> None:
    result = bench("--quick", "--only", "warm")
    assert result.exit_code == 0, result.output
    assert "after Pool.warm" in result.stdout
    assert "p99" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "fake"], "--host fake is not allowed: auto, wasmtime, wasmer"),
        (["--plot", "run.gif"], "a plot is .svg or .png, not run.gif"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    arguments: list[str], says: str
) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr


BEGINNINGS = {".svg": b"<?xml", ".png": b"\x89PNG"}


def in_a_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Of its own, for numpy and extism have threads that stay."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_a_plot_is_a_picture(tmp_path: Path, suffix: str) -> None:
    picture = tmp_path / f"run{suffix}"
    done = in_a_process(
        "-m", "memslot_plugin.cli", "bench", "--quick", "--only", "warm", "--plot", picture
    )
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(BEGINNINGS[suffix])
    assert picture.stat().st_size > 10_000


WITHOUT_MATPLOTLIB = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
from memslot_plugin.cli import main
main(sys.argv[1:])
"""


def test_a_plot_without_matplotlib_is_a_sentence_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    done = in_a_process("-c", WITHOUT_MATPLOTLIB, "bench", "--plot", tmp_path / "run.svg")
    assert done.returncode == 2, done.stderr
    assert "a plot needs matplotlib (No module named 'matplotlib" in done.stderr
    assert "install memslot[plot], or use --json" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


PEERS = """
from memslot_plugin.bench.guests import writer
from memslot_plugin.bench.peers import peers
found = peers("wasmtime", writer(65536), "touch_1")
for serve in found.values():
    serve()
print(*found, sep=", ")
"""


@pytest.mark.skipif(not importlib.util.find_spec("wasmtime"), reason="wasmtime is not installed")
def test_everybody_who_is_compared_with_serves_a_request() -> None:
    done = in_a_process("-c", PEERS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wasmtime alone, ")
    assert "extism" in done.stdout.strip().split(", ")
