"""The sides of `memslot run`: tried, compared, and measured by the runner of the benchmark.

A request is a fresh instance, the calls that were asked for, and the end of the instance; through memslot also the
calls and a reset.  The sides take turns in blocks, so that a machine that gets slower gets slower for all.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from memslot_plugin.bench.baseline import RUNTIMES, Baseline
from memslot_plugin.bench.live import Held, hold
from memslot_plugin.bench.results import Row
from memslot_plugin.bench.runner import CLOCK, Bench, Subject
from memslot_plugin.cli.output import sentence
from memslot_plugin.cli.source import Invocation, Source
from memslot_plugin.errors import GuestExit, GuestTrap
from memslot_plugin.hosts import Guest, Host, Instance, Lease, Wasi
from memslot_plugin.hosts.versions import installed_version
from memslot_plugin.settings import MIB

REQUESTS = 1000
SECONDS = 10.0
"""Without --requests each side serves REQUESTS, or as many as fit into SECONDS, but at least FEWEST."""

FEWEST = 5
ROUNDS = 20

MOST_INSTANCES = 65
MOST_HELD_BYTES = 256 * MIB
"""Bounds of the live instances that are held to see what each costs."""

Result = tuple[str, ...]
"""The values that the calls returned, as Python writes them, so that NaN equals NaN and 0.0 is not -0.0."""


class Outcome(NamedTuple):
    """Traces of a request: its result and its standard output."""

    result: Result
    output: bytes


@dataclass(frozen=True, slots=True)
class Measured:
    """The costs of one side: times in microseconds, memory in bytes (None if only one instance can live)."""

    median_us: float
    p99_us: float
    faults_per_request: float
    private_bytes_per_instance: float | None
    live_instances: int


def compare(
    host: Host,
    guest: Guest,
    source: Source,
    invocation: Invocation,
    *,
    wasi: Wasi | None,
    requests: int | None,
    bench: Bench,
) -> dict[str, Any] | str:
    """Run all sides; return the comparison, or a sentence if the guest traps or exits with an error.

    `ratio` and `reset_ratio` are the times of the runtime alone over those of memslot and reset, taken block by block,
    or None without a runtime to compare with.
    """
    notes = list(_notes(guest))
    sides = _memslot_sides(guest, source, invocation)
    if source.saved is not None:
        notes.append(
            f"{host.name} alone cannot start where a saved guest does, so there is nothing to compare with."
        )
    elif host.name in RUNTIMES:
        sides.append(_alone_side(RUNTIMES[host.name](source.data, wasi), source, invocation))
    else:
        notes.append(f"{host.name} has no baseline here, so there is nothing to compare with.")
    new, reset, *alone = sides

    bench.say(f"trying {invocation}")
    tried = [side.attempt() for side in sides]
    outcomes = [each for each in tried if isinstance(each, Outcome)]
    if len(outcomes) < len(sides):
        return _bad_end(sides, tried)
    started = CLOCK()
    again = [side.observe() for side in sides]
    if requests is None:
        requests = max(FEWEST, min(REQUESTS, int(SECONDS * 1e9 / (CLOCK() - started))))
    reference = outcomes[-1]
    unstable = _differing([reference, again[-1]])
    differing = _differing([*outcomes, *again])
    if unstable:
        notes.append(
            f"The guest's {' and '.join(sorted(unstable))} differ from request to request on the runtime alone, so they"
            " were not compared."
        )

    bench.say("holding instances")
    held = new.hold(min(host.settings.slots, MOST_INSTANCES))
    held_alone = [each.hold(MOST_INSTANCES) for each in alone]
    medians = measure(sides, requests, reference.result, bench)
    if not all(side.same for side in sides):
        differing.add("result")
    differences = sorted(differing - unstable)
    same = None if not alone or "result" in unstable else True
    document: dict[str, Any] = {
        "guest": source.name,
        "invoke": invocation.function,
        "arguments": list(invocation.program_arguments or invocation.arguments),
        "host": host.name,
        "host_version": installed_version(host.name),
        "plugin": next((pool.plugin for pool in host.statistics().pools if pool.leases), None),
        "slots": host.settings.slots,
        "requests": len(new.costs),
        "result": outcomes[0].result,
        "output": outcomes[0].output.decode(errors="replace"),
        "same_result": False if differences else same,
        "differences": differences,
        "memslot": new.measured(held),
        # Instances that wait ready were there before, and cost what new ones do.
        "reset": reset.measured(held),
        "alone": None,
        "ratio": None,
        "reset_ratio": None,
        "notes": notes,
    }
    for each, its_held in zip(alone, held_alone, strict=True):
        document["alone"] = each.measured(its_held)
        for key, side in (("ratio", new), ("reset_ratio", reset)):
            row = Row.compare({}, medians[side.name], each.name, medians[each.name], gain=True)
            document[key] = row.ratio
    return document


def _differing(outcomes: Sequence[Outcome]) -> set[str]:
    """Return the names of what is not the same in all outcomes."""
    pairs = zip(Outcome._fields, zip(*outcomes, strict=True), strict=True)
    return {name for name, values in pairs if len(set(values)) > 1}


def measure(
    sides: list[Side], requests: int, expected: Result, bench: Bench
) -> dict[str, list[float]]:
    """Serve at least so many requests on each side, in blocks that take turns; return the medians of the blocks."""
    size = -(-requests // ROUNDS)
    rounds = -(-requests // size)

    def subject(side: Side) -> Subject:
        def block() -> float:
            bench.say(f"{rounds * size} requests on each side: {len(side.costs)} done")
            return side.serve(size, expected)

        return block

    subjects = {side.name: subject(side) for side in sides}
    return bench.rounds(subjects, 0, fewest=rounds, most=rounds, warm_up=0)


# -- the sides


@dataclass(slots=True)
class Side:
    """One way to serve a request, and its costs; `end` releases what `begin` returned.

    `quiet` is true for a guest that may print.  `costs` are the nanoseconds of each request; `same` is true if each
    result was expected.
    """

    name: str
    begin: Callable[[], Any]
    call: Callable[[Any], Result]
    end: Callable[[Any], object]
    quiet: bool
    costs: list[int] = field(default_factory=list)
    faults: int = 0
    same: bool = True

    def observe(self) -> Outcome:
        """Serve one request and return what it left."""
        with tempfile.TemporaryFile() as output:
            with silenced(output.fileno()):
                live = self.begin()
                try:
                    result = self.call(live)
                finally:
                    self.end(live)
            output.seek(0)
            return Outcome(result, output.read())

    def attempt(self) -> Outcome | str:
        """Return the outcome of one request, or how it failed."""
        try:
            return self.observe()
        except GuestExit as error:
            return f"ended itself with exit status {error.code}"
        except GuestTrap as error:
            return f"trapped: {sentence(error)}"

    def serve(self, count: int, expected: Result) -> float:
        """Serve a block of requests, and before it a tenth as many because the others' turn emptied the caches.

        Return the median nanoseconds of a request of the block.
        """
        begin, call, end = self.begin, self.call, self.end
        with silenced() if self.quiet else nullcontext():
            for number in range(-max(1, count // 10), count):
                if number == 0:
                    self.faults -= _faults()
                started = CLOCK()
                live = begin()
                try:
                    result = call(live)
                finally:
                    end(live)
                    live = None
                cost = CLOCK() - started
                if number >= 0:
                    self.costs.append(cost)
                self.same = self.same and result == expected
            self.faults += _faults()
        return statistics.median(self.costs[-count:])

    def hold(self, most: int) -> Held:
        """Hold so many live instances, and measure the memory of each."""
        with silenced() if self.quiet else nullcontext():
            return hold(self.begin, self.call, self.end, most, most_bytes=MOST_HELD_BYTES)

    def measured(self, held: Held) -> Measured:
        """Return the costs of all requests, and of the instances that were held."""
        costs = sorted(self.costs)
        return Measured(
            statistics.median(costs) / 1000,
            costs[len(costs) * 99 // 100] / 1000,
            self.faults / len(costs),
            held.bytes,
            held.instances,
        )


def _faults() -> int:
    """Return the page faults of this thread so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def _memslot_sides(guest: Guest, source: Source, invocation: Invocation) -> list[Side]:
    """Return requests on new instances, and on instances that wait ready and are reset after each request."""

    def begin_lease() -> tuple[Lease, Instance]:
        lease = guest.lease()
        return lease, lease.__enter__()

    return [
        Side(
            "memslot",
            guest.instantiate,
            lambda instance: _result(instance.call, invocation),
            Instance.close,
            source.uses_wasi,
        ),
        Side(
            "memslot, reset",
            begin_lease,
            lambda live: _result(live[1].call, invocation),
            lambda live: live[0].__exit__(),
            source.uses_wasi,
        ),
    ]


