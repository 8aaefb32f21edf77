"""Plugins of the embedder's own beside the allocators, on every host: the order of hooks, and failures."""

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
        def memslot_grow_memory(self, memory, byte_size):
            heard.append((memory.request.growth, memory.byte_size, byte_size))

        @hookimpl
        def memslot_pool_exhausted(self, request, limit, in_use):
            heard.append(("exhausted", request.tenant, limit, in_use))

    cell = plain_cell.with_changes(reset="madvise")
    with cell.serving(slots=1, plugins=(Journal(),)) as host:
        guest = host.prepare(toy.A, name="toy")
        with guest.instantiate(tenant="ann") as instance:
            with pytest.raises(memslot.PoolExhausted):
                guest.instantiate(tenant="bob")
            instance.reset()
            assert instance.call("grow", 1) == 2
    reports = plain_cell.host == "wasmer"  # it grows by itself, and such a memory is not reset
    assert heard == [
        ("prepared", "toy", True),
        ("created", "ann", 2 * PAGE),
        ("exhausted", "bob", 1, 1),
        ("reset", "ann", "madvise"),
        ("report" if reports else "decide", 2 * PAGE, 3 * PAGE),
        *([] if reports else [("reset", "ann", "madvise")]),
    ]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda: "a memory", memslot.PluginError, "broken answered memslot_create_memory"),
        (lambda: 1 // 0, ZeroDivisionError, "by zero"),
    ],
    ids=["nonsense", "exception"],
)
def test_failure_of_an_owner_reaches_the_caller_and_costs_no_slot(
    plain_cell: Cell, answer: Any, error: type[Exception], message: str
) -> None:
    with plain_cell.serving(slots=1) as host:
        guest = host.prepare(toy.A)
        broken = SimpleNamespace(memslot_create_memory=hookimpl(tryfirst=True)(answer))
        host.plugins.register(broken, name="broken")
        with pytest.raises(error, match=message):
            guest.instantiate()
        cells.check(host, in_use=0)
        host.plugins.unregister("broken")
        guest.instantiate().close()
