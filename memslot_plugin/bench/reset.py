"""Family `reset`: what a reset costs over the least that it can cost, whatever the guest's size.

The floor is taken in the same rounds, on the same slot, in C: PAGEMAP_SCAN over the same range and a copy of exactly
the written pages; for madvise the bare call, for copy a bare comparison and the same copies.  What the clock takes is
taken off, for Python has no cheaper one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memslot_plugin._core import PAGE_SIZE
from memslot_plugin.bench.memory import Guestless, Pages, guestless, image_of, strategy
from memslot_plugin.bench.results import Claim, Family, Grid, Label, Row, Spread, pivot
from memslot_plugin.bench.runner import Bench, Subject
from memslot_plugin.memory.image import MemfdImage
from memslot_plugin.memory.probe import probe
from memslot_plugin.settings import MIB

NAME = "reset"
TITLE = "A reset, over the floor"

DIRTY = (0, 1, 16, 64, 256, 2048)
IMAGES = (1, 16, 64, 256)
QUICK_DIRTY = (0, 1, 64, 2048)
QUICK_IMAGES = (1, 64)

READS = {"nothing": 0, "300 pages": 300 * PAGE_SIZE, "all pages": 1 << 62}
"""What a request reads besides the pages that it writes."""

POPULATED = ("nothing", "300 pages")

SAME_PAGES = range(0, 256, 4)
"""64 pages of the first MiB, for guests of all sizes."""

RECOVERY = 32
"""Resets after which a request that read everything must be forgotten."""


COPIED = 16
"""MiB up to which `copy` is measured: it reads everything, and beyond keep_resident it drops instead."""


def strategies() -> tuple[str, ...]:
    """Those that this kernel can do, and whose cost does not follow the guest's size alone."""
    return ("madvise", "pagemap", "auto") if probe().pagemap.works else ("madvise",)


def measure(bench: Bench) -> Family:
    """Every case, and the claims about them."""
    images = QUICK_IMAGES if bench.quick else IMAGES
    rows: list[Row] = []
    extra = []
    for mebibytes in images:
        with image_of(mebibytes * MIB) as image:
            if probe().pagemap.works:
                extra += [of_nothing(bench, image, mebibytes, read) for read in POPULATED]
            for dirty in QUICK_DIRTY if bench.quick else DIRTY:
                if dirty * PAGE_SIZE <= mebibytes * MIB:
                    bench.say(f"reset: {dirty} pages of {mebibytes} MiB")
                    rows += cases(bench, image, mebibytes, dirty)
    skipped = () if probe().pagemap.works else (f"pagemap and auto: {probe().pagemap.detail}",)
    claims: list[Claim] = []
    if probe().pagemap.works:
        claims += over_the_floor(rows)
        says = "A reset of nothing, any image: more than the floor (the worst case)"
        claims.append(Claim(says, max(extra), 500.0, kind="nanoseconds"))
        claims += same_price(bench)
    return Family(NAME, tuple(rows), tuple(claims), skipped)


def cases(
    bench: Bench,
    image: MemfdImage,
    mebibytes: int,
    dirty: int,
    *,
    names: Sequence[str] | None = None,
    reads: Sequence[str] = tuple(READS),
    seconds: float = 0.5,
) -> Iterator[Row]:
    """The rows of one image and one number of written pages."""
    byte_size = mebibytes * MIB
    if names is None:
        names = (*strategies(), *(("copy",) if mebibytes <= COPIED else ()))
    for read in reads:
        for name in names:
            with guestless(image, byte_size) as guest:
                pages = Pages.spread(dirty, byte_size)
                subjects = pair(guest, pages, READS[read], name)
                samples = bench.rounds(subjects, seconds)
            labels: dict[str, Label] = {
                "strategy": name,
                "MiB": mebibytes,
                "pages written": dirty,
                "read": read,
            }
            yield Row.compare(labels, samples["reset"], "floor", samples["floor"])


def pair(guest: Guestless, pages: Pages, read: int, name: str) -> dict[str, Subject]:
    """The reset and its floor, each after a request that reads and writes."""
    reset = strategy(name)

    def request() -> None:
        guest.read(read)
        pages.write(guest.slot.base)

    def of_reset() -> float:
        request()
        return guest.reset(reset)

    def of_floor() -> float:
        request()
        if name == "madvise":
            return guest.floor_by_madvise()
        return guest.floor_by_copy(pages) if name == "copy" else guest.floor_by_pagemap(pages)

    return {"reset": of_reset, "floor": of_floor}


def of_nothing(
    bench: Bench, image: MemfdImage, mebibytes: int, read: str, seconds: float = 0.5
) -> float:
    """Nanoseconds that a reset after a request that wrote nothing costs more than the floor.

    What is read is read once, before: it stays populated for as long as the strategy leaves it.
    """
    reset, nothing = strategy("auto"), Pages([])
    with guestless(image, mebibytes * MIB) as guest:
        guest.read(READS[read])
        subjects: dict[str, Subject] = {
            "reset": lambda: guest.reset(reset),
            "floor": lambda: guest.floor_by_pagemap(nothing),
        }
        samples = bench.rounds(subjects, seconds)
    return Spread.of(samples["reset"]).median - Spread.of(samples["floor"]).median


def over_the_floor(rows: Sequence[Row]) -> Iterator[Claim]:
    """Limits per strategy and image size: the worst number of written pages, with 300 read pages."""
    worst: dict[tuple[Label, Label], float] = {}
    for row in rows:
        if row.has(read="300 pages") and row.labels["pages written"] != 0:
            case = row.labels["strategy"], row.labels["MiB"]
            worst[case] = max(worst.get(case, 0.0), row.ratio.median)
    for (name, mebibytes), ratio in worst.items():
        if name in ("auto", "pagemap"):
            says = (
                f"A reset by {name}, {mebibytes} MiB, any number of written pages: over the floor"
            )
            yield Claim(says, ratio, 1.25)


def same_price(bench: Bench) -> tuple[Claim, ...]:
    """64 pages in guests of 1 and 64 MiB, before and after a request that reads everything."""
    bench.say("reset: the same pages of 1 and 64 MiB")
    pages, reset = Pages(SAME_PAGES), strategy("auto")
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
        before = bench.rounds(subjects, 0.5)
        ratios = []
        for _ in range(5 if bench.quick else 15):
            bench.check()
            large.read(64 * MIB)
            for _ in range(RECOVERY):
                subjects["large"]()
            after = bench.rounds(subjects, 0.05, fewest=20, most=20)
            ratios.append(_ratio(after))
    return (
        Claim("The same 64 pages written in 64 MiB, over those in 1 MiB", _ratio(before), 1.5),
        Claim(
            f"The same, {RECOVERY} resets after a request that read all 64 MiB",
            Spread.of(ratios).median,
            1.5,
        ),
    )


def _ratio(samples: dict[str, list[float]]) -> float:
    pairs = zip(samples["large"], samples["small"], strict=True)
    return Spread.of(large / small for large, small in pairs).median


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """One per strategy."""
    for name in dict.fromkeys(row.labels["strategy"] for row in rows):
        ours = [row for row in rows if row.has(strategy=name)]
        yield pivot(
            f"{TITLE}: {name}, by pages written",
            ours,
            ("read", "MiB"),
            "pages written",
            heading=lambda pages: f"{pages:,}",
        )
