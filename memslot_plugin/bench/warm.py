"""Family `warm`: the first requests in slots that were made ready ahead of requests, against those in other slots.

Each round makes two pools alike, in which one slot has served the guest before; in one of them `Pool.warm` then
prepares the others.  The cost of `Pool.warm` is not counted: it is meant for idle time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memslot_plugin.bench.memory import Pages, image_of, pool_of, serve
from memslot_plugin.bench.results import Grid, Label, Row, pivot, spread
from memslot_plugin.bench.runner import CLOCK, Bench, Subject, clock_cost
from memslot_plugin.memory.image import MemfdImage
from memslot_plugin.memory.probe import probe
from memslot_plugin.settings import MIB

NAME = "warm"

GUEST = 4 * MIB
SLOTS = 400
WRITTEN = (1, 16, 64)
QUANTILES = {"median": 0.5, "p99": 0.99}
LIMITS = ()


def measure(bench: Bench) -> Iterator[Row | str]:
    """Measure median and p99 of first requests, warmed and not."""
    if not probe().pagemap.works:  # which pages a guest writes is unknown then
        yield f"warm: {probe().pagemap.detail}"
        return
    with image_of(GUEST) as image:
        for written in WRITTEN:
            bench.say(f"warm: {written} pages")
            yield from cases(bench, image, written)


def cases(bench: Bench, image: MemfdImage, written: int, seconds: float = 2.0) -> Iterator[Row]:
    """Yield the rows of one number of written pages."""
    pages = Pages.spread(written, GUEST)
    samples: dict[bool, list[list[float]]] = {True: [], False: []}

    def subject(warmed: bool) -> Subject:
        def first_requests() -> float:
            samples[warmed].append(sorted(_first_requests(image, pages, warmed=warmed)))
            return 0.0

        return first_requests

    bench.rounds({"warmed": subject(True), "not warmed": subject(False)}, seconds)
    for name, share in QUANTILES.items():
        ours, theirs = (
            [costs[int(share * len(costs))] for costs in samples[warmed]]
            for warmed in (True, False)
        )
        labels: dict[str, Label] = {"pages written": written, "of first requests": name}
        yield Row.compare(labels, ours, "not warmed", theirs, gain=True)


def _first_requests(image: MemfdImage, pages: Pages, *, warmed: bool) -> list[float]:
    """Return the cost of each first request in a slot: lease and write; all are leased before one is released."""
    clock = clock_cost()
    with pool_of(SLOTS, GUEST) as pool:
        serve(pool, image, GUEST, pages)
        if warmed:
            pool.warm(image, GUEST, affinity=image, count=SLOTS)
        slots, costs = [pool.lease(image, GUEST, affinity=image)], []
        for _ in range(SLOTS - 1):
            started = CLOCK()
            slot = pool.lease(image, GUEST, affinity=image)
            pages.write(slot.base)
            costs.append(CLOCK() - started - clock)
            slots.append(slot)
        for slot in slots:
            pool.release(slot)
    return costs


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """Show times faster than in slots that were not warmed."""
    if rows:
        title = "The first request in a fresh slot, after Pool.warm: times faster, by pages written"
        yield pivot(title, rows, ("of first requests",), "pages written", shown=spread)
