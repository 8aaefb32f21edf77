"""Family `warm`: whether warming the slots of a pool ahead of requests makes their first requests faster.

Each round makes two pools alike, in which one slot has served the guest before; in one of them `Pool.warm` then
prepares the others.  What it takes itself is not counted: it is meant for idle time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memslot_plugin.bench.memory import Pages, image_of, strategy
from memslot_plugin.bench.results import Family, Grid, Label, Row, pivot, spread
from memslot_plugin.bench.runner import CLOCK, Bench, Subject, clock_cost
from memslot_plugin.memory.image import MemfdImage
from memslot_plugin.memory.pool import Pool
from memslot_plugin.memory.probe import probe
from memslot_plugin.settings import MIB

NAME = "warm"
TITLE = "The first request in a fresh slot, after Pool.warm"

GUEST = 4 * MIB
SLOTS = 400
WRITTEN = (1, 16, 64)
QUANTILES = {"median": 0.5, "p99": 0.99}


def measure(bench: Bench) -> Family:
    """Median and p99 of first requests, warmed and not."""
    if not probe().pagemap.works:  # what a guest usually writes is unknown then
        return Family(NAME, (), skipped=(f"warm: {probe().pagemap.detail}",))
    rows: list[Row] = []
    with image_of(GUEST) as image:
        for written in WRITTEN:
            bench.say(f"warm: {written} pages")
            rows += cases(bench, image, written)
    return Family(NAME, tuple(rows))


def cases(bench: Bench, image: MemfdImage, written: int, seconds: float = 2.0) -> Iterator[Row]:
    """The rows of one number of written pages."""
    pages = Pages.spread(written, GUEST)
    samples: dict[tuple[bool, str], list[float]] = {
        (warmed, name): [] for warmed in (True, False) for name in QUANTILES
    }

    def subject(warmed: bool) -> Subject:
        def first_requests() -> float:
            costs = sorted(_first_requests(image, pages, warmed=warmed))
            for name, share in QUANTILES.items():
                samples[warmed, name].append(costs[int(share * len(costs))])
            return costs[len(costs) // 2]

        return first_requests

    bench.rounds({"warmed": subject(True), "not warmed": subject(False)}, seconds)
    for name in QUANTILES:
        labels: dict[str, Label] = {"pages written": written, "of first requests": name}
        yield Row.compare(
            labels, samples[True, name], "not warmed", samples[False, name], gain=True
        )


def _first_requests(image: MemfdImage, pages: Pages, *, warmed: bool) -> list[float]:
    """What each first request in a slot costs: lease and write; a slot is not released before all were leased."""
    clock = clock_cost()
    with Pool(slots=SLOTS, reserved=GUEST, guard=MIB, reset=strategy("auto")) as pool:
        slot = pool.lease(image, GUEST, affinity="guest")
        pages.write(slot.base)
        pool.release(slot)
        if warmed:
            pool.warm(image, GUEST, affinity="guest", count=SLOTS)
        slots, costs = [pool.lease(image, GUEST, affinity="guest")], []
        for _ in range(SLOTS - 1):
            started = CLOCK()
            slot = pool.lease(image, GUEST, affinity="guest")
            pages.write(slot.base)
            costs.append(CLOCK() - started - clock)
            slots.append(slot)
        for slot in slots:
            pool.release(slot)
    return costs


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """Times faster than unwarmed."""
    if rows:
        title = f"{TITLE}: times faster, by pages written"
        yield pivot(title, rows, ("of first requests",), "pages written", shown=spread)