def _alone_side(runtime: Baseline, source: Source, invocation: Invocation) -> Side:
    def call(instance: Any) -> Result:
        return _result(lambda name, *arguments: runtime.call(instance, name, arguments), invocation)

    return Side(f"{runtime.name} alone", runtime.instantiate, call, id, source.uses_wasi)


def _result(call: Callable[..., Any], invocation: Invocation) -> Result:
    """Return the values of the last call; a WASI guest that exits with 0 returns none."""
    value = None
    try:
        for name, arguments in invocation.calls:
            value = call(name, *arguments)
    except GuestExit as error:
        if error.code:
            raise
        return ()
    return written_values(value)


def written_values(value: Any) -> Result:
    """Return the results of a call, each as Python writes it."""
    if value is None:
        return ()
    return tuple(repr(each) for each in (value if isinstance(value, (list, tuple)) else [value]))


def _notes(guest: Guest) -> Iterator[str]:
    """Yield the reasons for which the guest, or a memory of it, is left to the runtime."""
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


def _bad_end(sides: list[Side], tried: list[Outcome | str]) -> str:
    """Return the sentence about a guest that failed on one side at least."""
    failed = {
        side.name: how for side, how in zip(sides, tried, strict=True) if isinstance(how, str)
    }
    how = next(iter(failed.values()))
    others = [side.name for side in sides if side.name not in failed]
    if not others:
        return f"the guest {how}"
    return f"the results differ: with {' and '.join(failed)} the guest {how}; with {' and '.join(others)} it did not"


@contextmanager
def silenced(output: int | None = None) -> Iterator[None]:
    """Point file descriptors 0, 1 and 2 at /dev/null for a block, and 1 at `output` if it is given.

    Descriptors and not `sys.stdout`, because guests write to those: bare wasmer cannot do otherwise, and all sides have
    to pay the same.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    saved = [os.dup(descriptor) for descriptor in range(3)]
    try:
        for descriptor in range(3):
            os.dup2(output if descriptor == 1 and output is not None else nothing, descriptor)
        yield
    finally:
        for descriptor, former in enumerate(saved):
            os.dup2(former, descriptor)
            os.close(former)
        os.close(nothing)
