"""Threads, tasks, collections and signals that come at any moment: no deadlock, no leak, no cross-talk."""

from __future__ import annotations

import asyncio
import gc
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import hookimpl

from . import cells, toy
from .cells import Cell
from .toy import PAGE

ROOT = Path(__file__).parents[1]


@pytest.fixture
def impatient() -> Iterator[None]:
    """The interpreter changes threads a hundred times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 100)
    yield
    sys.setswitchinterval(before)


def together(count: int, action: Callable[[int], None]) -> None:
    """Run it in so many threads at once; raise what the first one raised."""
    wrong: list[BaseException] = []

    def run(number: int) -> None:
        try:
            action(number)
        except BaseException as error:  # noqa: BLE001 - raised below
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]


def a_random_life(guest: memslot.Guest, choice: random.Random, mark: int) -> None:
    """A tenant who looks for strangers, writes a pattern of its own, and finds it unchanged later."""
    way = choice.randrange(6)
    if way == 0:
        with guest.lease(wait_timeout=60) as instance:
            live_in(instance, mark)
        return
    instance = guest.instantiate(wait_timeout=60)
    live_in(instance, mark)
    if way == 1:
        instance.reset()
        live_in(instance, mark)
    elif way == 2:
        instance.call("grow", 1)
        instance.call("fill", 0, 3 * PAGE, mark)
    elif way == 3:
        with pytest.raises(memslot.GuestTrap):
            instance.call("fill_and_trap", 0, 2 * PAGE, mark)
    if way != 4:  # which drops it
        instance.close()


def live_in(instance: memslot.Instance, mark: int) -> None:
    assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
    instance.call("fill", 0, PAGE, mark)
    instance.call("bump")
    assert instance.call("different", 0, PAGE, mark) == 0


def test_threads_lease_and_return_at_random(plain_cell: Cell, impatient: None) -> None:
    """On one host; on wasmer, whose objects live on one thread, on a host for each."""
    if plain_cell.host == "wasmer":

        def on_its_own(number: int) -> None:
            with plain_cell.open(slots=3, audit=0.1) as host:
                guest, choice = host.prepare(toy.A), random.Random(number)
                for _ in range(40):
                    a_random_life(guest, choice, number + 1)
                guest.close()
                cells.check(host, in_use=0)

        together(4, on_its_own)
        return
    with plain_cell.serving(slots=3, audit=0.1) as host:
        guest = host.prepare(toy.A)

        def on_the_same(number: int) -> None:
            choice = random.Random(number)
            for _ in range(40):
                a_random_life(guest, choice, number + 1)

        together(6, on_the_same)
        guest.close()


CALLS_OUT = toy.assemble(
    f"""(module (import "env" "help" (func $help)) (memory (export "memory") 2 8)
      (func (export "ask") (call $help)) {toy.CODE})"""
)


def test_a_collection_inside_of_every_callback(plain_cell: Cell) -> None:
    """Of garbage that holds instances, so that their finalizers run there."""
    guests: list[memslot.Guest] = []
    spare: list[memslot.Instance] = []

    def collect(*_: Any) -> None:
        if spare:
            cycle: list[Any] = [spare.pop()]
            cycle.append(cycle)
            del cycle
        gc.collect()

    class Collects:
        @hookimpl
        def memslot_memory_created(self, memory: Any) -> None:
            collect()

        @hookimpl
        def memslot_memory_reset(self, memory: Any, result: Any) -> None:
            collect()

        @hookimpl
        def memslot_pool_exhausted(self, request: Any, limit: int, in_use: int) -> None:
            collect()

        @hookimpl(tryfirst=True)
        def memslot_grow_memory(self, memory: Any, byte_size: int) -> None:
            collect()

    with plain_cell.open(slots=3, plugins=(Collects(),)) as host:
        if plain_cell.host == "fake":
            host.functions["ask"] = collect  # type: ignore[attr-defined]
        guest = host.prepare(CALLS_OUT, imports={"env": {"help": collect}})
        guests.append(guest)
        threshold = gc.get_threshold()
        gc.freeze()  # so that each of the many collections looks only at what comes from here on
        gc.set_threshold(1)
        try:
            for _ in range(50):
                spare.append(guest.instantiate())
                with guest.instantiate() as instance:
                    instance.call("fill", 0, PAGE, 0xEE)
                    instance.call("ask")
                    spare.append(guest.instantiate())
                    assert instance.call("grow", 1) == 2
                    with pytest.raises(memslot.PoolExhausted):
                        held = [guest.instantiate() for _ in range(4)]
                    instance.reset()
                    assert instance.memory.read(0, 2 * PAGE) == bytes(2 * PAGE)
                    with guest.lease(wait_timeout=0) as leased:
                        leased.call("fill", 0, PAGE, 0xDD)
                spare.clear()
            held = []
        finally:
            gc.set_threshold(*threshold)
        assert not held
        guest.close()
        cells.check(host, in_use=0)


def test_a_finalizer_on_another_thread(plain_cell: Cell) -> None:
    """The slot comes back at the host's next call, on the host's thread."""
    with plain_cell.serving(slots=2) as host:
        guest = host.prepare(toy.A)
        for _ in range(5):
            held: list[Any] = [guest.instantiate()]
            held[0].call("fill", 0, 2 * PAGE, 0xEE)
            cycle: list[Any] = [guest.instantiate()]
            cycle.append(cycle)
            del cycle

            def drop(_: int, held: list[Any] = held) -> None:
                held.clear()
                gc.collect()

            together(1, drop)
            with guest.instantiate() as first, guest.instantiate() as second:
                for instance in (first, second):
                    assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)


def test_tasks_that_are_cancelled_while_their_threads_go_on(plain_cell: Cell) -> None:
    if plain_cell.host == "wasmer":
        pytest.skip("impossible: wasmer's objects live on one thread, and to_thread uses many")
    choice = random.Random(5)
    with plain_cell.serving(slots=3, audit=0.1) as host:
        guest = host.prepare(toy.A)

        async def request(number: int) -> None:
            def serve() -> None:
                for _ in range(3):
                    a_random_life(guest, random.Random(number), number % 255 + 1)

            await asyncio.to_thread(serve)

        async def main() -> int:
            tasks = [asyncio.create_task(request(number)) for number in range(40)]
            for task in choice.sample(tasks, 20):
                task.cancel()
                await asyncio.sleep(choice.random() / 200)
            done = await asyncio.gather(*tasks, return_exceptions=True)
            wrong = [
                each
                for each in done
                if isinstance(each, BaseException) and not isinstance(each, asyncio.CancelledError)
            ]
            assert not wrong
            return sum(isinstance(each, asyncio.CancelledError) for each in done)

        assert asyncio.run(main()) > 0  # which waits for the threads as well
        guest.close()


def test_real_signals_at_random_moments(
    plain_cell: Cell, note: Callable[[str, object], None]
) -> None:
    command = [sys.executable, "-m", "integration_tests.interrupted_by_signals"]
    command += [plain_cell.host, plain_cell.backend, "2"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 1
    note("interrupts", int(done.stdout))
