"""Family `cycle`: write, reset, write, so that the page faults of the next request count; and how well `auto` chooses.

A workload is a sequence of requests, each a set of pages to write.  Every strategy serves the same requests on a slot
of its own, in blocks that take turns; a block is long enough to contain the flushes that `auto` decides on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from memslot_plugin._core import PAGE_SIZE
from memslot_plugin.bench.memory import (
    Guestless,
    Pages,
    guestless,
    image_of,
    pool_of,
    serve,
    strategy,
)
from memslot_plugin.bench.results import (
    Grid,
    Label,
    Limit,
    Row,
    Spread,
    pivot,
    spread,
)
from memslot_plugin.bench.runner import CLOCK, Bench, Subject, clock_cost, timed
from memslot_plugin.memory.image import MemfdImage
from memslot_plugin.memory.pool import Pool
from memslot_plugin.memory.probe import probe
from memslot_plugin.memory.reset import Reset
from memslot_plugin.settings import MIB

NAME = "cycle"

WRITTEN = (1, 4, 16, 64, 256, 2048)
QUICK_WRITTEN = (4, 64, 2048)
GUEST = 64 * MIB

TOGETHER, SCATTERED = "side by side", "over 64 MiB"
"""Places of the written pages.  Scattered ones make the kernel look through all of the guest's page tables."""

BLOCK, SHORT_BLOCK = 200, 20
"""Requests of one strategy before it is the next one's turn; short where a request is long."""

FEW, MANY = 4, 2000

LIMITS = (
    Limit(
        "Write, reset, write of 64 pages side by side: faster than by madvise",
        {"strategy": "auto", "pages written": 64, "where": TOGETHER},
        least=4,
    ),
    Limit(
        "auto, {workload}: over the better fixed strategy",
        {"strategy": "auto", "workload": None},
        most=1.25,
    ),
)


def strategies() -> tuple[str, ...]:
    """Return the strategies that this kernel can do, and whose cost does not follow the guest's size alone."""
    return ("madvise", "pagemap", "auto") if probe().pagemap.works else ("madvise",)


def measure(bench: Bench) -> Iterator[Row]:
    """Measure every number of pages, and every workload."""
    with image_of(GUEST) as image:
        for written in QUICK_WRITTEN if bench.quick else WRITTEN:
            for where in (TOGETHER, SCATTERED):
                bench.say(f"cycle: {written} pages {where}")
                yield from cycles(bench, image, written, where)
        for name in (*WORKLOADS, TWO_GUESTS):
            bench.say(f"cycle: {name}")
            yield from workload(bench, image, name)


def cycles(
    bench: Bench, image: MemfdImage, written: int, where: str, seconds: float = 1.0
) -> Iterator[Row]:
    """Yield the times that each strategy is faster than madvise, for a request that writes so many pages."""
    pages = Pages(range(written)) if where == TOGETHER else Pages.spread(written, GUEST)

    def subject(guest: Guestless, reset: Reset) -> Subject:
        base = guest.slot.base

        def cycle() -> float:
            started = CLOCK()
            pages.write(base)
            cost = CLOCK() - started + guest.reset(reset)
            started = CLOCK()
            pages.write(base)
            return cost + CLOCK() - started

        return cycle

    samples = _on_slots(bench, image, subject, seconds)
    for name in strategies():
        labels: dict[str, Label] = {"strategy": name, "pages written": written, "where": where}
        yield Row.compare(labels, samples[name], "madvise", samples["madvise"], gain=True)


def _on_slots(
    bench: Bench,
    image: MemfdImage,
    subject: Callable[[Guestless, Reset], Subject],
    seconds: float,
) -> dict[str, list[float]]:
    """Return the costs of each strategy, which has a slot of its own."""
    with ExitStack() as slots:
        subjects = {
            name: subject(slots.enter_context(guestless(image, GUEST)), strategy(name))
            for name in strategies()
        }
        return bench.rounds(subjects, seconds)


# -- workloads


def drifting() -> Iterator[Pages]:
    """Yield 64 pages that move on by one with each request, over all of the guest and again."""
    there = GUEST // PAGE_SIZE
    return (Pages((first + number) % there for number in range(64)) for first in itertools.count())


WORKLOADS: dict[str, Callable[[], Iterator[Pages]]] = {
    f"steady {FEW} pages": lambda: itertools.repeat(Pages.spread(FEW, GUEST)),
    f"steady {MANY:,} pages": lambda: itertools.repeat(Pages.spread(MANY, GUEST)),
    f"alternating {FEW} and {MANY:,} pages": lambda: itertools.cycle(
        [Pages.spread(FEW, GUEST), Pages.spread(MANY, GUEST)]
    ),
    "a working set that drifts": drifting,
}
"""The pages that each request writes, by workload."""

TWO_GUESTS = "two guests alternating on one slot"


def workload(bench: Bench, image: MemfdImage, name: str, seconds: float = 4.0) -> Iterator[Row]:
    """Yield the cost of each strategy over the better of the two fixed ones."""
    if name == TWO_GUESTS:
        with image_of(GUEST // 4, seed=0xA5) as other, ExitStack() as pools:
            subjects = {}
            for each in strategies():
                pool = pools.enter_context(pool_of(1, GUEST, each))
                subjects[each] = timed(_two_guests(pool, image, other), BLOCK // 2)
            samples = bench.rounds(subjects, seconds)
    else:
        samples = _on_slots(bench, image, _requests_of(name), seconds)
    fixed = [each for each in strategies() if each != "auto"]
    better = min(fixed, key=lambda each: Spread.of(samples[each]).median)
    for each in strategies():
        labels = {"workload": name, "strategy": each}
        yield Row.compare(labels, samples[each], better, samples[better])


def _requests_of(name: str) -> Callable[[Guestless, Reset], Subject]:
    """Return the blocks of a workload's requests."""
    clock, length = clock_cost(), SHORT_BLOCK if f"{MANY:,}" in name else BLOCK

    def subject(guest: Guestless, reset: Reset) -> Subject:
        coming, base = WORKLOADS[name](), guest.slot.base

        def block() -> float:
            cost = 0.0
            for pages in itertools.islice(coming, length):
                started = CLOCK()
                pages.write(base)
                cost += CLOCK() - started - clock + guest.reset(reset)
            return cost

        return block

    return subject


def _two_guests(pool: Pool, one: MemfdImage, other: MemfdImage) -> Callable[[], None]:
    """Return a request of a guest that writes few pages, and one of another that writes 64."""
    few, many = Pages.spread(FEW, GUEST), Pages.spread(64, GUEST // 4)

    def requests() -> None:
        serve(pool, one, GUEST, few)
        serve(pool, other, GUEST // 4, many)

    return requests


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """Show times faster than madvise, and times as dear as the better strategy."""
    once = [
        row for row in rows if row.has({"where": None}) and not row.has({"strategy": "madvise"})
    ]
    if once:
        title = "Write, reset, write: times faster than by madvise, by pages written"
        yield pivot(title, once, ("strategy", "where"), "pages written")
    chosen = [row for row in rows if row.has({"workload": None})]
    if chosen:
        title = "A request and its reset: over the better fixed strategy"
        yield pivot(title, chosen, ("workload",), "strategy", shown=spread)
