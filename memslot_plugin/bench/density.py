"""Family `density`: what a live instance costs in private memory and in mappings, against the runtimes alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

from memslot_plugin.bench.peers import chosen
from memslot_plugin.bench.results import Claim, Family, Grid, Label, Row, Spread
from memslot_plugin.bench.runner import Bench
from memslot_plugin.errors import MemslotError

NAME = "density"
TITLE = "A live instance of a guest with 4 MiB of data, 4 pages written"

INSTANCES, QUICK_INSTANCES = 1000, 100
SIDES = ("memslot", "alone")


def measure(bench: Bench, count: int | None = None) -> Family:
    """Both sides of every host that is here, each in a process of its own."""
    if count is None:
        count = QUICK_INSTANCES if bench.quick else INSTANCES
    rows: list[Row] = []
    hosts, skipped = chosen(bench.host)
    for host in hosts:
        found = {}
        for side in SIDES:
            bench.check()
            bench.say(f"density: {count} instances on {host}, {side}")
            found[side] = _in_a_process(host, side, count)
        for unit in ("bytes", "mappings"):
            labels: dict[str, Label] = {"host": host, "instances": count, "what": unit}
            ours, theirs = ([max(found[side][unit], 1e-3)] for side in SIDES)
            rows.append(Row.compare(labels, ours, f"{host} alone", theirs, unit=unit, gain=True))
    return Family(NAME, tuple(rows), tuple(claims(rows)), tuple(skipped))


def _in_a_process(host: str, side: str, count: int) -> dict[str, float]:
    command = [sys.executable, "-m", "memslot_plugin.bench.live", host, side, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ourselves
    if done.returncode:
        raise MemslotError(f"{count} instances on {host} ({side}): {done.stderr.strip()[-300:]}")
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """What must hold of them."""
    for row in rows:
        if row.has(host="wasmer", what="bytes"):
            says = "Private memory of a live instance: less than wasmer alone"
            yield Claim(says, row.ratio.median, 40.0, at_least=True)
    for row in rows:
        if row.labels["what"] == "mappings":
            says = f"Mappings (VMAs) of a live instance on {row.labels['host']}"
            yield Claim(says, row.cost.median, 4.0, kind="count")


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """One line per host."""
    lines = []
    for row in rows:
        shown = _kibibytes if row.unit == "bytes" else _count
        ratio = _less_or_more(row.ratio.median) if row.unit == "bytes" else "-"
        what = "private memory" if row.unit == "bytes" else "mappings"
        cells = (shown(row.cost), shown(row.baseline_cost), ratio)
        lines.append((str(row.labels["host"]), what, *cells))
    if lines:
        title = f"{TITLE}, of {rows[0].labels['instances']:,}"
        yield Grid(title, ("host", "what", "memslot", "runtime alone", "ratio"), tuple(lines))


def _less_or_more(ratio: float) -> str:
    return f"{ratio:.3g}x less" if ratio >= 1 else f"{1 / ratio:.3g}x more"


def _kibibytes(spread: Spread) -> str:
    return f"{spread.median / 1024:,.0f} KiB"


def _count(spread: Spread) -> str:
    return f"{spread.median:.2f}"
