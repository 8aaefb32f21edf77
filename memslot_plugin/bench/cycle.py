"""Family `cycle`: write, reset, write, so that the page faults of the next request count; and how well `auto` chooses.

A workload is a sequence of requests, each a set of pages to write.  Every strategy serves the same requests on a slot
of its own, in blocks that take turns; a block is long enough to contain the flushes that `auto` decides on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from memslot_plugin.bench.memory import (
    Guestless,
    Pages,
    image_of,
    strategy,
)
from memslot_plugin.bench.reset import strategies
from memslot_plugin.bench.results import Claim, Family, Grid, Label, Row, Spread, pivot, spread
from memslot_plugin.bench.runner import CLOCK, Bench, Subject, clock_cost
from memslot_plugin.memory.image import MemfdImage
from memslot_plugin.memory.pool import Pool
from memslot_plugin.memory.reset import Reset
from memslot_plugin.settings import MIB

NAME = "cycle"
TITLE = "Write, reset, write"

WRITTEN = (1, 4, 16, 64, 256, 2048)
QUICK_WRITTEN = (4, 64, 2048)
GUEST = 64 * MIB

TOGETHER, SCATTERED = "side by side", "over 64 MiB"
"""Where the written pages are.  Scattered ones make the kernel look through all of the guest's page tables."""

BLOCK, SHORT_BLOCK = 200, 20
"""Requests of one strategy before it is the next one's turn; short where a request is long."""

FEW, MANY = 4, 2000


def measure(bench: Bench) -> Family:
    """Every number of pages, every workload, and the claims about them."""
    rows: list[Row] = []
    with image_of(GUEST) as image:
        for written in QUICK_WRITTEN if bench.quick else WRITTEN:
            for where in (TOGETHER, SCATTERED):
                bench.say(f"cycle: {written} pages {where}")
                rows += cycles(bench, image, written, where)
        for name in WORKLOADS:
            bench.say(f"cycle: {name}")
            rows += workload(bench, image, name)
    return Family(NAME, tuple(rows), tuple(claims(rows)))


def cycles(
    bench: Bench, image: MemfdImage, written: int, where: str, seconds: float = 1.0
) -> Iterator[Row]:
    """How many times faster than by madvise each strategy makes a request that writes so many pages."""
    pages = Pages(range(written)) if where == TOGETHER else Pages.spread(written, GUEST)
    samples = _on_slots(image, lambda guests: bench.rounds(_cycles(guests, pages), seconds))
    for name in strategies():
        labels: dict[str, Label] = {"strategy": name, "pages written": written, "where": where}
        yield Row.compare(labels, samples[name], "madvise", samples["madvise"], gain=True)


def _on_slots(
    image: MemfdImage, use: Callable[[dict[str, Guestless]], dict[str, list[float]]]
) -> dict[str, list[float]]:
    guests = {}
    try:
        for name in strategies():
            guests[name] = Guestless(image, GUEST)
        return use(guests)
    finally:
        for guest in guests.values():
            guest.slot.destroy()


def _cycles(guests: dict[str, Guestless], pages: Pages) -> dict[str, Subject]:
    def subject(guest: Guestless, reset: Reset) -> Subject:
        base = guest.slot.base

        def cycle() -> float:
            started = CLOCK()
            pages.write(base)
            written = CLOCK() - started
            cost = guest.reset(reset)
            started = CLOCK()
            pages.write(base)
            return written + cost + CLOCK() - started

        return cycle

    return {name: subject(guest, strategy(name)) for name, guest in guests.items()}


# -- workloads


def steady(count: int) -> Iterator[Pages]:
    """Always the same pages."""
    return itertools.repeat(Pages.spread(count, GUEST))


def alternating() -> Iterator[Pages]:
    """Few and many pages in turn."""
    return itertools.cycle([Pages.spread(FEW, GUEST), Pages.spread(MANY, GUEST)])


def drifting() -> Iterator[Pages]:
    """64 pages that move on by one with each request, over all of the guest and again."""
    there = GUEST // 4096
    return (Pages((first + number) % there for number in range(64)) for first in itertools.count())


