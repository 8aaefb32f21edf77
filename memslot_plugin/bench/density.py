"""Family `density`: private memory and mappings of a live instance, against the runtimes alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

from memslot_plugin.bench.baseline import chosen
from memslot_plugin.bench.results import Claim, Grid, Label, Limit, Row
from memslot_plugin.bench.runner import Bench
from memslot_plugin.errors import MemslotError

NAME = "density"

INSTANCES, QUICK_INSTANCES = 1000, 100
SIDES = ("memslot", "alone")

LIMITS = (
    Limit(
        "Private memory of a live instance: less than wasmer alone",
        {"host": "wasmer", "what": "bytes"},
        least=40,
    ),
)


def measure(bench: Bench) -> Iterator[Row | Claim | str]:
    """Measure both sides of every host that is here, each in a process of its own."""
    count = QUICK_INSTANCES if bench.quick else INSTANCES
    hosts, skipped = chosen(bench.host)
    yield from skipped
    for host in hosts:
        found = []
        for side in SIDES:
            bench.say(f"density: {count} instances on {host}, {side}")
            found.append(_in_a_process(host, side, count))
        for unit in ("bytes", "mappings"):
            ours, theirs = ([max(each[unit], 1e-3)] for each in found)
            labels: dict[str, Label] = {"host": host, "instances": count, "what": unit}
            yield Row.compare(labels, ours, f"{host} alone", theirs, unit=unit, gain=True)
        says = f"Mappings (VMAs) of a live instance on {host}"
        yield Claim(says, found[0]["mappings"], 4, kind="count")


def _in_a_process(host: str, side: str, count: int) -> dict[str, float]:
    command = [sys.executable, "-m", "memslot_plugin.bench.live", host, side, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ourselves
    if done.returncode:
        raise MemslotError(f"{count} instances on {host} ({side}): {done.stderr.strip()[-300:]}")
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """Show two lines per host."""
    lines = []
    for row in rows:
        cells = [f"{each.median:.2f}" for each in (row.cost, row.baseline_cost)]
        if row.unit == "bytes":
            kibibytes = [each.median / 1024 for each in (row.cost, row.baseline_cost)]
            cells = [f"{each:,.0f} KiB" for each in kibibytes]
        ratio = row.ratio.median
        compared = f"{ratio:.3g}x less" if ratio >= 1 else f"{1 / ratio:.3g}x more"
        what = ("private memory", compared) if row.unit == "bytes" else ("mappings", "-")
        lines.append((str(row.labels["host"]), what[0], *cells, what[1]))
    if lines:
        title = f"A live instance of a guest with 4 MiB of data, 4 pages written, of {rows[0].labels['instances']:,}"
        yield Grid(title, ("host", "what", "memslot", "runtime alone", "ratio"), tuple(lines))
