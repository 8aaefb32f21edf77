"""The benchmark: measuring, keeping and showing a run, and judging its limits."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from memslot_plugin import bench
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import lib
from memslot_plugin.bench import (
    FAMILIES,
    Bench,
    baseline,
    cycle,
    grids,
    live,
    plot,
    request,
    snapshot,
)
from memslot_plugin.bench import results as r
from memslot_plugin.bench.memory import Guestless, Pages, guestless, image_of, strategy
from memslot_plugin.cli import main
from memslot_plugin.errors import MemslotError
from memslot_plugin.hosts import open_host
from memslot_plugin.memory.probe import probe
from memslot_plugin.tests.hosts import INSTALLED as HOSTS

MIB = 1 << 20
Measure = Callable[..., r.Family]

pytestmark = [
    pytest.mark.skipif(not probe().memfd.works, reason="impossible: no memfd, no image to measure"),
    pytest.mark.skipif(not probe().pagemap.works, reason="impossible: no PAGEMAP_SCAN here"),
]

needs_a_runtime = pytest.mark.skipif(not HOSTS, reason="no runtime is installed")


class Once(Bench):
    """A benchmark with one round per case."""

    def rounds(self, subjects: Any, seconds: float, **_: int) -> dict[str, list[float]]:
        return super().rounds(subjects, seconds, fewest=1, most=1, warm_up=0)


@pytest.fixture
def guest() -> Iterator[Guestless]:
    with image_of(MIB) as image, guestless(image, MIB) as made:
        yield made


# Memory


def content(guest: Guestless) -> list[bytes]:
    """Return the bytes of each page."""
    return [ctypes.string_at(guest.slot.base + at, P) for at in range(0, guest.byte_size, P)]


@pytest.mark.parametrize("how", ["pagemap", "madvise", "auto", "copy"])
def test_floor_and_reset_restore_the_pages_that_were_written(guest: Guestless, how: str) -> None:
    pristine, pages = content(guest), Pages.spread(16, MIB)
    for restore in (lambda: guest.floor(pages), lambda: guest.reset(strategy(how))):
        before = pristine
        for _ in range(2):  # other bytes each time
            pages.write(guest.slot.base)
            after = content(guest)
            assert [page for page in range(256) if before[page] != after[page]] == [
                *range(0, 256, 16)
            ]
            before = after
        assert restore() > 0
        assert content(guest) == pristine


def test_pages_that_are_read_alone_stay_shared(guest: Guestless) -> None:
    assert [Pages.spread(count, MIB).count for count in (0, 1, 7, 256, 1000)] == [0, 1, 7, 256, 256]
    assert lib.ms_bench_read(guest.slot.base, MIB) > 0
    assert guest.slot.private_runs() == []


# Rows, claims, runs


def test_ratios_are_taken_round_by_round_and_have_a_median_with_quartiles() -> None:
    assert r.Spread.of([4, 1, 3, 2, 5]) == r.Spread(3, 2, 4, 5)
    assert r.Spread.of([7.5]) == r.Spread(7.5, 7.5, 7.5, 1)
    ours, theirs = [1.0, 10.0, 100.0], [2.0, 20.0, 200.0]
    assert r.Row.compare({}, ours, "x", theirs).ratio.median == 0.5
    assert r.Row.compare({}, ours, "x", theirs, gain=True).ratio == r.Spread(2, 2, 2, 3)
    with pytest.raises(ValueError, match="zip"):
        r.Row.compare({}, ours, "x", theirs[:2])


def test_claim_at_its_limit_holds_and_above_it_fails() -> None:
    assert [r.Claim("", each, 4).holds for each in (3.9, 4, 4.1)] == [True, True, False]
    claims = [r.Claim("", each, 4, at_least=True) for each in (3.9, 4, 4.1)]
    assert [claim.holds for claim in claims] == [False, True, True]


def test_number_of_any_size_is_written_in_a_readable_unit() -> None:
    shown = [r.times(number) for number in (None, 0.9, 1.066, 12.34, 1234)]
    assert shown == ["-", "0.90x", "1.07x", "12.3x", "1,234x"]
    assert r.claimed(r.Claim("", 0, 0, kind="nanoseconds"), 371.0) == "0.37 us"
    assert r.claimed(r.Claim("", 0, 0, kind="count"), 2.004) == "2"


RESET = {"strategy": "auto", "MiB": 1, "read": "300 pages", "pages written": 16}
CYCLE = {"strategy": "auto", "pages written": 64, "where": "side by side"}
LARGE = {"guest": "4 MiB", "pages written": 1, "host": "wasmer", "against": "wasmer alone"}

MADE: list[Any] = [
    ("reset", 1.2, 1, RESET, [(1.2, 1.25)]),
    ("reset", 1.3, 1, {**RESET, "strategy": "pagemap"}, [(1.3, 1.25)]),
    ("reset", 9, 1, {**RESET, "read": "nothing"}, []),
    ("reset", 9, 1, {**RESET, "pages written": 0}, []),
    ("cycle", 5, 1, CYCLE, [(5, 4)]),
    ("cycle", 9, 1, {**CYCLE, "where": "over 64 MiB"}, []),
    ("cycle", 1.1, 1, {"workload": "steady", "strategy": "auto"}, [(1.1, 1.25)]),
    ("cycle", 9, 1, {"workload": "steady", "strategy": "madvise"}, []),
    ("request", 70, 1, {**LARGE, "memslot": request.NEW}, [(70, 60)]),
    ("request", 200, 1, {**LARGE, "memslot": request.RESET}, [(200, 150)]),
    ("density", 50, 1, {"host": "wasmer", "what": "bytes"}, [(50, 40)]),
    ("density", 9, 1, {"host": "wasmtime", "what": "bytes"}, []),
    ("density", 9, 1, {"host": "wasmtime", "what": "mappings"}, []),
    ("snapshot", 12, 1, {"guest": "QuickJS", "host": "wasmtime"}, [(12, 10)]),
    ("snapshot", 190, 1, {"guest": "lodash", "host": "wasmer"}, [(190, 200)]),
]
"""Family, ratio, cost and labels of a row, and the measured numbers and limits of its claims."""


def row(ratio: float, cost: float, labels: dict[str, Any]) -> r.Row:
    """Return a row of equal samples."""
    one, other = (r.Spread(each, each, each, 1) for each in (ratio, cost))
    return r.Row(labels, "x", one, other, other)


def claims_about(name: str, rows: list[r.Row]) -> tuple[r.Claim, ...]:
    family: Any = FAMILIES[name]
    if name == "reset":
        return tuple(family.over_the_floor(rows))
    return tuple(r.judge(rows, family.LIMITS))


@pytest.mark.parametrize("case", MADE, ids=lambda case: f"{case[0]}: {[*case[3].values()]}")
def test_claim_judges_a_row_that_has_a_limit(case: Any) -> None:
    name, ratio, cost, labels, expected = case
    claims = claims_about(name, [row(ratio, cost, labels)])
    assert [(claim.measured, claim.limit) for claim in claims] == expected


def test_claim_over_the_floor_is_about_the_worst_number_of_pages() -> None:
    ratios = {1: 1.2, 64: 1.3, 256: 1.1}
    rows = [row(ratio, 1, {**RESET, "pages written": pages}) for pages, ratio in ratios.items()]
    assert [claim.measured for claim in claims_about("reset", rows)] == [1.3]


@pytest.mark.parametrize(("bare", "expected"), [(1.95, [(1.5, 1.7), (1.9, 1.8)]), (1.5, [])])
def test_claim_about_two_workers_is_made_only_if_two_bare_loops_scale(
    bare: float, expected: list[tuple[float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    ratios = {bench.scaling.MACHINE: bare, bench.scaling.THREADS: 1.5, bench.scaling.FORK: 1.9}
    found = bench.scaling.judged([row(ratio, 1, {"two": two}) for two, ratio in ratios.items()])
    claims = [each for each in found if isinstance(each, r.Claim)]
    assert [(claim.measured, claim.limit) for claim in claims] == expected


def made(*names: str) -> r.Run:
    """Return a run of made families, each with a case that could not be measured."""
    families = []
    for name in names:
        rows = [row(*numbers) for family, *numbers, _ in MADE if family == name]
        skipped = (f"{name}: reasons",)
        families.append(r.Family(name, tuple(rows), claims_about(name, rows), skipped))
    words = ("date", "processor", "processors", "kernel", "python")
    return r.Run({"versions": {"memslot": "1"}, **dict.fromkeys(words, "?")}, True, (*families,))


# Families


def invoke(*arguments: str | Path) -> Result:
    runner = CliRunner(env={"COLUMNS": "160"})
    return runner.invoke(main, ["bench", *map(str, arguments)])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Measure a family once by the command, with smaller constants, and check that its tables are rectangles."""

    def measured(name: str, *options: str | Path, **small: object) -> r.Family:
        monkeypatch.setattr(bench, "Bench", Once)
        for constant, value in small.items():
            monkeypatch.setattr(FAMILIES[name], constant, value)
        result = invoke("--quick", "--json", "--only", name, *options)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        found = r.Run.read(json.loads(result.stdout))
        assert (found.quick, [each.name for each in found.families]) == (True, [name])
        assert found.machine["versions"]["memslot"]
        (family,) = found.families
        for grid in grids(family):
            assert {len(line) for line in grid.rows} == {len(grid.columns)}
        return family

    return measured


