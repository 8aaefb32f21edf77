"""Plugins of the embedder beside the allocators, on each host: the order of hooks, and failures."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import hookimpl

from . import cells, toy
from .cells import Cell
from .toy import PAGE


def test_watching_hooks_over_a_life_are_called_in_order(plain_cell: Cell) -> None:
    heard: list[tuple[Any, ...]] = []

    def note(*what: Any) -> None:
        heard.append(what)

    hooks: dict[str, Callable[..., None]] = {
        "guest_prepared": lambda guest_id: note("prepared", guest_id.partition("#")[0]),
        "memory_created": lambda memory: note("created", memory.request.tenant),
        "memory_reset": lambda memory, result: note(
            "reset", memory.request.tenant, result.strategy
        ),
        "grow_memory": lambda memory, byte_size: note("asked", memory.byte_size, byte_size),
        "memory_grown": lambda memory, byte_size: note("grown", memory.byte_size, byte_size),
        "pool_exhausted": lambda request, limit, in_use: note(request.tenant, limit, in_use),
    }
    journal = SimpleNamespace(**{f"memslot_{name}": hookimpl(hook) for name, hook in hooks.items()})
    cell = plain_cell.with_changes(reset="madvise")
    with cell.serving(slots=1, plugins=(journal,)) as host:
        guest = host.prepare(toy.A, name="toy")
        with guest.instantiate(tenant="ann") as instance:
            with pytest.raises(memslot.PoolExhausted):
                guest.instantiate(tenant="bob")
            instance.reset()
            assert instance.call("grow", 1) == 2
    # wasmer grows a memory by itself, and such a memory is destroyed instead of reset.
    by_itself = plain_cell.host == "wasmer"
    assert heard == [
        ("prepared", "toy"),
        ("created", "ann"),
        ("bob", 1, 1),
        ("reset", "ann", "madvise"),
        *([] if by_itself else [("asked", 2 * PAGE, 3 * PAGE)]),
        ("grown", 3 * PAGE, 3 * PAGE),
        *([] if by_itself else [("reset", "ann", "madvise")]),
    ]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda: "a memory", memslot.PluginError, "broken answered memslot_create_memory"),
        (lambda: 1 // 0, ZeroDivisionError, "by zero"),
    ],
    ids=["nonsense", "exception"],
)
def test_owner_that_raises_reaches_the_caller_and_costs_no_slot(
    host: memslot.Host, answer: Any, error: type[Exception], message: str
) -> None:
    guest = host.prepare(toy.A)
    broken = SimpleNamespace(memslot_create_memory=hookimpl(tryfirst=True)(answer))
    host.plugins.register(broken, name="broken")
    with pytest.raises(error, match=message):
        guest.instantiate()
    cells.check(host, in_use=0)
    host.plugins.unregister("broken")


class Resets:
    """Three plugins of different kinds that are called at resets."""

    def __init__(self) -> None:
        self.heard = 0

    @hookimpl(wrapper=True)
    def wraps(self, memory: Any) -> Any:
        self.heard += 1
        return (yield)

    @hookimpl(tryfirst=True)
    def is_asked_first(self, memory: Any) -> None:
        self.heard += 1

    @hookimpl
    def watches(self, memory: Any, result: Any) -> None:
        self.heard += 1


@pytest.mark.parametrize(
    ("kind", "hook"),
    [("wraps", "reset_memory"), ("is_asked_first", "reset_memory"), ("watches", "memory_reset")],
)
def test_plugin_that_comes_and_goes_is_asked_for_the_resets_between(
    host: memslot.Host, kind: str, hook: str
) -> None:
    """A lease binds the reset, and binds it anew when a plugin comes or goes."""
    resets = Resets()
    plugin = SimpleNamespace(**{f"memslot_{hook}": getattr(resets, kind)})

    def reset_twice() -> int:
        before = resets.heard
        for _ in range(2):
            instance.call("fill", 0, PAGE, 0xEE)
            instance.reset()
            assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
        return resets.heard - before

    with host.prepare(toy.A).instantiate() as instance:
        assert reset_twice() == 0
        host.plugins.register(plugin, name="plugin")
        assert reset_twice() == 2
        host.plugins.unregister("plugin")
        assert reset_twice() == 0
