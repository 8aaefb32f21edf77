"""Plugins of the embedder's own beside the allocators, on every host: order, decisions and failures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import LinearMemory, MemoryRequest, ResetResult, hookimpl

from . import cells, toy
from .cells import Cell
from .toy import PAGE


class Journal:
    """Writes down every watching hook."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    @hookimpl
    def memslot_guest_prepared(self, guest_id: str, report: Any) -> None:
        self.heard.append(("prepared", guest_id.partition("#")[0], report.memories[0].image))

    @hookimpl
    def memslot_memory_created(self, memory: LinearMemory) -> None:
        self.heard.append(("created", memory.request.tenant, memory.byte_size))

    @hookimpl
    def memslot_memory_reset(self, memory: LinearMemory, result: ResetResult) -> None:
        assert result.nanoseconds >= 0
        self.heard.append(("reset", memory.request.tenant, result.strategy))

    @hookimpl
    def memslot_pool_exhausted(self, request: MemoryRequest, limit: int, in_use: int) -> None:
        self.heard.append(("exhausted", request.tenant, limit, in_use))


def test_watching_hooks_hear_a_life_in_order(plain_cell: Cell) -> None:
    journal = Journal()
    cell = plain_cell.with_changes(reset="madvise")
    with cell.serving(slots=1, plugins=(journal,)) as host:
        guest = host.prepare(toy.A, name="toy")
        with guest.instantiate(tenant="ann") as instance:
            with pytest.raises(memslot.PoolExhausted):
                guest.instantiate(tenant="bob")
            instance.call("store", 0, 1)
            instance.reset()
    assert journal.heard == [
        ("prepared", "toy", True),
        ("created", "ann", 2 * PAGE),
        ("exhausted", "bob", 1, 1),
        ("reset", "ann", "madvise"),
        ("reset", "ann", "madvise"),
    ]


class Limit:
    """Refuses more than three pages, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []

    @hookimpl(tryfirst=True)
    def memslot_grow_memory(self, memory: LinearMemory, byte_size: int) -> bool | None:
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
    blocked = plain_cell.settings(plugins=(), blocked=("memfd", "anonymous"))
    with memslot.open_host(plain_cell.host, settings=blocked) as host:
        guest = host.prepare(toy.A)
        for _ in range(2):
            with pytest.raises(memslot.PluginError, match="memslot_create_memory"):
                guest.instantiate()