def values(family: r.Family, label: str) -> set[r.Label]:
    return {each.labels[label] for each in family.rows if label in each.labels}


def cells(family: r.Family) -> int:
    """Return the ratios in the tables."""
    shown = (cell for grid in grids(family) for line in grid.rows for cell in line)
    return sum(cell.endswith(("x", ")")) for cell in shown)


PEERS = {f"{host} alone" for host in HOSTS}
if "wasmtime" in HOSTS:
    PEERS |= {"its pool, the better", *(["extism"] if importlib.util.find_spec("extism") else [])}

RESETS, ALL = {"pagemap", "auto"}, {*cycle.WORKLOADS, cycle.TWO_GUESTS}
BYTES_AND_MAPPINGS = {"QUICK_INSTANCES": 2, "chosen": lambda _: (HOSTS[:1], [])}
QUICK_RESET = {"QUICK_IMAGES": (1, 2), "QUICK_DIRTY": (0, 1)}
QUICK_CYCLE = {"QUICK_WRITTEN": (64,), "GUEST": 4 * MIB, "BLOCK": 2, "SHORT_BLOCK": 2}
QUICK_REQUEST = {"SIZES": (65536,), "WRITTEN": (1,), "BLOCK": 4}

SMALL: list[tuple[str, dict[str, Any], str, set[str], int, int]] = [
    ("reset", QUICK_RESET, "strategy", RESETS, 2 * 2 * 3 * 2, 7),
    ("cycle", QUICK_CYCLE, "workload", ALL, 2 * 2 + 5 * 3, 6),
    ("request", QUICK_REQUEST, "against", PEERS, 2 * len(PEERS), len(HOSTS)),
    ("density", BYTES_AND_MAPPINGS, "what", {"bytes", "mappings"}, 0, len(HOSTS[:1])),
]
"""Family, smaller constants, a label, its values in the rows, ratios in the tables, and claims."""


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case[0])
def test_family_measured_once_has_a_row_for_each_case(case: Any, measured: Measure) -> None:
    name, small, label, expected, shown, claims = case
    if name in ("request", "density") and not HOSTS:
        pytest.skip("no runtime is installed")
    family = measured(name, **small)
    assert values(family, label) == expected
    assert (cells(family), len(family.claims)) == (shown, claims)