WORKLOADS: dict[str, Callable[[], Iterator[Pages]] | None] = {
    f"steady {FEW} pages": lambda: steady(FEW),
    f"steady {MANY:,} pages": lambda: steady(MANY),
    f"alternating {FEW} and {MANY:,} pages": alternating,
    "two guests alternating on one slot": None,
    "a working set that drifts": drifting,
}
"""The requests of each; those of two guests need a pool and stand below."""


def workload(bench: Bench, image: MemfdImage, name: str, seconds: float = 4.0) -> Iterator[Row]:
    """What each strategy costs over the better of the two fixed ones."""
    requests = WORKLOADS[name]
    if requests is None:
        with image_of(GUEST // 4, seed=0xA5) as other:
            subjects = {each: _two_guests(image, other, each) for each in strategies()}
            try:
                samples = bench.rounds({each: made[0] for each, made in subjects.items()}, seconds)
            finally:
                for _, pool in subjects.values():
                    pool.close()
    else:
        length = SHORT_BLOCK if f"{MANY:,}" in name else BLOCK
        samples = _on_slots(
            image, lambda guests: bench.rounds(_blocks(guests, requests, length), seconds)
        )
    fixed = [each for each in strategies() if each != "auto"]
    better = min(fixed, key=lambda each: Spread.of(samples[each]).median)
    for each in strategies():
        labels = {"workload": name, "strategy": each}
        yield Row.compare(labels, samples[each], better, samples[better])


def _blocks(
    guests: dict[str, Guestless], requests: Callable[[], Iterator[Pages]], length: int
) -> dict[str, Subject]:
    clock = clock_cost()

    def subject(guest: Guestless, reset: Reset) -> Subject:
        coming, base = requests(), guest.slot.base

        def block() -> float:
            cost = 0.0
            for pages in itertools.islice(coming, length):
                started = CLOCK()
                pages.write(base)
                cost += CLOCK() - started - clock + guest.reset(reset)
            return cost

        return block

    return {name: subject(guest, strategy(name)) for name, guest in guests.items()}


def _two_guests(one: MemfdImage, other: MemfdImage, name: str) -> tuple[Subject, Pool]:
    """Requests of a guest that writes few pages and one that writes 64, which share the only slot there is."""
    pool = Pool(slots=1, reserved=GUEST, guard=MIB, reset=strategy(name))
    guests = [
        (one, GUEST, Pages.spread(FEW, GUEST)),
        (other, GUEST // 4, Pages.spread(64, GUEST // 4)),
    ]

    def block() -> float:
        started = CLOCK()
        for _ in range(BLOCK // 2):
            for image, byte_size, pages in guests:
                slot = pool.lease(image, byte_size, affinity=image)
                pages.write(slot.base)
                pool.release(slot)
        return CLOCK() - started

    return block, pool


def claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """What must hold of them."""
    wanted: dict[str, Label] = {"strategy": "auto", "pages written": 64, "where": TOGETHER}
    for row in rows:
        if row.has(**wanted):
            says = "Write, reset, write of 64 pages side by side: faster than by madvise"
            yield Claim(says, row.ratio.median, 4.0, at_least=True)
    for row in rows:
        if "workload" in row.labels and row.has(strategy="auto"):
            says = f"auto, {row.labels['workload']}: over the better fixed strategy"
            yield Claim(says, row.ratio.median, 1.25)


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """Times faster than madvise, and times as dear as the better strategy."""
    once = [row for row in rows if "where" in row.labels and not row.has(strategy="madvise")]
    if once:
        title = f"{TITLE}: times faster than by madvise, by pages written"
        yield pivot(title, once, ("strategy", "where"), "pages written")
    chosen = [row for row in rows if "workload" in row.labels]
    if chosen:
        title = "A request and its reset: over the better fixed strategy"
        yield pivot(title, chosen, ("workload",), "strategy", shown=spread)
