"""The long run: each verb of a host, round after round, and its costs.

By hand: python -m integration_tests.soak HOST [SECONDS] [--quickjs FILE]

A round does each act once, in a drawn order. After each act each slot of a new tenant has to be pristine. Each reset
is audited byte by byte.
"""

from __future__ import annotations

import argparse
import functools
import gc
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import memslot_plugin as memslot
from memslot_plugin.settings import MIB
from memslot_plugin.tests.leaks import Footprint, count_objects

from . import cells, javascript, toy
from .cells import Cell
from .processes import beside
from .toy import PAGE
from .verbs import COMPILE, VERBS, World, finish

CALLS_OUT = f"""(module (import "env" "help" (func $help (param i32) (result i32)))
  (memory (export "memory") 2 8)
  (func (export "ask") (param i32) (result i32)
    (i32.store8 (i32.const 5) (i32.const 77)) (call $help (local.get 0)))
  {toy.CODE})"""


class Refused(Exception):
    """Error that a host function raises in the middle of a call."""


def help_(number: int) -> int:
    if number == 13:
        raise Refused
    return number + 1


class Soak:
    """Acts of a round."""

    def __init__(self, world: World, quickjs: bytes | None) -> None:
        self.world = world
        self.random = random.Random(1)
        self.wide = world.host.prepare(toy.WIDE)
        self.caller = world.host.prepare(toy.assemble(CALLS_OUT), imports={"env": {"help": help_}})
        self.seldom = [functools.partial(self.verb, verb) for verb in VERBS if verb in COMPILE]
        self.acts: list[Callable[[], None]] = [
            *(functools.partial(self.verb, verb) for verb in VERBS if verb not in COMPILE),
            self.copied_data,
            self.trap,
            self.raise_in_mid_call,
        ]
        if not world.host.runtime.thread_confined:
            self.acts.append(self.threads)
        if quickjs is not None:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", memslot.RepeatedRandomness
                )  # no call here draws a random number
                self.javascript = world.host.prepare(
                    quickjs, imports=javascript.IMPORTS, wasi=memslot.Wasi(), init=boot
                )
            self.acts += [self.evaluate, self.evaluate]

    def round(self, *, seldom: bool) -> None:
        acts = self.acts + self.seldom * seldom
        self.random.shuffle(acts)
        for act in acts:
            act()
            self.world.serves()

    def verb(self, verb: str) -> None:
        setup, action = VERBS[verb]
        given = setup(self.world)
        action(self.world, given)
        finish(given)

    def copied_data(self) -> None:
        with self.wide.instantiate() as instance:
            expected = toy.pristine(toy.WIDE, self.world.host.name)
            assert instance.memory.read(0, 16 * PAGE) == expected
            at = self.random.randrange(16 * PAGE - 5000)
            instance.call("fill", at, 5000, self.random.randrange(1, 256))

    def trap(self) -> None:
        with self.world.guest.instantiate() as instance:
            for call in (("fill_and_trap", 9, 9000, 5), ("load", 2 * PAGE), ("store", -1, 1)):
                with pytest.raises(memslot.GuestTrap):
                    instance.call(*call)

    def raise_in_mid_call(self) -> None:
        with self.caller.instantiate() as instance:
            assert instance.memory.read(0, 2 * PAGE) == bytes(2 * PAGE)
            assert instance.call("ask", 1) == 2
            with pytest.raises(Refused):
                instance.call("ask", 13)

    def threads(self) -> None:
        def serve() -> None:
            for _ in range(5):
                with self.world.guest.lease(wait_timeout=20) as instance:
                    assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
                    instance.call("fill", 0, PAGE, 0x77)

        with beside(serve, serve):
            pass

    def evaluate(self) -> None:
        with self.javascript.lease(wait_timeout=20) as instance:
            machine = javascript.Pooled(instance)
            said = javascript.evaluate(machine, "globalThis.left = (globalThis.left || 41) + 1")
            assert said == "42"


def boot(instance: memslot.Instance) -> None:
    """Boot QuickJS and use it once."""
    instance.call("_initialize") if "_initialize" in instance.exports else None
    javascript.evaluate(javascript.Pooled(instance), "6 * 7")


def soak(cell: Cell, seconds: float, quickjs: bytes | None = None) -> str:
    """Run rounds for these seconds, after a fifth of them to warm up; return the costs, after a leak check."""
    world = World(cell, slots=4, audit=1.0, wait_timeout=20, image_limit=64 * MIB)
    with world.host as host:
        run = Soak(world, quickjs)
        started = time.monotonic()
        warm = 0
        while warm < 3 or time.monotonic() < started + seconds / 5:
            run.round(seldom=True)
            warm += 1  # at least these rounds: a slow machine too has to open all that a process opens once
        before, objects = Footprint.now(), count_objects()
        took: list[float] = []
        begin = now = time.monotonic()
        while now < begin + seconds:
            used = time.process_time()
            run.round(seldom=not host.runtime.thread_confined)
            took.append(time.process_time() - used)
            now = time.monotonic()
        third = max(len(took) // 3, 1)
        after, more = Footprint.now(), count_objects() - objects
        pools = host.statistics().pools
        audits = sum(pool.audits for pool in pools)
        said = (
            f"{cell}: {len(took)} rounds in {now - begin:.0f} s,"
            f" {sum(took[-third:]) / sum(took[:third]):.2f}x as long at the end as at the start;"
            f" {audits} audits; RSS {(after.resident - before.resident) / MIB:+.2f} MiB,"
            f" {after.mappings - before.mappings:+} mappings, {more:+} objects"
        )
        print(said, flush=True)
        assert audits > 0
        assert sum(pool.failed_resets for pool in pools) == 0
        # Images, extents and accessible bytes of idle slots depend on chance. A lost reservation would have gigabytes.
        allowed = replace(
            before, image_mappings=before.image_mappings + 8, reserved=before.reserved + 64 * MIB
        )
        lost = after.lost_since(allowed, mappings=16)
        assert not lost, lost
        assert more <= 200
        if seconds > 60:
            assert after.resident <= before.resident + 2 * MIB
    return said


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m integration_tests.soak")
    parser.add_argument("host", choices=cells.REAL_HOSTS)
    parser.add_argument("seconds", type=float, nargs="?", default=60.0)
    parser.add_argument("--quickjs", type=Path, help="the module, as javascript.fetch gets it")
    told = parser.parse_args()
    quickjs = None if told.quickjs is None else told.quickjs.read_bytes()
    gc.freeze()
    for backend in cells.BACKENDS:
        soak(Cell(told.host, backend), told.seconds, quickjs)


if __name__ == "__main__":
    main()