def test_family_scaling_adds_threads_and_processes(measured: Measure) -> None:
    processes = {bench.scaling.FORK: bench.scaling.PROCESSES[bench.scaling.FORK]}
    family = measured("scaling", QUICK_SECONDS=0.01, PROCESSES=processes)
    threads = {bench.scaling.THREADS} if "wasmtime" in HOSTS else set()
    assert values(family, "two") == {bench.scaling.MACHINE, bench.scaling.FORK, *threads}
    with image_of(bench.scaling.GUEST) as image:
        assert bench.scaling._processes(image, "spawn")(1, 0.01) > 0


GUEST = """(module (memory (export "memory") 1)
  (data (i32.const 0) "\\10\\00\\00\\00\\02\\00\\00\\00\\07") (data (i32.const 16) "42")
  (func (export "qjs_alloc") (param i32) (result i32) (i32.const 1024))
  (func (export "eval_code") (param i32 i32 i32) (result i32) (i32.eqz (local.get 1)))
  (func (export "get_string") (param i32) (result i32) (i32.const 0))
  (func (export "qjs_last_ptr") (result i32) (i32.const 16))
  (func (export "qjs_last_len") (result i32) (i32.const 2)))"""
"""A guest that answers 42 to each script, as QuickJS. An empty script fails."""


