"""The sides of `memslot run`: tried, compared, and measured by the runner of the benchmark.

A request is a fresh instance, the calls that were asked for, and the end of the instance; through memslot also the
calls and a reset.  The sides take turns in blocks, so that a machine that gets slower gets slower for all.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from memslot_plugin.bench.baseline import RUNTIMES, Baseline
from memslot_plugin.bench.live import hold
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

MOST_INSTANCES = 64
MOST_HELD_BYTES = 256 * MIB
"""Bounds of the live instances that are held to see what each costs."""

LARGEST_COMPARED_MEMORY = 256 * MIB

Result = tuple[str, ...]
"""The values that the calls returned, as Python writes them, so that NaN equals NaN and 0.0 is not -0.0."""


class Outcome(NamedTuple):
    """Traces of a request: its result, standard output, and a digest of memory 0 (None if it cannot be read)."""

    result: Result
    output: bytes
    memory: str | None

    def differences(self, other: Outcome) -> set[str]:
        """Return the names of what differs; memory is compared only where both could read it."""
        mine, theirs = self._asdict(), other._asdict()
        names = {name for name in mine if mine[name] != theirs[name]}
        return names if self.memory and other.memory else names - {"memory"}


@dataclass(frozen=True, slots=True)
class Measured:
    """The costs of one side: times in microseconds, memory in bytes (None if only one instance can live)."""

    median_us: float
    p99_us: float
    faults_per_request: float
    private_bytes_per_instance: int | None
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

    `ratio` and `reset_ratio` are the costs of the runtime alone over those of memslot and reset, by the name of the
    cost; None stands where nothing can be divided.  The ratios of time are taken block by block.
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

    bench.say(f"trying {invocation}")
    tried = [side.attempt() for side in sides]
    outcomes = [each for each in tried if isinstance(each, Outcome)]
    if len(outcomes) < len(sides):
        return _bad_end(sides, tried)
    again = [side.observe() for side in sides]
    reference = outcomes[-1]
    unstable = reference.differences(again[-1])
    differing = set().union(*(reference.differences(each) for each in (*outcomes, *again[:-1])))
    if unstable:
        notes.append(
            f"The guest's {' and '.join(sorted(unstable))} differ from request to request on the runtime alone, so they"
            " were not compared."
        )

    if requests is None:
        price = sum(sum(side.serve(1, reference.result)) for side in sides)
        requests = max(FEWEST, min(REQUESTS, int(SECONDS * 1e9 / price)))
    new, reset, *alone = sides
    for side, most in ((new, host.settings.slots), *((each, MOST_INSTANCES + 1) for each in alone)):
        bench.say(f"holding instances, {side.name}")
        side.hold(min(most, MOST_INSTANCES + 1))
    # Instances that wait ready were there before, and cost what new ones do.
    reset.memory = new.memory
    measure(sides, requests, reference.result, bench)
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
        "requests": requests,
        "result": [_number(value) for value in outcomes[0].result],
        "output": outcomes[0].output.decode(errors="replace"),
        "same_result": False if differences else same,
        "differences": differences,
        "memslot": new.measured(),
        "reset": reset.measured(),
        "alone": alone[0].measured() if alone else None,
        "notes": notes,
    }
    for key, side in (("ratio", new), ("reset_ratio", reset)):
        document[key] = document[f"{key}_spread"] = None
        if alone:
            time = Row.compare({}, side.medians, "alone", alone[0].medians, gain=True).ratio
            ratios = _ratios(side.measured(), alone[0].measured())
            document |= {key: {**ratios, "median_us": time.median}, f"{key}_spread": time}
    return document


def measure(sides: list[Side], requests: int, expected: Result, bench: Bench) -> None:
    """Serve so many requests on each side, in blocks that take turns."""
    sizes = list(blocks_of(requests))

    def subject(side: Side) -> Subject:
        side.costs.clear()
        side.faults = 0

        def block() -> float:
            number = len(side.costs)
            bench.say(f"{requests} requests on each side: {100 * number // len(sizes)} % done")
            return statistics.median(side.serve(sizes[number], expected))

        return block

    subjects = {side.name: subject(side) for side in sides}
    bench.rounds(subjects, 0, fewest=len(sizes), most=len(sizes), warm_up=0)


def blocks_of(requests: int) -> Iterator[int]:
    """Yield the requests in ROUNDS blocks of at least ten, as equal as they can be."""
    rounds = max(1, min(ROUNDS, requests // 10))
    for number in range(rounds):
        yield requests * (number + 1) // rounds - requests * number // rounds


def _ratios(ours: Measured, alone: Measured) -> dict[str, float | None]:
    ratios: dict[str, float | None] = {}
    for name in ("median_us", "p99_us", "faults_per_request", "private_bytes_per_instance"):
        cost, theirs = getattr(ours, name), getattr(alone, name)
        divisible = theirs is not None and cost and (name != "faults_per_request" or cost >= 1)
        ratios[name] = theirs / cost if divisible else None
    return ratios


# -- the sides


@dataclass(slots=True)
class Side:
    """One way to serve a request, and its costs; `end` releases what `begin` returned.

    `costs` are the nanoseconds of each request, block by block; `memory` the private bytes of each further live
    instance, and the number that was held; `same` is true if each result was expected.
    """

    name: str
    begin: Callable[[], Any]
    call: Callable[[Any], Result]
    end: Callable[[Any], None]
    read_memory: Callable[[Any], bytes | None]
    quiet: bool
    costs: list[list[int]] = field(default_factory=list)
    faults: int = 0
    memory: tuple[int | None, int] = (None, 0)
    same: bool = True

    def observe(self) -> Outcome:
        """Serve one request and return what it left."""
        with tempfile.TemporaryFile() as output:
            with silenced(output.fileno()):
                live = self.begin()
                try:
                    result = self.call(live)
                    memory = self.read_memory(live)
                finally:
                    self.end(live)
            output.seek(0)
            digest = None if memory is None else hashlib.sha256(memory).hexdigest()
            return Outcome(result, output.read(), digest)

    def attempt(self) -> Outcome | str:
        """Return the outcome of one request, or how it failed."""
        try:
            return self.observe()
        except GuestExit as error:
            return f"ended itself with exit status {error.code}"
        except GuestTrap as error:
            return f"trapped: {sentence(error)}"

    def serve(self, count: int, expected: Result) -> list[int]:
        """Serve a block of requests, and before it a tenth as many because the others' turn emptied the caches.

        Return the nanoseconds of each request of the block.
        """
        begin, call, end = self.begin, self.call, self.end
        costs: list[int] = []
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
                    costs.append(cost)
                self.same = self.same and result == expected
            self.faults += _faults()
        self.costs.append(costs)
        return costs

    def hold(self, most: int) -> None:
        """Hold so many live instances, and measure the memory of each."""
        with silenced() if self.quiet else nullcontext():
            held = hold(self.begin, self.call, self.end, most, most_bytes=MOST_HELD_BYTES)
        self.memory = (None if held.bytes is None else int(held.bytes), held.instances)

    @property
    def medians(self) -> list[float]:
        """The median of each block."""
        return [statistics.median(block) for block in self.costs]

    def measured(self) -> Measured:
        """Return the costs of all blocks."""
        costs = sorted(itertools.chain.from_iterable(self.costs))
        return Measured(
            statistics.median(costs) / 1000,
            percentile(costs, 99) / 1000,
            self.faults / len(costs),
            *self.memory,
        )


def _faults() -> int:
    """Return the page faults of this thread so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def percentile(ordered: list[int], percent: int) -> int:
    """Return the smallest of these ordered samples that at least so many percent of them do not pass."""
    return ordered[-(-len(ordered) * percent // 100) - 1]


def _memslot_sides(guest: Guest, source: Source, invocation: Invocation) -> list[Side]:
    """Return requests on new instances, and on instances that wait ready and are reset after each request."""

    def call(instance: Instance) -> Result:
        return _result(instance.call, invocation)

    def read_memory(instance: Instance) -> bytes | None:
        if source.memory is None or instance.memory.byte_size > LARGEST_COMPARED_MEMORY:
            return None
        return instance.memory.read(0, instance.memory.byte_size)

    def begin_lease() -> tuple[Lease, Instance]:
        lease = guest.lease()
        return lease, lease.__enter__()

    return [
        Side("memslot", guest.instantiate, call, Instance.close, read_memory, source.uses_wasi),
        Side(
            "memslot, reset",
            begin_lease,
            lambda live: call(live[1]),
            lambda live: live[0].__exit__(),
            lambda live: read_memory(live[1]),
            source.uses_wasi,
        ),
    ]


def _alone_side(runtime: Baseline, source: Source, invocation: Invocation) -> Side:
    def call(instance: Any) -> Result:
        return _result(lambda name, *arguments: runtime.call(instance, name, arguments), invocation)

    def read_memory(instance: Any) -> bytes | None:
        if source.memory is None:
            return None
        return runtime.read_memory(instance, source.memory, LARGEST_COMPARED_MEMORY)

    return Side(
        f"{runtime.name} alone",
        runtime.instantiate,
        call,
        lambda _: None,
        read_memory,
        source.uses_wasi,
    )


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


def _number(text: str) -> int | float | str:
    """Return a value as JSON has it; NaN and the infinities, which it has not, as text."""
    try:
        return int(text)
    except ValueError:
        return float(text) if math.isfinite(float(text)) else text


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
    ours = next((each for each in tried[:2] if isinstance(each, str)), None)
    if len(sides) == 2:
        return f"the guest {ours}"
    name, theirs = sides[2].name, tried[2]
    if ours is None:
        return f"the results differ: on {name} the guest {theirs}; through memslot it did not"
    if isinstance(theirs, str):
        return f"the guest, through memslot as on {name}, {ours}"
    return f"the results differ: through memslot the guest {ours}; on {name} it did not"


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
