"""One request after the other, through memslot and on the runtime alone: how long, how many faults, how much memory.

A request is a fresh instance, the calls that were asked for, and the end of the instance; through memslot also the
calls and a reset.  The sides take turns in blocks, so that a machine that gets slower gets slower for all.
"""

from __future__ import annotations

import hashlib
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from memslot_plugin._core.proc import private_bytes
from memslot_plugin.cli.source import Invocation, Source
from memslot_plugin.errors import GuestExit, MemslotError
from memslot_plugin.hosts import Guest, Instance, Lease
from memslot_plugin.hosts.alone import Alone

MOST_INSTANCES = 64
MOST_HELD_BYTES = 256 << 20
"""Holding live instances stops at so many of them, or at so many bytes."""

LARGEST_COMPARED_MEMORY = 256 << 20

Result = tuple[str, ...]
"""What the calls answered, each value as Python writes it, so that NaN equals NaN and 0.0 is not -0.0."""


@dataclass(frozen=True, slots=True)
class Side:
    """One way to serve a request; `end` lets go of what only `begin` knows about."""

    name: str
    begin: Callable[[], Any]
    call: Callable[[Any], Result]
    end: Callable[[Any], None]
    read_memory: Callable[[Any], bytes | None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a request left behind: answers, standard output, and a digest of memory 0 (None if it cannot be read)."""

    result: Result
    output: bytes
    memory: str | None

    def differences(self, other: Outcome) -> tuple[str, ...]:
        """The names of what differs; memory is compared only where both could read it."""
        names = [
            name for name in ("result", "output") if getattr(self, name) != getattr(other, name)
        ]
        if self.memory and other.memory and self.memory != other.memory:
            names.append("memory")
        return tuple(names)


@dataclass(slots=True)
class Samples:
    """What was measured of one side."""

    nanoseconds: list[int] = field(default_factory=list)
    faults: int = 0
    other_results: int = 0

    def median_us(self) -> float:
        """The time that half of the requests did not pass."""
        return statistics.median(self.nanoseconds) / 1000

    def p99_us(self) -> float:
        """The smallest time that at least 99 % of the requests did not pass."""
        ordered = sorted(self.nanoseconds)
        return ordered[-(-len(ordered) * 99 // 100) - 1] / 1000

    def faults_per_request(self) -> float:
        """Page faults that needed no disk."""
        return self.faults / len(self.nanoseconds)


def memslot_side(guest: Guest, source: Source, invocation: Invocation) -> Side:
    """Requests through memslot: an instance in a leased slot."""
    calls = invocation.calls

    def call(instance: Instance) -> Result:
        return _result(lambda: [instance.call(name, *arguments) for name, arguments in calls])

    def read_memory(instance: Instance) -> bytes | None:
        if source.memory is None or instance.memory.byte_size > LARGEST_COMPARED_MEMORY:
            return None
        return instance.memory.read(0, instance.memory.byte_size)

    return Side("memslot", guest.instantiate, call, Instance.close, read_memory)


def reset_side(guest: Guest, source: Source, invocation: Invocation) -> Side:
    """Requests through memslot on instances that wait ready, and are reset after each request."""
    new = memslot_side(guest, source, invocation)

    def begin() -> tuple[Lease, Instance]:
        lease = guest.lease()
        return lease, lease.__enter__()

    return Side(
        "memslot, reset",
        begin,
        lambda live: new.call(live[1]),
        lambda live: live[0].__exit__(),
        lambda live: new.read_memory(live[1]),
    )


def alone_side(runtime: Alone, source: Source, invocation: Invocation) -> Side:
    """Requests on the bare runtime: an instance of its own allocation."""
    calls = invocation.calls
    exported = source.memory

    def call(instance: Any) -> Result:
        return _result(
            lambda: [runtime.call(instance, name, arguments) for name, arguments in calls]
        )

    def read_memory(instance: Any) -> bytes | None:
        if exported is None:
            return None
        return runtime.read_memory(instance, exported, LARGEST_COMPARED_MEMORY)

    return Side(f"{runtime.name} alone", runtime.instantiate, call, lambda _: None, read_memory)


def _result(call: Callable[[], Sequence[Any]]) -> Result:
    """The values of the last call; a WASI guest that ends itself well is as good as one that returns."""
    try:
        value = call()[-1]
    except GuestExit as error:
        if error.code:
            raise
        value = None
    return written_values(value)


def written_values(value: Any) -> Result:
    """What a call answered, each value as Python writes it."""
    if value is None:
        return ()
    return tuple(repr(each) for each in (value if isinstance(value, (list, tuple)) else [value]))


def observe(side: Side) -> Outcome:
    """One request, looked at from all sides and not timed."""
    with tempfile.TemporaryFile() as output:
        with silenced(output.fileno()):
            live = side.begin()
            try:
                result = side.call(live)
                memory = side.read_memory(live)
            finally:
                side.end(live)
        output.seek(0)
        digest = None if memory is None else hashlib.sha256(memory).hexdigest()
        return Outcome(result, output.read(), digest)


def time_block(
    side: Side, samples: Samples, count: int, expected: Result, check: Callable[[], None]
) -> None:
    """`count` timed requests after a few that warm up and are not counted; `check` is called between them."""
    clock = time.perf_counter_ns
    begin, call, end = side.begin, side.call, side.end
    faults = 0
    warm_up = max(1, count // 10)  # the other side's turn has emptied the processor's caches
    for number in range(-warm_up, count):
        check()
        if number == 0:
            faults = _faults()
        start = clock()
        live = begin()
        try:
            result = call(live)
        finally:
            end(live)
            live = None
        stop = clock()
        if number >= 0:
            samples.nanoseconds.append(stop - start)
        if result != expected:
            samples.other_results += 1
    samples.faults += _faults() - faults


def _faults() -> int:
    """Page faults of this thread that needed no disk, so far."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def private_bytes_per_instance(
    side: Side, most: int, check: Callable[[], None]
) -> tuple[int | None, int]:
    """Private memory that each further live instance costs after its request, and how many were held.

    What the first one costs is not counted, for it pays for what all of them share; None if there can be only one.
    """
    held: list[Any] = []
    try:
        before = now = served = 0
        while len(held) < min(most, MOST_INSTANCES + 1) and now - before < MOST_HELD_BYTES:
            check()
            try:
                held.append(side.begin())
                side.call(held[-1])
            except MemslotError:
                if served < 2:
                    raise
                break  # address space, slots: so many were possible
            served += 1
            now = private_bytes()
            before = before or now
        further = served - 1
        return (max(now - before, 0) // further if further else None), served
    finally:
        while held:
            side.end(held.pop())


@contextmanager
def silenced(output: int | None = None) -> Iterator[None]:
    """A block in which file descriptor 1 is `output`; 0 and 2, and 1 where none is given, are /dev/null.

    Descriptors and not `sys.stdout`, for guests write to those: bare wasmer cannot do otherwise, and both sides are to
    pay the same.
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
