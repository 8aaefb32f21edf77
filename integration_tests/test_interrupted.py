"""KeyboardInterrupt and MemoryError at every line of every verb: nothing is lost, and the host goes on serving."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin.tests.profiles import EXPENSIVE

from . import cells, toy
from .cells import Cell
from .interrupts import Interruption
from .leaks import Footprint
from .toy import PAGE

TRIED = 4000 if EXPENSIVE else 40
"""At how many events at most a verb is interrupted; each Python begins at another one."""

ERRORS = (KeyboardInterrupt, MemoryError)

TABLE = toy.assemble(
    f"""(module (memory (export "memory") 2 8) (table 1 funcref)
      (func (export "touch") (table.set (i32.const 0) (ref.null func))) {toy.CODE})"""
)
"""Its code can change a table, so that a reset needs a new instance."""


class World:
    """A host that lives through all interruptions of one verb."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.host = self.open()
        self.guest = self.host.prepare(toy.A)
        self.table = self.host.prepare(TABLE)

    def open(self) -> memslot.Host:
        return self.cell.open(slots=3, audit=0.0)

    def dirty(self, guest: memslot.Guest) -> memslot.Instance:
        instance = guest.instantiate()
        instance.call("fill", 0, PAGE, 0xEE)
        return instance


Verb = Callable[[World], Any]
Setup = Callable[[World], Any]


def instantiate(world: World, _: Any) -> Any:
    return world.guest.instantiate(tenant="ann")


def waits(world: World, _: Any) -> Any:
    return world.guest.instantiate(wait_timeout=5)


def close(world: World, instance: Any) -> Any:
    instance.close()


def reset(world: World, instance: Any) -> Any:
    instance.reset()


def grow(world: World, instance: Any) -> Any:
    instance.call("grow", 1)
    instance.memory.write(0, instance.memory.read(1, 5))
    instance.memory.grow(1)


def lease(world: World, _: Any) -> Any:
    with world.guest.lease() as instance:
        instance.call("store", 9, 9)


def snapshot(world: World, instance: Any) -> Any:
    return instance.snapshot()


def fork(world: World, instance: Any) -> Any:
    return instance.fork(2)


def prepare(world: World, _: Any) -> Any:
    return world.host.prepare(toy.B)


def initialise(world: World, _: Any) -> Any:
    return world.host.prepare(toy.B, init="bump")


def close_guest(world: World, guest: Any) -> Any:
    guest.close()


def warm(world: World, _: Any) -> Any:
    return world.guest.warm(2)


def statistics(world: World, _: Any) -> Any:
    return world.host.statistics()


def nothing(world: World) -> None:
    return None


def an_instance(world: World) -> Any:
    return world.dirty(world.guest)


def a_grown_instance(world: World) -> Any:
    instance = world.dirty(world.guest)
    instance.call("grow", 1)
    return instance


def one_with_a_table(world: World) -> Any:
    return world.dirty(world.table)


def all_slots_waiting(world: World) -> Any:
    """Ready instances of another guest in every slot: whoever wants one has to end one."""
    leases = [world.table.lease() for _ in range(3)]
    for each in leases:
        each.__enter__()
    for each in leases:
        each.__exit__()


def one_waiting(world: World) -> Any:
    with world.guest.lease():
        pass


def a_fork(world: World) -> Any:
    with world.dirty(world.guest) as parent:
        return parent.fork(1)[0]


def another_guest(world: World) -> Any:
    guest = world.host.prepare(toy.B)
    world.dirty(guest).close()
    return guest


def dropped(world: World) -> Any:
    world.dirty(world.guest)


VERBS: dict[str, tuple[Setup, Callable[[World, Any], Any]]] = {
    "instantiate": (nothing, instantiate),
    "instantiate where instances wait ready": (all_slots_waiting, waits),
    "close": (an_instance, close),
    "close a grown instance": (a_grown_instance, close),
    "close a fork": (a_fork, close),
    "reset": (an_instance, reset),
    "reset by a new instance": (one_with_a_table, reset),
    "reset after growth": (a_grown_instance, reset),
    "grow": (an_instance, grow),
    "lease": (nothing, lease),
    "lease what waits": (one_waiting, lease),
    "snapshot": (an_instance, snapshot),
    "fork": (an_instance, fork),
    "prepare": (nothing, prepare),
    "prepare with init": (nothing, initialise),
    "close a guest": (another_guest, close_guest),
    "warm": (nothing, warm),
    "statistics": (dropped, statistics),
}


def interrupted(world: World, verb: str, interruption: Interruption) -> None:
    """One verb, interrupted; its result and its arguments are dropped."""
    setup, action = VERBS[verb]
    given = setup(world)
    try:
        interruption.run(lambda: action(world, given))
    except BaseException as error:
        if error is not interruption.error:
            raise


