"""Family `request`: a whole request, that is a fresh instance, one call and its end, against the runtimes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from memslot_plugin.bench import guests
from memslot_plugin.bench.peers import KEPT, Request, chosen, peers
from memslot_plugin.bench.results import Claim, Family, Grid, Label, Row, Spread, pivot
from memslot_plugin.bench.runner import CLOCK, Bench, Subject
from memslot_plugin.hosts import Guest, open_host
from memslot_plugin.settings import KIB, MIB

NAME = "request"
TITLE = "A request: times faster"

SIZES = (64 * KIB, 4 * MIB)
WRITTEN = (1, 16, 64)

BLOCK = 20
"""Requests of one side before it is the other's turn."""

NEW, RESET = "new instance", "same instance, reset"


class Promise(NamedTuple):
    """A limit for one row: `ours` must be so many times faster than the runtime `against`."""

    ours: str
    host: str
    guest: str
    written: int
    against: str
    times: float


PROMISES = (
    Promise(NEW, "wasmer", "4 MiB", 1, "wasmer alone", 60),
    Promise(RESET, "wasmer", "64 KiB", 1, "wasmer alone", 6),
    Promise(RESET, "wasmer", "4 MiB", 1, "wasmer alone", 150),
    Promise(RESET, "wasmer", "4 MiB", 64, "wasmer alone", 60),
    *(
        Promise(RESET, "wasmtime", guest, written, "its pool, the better", faster)
        for guest in ("64 KiB", "4 MiB")
        for written, faster in ((1, 8), (16, 6), (64, 4))
    ),
)


def measure(bench: Bench) -> Family:
    """Every host that is here, guest and number of pages."""
    rows: list[Row] = []
    hosts, skipped = chosen(bench.host)
    for host in hosts:
        for byte_size in SIZES:
            for written in WRITTEN:
                bench.say(f"request: {host}, {guests.size(byte_size)}, {written} pages")
                rows += cases(bench, host, byte_size, written)
    if any(row.has(host="wasmtime") for row in rows) and not any(
        row.baseline == "extism" for row in rows
    ):
        skipped.append("extism: not installed")
    return Family(NAME, tuple(rows), tuple(claims(rows)), tuple(skipped))


def cases(
    bench: Bench, host: str, byte_size: int, written: int, seconds: float = 1.5
) -> Iterator[Row]:
    """Both ways of ours against every peer of the host."""
    module, function = guests.writer(byte_size), f"touch_{written}"
    with open_host(host, slots=4) as opened:
        guest = opened.prepare(module, name="bench")
        with guest.instantiate() as instance:

            def reset() -> None:
                instance.call(function)
                instance.reset()

            requests: dict[str, Request] = {NEW: _new(guest, function), RESET: reset}
            requests.update(peers(host, module, function))
            subjects = {name: _timed(request) for name, request in requests.items()}
            samples = bench.rounds(subjects, seconds)
    if host == "wasmtime":
        better = min(KEPT, key=lambda name: Spread.of(samples[name]).median)
        samples["its pool, the better"] = samples[better]
        for name in KEPT:
            del samples[name]
    for ours in (NEW, RESET):
        for against in samples:
            if against not in (NEW, RESET):
                labels: dict[str, Label] = {
                    "host": host,
                    "guest": guests.size(byte_size),
                    "pages written": written,
                    "memslot": ours,
                    "against": against,
                }
                yield Row.compare(labels, samples[ours], against, samples[against], gain=True)


def _new(guest: Guest, function: str) -> Request:
    def request() -> None:
        with guest.instantiate() as instance:
            instance.call(function)

    return request


def _timed(request: Request) -> Subject:
    """A block of requests, after a few that find the processor's caches as the others have left them."""

    def subject() -> float:
        for _ in range(BLOCK // 4):
            request()
        started = CLOCK()
        for _ in range(BLOCK):
            request()
        return (CLOCK() - started) / BLOCK

    return subject


def claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """Limits for the rows that have one."""
    for promise in PROMISES:
        labels: dict[str, Label] = {
            "pages written": promise.written,
            "host": promise.host,
            "guest": promise.guest,
            "memslot": promise.ours,
            "against": promise.against,
        }
        for row in rows:
            if row.has(**labels):
                says = (
                    f"A request on {promise.host} ({promise.ours}), {promise.guest} of data, pages written:"
                    f" {promise.written}; faster than {promise.against}"
                )
                yield Claim(says, row.ratio.median, promise.times, at_least=True)


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """One per host."""
    for host in dict.fromkeys(row.labels["host"] for row in rows):
        ours = sorted(
            (row for row in rows if row.has(host=host)),
            key=lambda row: (row.labels["memslot"] != NEW, row.labels["guest"] != "64 KiB"),
        )
        yield pivot(
            f"{TITLE} on {host}, by pages written",
            ours,
            ("memslot", "guest", "against"),
            "pages written",
        )
