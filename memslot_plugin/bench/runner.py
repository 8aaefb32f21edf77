"""The runner: subjects take turns, round by round, so that a slower moment is slower for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Subject = Callable[[], float]
"""Does its work once and returns its cost."""

CLOCK = time.perf_counter_ns

WARM_UP = 3
"""Rounds of each case that are not counted."""


@dataclass(frozen=True, slots=True)
class Bench:
    """Options of a run that every family is given.

    `say` gets a line about the step that begins; `guests` is a folder with real guests for the family snapshot.
    """

    quick: bool = False
    host: str | None = None
    guests: Path | None = None
    say: Callable[[str], object] = str

    def rounds(
        self,
        subjects: Mapping[str, Subject],
        seconds: float,
        *,
        fewest: int = 5,
        most: int = 4000,
        warm_up: int = WARM_UP,
    ) -> dict[str, list[float]]:
        """Return the cost of each subject in each round, for about `seconds` (a fifth of it in a quick run).

        Each round begins with another subject, so that none always finds the caches that the same other one left.  The
        first `warm_up` rounds are not counted.
        """
        names = list(subjects)
        samples: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(warm_up):
            for subject in subjects.values():
                subject()
        deadline = CLOCK() + seconds * 1e9 / (5 if self.quick else 1)
        for number in range(most):
            if number >= fewest and CLOCK() >= deadline:
                break
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                samples[name].append(subjects[name]())
        return samples


def timed(action: Callable[[], object], count: int = 1, warm_up: int = 0) -> Subject:
    """Return a subject whose cost is the mean nanoseconds of `count` actions, after some that are not counted."""

    def subject() -> float:
        for _ in range(warm_up):
            action()
        started = CLOCK()
        for _ in range(count):
            action()
        return (CLOCK() - started) / count

    return subject


def clock_cost() -> float:
    """Return the nanoseconds that taking the time twice takes by itself."""
    return min(-CLOCK() + CLOCK() for _ in range(200))
