"""The results of a run: rows of ratios, claims about them, and tables of both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

Label = str | int


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its quartiles, of `count` samples."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        """Return the spread of at least one sample."""
        ordered = sorted(samples)
        if len(ordered) == 1:
            return cls(ordered[0], ordered[0], ordered[0], 1)
        low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(median, low, high, len(ordered))


@dataclass(frozen=True, slots=True)
class Row:
    """One case: its cost, the baseline's cost in the same rounds, and their ratio, taken round by round.

    `labels` name the case.  `unit` is that of `cost` and `baseline_cost`: "ns", "bytes", "mappings", or "1/s".
    """

    labels: Mapping[str, Label]
    baseline: str
    ratio: Spread
    cost: Spread
    baseline_cost: Spread
    unit: str = "ns"

    @classmethod
    def compare(
        cls,
        labels: Mapping[str, Label],
        samples: Sequence[float],
        baseline: str,
        baseline_samples: Sequence[float],
        *,
        unit: str = "ns",
        gain: bool = False,
    ) -> Row:
        """Return the row of samples of the same rounds; with `gain` the ratio is baseline over case."""
        pairs = zip(samples, baseline_samples, strict=True)
        ratio = Spread.of(theirs / ours if gain else ours / theirs for ours, theirs in pairs)
        return cls(labels, baseline, ratio, Spread.of(samples), Spread.of(baseline_samples), unit)

    def has(self, labels: Mapping[str, Label | None]) -> bool:
        """Return true if the case has all these labels; None stands for any value."""
        return all(
            name in self.labels and value in (None, self.labels[name])
            for name, value in labels.items()
        )


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence that must hold, the number that was measured, and its limit.

    `kind` decides how the number is written: "times", "nanoseconds", "count".
    """

    says: str
    measured: float
    limit: float
    at_least: bool = False
    kind: str = "times"

    @property
    def holds(self) -> bool:
        """True if the number keeps to the limit."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass(frozen=True, slots=True)
class Limit:
    """A claim about each row that has these labels: its ratio is at least `least`, or else at most `most`.

    `says` may name labels in braces.
    """

    says: str
    labels: Mapping[str, Label | None]
    least: float | None = None
    most: float = 0.0


def judge(rows: Sequence[Row], limits: Iterable[Limit]) -> Iterator[Claim]:
    """Yield the claims that the limits make about these rows."""
    for each in limits:
        for row in rows:
            if row.has(each.labels):
                says, at_least = each.says.format_map(row.labels), each.least is not None
                limit = each.most if each.least is None else each.least
                yield Claim(says, row.ratio.median, limit, at_least)


@dataclass(frozen=True, slots=True)
class Family:
    """Results of one family; `skipped` are sentences about cases that were left out."""

    name: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """Results of one `memslot bench`, and the machine that they are from."""

    machine: Mapping[str, Any]
    quick: bool
    families: tuple[Family, ...] = ()

    @property
    def claims(self) -> list[Claim]:
        """The claims of all families."""
        return [claim for family in self.families for claim in family.claims]

    def document(self) -> dict[str, Any]:
        """Return the run as JSON has it."""
        document = asdict(self)
        claims = [claim for family in document["families"] for claim in family["claims"]]
        for claim, judged in zip(claims, self.claims, strict=True):
            claim["holds"] = judged.holds
        return document

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Run:
        """Return the run that `document` wrote."""
        return msgspec.convert(document, cls, strict=False)


@dataclass(frozen=True, slots=True)
class Grid:
    """A table for people, the same on a terminal and in the README."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def times(ratio: float | None) -> str:
    """Write a ratio for people: "1.07x", "12.3x", "180x"; a dash for None."""
    if ratio is None:
        return "-"
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"


def spread(row: Row) -> str:
    """Write a ratio with its quartiles: "1.07x (1.05-1.11)"."""
    low, high = times(row.ratio.low)[:-1], times(row.ratio.high)[:-1]
    return f"{times(row.ratio.median)} ({low}-{high})"


def pivot(
    title: str,
    rows: Sequence[Row],
    down: Sequence[str],
    across: str,
    *,
    shown: Callable[[Row], str] = lambda row: times(row.ratio.median),
) -> Grid:
    """Return a grid with a line per combination of the labels `down`, and a column per value of the label `across`."""
    columns = list(dict.fromkeys(row.labels[across] for row in rows))
    lines: dict[tuple[Label, ...], dict[Label, str]] = {}
    for row in rows:
        key = tuple(row.labels[name] for name in down)
        lines.setdefault(key, {})[row.labels[across]] = shown(row)
    return Grid(
        title,
        (*down, *(f"{each:,}" if isinstance(each, int) else each for each in columns)),
        tuple(
            (*map(str, key), *(cells.get(column, "-") for column in columns))
            for key, cells in lines.items()
        ),
    )


def claimed(claim: Claim, number: float) -> str:
    """Write a claim's measured number or limit for people."""
    if claim.kind == "nanoseconds":
        return f"{number / 1000:.2f} us"
    return f"{number:.3g}" if claim.kind == "count" else times(number)
