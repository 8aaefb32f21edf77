"""Threads, tasks and collections at any moment: no deadlock, no leak, no foreign byte."""

from __future__ import annotations

import asyncio
import functools
import gc
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import hookimpl

from . import cells, toy
from .cells import Cell
from .processes import beside
from .toy import PAGE


@pytest.fixture
def _impatient() -> Iterator[None]:
    """Switch threads a hundred times as often as CPython does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 100)
    yield
    sys.setswitchinterval(before)


def random_lives(guest: memslot.Guest, lives: int, number: int) -> None:
    """Run tenants that look for foreign bytes, write a pattern, find it unchanged, and end in some way."""
    choice, mark = random.Random(number), number + 1

    def live_in(instance: memslot.Instance) -> None:
        assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
        instance.call("fill", 0, PAGE, mark)
        instance.call("bump")
        assert instance.call("different", 0, PAGE, mark) == 0

    def live(way: int) -> None:
        if way == 0:
            with guest.lease(wait_timeout=60) as instance:
                live_in(instance)
            return
        instance = guest.instantiate(wait_timeout=60)
        live_in(instance)
        if way == 1:
            instance.reset()
            live_in(instance)
        elif way == 2:
            instance.call("grow", 1)
            instance.call("fill", 0, 3 * PAGE, mark)
        elif way == 3:
            with pytest.raises(memslot.GuestTrap):
                instance.call("fill_and_trap", 0, 2 * PAGE, mark)
        if way != 4:  # the tenant drops the instance
            instance.close()

    for _ in range(lives):
        live(choice.randrange(6))


@pytest.mark.usefixtures("_impatient")
def test_threads_that_lease_and_return_at_random_find_their_own_bytes_alone(
    plain_cell: Cell,
) -> None:
    """Threads share a host. On wasmer each has its own: an object of wasmer lives on one thread."""

    def on_a_host(threads: int, number: int) -> None:
        with plain_cell.serving(slots=3, audit=0.1) as host, host.prepare(toy.A) as guest:
            live = functools.partial(random_lives, guest, 40)
            if threads == 1:
                live(number)
            else:
                with beside(*(functools.partial(live, number) for number in range(threads))):
                    pass

    if plain_cell.host == "wasmer":
        with beside(*(functools.partial(on_a_host, 1, number) for number in range(4))):
            pass
    else:
        on_a_host(6, 0)


CALLS_OUT = toy.assemble(
    f"""(module (import "env" "help" (func $help)) (memory (export "memory") 2 8)
      (func (export "ask") (call $help)) {toy.CODE})"""
)


def test_collection_within_any_callback_loses_no_slot(plain_cell: Cell) -> None:
    """The garbage refers to instances, so that their finalizers run in the callback."""
    spare: list[memslot.Instance] = []

    def collect(*_: Any) -> None:
        if spare:
            cycle: list[Any] = [spare.pop()]
            cycle.append(cycle)
            del cycle
        gc.collect()

    class Collects:
        memslot_memory_created = hookimpl(lambda self, memory: collect())
        memslot_memory_reset = hookimpl(lambda self, memory, result: collect())
        memslot_pool_exhausted = hookimpl(lambda self, request, limit, in_use: collect())
        memslot_grow_memory = hookimpl(lambda self, memory, byte_size: collect(), tryfirst=True)

    with plain_cell.open(slots=3, plugins=(Collects(),)) as host:
        if plain_cell.host == "fake":
            host.functions["ask"] = collect  # type: ignore[attr-defined]
        guest = host.prepare(CALLS_OUT, imports={"env": {"help": collect}})
        threshold = gc.get_threshold()
        gc.freeze()  # each of the many collections visits objects from here on alone
        gc.set_threshold(1)
        try:
            for _ in range(20):
                spare.append(guest.instantiate())
                with guest.instantiate() as instance:
                    instance.call("fill", 0, PAGE, 0xEE)
                    instance.call("ask")
                    spare.append(guest.instantiate())
                    assert instance.call("grow", 1) == 2
                    with pytest.raises(memslot.PoolExhausted):
                        [guest.instantiate() for _ in range(4)]
                    instance.reset()
                    assert instance.memory.read(0, 2 * PAGE) == bytes(2 * PAGE)
                    with guest.lease(wait_timeout=0) as leased:
                        leased.call("fill", 0, PAGE, 0xDD)
                spare.clear()
        finally:
            gc.set_threshold(*threshold)
        guest.close()
        cells.check(host, in_use=0)


def test_finalizer_on_another_thread_gives_the_slot_back_at_the_next_call(plain_cell: Cell) -> None:
    with plain_cell.serving(slots=2) as host:
        guest = host.prepare(toy.A)
        for _ in range(2):
            held: list[Any] = [guest.instantiate()]
            held[0].call("fill", 0, 2 * PAGE, 0xEE)
            cycle: list[Any] = [guest.instantiate()]
            cycle.append(cycle)
            del cycle
            with beside(held.clear, gc.collect):
                pass
            with guest.instantiate() as first, guest.instantiate() as second:
                for instance in (first, second):
                    assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)


def test_tasks_cancelled_while_their_threads_go_on_lose_no_slot(plain_cell: Cell) -> None:
    if plain_cell.host == "wasmer":
        pytest.skip("impossible: wasmer's objects live on one thread, and to_thread uses many")
    choice = random.Random(5)
    with plain_cell.serving(slots=3, audit=0.1) as host, host.prepare(toy.A) as guest:

        async def main() -> list[Any]:
            serve = functools.partial(asyncio.to_thread, random_lives, guest, 3)
            tasks = [asyncio.create_task(serve(number)) for number in range(20)]
            for task in choice.sample(tasks, 10):
                task.cancel()
                await asyncio.sleep(choice.random() / 200)
            return await asyncio.gather(*tasks, return_exceptions=True)

        ended = asyncio.run(main())  # waits for the threads too
        assert {type(each) for each in ended} == {type(None), asyncio.CancelledError}
