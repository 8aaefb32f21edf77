"""Plugins of the embedder's own beside the allocators, on every host: who hears what, and who decides."""

from __future__ import annotations

from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import Image, InitialContent, LinearMemory, MemoryRequest, ResetResult, hookimpl

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
    """Lets nobody have more than three pages, and remembers who asked for what."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []

    @hookimpl(tryfirst=True)
    def memslot_grow_memory(self, memory: LinearMemory, byte_size: int) -> bool | None:
        self.asked.append((memory.request.growth, memory.byte_size // PAGE, byte_size // PAGE))
        return False if byte_size > 3 * PAGE else None


def test_a_plugin_decides_about_growth_where_the_host_asks_before(plain_cell: Cell) -> None:
    limit = Limit()
    with plain_cell.serving(slots=1, plugins=(limit,)) as host:
        guest = host.prepare(toy.A)
        for _ in range(2):
            with guest.instantiate() as instance:
                limit.asked.clear()
                if plain_cell.host == "wasmer":
                    # It grows by itself, and tells: only the maximum bounds it.
                    assert instance.call("grow", 4) == 2
                    assert limit.asked == [("report", 2, 6)]
                    assert instance.call("grow", 3) == -1
                    assert instance.call("size") == 6
                    assert instance.memory.byte_size == 6 * PAGE
                    continue
                assert instance.call("grow", 2) == -1
                assert instance.call("grow", 1) == 2
                assert instance.call("grow", 1) == -1
                with pytest.raises(memslot.GrowthRefused):
                    instance.memory.grow(1)
                assert limit.asked == [
                    ("decide", 2, 4),
                    ("decide", 2, 3),
                    ("decide", 3, 4),
                    ("decide", 3, 4),
                ]
                assert instance.call("size") == 3
                instance.call("store", 3 * PAGE - 1, 1)
                with pytest.raises(memslot.GuestTrap):
                    instance.call("store", 3 * PAGE, 1)
                assert instance.call("grow", 100) == -1
                assert len(limit.asked) == 4, "beyond the maximum nobody needs to be asked"


def test_a_plugin_that_raises_in_a_growth(plain_cell: Cell) -> None:
    class Broken:
        @hookimpl(tryfirst=True)
        def memslot_grow_memory(self, memory: LinearMemory, byte_size: int) -> bool | None:
            raise ZeroDivisionError("in the plugin")

    with plain_cell.serving(slots=1) as host:
        guest = host.prepare(toy.A)
        host.plugins.register(Broken(), name="broken")
        with (
            guest.instantiate() as instance,
            pytest.raises(ZeroDivisionError, match="in the plugin"),
        ):
            instance.call("grow", 1)
        cells.check(host, in_use=0)
        host.plugins.unregister("broken")
        for _ in range(2):
            with guest.instantiate() as instance:
                assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
                assert instance.call("grow", 1) == 2


def test_a_watcher_that_raises_is_only_logged(
    plain_cell: Cell, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        @hookimpl
        def memslot_memory_created(self, memory: LinearMemory) -> None:
            raise ZeroDivisionError("in the plugin")

        @hookimpl
        def memslot_memory_reset(self, memory: LinearMemory, result: ResetResult) -> None:
            raise ZeroDivisionError("in the plugin")

    with plain_cell.serving(slots=1, plugins=(Broken(),)) as host:
        guest = host.prepare(toy.A)
        for _ in range(5):
            with guest.instantiate() as instance:
                assert instance.call("load", 16) == ord("t")
    assert sorted(record.message for record in caplog.records) == [
        "plugin Broken failed in memslot_memory_created; further failures are only counted",
        "plugin Broken failed in memslot_memory_reset; further failures are only counted",
    ]


def test_without_an_image_the_runtime_initialises(real_cell: Cell) -> None:
    """A plugin that owns memories and builds no images: still the same bytes."""

    class Imageless:
        @hookimpl(tryfirst=True)
        def memslot_build_image(self, content: InitialContent) -> Image | None:
            if content.name == "plain":
                raise_if_asked_twice.append(content)
            return None

    raise_if_asked_twice: list[InitialContent] = []
    with real_cell.serving(slots=1, plugins=(Imageless(),)) as host:
        guest = host.prepare(toy.A, name="plain")
        assert len(raise_if_asked_twice) == 1
        assert guest.report.memories[0].image, "the allocators were asked after it"
        for _ in range(2):
            with guest.instantiate() as instance:
                assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
                instance.call("fill", 0, 2 * PAGE, 1)


def test_nobody_answers(plain_cell: Cell) -> None:
    host = memslot.open_host(
        plain_cell.host, settings=plain_cell.settings(plugins=(), blocked=("memfd", "anonymous"))
    )
    with host:
        guest = host.prepare(toy.A)
        with pytest.raises(memslot.PluginError, match="memslot_create_memory"):
            guest.instantiate()
        with pytest.raises(memslot.PluginError):
            guest.instantiate()


def test_a_plugin_that_creates_nonsense(plain_cell: Cell) -> None:
    class Nonsense:
        @hookimpl(tryfirst=True)
        def memslot_create_memory(self, request: MemoryRequest) -> Any:
            return "a memory"

    with plain_cell.serving(slots=1) as host:
        guest = host.prepare(toy.A)
        host.plugins.register(Nonsense(), name="nonsense")
        with pytest.raises(memslot.PluginError, match=r"nonsense.*memslot_create_memory"):
            guest.instantiate()
        host.plugins.unregister("nonsense")
        with guest.instantiate() as instance:
            assert instance.call("load", 16) == ord("t")
