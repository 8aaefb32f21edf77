"""The long run: mixed guests and everything that can become of an instance, round after round, and what it costs.

By hand: python -m integration_tests.soak HOST [SECONDS] [--quickjs FILE]

A round is every act once, in an order of its own.  Each tenant looks for what others left behind before it leaves
something itself, and every reset is audited byte by byte.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import memslot_plugin as memslot
from memslot_plugin.tests.patience import count_objects

from . import cells, javascript, toy
from .cells import Cell
from .leaks import MIB, Footprint
from .processes import beside
from .toy import PAGE

CALLS_OUT = f"""(module (import "env" "help" (func $help (param i32) (result i32)))
  (memory (export "memory") 2 8) (table 1 funcref)
  (func (export "ask") (param i32) (result i32)
    (i32.store8 (i32.const 5) (i32.const 77)) (call $help (local.get 0)))
  (func (export "change_table") (table.set (i32.const 0) (ref.null func)))
  {toy.CODE})"""


class Refused(Exception):
    """What the host function raises in mid-call."""


def help_(number: int) -> int:
    if number == 13:
        raise Refused
    return number + 1


@dataclass
class Measured:
    """Findings of a soak; sizes are bytes, `slowdown` is processor time of the last third of the rounds over the first."""

    rounds: int
    seconds: float
    slowdown: float
    resident: int
    descriptors: int
    mappings: int
    objects: int
    audits: int
    lost: list[str]

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds in {self.seconds:.0f} s, {self.slowdown:.2f}x as long at the end as at the start;"
            f" {self.audits} audits; RSS {self.resident / MIB:+.2f} MiB, {self.descriptors:+} descriptors,"
            f" {self.mappings:+} mappings, {self.objects:+} objects"
        )


class Soak:
    """A host and its guests, and the acts of a round."""

    def __init__(self, host: memslot.Host, quickjs: bytes | None) -> None:
        self.host = host
        self.random = random.Random(1)
        self.toys = {module: host.prepare(module) for module in (toy.A, toy.B, toy.ZEROS, toy.WIDE)}
        self.caller = host.prepare(toy.assemble(CALLS_OUT), imports={"env": {"help": help_}})
        self.acts: list[Callable[[], None]] = [
            *(lambda module=module: self.serve(module) for module in self.toys),
            self.trap,
            self.grow,
            self.reset,
            self.lease,
            self.warm,
            self.raise_in_mid_call,
            self.new_instance_by_reset,
            self.drop,
        ]
        self.seldom: list[Callable[[], None]] = [self.snapshot, self.fork, self.prepare]
        """What compiles a module, which wasmer keeps for as long as its store lives."""
        if not host.thread_confined:
            self.acts.append(self.threads)
        if quickjs is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", memslot.RepeatedRandomness)  # no call here draws
                self.javascript = host.prepare(
                    quickjs,
                    imports=javascript.IMPORTS,
                    wasi=memslot.Wasi(),
                    init=boot,
                    name="quickjs",
                )
            self.acts += [self.evaluate, self.evaluate]

    def round(self) -> None:
        self.random.shuffle(self.acts)
        for act in self.acts:
            act()

    # -- what a tenant does

    def arrive(self, module: bytes, instance: memslot.Instance) -> None:
        expected = toy.pristine(module, self.host.name)
        assert instance.memory.read(0, instance.memory.byte_size) == expected, "a stranger's bytes"

    def serve(self, module: bytes) -> None:
        with self.toys[module].instantiate(tenant="ann") as instance:
            self.arrive(module, instance)
            mark = self.random.randrange(1, 256)
            at = self.random.randrange(2 * PAGE - 5000)
            instance.call("fill", at, 5000, mark)
            assert instance.call("different", at, 5000, mark) == 0
            instance.call("bump")

    def trap(self) -> None:
        with self.toys[toy.A].instantiate() as instance:
            self.arrive(toy.A, instance)
            for call in (("fill_and_trap", 9, 9000, 5), ("load", 2 * PAGE), ("store", -1, 1)):
                try:
                    instance.call(*call)
                except memslot.GuestTrap:
                    continue
                raise AssertionError(f"{call} did not trap")

    def grow(self) -> None:
        with self.toys[toy.B].instantiate() as instance:
            self.arrive(toy.B, instance)
            assert instance.call("grow", 6) == 2
            instance.call("fill", 2 * PAGE, 6 * PAGE, 9)
            assert instance.call("grow", 1) == -1

    def reset(self) -> None:
        with self.toys[toy.A].instantiate() as instance:
            for _ in range(3):
                instance.call("fill", 100, 9000, 0xEE)
                assert instance.call("bump") == 8
                instance.reset()
                self.arrive(toy.A, instance)

    def new_instance_by_reset(self) -> None:
        with self.caller.instantiate() as instance:
            instance.call("change_table")
            instance.call("grow", 1)
            instance.reset()
            assert instance.memory.read(0, 2 * PAGE) == bytes(2 * PAGE)

    def lease(self) -> None:
        for _ in range(3):
            with self.toys[toy.ZEROS].lease(wait_timeout=20) as instance:
                self.arrive(toy.ZEROS, instance)
                instance.call("fill", 0, PAGE, 1)

    def warm(self) -> None:
        self.toys[toy.A].warm(1)

    def raise_in_mid_call(self) -> None:
        with self.caller.instantiate() as instance:
            assert instance.memory.read(0, 2 * PAGE) == bytes(2 * PAGE)
            assert instance.call("ask", 1) == 2
            try:
                instance.call("ask", 13)
            except Refused:
                return
            raise AssertionError("the host function's exception was lost")

    def drop(self) -> None:
        instance = self.toys[toy.B].instantiate()
        instance.call("fill", 0, PAGE, 3)

    def threads(self) -> None:
        def serve() -> None:
            for _ in range(5):
                with self.toys[toy.A].lease(wait_timeout=20) as instance:
                    self.arrive(toy.A, instance)
                    instance.call("fill", 0, PAGE, 0x77)

        with beside(serve, serve):
            pass

    def snapshot(self) -> None:
        with self.toys[toy.A].instantiate() as instance:
            instance.call("fill", 50, 500, 4)
            taken = instance.snapshot()
        with taken, taken.instantiate() as later:
            assert later.call("different", 50, 500, 4) == 0
            later.call("fill", 0, PAGE, 6)

    def fork(self) -> None:
        with self.toys[toy.B].instantiate() as instance:
            instance.call("fill", 50, 500, 4)
            for mark, child in enumerate(instance.fork(2), start=8):
                child.call("fill", 0, 5000, mark)
                child.close()
            assert instance.call("different", 50, 500, 4) == 0

    def prepare(self) -> None:
        with self.host.prepare(toy.B) as guest, guest.instantiate() as instance:
            self.arrive(toy.B, instance)

    def evaluate(self) -> None:
        with self.javascript.lease(wait_timeout=20) as instance:
            machine = javascript.Pooled(instance)
            said = javascript.evaluate(machine, "globalThis.left = (globalThis.left || 41) + 1")
            assert said == "42"


def boot(instance: memslot.Instance) -> None:
    """QuickJS with its runtime made, and once used."""
    instance.call("_initialize") if "_initialize" in instance.exports else None
    javascript.evaluate(javascript.Pooled(instance), "6 * 7")


def soak(cell: Cell, seconds: float, quickjs: bytes | None = None) -> Measured:
    """Rounds for so long, after a fifth of that to warm up."""
    with cell.serving(slots=4, audit=1.0, wait_timeout=20, image_limit=64 * MIB) as host:
        run = Soak(host, quickjs)
        started = time.monotonic()
        while time.monotonic() < started + seconds / 5:
            run.round()
            for act in run.seldom:
                act()
        before, objects = Footprint.now(), count_objects()
        took: list[float] = []
        begin = now = time.monotonic()
        while now < begin + seconds:
            used = time.process_time()
            run.round()
            for act in run.seldom if not host.thread_confined else ():
                act()
            took.append(time.process_time() - used)
            now = time.monotonic()
        third = max(len(took) // 3, 1)
        after = Footprint.now()
        pools = host.statistics().pools
        assert sum(pool.failed_resets for pool in pools) == 0
        # Whose images lie in the idle slots, in how many extents, and how much of those slots the memories could access
        # that they held last, is as chance has it; a reservation that is lost has gigabytes.
        allowed = replace(before, images=before.images + 8, reserved=before.reserved + 64 * MIB)
        lost = after.lost_since(allowed, mappings=16)
        measured = Measured(
            rounds=len(took),
            seconds=now - begin,
            slowdown=sum(took[-third:]) / sum(took[:third]),
            resident=after.resident - before.resident,
            descriptors=after.descriptors.total() - before.descriptors.total(),
            mappings=after.mappings - before.mappings,
            objects=count_objects() - objects,
            audits=sum(pool.audits for pool in pools),
            lost=lost,
        )
        for guest in list(host._guests):
            guest.close()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m integration_tests.soak")
    parser.add_argument("host", choices=cells.HOSTS)
    parser.add_argument("seconds", type=float, nargs="?", default=60.0)
    parser.add_argument("--quickjs", type=Path, help="the module, as javascript.fetch gets it")
    told = parser.parse_args()
    quickjs = None if told.quickjs is None else told.quickjs.read_bytes()
    gc.freeze()
    for backend in cells.backends():
        measured = soak(Cell(told.host, backend), told.seconds, quickjs)
        print(f"{told.host} {backend}: {measured}", *measured.lost, flush=True)


if __name__ == "__main__":
    main()
