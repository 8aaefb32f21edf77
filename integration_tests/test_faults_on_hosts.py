"""Each system call of the core fails once, at each point of a host's life: an error that says so, nothing lost, and no
byte of another tenant.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

import memslot_plugin as memslot
from memslot_plugin.tests import faults
from memslot_plugin.tests.profiles import LONG

from . import cells, toy
from .cells import Cell
from .toy import PAGE

Result = TypeVar("Result")

CELLS = (
    cells.POSSIBLE_CELLS
    if LONG
    else [
        *(cell for cell in cells.PLAIN_CELLS if not cell.missing),
        Cell("fake", "memfd", allocation="on-demand", reset="madvise"),
        Cell("fake", "anonymous", growth="ftruncate", reset="pagemap"),
    ]
)


class Life:
    """A host's whole life, in steps of which any may fail once; its slots are checked after each, and what the process
    holds after all lives of a test (the fixture `leaks`).
    """

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.failures: list[memslot.MemslotError] = []
        self.refused_growths = 0
        self.failed_resets = 0

    def attempt(self, step: Callable[[], Result]) -> Result | None:
        """The step's result, or None if it raised what may be raised."""
        try:
            return step()
        except memslot.MemslotError as error:
            error.__traceback__ = error.__context__ = error.__cause__ = None  # they hold instances
            self.failures.append(error)
            return None

    def until_done(self, step: Callable[[], Result]) -> Result:
        """The result of a step that works at the second attempt at the latest."""
        failures = len(self.failures)
        result = self.attempt(step)
        return step() if len(self.failures) > failures else result  # type: ignore[return-value]

    def start(self, guest: memslot.Guest, expected: bytes) -> memslot.Instance:
        instance = self.until_done(guest.instantiate)
        self.arrive(instance, expected)
        cells.check(self.host)
        return instance

    def arrive(self, instance: memslot.Instance, expected: bytes) -> None:
        """Find exactly what is expected, and leave other bytes everywhere."""
        assert instance.memory.byte_size == len(expected)
        assert instance.memory.read(0, len(expected)) == expected, "a byte of another tenant"
        instance.memory.write(0, b"\xee" * len(expected))

    def close(self, instance: memslot.Instance) -> None:
        self.attempt(instance.close)
        assert instance.closed

    def grow(self, instance: memslot.Instance) -> None:
        if instance.call("grow", 2) == -1:
            self.refused_growths += 1
            self.arrive(instance, b"\xee" * 2 * PAGE)
            assert instance.call("grow", 2) == 2
        self.arrive(instance, b"\xee" * 2 * PAGE + bytes(2 * PAGE))

    def reset(self, instance: memslot.Instance, guest: memslot.Guest, expected: bytes) -> Any:
        """The instance, or another one if it was closed because its reset failed."""
        failures = len(self.failures)
        self.attempt(instance.reset)
        assert instance.closed == (len(self.failures) > failures)
        if instance.closed:
            return self.start(guest, expected)
        self.arrive(instance, expected)
        return instance

    def run(self) -> None:
        self.host = self.until_done(self.cell.open)
        try:
            self.serve()
        finally:
            self.attempt(self.host.close)
            self.host.close()

    def serve(self) -> None:
        a = self.until_done(lambda: self.host.prepare(toy.A))
        b = self.until_done(lambda: self.host.prepare(toy.B))
        of_a, of_b = toy.pristine(toy.A), toy.pristine(toy.B)
        instance = self.start(a, of_a)
        for _ in range(2):
            instance = self.reset(instance, a, of_a)  # in place
        self.grow(instance)
        instance = self.reset(instance, a, of_a)  # by a new instance
        self.grow(instance)
        self.close(instance)
        for guest, expected in ((b, of_b), (a, of_a), (a, of_a), (b, of_b)):
            self.close(self.start(guest, expected))
        self.attempt(lambda: a.warm(2))
        for _ in range(2):
            self.until_done(lambda: self.lease(a, of_a))
        self.snapshots(a, of_a)
        self.start(b, of_b)  # and drop it
        gc.collect()
        seen = self.until_done(self.host.statistics)
        assert seen.live_instances == seen.ready_instances <= 1  # one waits for a lease
        for guest in (a, b):
            self.attempt(guest.close)
            guest.close()
        cells.check(self.host, in_use=0)
        pools = self.host.statistics().pools
        assert sum(pool.warm for pool in pools) == 0, "an unused slot has a closed guest's image"
        assert all(pool.limit == 4 for pool in pools)
        self.failed_resets = sum(pool.failed_resets for pool in pools)

    def lease(self, guest: memslot.Guest, expected: bytes) -> None:
        with guest.lease() as instance:
            self.arrive(instance, expected)

    def snapshots(self, guest: memslot.Guest, expected: bytes) -> None:
        instance = self.start(guest, expected)
        self.grow(instance)
        now = instance.memory.read(0, 4 * PAGE)
        taken = self.until_done(instance.snapshot)
        for fork in self.until_done(lambda: instance.fork(2)):
            assert fork.memory.read(0, 4 * PAGE) == now
            fork.memory.write(0, bytes(4 * PAGE))
            self.attempt(fork.reset)
            if not fork.closed:
                assert fork.memory.read(0, 4 * PAGE) == now
            self.close(fork)
        assert instance.memory.read(0, 4 * PAGE) == now
        self.close(instance)
        instance = self.start(taken, now)
        instance.memory.write(0, bytes(4 * PAGE))
        self.close(self.reset(instance, taken, now))
        self.attempt(taken.close)
        taken.close()


@pytest.mark.gate
@pytest.mark.long
@pytest.mark.parametrize("lived_in", CELLS, ids=str)
def test_system_call_that_fails_once_in_a_hosts_life_loses_nothing(
    lived_in: Cell, note: Callable[[str, object], None]
) -> None:
    faults.calls_of(lambda: Life(lived_in).run())  # what a process makes once
    made = faults.calls_of(lambda: Life(lived_in).run())
    hit = count = 0
    for fault in faults.every(made):
        count += 1
        with faults.injected(fault) as injection:
            life = Life(lived_in)
            life.run()
            for failure in life.failures:
                what, _, reason = str(failure).partition(": ")
                assert what
                assert os.strerror(fault.error) in reason, failure
            assert len(life.failures) <= 1, life.failures
        hit += injection.hit
        if injection.hit and not fault.is_made_again:
            told = life.failures or injection.logged or life.refused_growths or life.failed_resets
            assert told, f"no error and no log said that {fault}"
    # A life that measures time, as `auto` does, makes a call more or less.
    assert hit >= count * 0.95
    note("faults", hit)