@needs_a_runtime
def test_family_snapshot_measures_the_guests_of_a_folder_and_names_the_others(
    measured: Measure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = baseline.assemble(GUEST)
    (tmp_path / "lodash.min.js").write_text("var _")
    # The installed package: found, and not imported.
    package = tmp_path / "site" / "quickjs_rs"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError")
    (package / "_guest.wasm").write_bytes(module)
    monkeypatch.syspath_prepend(package.parent)
    lodash = snapshot.SCRIPTS["lodash"]._replace(answer="42")
    scripts = {"QuickJS": snapshot.SCRIPTS["QuickJS"], "lodash": lodash}
    small = {"SCRIPTS": scripts, "BLOCK": 2, "BOOTS": 2}
    family = measured("snapshot", "--guests", tmp_path, **small)
    assert values(family, "host") == set(HOSTS)
    assert values(family, "guest") == {"QuickJS", "lodash"}
    assert cells(family) == len(family.rows)
    family = measured("snapshot", **small)
    assert "lodash, because --guests names no folder with lodash*.js" in family.skipped


@needs_a_runtime
def test_real_guest_that_fails_raises() -> None:
    with (
        open_host(HOSTS[0]) as host,
        host.prepare(baseline.assemble(GUEST)).instantiate() as instance,
        pytest.raises(ValueError, match="status 1 to b''"),
    ):
        snapshot._Prompt(instance, 8).ask(b"")


def test_rounds_without_time_left_still_run_the_fewest() -> None:
    samples = Bench().rounds({"a": lambda: 1.0, "b": lambda: 2.0}, seconds=0, fewest=3)
    assert samples == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_density_up_to_any_bound_ends_all_its_instances() -> None:
    ended: list[object] = []
    assert live.hold(object, id, ended.append, 3).instances == len(ended) == 3
    assert live.hold(object, id, ended.append, 1).bytes is None  # nothing to divide by
    assert live.hold(object, id, ended.append, 9, most_bytes=-1 << 40).instances == 2
    few = [object(), object()]

    def begin() -> object:
        if not few:
            raise MemslotError("full")
        return few.pop()

    assert live.hold(begin, id, ended.append, 9).instances == 2
    assert len(ended) == 8
    with pytest.raises(MemslotError, match="full"):
        live.hold(begin, id, ended.append, 9)


# The command

HOLDS, FAILS = made("request"), made("request", "snapshot")  # lodash: 190 times of 200


@pytest.mark.parametrize(
    ("found", "options", "code"),
    [(HOLDS, ["--check"], 0), (FAILS, ["--check"], 1), (FAILS, [], 0)],
    ids=["holds", "fails", "unchecked"],
)
def test_bench_check_with_a_failed_claim_exits_with_1(
    found: r.Run, options: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "run", lambda *_: found)
    result = invoke(*options, "--json")
    assert (result.exit_code, result.stderr) == (code, "")
    assert r.Run.read(json.loads(result.stdout)) == found
    pictures: list[object] = []
    monkeypatch.setattr(plot, "draw", lambda *drawn: pictures.append(drawn))
    result = invoke(*options, "--plot", "run.svg")
    assert pictures == [(found, "run.svg")]
    assert (result.exit_code, result.stderr) == (code, "")
    assert "Not measured: request: reasons" in result.stdout
    verdicts = [line.split()[-1] for line in result.stdout.splitlines() if " at least " in line]
    assert verdicts == ["yes", "yes", *(["yes", "no"] if found is FAILS else [])]


def test_bench_check_without_any_judged_claim_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run", lambda *_: made())
    assert (invoke("--check").exit_code, invoke().exit_code) == (1, 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "fake"], "'fake' is not one of 'wasmtime', 'wasmer'"),
        (["--plot", "run.gif"], "a plot is .svg or .png, not run.gif"),
        (["--plot", "run.svg"], "a plot needs matplotlib (import of matplotlib.figure"),
        (["--plot", "run.svg"], "install memslot[plot], or use --json"),
        (["--guests", __file__], "is a file"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_measured(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(bench, "run", None)
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr


DRAW = """
import json, sys
from memslot_plugin.bench import plot
from memslot_plugin.bench.results import Run
from memslot_plugin.errors import SettingError
run, (svg, png, nowhere) = Run.read(json.load(sys.stdin)), sys.argv[1:]
plot.draw(run, svg)
plot.draw(run, png)
try:
    plot.draw(run, nowhere)
except SettingError as error:
    print(error)
"""


def test_plot_of_a_run_is_a_picture_in_both_formats(tmp_path: Path) -> None:
    svg, png, nowhere = tmp_path / "run.svg", tmp_path / "run.png", tmp_path / "none" / "run.svg"
    command = [sys.executable, "-c", DRAW, *map(str, (svg, png, nowhere))]
    document = json.dumps(made("cycle", "density").document())
    done = subprocess.run(command, input=document, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"the plot cannot be written to {nowhere}: No such file or directory\n"
    assert svg.read_bytes().startswith(b"<?xml")
    assert png.read_bytes().startswith(b"\x89PNG")
