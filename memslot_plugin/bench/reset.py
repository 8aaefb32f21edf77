"""Family `reset`: a reset over the least that it can cost, for guests of all sizes.

The floor is taken in the same rounds, on the same slot, in C: PAGEMAP_SCAN over the same range and a copy of exactly
the written pages.  The cost of the clock is subtracted, because Python has no cheaper one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memslot_plugin._core import PAGE_SIZE
from memslot_plugin.bench.memory import Guestless, Pages, guestless, image_of, strategy
from memslot_plugin.bench.results import Claim, Grid, Label, Row, Spread, pivot
from memslot_plugin.bench.runner import Bench, Subject
from memslot_plugin.memory.image import MemfdImage
from memslot_plugin.memory.probe import probe
from memslot_plugin.settings import MIB

NAME = "reset"

DIRTY = (0, 1, 16, 64, 256, 2048)
IMAGES = (1, 16, 64, 256)
QUICK_DIRTY = (0, 1, 64, 2048)
QUICK_IMAGES = (1, 64)

READS = {"nothing": 0, "300 pages": 300 * PAGE_SIZE, "all pages": 1 << 62}
"""Bytes that a request reads besides the pages that it writes."""

STRATEGIES = ("pagemap", "auto")
"""The strategies that scan, as the floor does."""

LIMITS = ()
"""No row is judged by itself."""

RECOVERY = 32
"""Resets after which a request that read everything must be forgotten."""


def measure(bench: Bench) -> Iterator[Row | Claim | str]:
    """Measure every image, number of written pages, and strategy."""
    if not probe().pagemap.works:
        yield f"reset: {probe().pagemap.detail}"
        return
    rows: list[Row] = []
    extra = []
    for mebibytes in QUICK_IMAGES if bench.quick else IMAGES:
        with image_of(mebibytes * MIB) as image:
            extra += [of_nothing(bench, image, read) for read in ("nothing", "300 pages")]
            for dirty in QUICK_DIRTY if bench.quick else DIRTY:
                if dirty * PAGE_SIZE <= mebibytes * MIB:
                    bench.say(f"reset: {dirty} pages of {mebibytes} MiB")
                    rows += cases(bench, image, mebibytes, dirty)
    yield from rows
    yield from over_the_floor(rows)
    says = "A reset of nothing, any image: more than the floor (the worst case)"
    yield Claim(says, max(extra), 500.0, kind="nanoseconds")
    yield from same_price(bench)


def cases(
    bench: Bench, image: MemfdImage, mebibytes: int, dirty: int, seconds: float = 0.5
) -> Iterator[Row]:
    """Yield the rows of one image and one number of written pages."""
    for read, read_bytes in READS.items():
        for name in STRATEGIES:
            with guestless(image, image.byte_size) as guest:
                subjects = pair(guest, Pages.spread(dirty, image.byte_size), read_bytes, name)
                samples = bench.rounds(subjects, seconds)
            labels: dict[str, Label] = {
                "strategy": name,
                "MiB": mebibytes,
                "pages written": dirty,
                "read": read,
            }
            yield Row.compare(labels, samples["reset"], "floor", samples["floor"])


def pair(guest: Guestless, pages: Pages, read_bytes: int, name: str) -> dict[str, Subject]:
    """Return the reset and its floor, each after a request that reads and writes."""
    reset = strategy(name)

    def of_reset() -> float:
        guest.read(read_bytes)
        pages.write(guest.slot.base)
        return guest.reset(reset)

    def of_floor() -> float:
        guest.read(read_bytes)
        pages.write(guest.slot.base)
        return guest.floor(pages)

    return {"reset": of_reset, "floor": of_floor}


def of_nothing(bench: Bench, image: MemfdImage, read: str, seconds: float = 0.5) -> float:
    """Return the nanoseconds that a reset after a request that wrote nothing costs more than the floor.

    The pages are read once, before: they stay populated for as long as the strategy leaves them.
    """
    with guestless(image, image.byte_size) as guest:
        guest.read(READS[read])
        samples = bench.rounds(pair(guest, Pages([]), 0, "auto"), seconds)
    return Spread.of(samples["reset"]).median - Spread.of(samples["floor"]).median


def same_price(bench: Bench) -> Iterator[Claim]:
    """Yield claims about the same 64 pages in 1 and 64 MiB, before and after a request that reads everything."""
    bench.say("reset: the same pages of 1 and 64 MiB")
    pages, reset = Pages(range(0, 256, 4)), strategy("auto")
    with (
        image_of(MIB) as small_image,
        image_of(64 * MIB) as large_image,
        guestless(small_image, MIB) as small,
        guestless(large_image, 64 * MIB) as large,
    ):

        def subject(guest: Guestless) -> Subject:
            def request() -> float:
                pages.write(guest.slot.base)
                return guest.reset(reset)

            return request

        subjects = {"small": subject(small), "large": subject(large)}

        def ratio(seconds: float, **options: int) -> float:
            samples = bench.rounds(subjects, seconds, **options)
            return Row.compare({}, samples["large"], "", samples["small"]).ratio.median

        says = "The same 64 pages written in 64 MiB, over those in 1 MiB"
        yield Claim(says, ratio(0.5), 1.5)
        ratios = []
        for _ in range(5 if bench.quick else 15):
            large.read(64 * MIB)
            for _ in range(RECOVERY):
                subjects["large"]()
            ratios.append(ratio(0.05, fewest=20, most=20))
        says = f"The same, {RECOVERY} resets after a request that read all 64 MiB"
        yield Claim(says, Spread.of(ratios).median, 1.5)


def over_the_floor(rows: Sequence[Row]) -> Iterator[Claim]:
    """Yield a claim about the worst number of written pages per strategy and image size, with 300 read pages."""
    worst: dict[tuple[Label, Label], float] = {}
    for row in rows:
        if row.has({"read": "300 pages"}) and row.labels["pages written"] != 0:
            case = row.labels["strategy"], row.labels["MiB"]
            worst[case] = max(worst.get(case, 0.0), row.ratio.median)
    for (name, mebibytes), ratio in worst.items():
        says = f"A reset by {name}, {mebibytes} MiB, any number of written pages: over the floor"
        yield Claim(says, ratio, 1.25)


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """Show one table per strategy."""
    for name in dict.fromkeys(row.labels["strategy"] for row in rows):
        yield pivot(
            f"A reset, over the floor: {name}, by pages written",
            [row for row in rows if row.has({"strategy": name})],
            ("read", "MiB"),
            "pages written",
        )
