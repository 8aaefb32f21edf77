"""What a run of the benchmark is: rows of ratios, claims about them, and how both go to JSON and come back."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

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
        """That of these samples, of which there is at least one."""
        ordered = sorted(samples)
        if len(ordered) == 1:
            return cls(ordered[0], ordered[0], ordered[0], 1)
        low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(median, low, high, len(ordered))


@dataclass(frozen=True, slots=True)
class Row:
    """One case: what it cost, what the baseline cost in the same rounds, and their ratio, taken round by round.

    `labels` say which case it is.  `unit` is that of `cost` and `baseline_cost`: "ns", "bytes", "mappings", or
    "1/s".
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
        """The row of samples of the same rounds; with `gain` the ratio says how many times better they are."""
        pairs = zip(samples, baseline_samples, strict=True)
        ratios = [theirs / ours if gain else ours / theirs for ours, theirs in pairs]
        return cls(
            labels,
            baseline,
            Spread.of(ratios),
            Spread.of(samples),
            Spread.of(baseline_samples),
            unit,
        )

    def has(self, **labels: Label) -> bool:
        """Whether it is of such a case."""
        return all(self.labels.get(name) == value for name, value in labels.items())


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that must hold: a sentence, the number that was measured, and the limit for it.

    `kind` says how people read the number: "times", "nanoseconds", "count".
    """

    says: str
    measured: float
    limit: float
    at_least: bool = False
    kind: str = "times"

    @property
    def holds(self) -> bool:
        """Whether the number keeps to the limit."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass(frozen=True, slots=True)
class Family:
    """What one family measured; `skipped` are sentences about what it could not."""

    name: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that `memslot bench` measured at once, and on what."""

    machine: Mapping[str, Any]
    quick: bool
    families: tuple[Family, ...] = field(default_factory=tuple)

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        document = asdict(self)
        for family, found in zip(document["families"], self.families, strict=True):
            for claim, each in zip(family["claims"], found.claims, strict=True):
                claim["holds"] = each.holds
        return document

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Run:
        """What `document` wrote."""
        families = tuple(
            Family(
                family["name"],
                tuple(_row(row) for row in family["rows"]),
                tuple(
                    Claim(**{name: value for name, value in claim.items() if name != "holds"})
                    for claim in family["claims"]
                ),
                tuple(family["skipped"]),
            )
            for family in document["families"]
        )
        return cls(document["machine"], document["quick"], families)


def _row(row: Mapping[str, Any]) -> Row:
    spreads = {name: Spread(**row[name]) for name in ("ratio", "cost", "baseline_cost")}
    return Row(row["labels"], row["baseline"], unit=row["unit"], **spreads)


@dataclass(frozen=True, slots=True)
class Grid:
    """A table for people, the same on a terminal and in the README."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def times(ratio: float) -> str:
    """How many times as much, for people: "1.07x", "12.3x", "180x"."""
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"


def spread(row: Row) -> str:
    """A ratio with its quartiles: "1.07x (1.05-1.11)"."""
    low, high = times(row.ratio.low)[:-1], times(row.ratio.high)[:-1]
    return f"{times(row.ratio.median)} ({low}-{high})"


def pivot(
    title: str,
    rows: Sequence[Row],
    down: Sequence[str],
    across: str,
    *,
    shown: Callable[[Row], str] = lambda row: times(row.ratio.median),
    heading: Callable[[Label], str] = str,
) -> Grid:
    """A grid with one line per combination of the labels `down`, and one column per value of the label `across`."""
    columns = list(dict.fromkeys(row.labels[across] for row in rows))
    lines: dict[tuple[Label, ...], dict[Label, str]] = {}
    for row in rows:
        key = tuple(row.labels[name] for name in down)
        lines.setdefault(key, {})[row.labels[across]] = shown(row)
    return Grid(
        title,
        (*down, *(heading(column) for column in columns)),
        tuple(
            (*map(str, key), *(cells.get(column, "-") for column in columns))
            for key, cells in lines.items()
        ),
    )


def claimed(claim: Claim, measured: float | None = None) -> str:
    """A claim's number for people."""
    value = claim.measured if measured is None else measured
    if claim.kind == "nanoseconds":
        return f"{value / 1000:.2f} us"
    return f"{value:.3g}" if claim.kind == "count" else times(value)
