"""The sides of `memslot run`: tried, compared, and then measured in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from memslot_plugin.cli import measure
from memslot_plugin.cli.measure import Outcome, Samples, Side
from memslot_plugin.cli.output import sentence
from memslot_plugin.cli.source import Invocation, Source
from memslot_plugin.errors import GuestExit, GuestTrap
from memslot_plugin.hosts import Guest, Host, Wasi
from memslot_plugin.hosts.alone import KNOWN, Alone
from memslot_plugin.settings import Settings

REQUESTS = 1000
SECONDS = 10.0
"""Unless a number is given there are REQUESTS on each side, or as many as fit into SECONDS."""

FEWEST = 5
ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Measured:
    """What one side costs; times in microseconds, memory in bytes (None: only one instance can live)."""

    median_us: float
    p99_us: float
    faults_per_request: float
    private_bytes_per_instance: int | None
    live_instances: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that `memslot run` found out."""

    source: Source
    invocation: Invocation
    host: str
    plugin: str | None
    settings: Settings
    requests: int
    outcome: Outcome
    memslot: Measured
    reset: Measured
    alone: Measured | None
    differences: tuple[str, ...]
    unstable: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def same_result(self) -> bool | None:
        """Whether both sides answered the same; None where that cannot be said."""
        if self.differences:
            return False
        return None if self.alone is None or "result" in self.unstable else True

    def ratio(self, what: str, *, reset: bool = False) -> float | None:
        """How many times less memslot needs for a new instance, or for one that is reset; None where there is nothing
        to divide.
        """
        ours = getattr(self.reset if reset else self.memslot, what)
        theirs = getattr(self.alone, what, None)
        if theirs is None or not ours or (what == "faults_per_request" and ours < 1):
            return None
        return float(theirs / ours)


def compare(
    *,
    host: Host,
    guest: Guest,
    source: Source,
    invocation: Invocation,
    wasi: Wasi | None,
    requests: int | None,
    say: Callable[[str], None],
    check: Callable[[], None],
) -> Comparison | str:
    """Run all sides; a sentence instead of numbers if the guest does not come to a good end."""
    ours = [each(guest, source, invocation) for each in (measure.memslot_side, measure.reset_side)]
    theirs: Side | None = None
    notes = list(_notes(guest))
    if source.saved is not None:
        notes.append(
            f"{host.name} alone cannot start where a saved guest does, so there is nothing to compare with."
        )
    elif host.name in KNOWN:
        runtime: Alone = KNOWN[host.name](source.data, wasi)
        theirs = measure.alone_side(runtime, source, invocation)
    else:
        notes.append(
            f"How {host.name} runs a guest alone is not known here, so there is nothing to compare with."
        )
    sides = ours if theirs is None else [*ours, theirs]

    say(f"trying {invocation}")
    first = [_attempt(side) for side in sides]
    check()
    for tried in first:
        if isinstance(tried, str):
            return _bad_end(sides, first, alone=theirs is not None)
    outcomes = [outcome for outcome in first if isinstance(outcome, Outcome)]
    again = [measure.observe(side) for side in sides]
    reference = outcomes[-1]
    unstable = reference.differences(again[-1])
    differing = {
        name for outcome in (*outcomes, *again[:-1]) for name in reference.differences(outcome)
    }

    quiet: Callable[[], AbstractContextManager[None]] = (
        measure.silenced if wasi is not None else _as_it_is
    )
    if requests is None:
        requests = _affordable(sides, reference, quiet, check)
    memory: list[tuple[int | None, int]] = []
    for side in sides:
        if (
            side is ours[1]
        ):  # those that wait ready were there before: what one costs, the first side shows
            memory.append(memory[0])
            continue
        say(f"holding instances, {side.name}")
        limit = host.settings.slots if side is ours[0] else measure.MOST_INSTANCES + 1
        with quiet():
            memory.append(measure.private_bytes_per_instance(side, limit, check))

    samples = [Samples() for _ in sides]
    done = 0
    for number, block in enumerate(_blocks(requests)):
        say(f"{requests} requests on each side: {100 * done // requests} % done")
        turns = list(zip(sides, samples, strict=True))
        turn = number % len(turns)  # each round begins with another side
        for side, sample in (*turns[turn:], *turns[:turn]):
            with quiet():
                measure.time_block(side, sample, block, reference.result, check)
        done += block
    if any(sample.other_results for sample in samples):
        differing.add("result")

    pools = host.statistics().pools
    measured = [
        Measured(
            median_us=sample.median_us(),
            p99_us=sample.p99_us(),
            faults_per_request=sample.faults_per_request(),
            private_bytes_per_instance=private,
            live_instances=held,
        )
        for sample, (private, held) in zip(samples, memory, strict=True)
    ]
    if unstable:
        notes.append(
            f"The guest's {' and '.join(unstable)} differ from request to request on the runtime alone, so they were"
            " not compared."
        )
    return Comparison(
        source=source,
        invocation=invocation,
        host=host.name,
        plugin=next((pool.plugin for pool in pools if pool.leases), None),
        settings=host.settings,
        requests=requests,
        outcome=outcomes[0],
        memslot=measured[0],
        reset=measured[1],
        alone=None if theirs is None else measured[2],
        differences=tuple(sorted(differing.difference(unstable))),
        unstable=unstable,
        notes=tuple(notes),
    )


