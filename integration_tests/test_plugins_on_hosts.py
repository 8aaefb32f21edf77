"""Plugins of the embedder's own beside the allocators, on every host: order, decisions and failures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import hookimpl

from . import cells, toy
from .cells import Cell
from .toy import PAGE


def test_watching_hooks_hear_a_life_in_order(plain_cell: Cell) -> None:
    heard: list[tuple[Any, ...]] = []

    class Journal:
        @hookimpl
        def memslot_guest_prepared(self, guest_id, report):
            heard.append(("prepared", guest_id.partition("#")[0], report.memories[0].image))

        @hookimpl
        def memslot_memory_created(self, memory):
            heard.append(("created", memory.request.tenant, memory.byte_size))

        @hookimpl
        def memslot_memory_reset(self, memory, result):
            heard.append(("reset", memory.request.tenant, result.strategy))

        @hookimpl
        def memslot_pool_exhausted(self, request, limit, in_use):
            heard.append(("exhausted", request.tenant, limit, in_use))

    cell = plain_cell.with_changes(reset="madvise")
    with cell.serving(slots=1, plugins=(Journal(),)) as host:
        guest = host.prepare(toy.A, name="toy")
        with guest.instantiate(tenant="ann") as instance:
            with pytest.raises(memslot.PoolExhausted):
                guest.instantiate(tenant="bob")
            instance.call("store", 0, 1)
            instance.reset()
    begun = [("prepared", "toy", True), ("created", "ann", 2 * PAGE), ("exhausted", "bob", 1, 1)]
    assert heard == [*begun, ("reset", "ann", "madvise"), ("reset", "ann", "madvise")]


class Limit:
    """Refuses more than three pages, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []

    @hookimpl(tryfirst=True)
    def memslot_grow_memory(self, memory, byte_size):
        self.asked.append((memory.request.growth, memory.byte_size // PAGE, byte_size // PAGE))
        return False if byte_size > 3 * PAGE else None


def test_plugin_decides_about_growth_where_the_host_asks_before(plain_cell: Cell) -> None:
    limit = Limit()
    with (
        plain_cell.serving(slots=1, plugins=(limit,)) as host,
        host.prepare(toy.A).instantiate() as instance,
    ):
        if plain_cell.host == "wasmer":
            # It grows by itself, and tells: only the maximum bounds it.
            assert [instance.call("grow", pages) for pages in (4, 3)] == [2, -1]
            assert limit.asked == [("report", 2, 6)]
            assert instance.memory.byte_size == instance.call("size") * PAGE == 6 * PAGE
            return
        assert [instance.call("grow", pages) for pages in (2, 1, 1)] == [-1, 2, -1]
        with pytest.raises(memslot.GrowthRefused):
            instance.memory.grow(1)
        instance.call("store", 3 * PAGE - 1, 1)
        with pytest.raises(memslot.GuestTrap):
            instance.call("store", 3 * PAGE, 1)
        assert instance.call("grow", 100) == -1  # beyond the maximum no plugin is asked
        asked = [(2, 4), (2, 3), (3, 4), (3, 4)]
        assert limit.asked == [("decide", *pages) for pages in asked]
        assert instance.call("size") == 3


@hookimpl(tryfirst=True)
def nonsense() -> Any:
    return "a memory"


@hookimpl(tryfirst=True)
def raises() -> Any:
    raise ZeroDivisionError("in the plugin")


@pytest.mark.parametrize(
    ("hook", "function", "error", "message"),
    [
        ("memslot_create_memory", nonsense, memslot.PluginError, "broken.*memslot_create_memory"),
        ("memslot_create_memory", raises, ZeroDivisionError, "in the plugin"),
        ("memslot_grow_memory", raises, ZeroDivisionError, "in the plugin"),
    ],
    ids=["creates-nonsense", "raises-in-create", "raises-in-grow"],
)
def test_failure_of_a_plugin_reaches_the_caller_and_costs_no_slot(
    plain_cell: Cell, hook: str, function: Any, error: type[Exception], message: str
) -> None:
    with plain_cell.serving(slots=1) as host:
        guest = host.prepare(toy.A)
        host.plugins.register(SimpleNamespace(**{hook: function}), name="broken")
        with pytest.raises(error, match=message), guest.instantiate() as instance:
            instance.call("grow", 1)
        cells.check(host, in_use=0)
        host.plugins.unregister("broken")
        with guest.instantiate() as instance:
            assert instance.call("grow", 1) == 2


def test_host_without_allocators_raises_at_each_instance(plain_cell: Cell) -> None:
    with plain_cell.open(plugins=(), blocked=("memfd", "anonymous")) as host:
        guest = host.prepare(toy.A)
        for _ in range(2):
            with pytest.raises(memslot.PluginError, match="memslot_create_memory"):
                guest.instantiate()
