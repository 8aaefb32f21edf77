"""Family `scaling`: what a second thread and a second process add.

Threads make calls of about a millisecond, each in a fresh instance, on wasmtime, which lets other threads run
meanwhile.  Processes lease a slot, write into it and release it; all of them map the same sealed image: a forked child
inherits it, a spawned one is given its descriptor.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from memslot_plugin._core import lib
from memslot_plugin.bench import guests, worker
from memslot_plugin.bench.memory import image_of
from memslot_plugin.bench.peers import missing
from memslot_plugin.bench.results import Claim, Family, Grid, Row, spread
from memslot_plugin.bench.runner import CLOCK, Bench, Subject
from memslot_plugin.errors import MemslotError
from memslot_plugin.hosts import Guest, open_host
from memslot_plugin.memory.image import MemfdImage

NAME = "scaling"
TITLE = "Two over one: throughput"

SECONDS, QUICK_SECONDS = 0.4, 0.1
"""How long one or two of them work before it is the others' turn."""

GUEST = worker.GUEST
CALL_NANOSECONDS = 1_000_000

FAIR = 1.9
"""Work of two bare loops over that of one, below which other work kept a processor busy and no row is judged."""

MACHINE = "bare loops: what the machine gives"
THREADS, FORK, SPAWN = (
    "threads on wasmtime, calls of 1 ms",
    "processes, forked",
    "processes, spawned",
)


def measure(bench: Bench) -> Family:
    """Threads and both kinds of process."""
    bench.say("scaling: the machine")
    rows = [machine(bench)]
    skipped = []
    reason = missing("wasmtime")
    if reason is not None:
        skipped.append(f"threads: {reason}")
    elif bench.host in (None, "auto", "wasmtime"):
        bench.say("scaling: threads")
        rows.append(threads(bench))
    with image_of(GUEST) as image:
        for what in PROCESSES:
            bench.say(f"scaling: {what}")
            rows.append(processes(bench, what, image))
    processors = len(os.sched_getaffinity(0))
    if processors < 2:
        skipped.append("a second one: there is one processor here")
    elif not fair(rows):
        skipped.append(
            "whether two do the work of two, because two bare loops do the work of"
            f" {rows[0].ratio.median:.2f} here"
        )
    return Family(NAME, tuple(rows), tuple(claims(rows)), tuple(skipped))


def _row(bench: Bench, what: str, subjects: dict[str, Subject], seconds: float) -> Row:
    samples = bench.rounds(subjects, seconds, fewest=3, warm_up=1)
    return Row.compare({"two": what}, samples["two"], "one", samples["one"], unit="1/s")


def _length(bench: Bench) -> float:
    return QUICK_SECONDS if bench.quick else SECONDS


def machine(bench: Bench, seconds: float = 4.0) -> Row:
    """What two loops in C that touch no memory compute, over one: nothing here can do better."""

    def subject(count: int) -> Subject:
        length = int(_length(bench) * 1e9)
        return lambda: _together(count, lambda: float(lib.ms_bench_spin(length)))

    return _row(bench, MACHINE, {"one": subject(1), "two": subject(2)}, seconds)


# -- threads


def threads(bench: Bench, seconds: float = 8.0) -> Row:
    """Calls per second of two threads over those of one, on one host."""
    with open_host("wasmtime", slots=4) as host, host.prepare(guests.spinner()) as guest:
        turns = _calibrated(guest)

        def subject(count: int) -> Subject:
            def serve() -> float:
                ends = time.monotonic() + _length(bench)
                return _together(count, lambda: _calls(guest, turns, ends))

            return serve

        return _row(bench, THREADS, {"one": subject(1), "two": subject(2)}, seconds)


def _calibrated(guest: Guest) -> int:
    """An argument for `spin` that takes a millisecond."""
    turns = 1000
    with guest.instantiate() as instance:
        while True:
            started = CLOCK()
            instance.call("spin", turns)
            took = CLOCK() - started
            if took > CALL_NANOSECONDS / 2:
                return int(turns * CALL_NANOSECONDS / took)
            turns *= 2


def _calls(guest: Guest, turns: int, ends: float) -> float:
    """Calls per second until then, of at least one call."""
    done, started = 0, time.monotonic()
    while not done or time.monotonic() < ends:
        with guest.instantiate() as instance:
            instance.call("spin", turns)
        done += 1
    return done / (time.monotonic() - started)


def _together(count: int, work: Callable[[], float]) -> float:
    """The sum of what so many threads answer."""
    answers: list[float] = []
    started = [threading.Thread(target=lambda: answers.append(work())) for _ in range(count)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if len(answers) != count:
        raise MemslotError("a thread of the benchmark failed; its traceback is on standard error")
    return sum(answers)


# -- processes


def processes(bench: Bench, what: str, image: MemfdImage, seconds: float = 8.0) -> Row:
    """Requests per second of two processes over those of one."""

    def subject(count: int) -> Subject:
        return lambda: PROCESSES[what](image, count, _length(bench))

    return _row(bench, what, {"one": subject(1), "two": subject(2)}, seconds)


def _forked(image: MemfdImage, count: int, seconds: float) -> float:
    ends = time.monotonic() + seconds
    readers = []
    for _ in range(count):
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            # From 3.12 on Python warns where other threads exist; this child takes no lock that they could hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            status = 1
            try:
                os.write(writer, repr(worker.serve(image, ends)).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        readers.append((child, reader))
    total = 0.0
    for child, reader in readers:
        with os.fdopen(reader) as answer:
            text = answer.read()
        _, status = os.waitpid(child, 0)
        if status:
            raise MemslotError(f"a forked process of the benchmark ended with status {status}")
        total += float(text)
    return total


def _spawned(image: MemfdImage, count: int, seconds: float) -> float:
    program = "from memslot_plugin.bench.worker import main; main()"
    command = [sys.executable, "-c", program, str(image.fd), str(seconds)]
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(  # noqa: S603 - ourselves
                    command,
                    pass_fds=[image.fd],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(count)
        ]
        for process in started:  # each says that it is ready, and then all begin at once
            assert process.stdout is not None
            process.stdout.readline()
        answers = []
        for process in started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in started:
            answers.append(process.communicate()[0])
            if process.returncode:
                raise MemslotError(
                    f"a spawned process of the benchmark ended with status {process.returncode}"
                )
    return sum(float(answer) for answer in answers)


PROCESSES: dict[str, Callable[[MemfdImage, int, float], float]] = {FORK: _forked, SPAWN: _spawned}
"""How so many processes are started, serve for so long, and say how many requests per second they served together."""


def fair(rows: Sequence[Row]) -> bool:
    """Return true if two bare loops did the work of two."""
    return any(row.has(two=MACHINE) and row.ratio.median >= FAIR for row in rows)


def claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """Limits for threads and processes, where two bare loops do the work of two."""
    for row in rows:
        kind = str(row.labels["two"])
        if kind != MACHINE and fair(rows):
            says = f"Two {kind}: throughput over one"
            yield Claim(says, row.ratio.median, 1.7 if kind == THREADS else 1.8, at_least=True)


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """One line each."""
    if rows:
        lines = tuple((str(row.labels["two"]), spread(row)) for row in rows)
        yield Grid(TITLE, ("two", "over one"), lines)