def _notes(guest: Guest) -> Iterator[str]:
    """Why the guest, or a memory of it, is left to the runtime."""
    loaded = guest.loaded
    if loaded is not None:
        yield (
            "The images are mapped from the file, whose pages all processes share."
            if loaded.shares_file
            else f"The images are not mapped from the file: {loaded.copied_because}."
        )
        if loaded.compiled_because is not None:
            yield f"The module was compiled: {loaded.compiled_because}."
    report = guest.report
    if report.native is not None:
        yield f"memslot leaves this guest to the runtime as it is. {report.native}"
        return
    for memory in report.memories:
        if memory.reason is not None:
            yield f"Memory {memory.index} has no image. {memory.reason}"
    if not report.memories:
        yield "The guest has no linear memory, so there is nothing that memslot could make cheaper."


def _attempt(side: Side) -> Outcome | str:
    """One request, or how the guest failed in it."""
    try:
        return measure.observe(side)
    except GuestExit as error:
        return f"ended itself with exit status {error.code}"
    except GuestTrap as error:
        return f"trapped: {sentence(error)}"


def _bad_end(sides: list[Side], tried: list[Outcome | str], *, alone: bool) -> str:
    """The sentence about a guest that failed on one side at least; `alone` is whether the last one is the runtime's."""
    ours = next((each for each in tried[: 2 if alone else None] if isinstance(each, str)), None)
    if not alone:
        return f"the guest {ours}"
    name, theirs = sides[-1].name, tried[-1]
    if ours is not None and isinstance(theirs, str):
        return f"the guest, through memslot as on {name}, {ours}"
    if ours is not None:
        return f"the results differ: through memslot the guest {ours}; on {name} it did not"
    return f"the results differ: on {name} the guest {theirs}; through memslot it did not"


def _as_it_is() -> AbstractContextManager[None]:
    return nullcontext()


def _affordable(
    sides: list[Side],
    reference: Outcome,
    quiet: Callable[[], AbstractContextManager[None]],
    check: Callable[[], None],
) -> int:
    """How many requests fit into SECONDS, by the price of two on each side."""
    start = time.perf_counter()
    for side in sides:
        with quiet():
            measure.time_block(side, Samples(), 1, reference.result, check)
    price = (time.perf_counter() - start) / 2
    return max(FEWEST, min(REQUESTS, int(SECONDS / price)))


def _blocks(requests: int) -> Iterator[int]:
    """The requests in ROUNDS blocks of at least ten, as equal as they can be."""
    rounds = max(1, min(ROUNDS, requests // 10))
    for number in range(rounds):
        yield requests * (number + 1) // rounds - requests * number // rounds