@contextmanager
def no_noise() -> Iterator[None]:
    """What finalizers and callbacks could not raise is a failure."""
    heard: list[Any] = []
    before, sys.unraisablehook = sys.unraisablehook, heard.append
    try:
        yield
    finally:
        sys.unraisablehook = before
    assert not heard, heard


def serves(world: World) -> None:
    """Nothing is leased but what waits ready, and the guest finds a pristine memory."""
    gc.collect()
    counted = world.host.statistics()
    assert counted.live_instances == counted.ready_instances
    cells.check(world.host, in_use=counted.ready_instances)
    with world.guest.instantiate() as first, world.table.instantiate() as second:
        assert first.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
        assert first.call("bump") == 8
        assert second.memory.read(0, 2 * PAGE) == bytes(2 * PAGE)
        first.call("fill", 0, 2 * PAGE, 0xDD)
        second.call("fill", 0, 2 * PAGE, 0xDD)


def places(events: int) -> range:
    """Which events a verb is interrupted at."""
    stride = max(events // TRIED, 1)
    return range(1 + sys.version_info.minor % stride, events + 1, stride)


def interrupt(cell: Cell, verb: str) -> int:
    """Everything that can happen to one verb; how many events it has."""
    world = World(cell)
    try:
        interrupted(world, verb, Interruption())  # whatever is made once
        quiet = Interruption()
        interrupted(world, verb, quiet)
        assert quiet.seen > 3
        before = Footprint.now()
        for number, at in enumerate(places(quiet.seen)):
            interruption = Interruption(ERRORS[number % 2]("injected"), at)
            try:
                with no_noise():
                    interrupted(world, verb, interruption)
                    interruption.error = None  # its traceback holds what it went through
                    serves(world)
            except BaseException as wrong:
                raise AssertionError(f"{verb}: interrupted by the {interruption.place}") from wrong
        world.table.close()
        world.guest.close()
        left = Footprint.now().descriptors - before.descriptors
        assert all("extension" in name for name in left), left  # one for each slot that grew
        world.host.close()
    except BaseException:
        world.host.close(force=True)
        raise
    return quiet.seen


@pytest.mark.parametrize("verb", VERBS)
def test_an_exception_at_any_line_loses_nothing(
    plain_cell: Cell, verb: str, note: Callable[[str, object], None]
) -> None:
    note("events", interrupt(plain_cell, verb))


@pytest.mark.parametrize("verb", ["instantiate", "close a grown instance", "reset after growth"])
@pytest.mark.parametrize(
    "changes",
    [{"allocation": "on-demand"}, {"growth": "ftruncate"}, {"reset": "madvise"}],
    ids=lambda changes: "-".join(changes.values()),
)
def test_nor_in_the_other_ways_of_allocating(
    plain_cell: Cell, changes: dict[str, str], verb: str
) -> None:
    cell = plain_cell.with_changes(**changes)
    if cell.refused:
        pytest.skip(cell.refused)
    interrupt(cell, verb)


def busy_host(cell: Cell) -> tuple[memslot.Host, list[Any]]:
    """A host with a guest in use, one whose instance waits, one that was dropped, and a fork."""
    host = cell.open(slots=4, audit=0.0)
    guests = [host.prepare(toy.A), host.prepare(TABLE)]
    with guests[1].lease() as leased:
        leased.call("bump")
    guests[1].instantiate()
    used = guests[0].instantiate()
    return host, [used, used.fork(1), guests]


def cut_short(interruption: Interruption, action: Callable[[], Any]) -> None:
    """Run it, and let nothing else than the interruption be raised."""
    try:
        interruption.run(action)
    except BaseException as error:
        if error is not interruption.error:
            raise AssertionError(interruption.place) from error
    interruption.error = None


def test_closing_a_host_goes_on_where_it_was_cut_short(plain_cell: Cell) -> None:
    def close(interruption: Interruption) -> None:
        host, held = busy_host(plain_cell)
        cut_short(interruption, lambda: host.close(force=True))
        host.close(force=True)
        with pytest.raises(memslot.UsedAfterClose):
            held[-1][0].instantiate()

    quiet = Interruption()
    close(quiet)
    before = Footprint.now()
    for number, at in enumerate(places(quiet.seen)):
        interruption = Interruption(ERRORS[number % 2]("injected"), at)
        with no_noise():
            close(interruption)
            lost = Footprint.now().lost_since(before, mappings=64)
            assert not lost, (interruption.place, lost)


def test_opening_a_host_leaves_nothing_where_it_was_cut_short(plain_cell: Cell) -> None:
    def open_and_close() -> None:
        plain_cell.open().close()

    open_and_close()
    quiet = Interruption()
    quiet.run(plain_cell.open).close()
    before = Footprint.now()
    for number, at in enumerate(places(quiet.seen)):
        with no_noise():
            cut_short(Interruption(ERRORS[number % 2]("injected"), at), open_and_close)
    lost = Footprint.now().lost_since(before, mappings=32)
    assert not lost
