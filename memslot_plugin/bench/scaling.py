"""Family `scaling`: the throughput of two threads and of two processes over that of one.

Threads make calls of about a millisecond, each in a fresh instance, on wasmtime, which lets other threads run
meanwhile.  Processes lease a slot, write into it and release it; all of them map the same sealed image: a forked child
inherits it, a spawned one is given its descriptor.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import reduction
from typing import Any

from memslot_hooks.types import Extent
from memslot_plugin._core import lib
from memslot_plugin.bench import guests
from memslot_plugin.bench.baseline import chosen
from memslot_plugin.bench.memory import Pages, image_of, pool_of, serve, strategy
from memslot_plugin.bench.results import Claim, Grid, Limit, Row, judge, spread
from memslot_plugin.bench.runner import CLOCK, Bench, Subject
from memslot_plugin.errors import MemslotError
from memslot_plugin.hosts import Guest, open_host
from memslot_plugin.memory.backing import Memfd
from memslot_plugin.memory.image import MemfdImage
from memslot_plugin.settings import MIB

NAME = "scaling"

SECONDS, QUICK_SECONDS = 0.4, 0.1
"""Duration for which one or two of them work before it is the others' turn."""

GUEST = 4 * MIB
WRITTEN = 16
CALL_NANOSECONDS = 1_000_000

FAIR = 1.9
"""Work of two bare loops over that of one, below which other work kept a processor busy and no row is judged."""

MACHINE = "bare loops: what the machine gives"
THREADS = "threads on wasmtime, calls of 1 ms"
FORK, SPAWN = "processes, forked", "processes, spawned"
PROCESSES = {FORK: "fork", SPAWN: "spawn"}
"""Start methods of multiprocessing."""

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""

LIMITS = ()
"""Rows are judged by FAIR_LIMITS, and only on a machine that is fair."""

FAIR_LIMITS = [
    Limit(f"Two {two}: throughput over one", {"two": two}, least)
    for two, least in {THREADS: 1.7, FORK: 1.8, SPAWN: 1.8}.items()
]

Work = Callable[[int, float], float]
"""Lets so many work for so many seconds, and returns the sum of what each did per second."""


def measure(bench: Bench) -> Iterator[Row | Claim | str]:
    """Measure the machine, threads, and both kinds of process."""
    rows = [compare(bench, MACHINE, lambda count, seconds: _together(count, _spin, seconds), 4.0)]
    if bench.host in (None, "wasmtime"):
        here, skipped = chosen("wasmtime")
        yield from (f"threads: {each}" for each in skipped)
        if here:
            with open_host("wasmtime", slots=4) as host, host.prepare(guests.spinner()) as guest:
                rows.append(compare(bench, THREADS, _threads(guest)))
    with image_of(GUEST) as image:
        rows += [compare(bench, each, _processes(image, PROCESSES[each])) for each in PROCESSES]
    yield from rows
    yield from judged(rows)


def judged(rows: Sequence[Row]) -> Iterator[Claim | str]:
    """Yield claims about threads and processes, or the reason why there are none."""
    given = rows[0].ratio.median
    if len(os.sched_getaffinity(0)) < 2:
        yield "a second one: there is one processor here"
    elif given < FAIR:
        yield f"claims about two, because two bare loops do the work of {given:.2f} here"
    else:
        yield from judge(rows, FAIR_LIMITS)


def compare(bench: Bench, what: str, work: Work, seconds: float = 8.0) -> Row:
    """Compare two with one."""
    bench.say(f"scaling: {what}")
    length = QUICK_SECONDS if bench.quick else SECONDS
    subjects: dict[str, Subject] = {
        "one": lambda: work(1, length),
        "two": lambda: work(2, length),
    }
    samples = bench.rounds(subjects, seconds, fewest=3, warm_up=1)
    return Row.compare({"two": what}, samples["two"], "one", samples["one"], unit="1/s")


def _per_second(action: Callable[[], object], seconds: float) -> float:
    """Return the actions per second, of at least one."""
    done, started = 0, time.monotonic()
    ends = started + seconds
    while not done or time.monotonic() < ends:
        action()
        done += 1
    return done / (time.monotonic() - started)


# -- threads


def _together(count: int, work: Callable[[float], float], seconds: float) -> float:
    """Return the sum of what so many threads return."""
    answers: list[float] = []
    started = [threading.Thread(target=lambda: answers.append(work(seconds))) for _ in range(count)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if len(answers) != count:
        raise MemslotError("a thread of the benchmark failed; its traceback is on standard error")
    return sum(answers)


def _spin(seconds: float) -> float:
    """Return the turns of a loop in C that touches no memory: nothing here can do better."""
    return float(lib.ms_bench_spin(int(seconds * 1e9)))


def _threads(guest: Guest) -> Work:
    turns = _calibrated(guest)

    def call() -> None:
        with guest.instantiate() as instance:
            instance.call("spin", turns)

    return lambda count, seconds: _together(
        count, lambda length: _per_second(call, length), seconds
    )


def _calibrated(guest: Guest) -> int:
    """Return an argument for `spin` that takes a millisecond."""
    turns = 1000
    with guest.instantiate() as instance:
        while True:
            started = CLOCK()
            instance.call("spin", turns)
            took = CLOCK() - started
            if took > CALL_NANOSECONDS / 2:
                return int(turns * CALL_NANOSECONDS / took)
            turns *= 2


# -- processes


class _Passed:
    """An image whose sealed file multiprocessing passes to a spawned process."""

    def __init__(self, image: MemfdImage) -> None:
        self.image = image

    def __reduce__(self) -> tuple[Callable[[Any], _Passed], tuple[Any]]:
        return _received, (reduction.DupFd(self.image.fd),)


def _received(passed: Any) -> _Passed:
    extent = Extent(0, GUEST, 0, Memfd("received", passed.detach(), GUEST))
    return _Passed(MemfdImage.of_extents("received", [extent]))


def _processes(image: MemfdImage, method: str) -> Work:
    context: Any = multiprocessing.get_context(method)

    def work(count: int, seconds: float) -> float:
        barrier, answers = context.Barrier(count, timeout=60), context.SimpleQueue()
        arguments = (os.getpid(), _Passed(image), barrier, answers, seconds)
        children = [context.Process(target=_child, args=arguments) for _ in range(count)]
        with warnings.catch_warnings():
            # From 3.12 on Python warns where other threads exist; this child takes no lock that they could hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            # Children inherit the mask: Ctrl-C is for the parent, and a spawned child would print a traceback.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            for child in children:
                child.start()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for child in children:
            child.join()
            if child.exitcode:
                raise MemslotError(f"a process of the benchmark ended with {child.exitcode}")
        return float(sum(answers.get() for _ in children))

    return work


def _child(parent: int, passed: _Passed, barrier: Any, answers: Any, seconds: float) -> None:
    """Serve requests in slots of a pool of its own, and answer how many there were per second."""
    # Ctrl-C ends the parent alone, and this one would wait for another child that never starts (prctl(2)).
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    strategy("auto")  # measures prices, once per process
    pages = Pages.spread(WRITTEN, GUEST)
    with pool_of(4, GUEST) as pool:
        barrier.wait()
        answers.put(_per_second(lambda: serve(pool, passed.image, GUEST, pages), seconds))


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """Show one line each."""
    if rows:
        lines = tuple((str(row.labels["two"]), spread(row)) for row in rows)
        yield Grid("Two over one: throughput", ("two", "over one"), lines)
