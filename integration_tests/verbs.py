"""Each verb of a host with the state that it starts from: for faults, interrupts, signals and the long run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest

import memslot_plugin as memslot

from . import cells, toy
from .cells import Cell
from .toy import PAGE

TABLE = toy.assemble(
    f"""(module (memory (export "memory") 2 8) (table 1 funcref)
      (func (export "touch") (table.set (i32.const 0) (ref.null func))) {toy.CODE})"""
)
"""A guest whose code can change a table, so that a reset needs a new instance."""


class World:
    """A host with two guests, and states that verbs start from."""

    def __init__(self, cell: Cell, **settings: Any) -> None:
        self.cell = cell
        self.host = cell.open(**{"slots": 3, "audit": 0.0, **settings})
        self.guest = self.host.prepare(toy.A)
        self.table = self.host.prepare(TABLE)

    def nothing(self) -> None:
        return None

    def instance(self, guest: memslot.Guest | None = None) -> memslot.Instance:
        instance = (guest or self.guest).instantiate()
        instance.call("fill", 0, PAGE, 0xEE)
        return instance

    def grown(self) -> memslot.Instance:
        instance = self.instance()
        instance.call("grow", 1)
        return instance

    def with_a_table(self) -> memslot.Instance:
        return self.instance(self.table)

    def fork(self) -> memslot.Instance:
        with self.instance() as parent:
            return parent.fork(1)[0]

    def all_slots_waiting(self) -> None:
        """Leave ready instances of another guest in each slot: a lease has to end one."""
        leases = [self.table.lease() for _ in range(3)]
        for each in leases:
            each.__enter__()
        for each in leases:
            each.__exit__()

    def one_waiting(self) -> None:
        with self.guest.lease():
            pass

    def another_guest(self) -> memslot.Guest:
        guest = self.host.prepare(toy.B)
        self.instance(guest).close()
        return guest

    def dropped(self) -> None:
        self.instance()

    def busy_host(self) -> memslot.Host:
        """Open a host with instances in use, ready, dropped and forked."""
        host = self.cell.open(slots=4, audit=0.0)
        used, waiting = host.prepare(toy.A), host.prepare(TABLE)
        with waiting.lease() as leased:
            leased.call("bump")
        waiting.instantiate()
        KEPT[:] = [used, used.instantiate().fork(1)]
        return host

    def serves(self) -> None:
        """Fail unless ready instances alone are leased, and guests find pristine memories."""
        gc.collect()
        counted = self.host.statistics()
        assert counted.live_instances == counted.ready_instances
        cells.check(self.host, in_use=counted.ready_instances)
        with self.guest.instantiate() as first, self.table.instantiate() as second:
            assert first.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
            assert first.call("bump") == 8
            assert second.memory.read(0, 2 * PAGE) == bytes(2 * PAGE)
            for each in (first, second):
                each.call("fill", 0, 2 * PAGE, 0xDD)

    def __enter__(self) -> World:  # noqa: PYI034 - typing has no Self on 3.10
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close guests and host. After a failure close by force, so that the failure is the error."""
        if kind is None:
            self.table.close()
            self.guest.close()
        self.host.close(force=kind is not None)


KEPT: list[Any] = []


def grow(world: World, instance: memslot.Instance) -> Any:
    grown = instance.call("grow", 1)
    instance.memory.write(0, instance.memory.read(1, 5))
    instance.memory.grow(1)
    return grown


def lease(world: World, _: None) -> None:
    with world.guest.lease() as instance:
        instance.call("store", 9, 9)


def reset_in_a_block(_: World, instance: memslot.Instance) -> None:
    with instance:
        instance.reset()


VERBS: dict[str, tuple[Callable[[World], Any], Callable[[World, Any], Any]]] = {
    "instantiate": (World.nothing, lambda world, _: world.guest.instantiate(tenant="ann")),
    "instantiate where instances wait": (
        World.all_slots_waiting,
        lambda world, _: world.guest.instantiate(wait_timeout=5),
    ),
    "close": (World.instance, lambda _, instance: instance.close()),
    "close a grown instance": (World.grown, lambda _, instance: instance.close()),
    "close a fork": (World.fork, lambda _, instance: instance.close()),
    "reset": (World.instance, lambda _, instance: instance.reset()),
    "reset by a new instance": (World.with_a_table, lambda _, instance: instance.reset()),
    "reset by a new instance in a block": (World.with_a_table, reset_in_a_block),
    "reset after growth": (World.grown, lambda _, instance: instance.reset()),
    "grow": (World.instance, grow),
    "lease": (World.nothing, lease),
    "lease what waits": (World.one_waiting, lease),
    "snapshot": (World.instance, lambda _, instance: instance.snapshot()),
    "fork": (World.instance, lambda _, instance: instance.fork(2)),
    "prepare": (World.nothing, lambda world, _: world.host.prepare(toy.B)),
    "prepare with init": (World.nothing, lambda world, _: world.host.prepare(toy.B, init="bump")),
    "close a guest": (World.another_guest, lambda _, guest: guest.close()),
    "warm": (World.nothing, lambda world, _: world.guest.warm(2)),
    "statistics": (World.dropped, lambda world, _: world.host.statistics()),
    "open a host": (World.nothing, lambda world, _: world.cell.open().close()),
    "close a host": (World.busy_host, lambda _, host: host.close(force=True)),
}


def finish(given: Any) -> None:
    """Close the host that a verb was closing."""
    if isinstance(given, memslot.Host):
        given.close(force=True)
        with pytest.raises(memslot.UsedAfterClose):
            KEPT[0].instantiate()
        KEPT.clear()


OPENING = (
    *("prepare", "prepare with init", "close a guest", "open a host", "close a host"),
    *("snapshot", "fork", "close a fork"),
)
"""Verbs that an interrupt may leave half done: a host, guest, image or descriptor may stay open."""

COMPILE = ("close a fork", "snapshot", "fork", "prepare", "prepare with init", "close a guest")
"""Verbs that compile a module, which wasmer keeps for as long as its store lives."""
