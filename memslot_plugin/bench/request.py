"""Family `request`: a whole request, that is a fresh instance, one call and its end, against the peers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memslot_plugin.bench import guests
from memslot_plugin.bench.baseline import KEPT, Request, chosen, peers
from memslot_plugin.bench.results import Grid, Label, Limit, Row, Spread, pivot
from memslot_plugin.bench.runner import Bench, timed
from memslot_plugin.hosts import open_host
from memslot_plugin.settings import KIB, MIB

NAME = "request"

SIZES = (64 * KIB, 4 * MIB)
WRITTEN = (1, 16, 64)

BLOCK = 20
"""Requests of one side before it is the other's turn, after a quarter of them that warm the caches."""

NEW, RESET = "new instance", "same instance, reset"
POOL = "its pool, the better"

LIMITS = [
    Limit(
        "A request on {host} ({memslot}), {guest} of data, pages written: {pages written}; faster than {against}",
        {
            "host": host,
            "memslot": memslot,
            "guest": guest,
            "pages written": written,
            "against": against,
        },
        least,
    )
    for memslot, host, guest, written, against, least in (
        (NEW, "wasmer", "4 MiB", 1, "wasmer alone", 60),
        (RESET, "wasmer", "64 KiB", 1, "wasmer alone", 6),
        (RESET, "wasmer", "4 MiB", 1, "wasmer alone", 150),
        (RESET, "wasmer", "4 MiB", 64, "wasmer alone", 60),
        *(
            (RESET, "wasmtime", guest, written, POOL, least)
            for guest in ("64 KiB", "4 MiB")
            for written, least in ((1, 8), (16, 6), (64, 4))
        ),
    )
]


def measure(bench: Bench) -> Iterator[Row | str]:
    """Measure every host that is here, guest and number of pages."""
    hosts, skipped = chosen(bench.host)
    yield from skipped
    found: list[Row] = []
    for host in hosts:
        for byte_size in SIZES:
            for written in WRITTEN:
                bench.say(f"request: {host}, {guests.size(byte_size)}, {written} pages")
                found += cases(bench, host, byte_size, written)
    yield from found
    if "wasmtime" in hosts and not any(row.baseline == "extism" for row in found):
        yield "extism: not installed"


def cases(
    bench: Bench, host: str, byte_size: int, written: int, seconds: float = 1.5
) -> Iterator[Row]:
    """Yield both ways through memslot against every peer of the host."""
    module, function = guests.writer(byte_size), f"touch_{written}"
    with open_host(host, slots=4) as opened:
        guest = opened.prepare(module, name="bench")
        with guest.instantiate() as ready:

            def new() -> None:
                with guest.instantiate() as instance:
                    instance.call(function)

            def reset() -> None:
                ready.call(function)
                ready.reset()

            requests: dict[str, Request] = {
                NEW: new,
                RESET: reset,
                **peers(host, module, function),
            }
            subjects = {name: timed(each, BLOCK, BLOCK // 4) for name, each in requests.items()}
            samples = bench.rounds(subjects, seconds)
    if host == "wasmtime":
        pools = [samples.pop(name) for name in KEPT]
        samples[POOL] = min(pools, key=lambda each: Spread.of(each).median)
    ours = {name: samples.pop(name) for name in (NEW, RESET)}
    for name, costs in ours.items():
        for against, theirs in samples.items():
            labels: dict[str, Label] = {
                "host": host,
                "guest": guests.size(byte_size),
                "pages written": written,
                "memslot": name,
                "against": against,
            }
            yield Row.compare(labels, costs, against, theirs, gain=True)


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """Show one table per host."""
    for host in dict.fromkeys(row.labels["host"] for row in rows):
        yield pivot(
            f"A request: times faster on {host}, by pages written",
            sorted(
                (row for row in rows if row.has({"host": host})),
                key=lambda row: (row.labels["memslot"] != NEW, row.labels["guest"] != "64 KiB"),
            ),
            ("memslot", "guest", "against"),
            "pages written",
        )
