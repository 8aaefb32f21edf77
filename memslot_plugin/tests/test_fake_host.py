"""The fake host: functions that are Python; and what hooks and statistics tell of any host."""

from __future__ import annotations

import itertools
import sys
from types import FrameType
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import LinearMemory, MemoryRequest, ResetResult, hookimpl
from memslot_plugin._core import PAGE_SIZE
from memslot_plugin.hosts.instance import Instance
from memslot_plugin.tests import hosts
from memslot_plugin.tests.hosts import PAGE, assemble, in_use, serving

pytestmark = pytest.mark.usefixtures("no_leaks")

SMALL: dict[str, Any] = {"reserved": 1 << 20, "guard": PAGE}


class Watcher:
    """Notes every watching hook."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    @hookimpl
    def memslot_guest_prepared(self, guest_id: str, report: Any) -> None:
        self.seen.append(("prepared", guest_id))

    @hookimpl
    def memslot_memory_created(self, memory: LinearMemory) -> None:
        self.seen.append(("created", memory.request.tenant))

    @hookimpl
    def memslot_memory_reset(self, memory: LinearMemory, result: ResetResult) -> None:
        self.seen.append(("reset", f"{result.strategy}: {result.reason}".removesuffix(": ")))

    @hookimpl
    def memslot_pool_exhausted(self, request: MemoryRequest, limit: int, in_use: int) -> None:
        self.seen.append(("exhausted", request.tenant, limit, in_use))


def test_functions_get_memories_within_bounds_and_have_no_globals() -> None:
    functions: dict[str, Any] = {
        "far": lambda live: live.read(0, PAGE, PAGE + 1),
        "before": lambda live: live.write(0, -1, b"x"),
        "other": lambda live: live.read(1, 0, 1),
        "grow_other": lambda live: live.grow(1, 1),
    }
    with hosts.started("fake", functions=functions) as instance:
        for name, said in (("far", r"\[65536, 131073\) of 131072 bytes"), ("before", r"\[-1, 0\)")):
            with pytest.raises(memslot.GuestTrap, match=f"out of bounds memory access: {said}"):
                instance.call(name)
        for name in ("other", "grow_other"):
            with pytest.raises(memslot.ExportNotFound, match="memory 1 of echo is not one of its"):
                instance.call(name)
        with pytest.raises(memslot.ExportNotFound, match="no globals, so none is called 'count'"):
            instance.global_value("count")
        assert (instance.stdout, len(instance.memory)) == (b"", 2 * PAGE)
        assert dict(instance.exports) == dict.fromkeys(functions, "func")


def test_module_that_needs_a_runtime_is_refused() -> None:
    with serving("fake") as host:
        with pytest.raises(memslot.InvalidModule, match="no assembler; give it the bytes of a"):
            host.prepare("(module)")
        with pytest.raises(memslot.InvalidModule, match="fake host has no runtime for module: "):
            host.prepare(assemble("(module (memory i64 1))"))
        assert host.statistics().guests == 0


def test_all_memories_are_leased_or_none() -> None:
    with serving("fake", slots=2, **SMALL) as host:
        guest = host.prepare(assemble("(module (memory 1) (memory 2))"))
        with guest.instantiate() as instance:
            assert [memory.byte_size for memory in instance.memories] == [PAGE, 2 * PAGE]
            instance.memories[0].write(0, b"first")
            assert instance.memories[1].read(0, 5) == bytes(5)
        with hosts.prepare(host).instantiate():
            with pytest.raises(memslot.PoolExhausted):
                guest.instantiate()
            assert in_use(host) == 1
        guest.instantiate().close()


def test_watching_hooks_are_told_of_everything() -> None:
    with serving("fake") as host:
        assert host.plugins.armed.memory_created is None, "no watcher, no call"
    watcher = Watcher()
    with serving("fake", slots=1, reset="copy", plugins=(watcher,)) as host:
        guest = hosts.prepare(host)
        with guest.instantiate(tenant="ann") as instance:
            instance.reset()
            with pytest.raises(memslot.PoolExhausted) as caught:
                guest.instantiate(tenant="bob")
            assert (caught.value.limit, caught.value.in_use) == (1, 1)
            with pytest.raises(memslot.PoolTimeout):
                guest.instantiate(tenant="eve", wait_timeout=0.01)
    assert watcher.seen == [
        ("prepared", guest.guest_id),
        ("created", "ann"),
        ("reset", "copy"),
        ("exhausted", "bob", 1, 1),
        ("exhausted", "eve", 1, 1),
        ("reset", "copy"),
    ]


def test_memory_that_is_destroyed_was_not_reset() -> None:
    watcher = Watcher()
    with hosts.started("fake", allocation="on-demand", plugins=(watcher,)) as instance:
        instance.reset()
    assert [each[0] for each in watcher.seen] == ["prepared", "created", "reset"]


@pytest.mark.skipif(
    not memslot.probe().pagemap.works,
    reason=f"impossible: PAGEMAP_SCAN: {memslot.probe().pagemap.detail}",
)
@pytest.mark.parametrize(
    ("keep_resident", "how"),
    [(1 << 30, "madvise: pages not written lately"), (10 * PAGE_SIZE, "pagemap: keep_resident")],
)
def test_statistics_and_watchers_learn_how_a_reset_was_done_and_why(
    keep_resident: int, how: str
) -> None:
    watcher = Watcher()
    options: dict[str, Any] = {**SMALL, "plugins": (watcher,), "keep_resident": keep_resident}
    with serving("fake", reset="auto", **options) as host:
        with hosts.prepare(host, "(module (memory 8))").instantiate() as instance:
            for request in range(1000):
                # All pages at first, and then one.
                for page in range(1 if request else 8 * PAGE // PAGE_SIZE):
                    instance.memory.write(page * PAGE_SIZE, b"x")
                instance.reset()
                if ("reset", how) in watcher.seen:
                    break
        (pool,) = (pool for pool in host.statistics().pools if pool.resets)
    seen = {each[1] for each in watcher.seen if each[0] == "reset"}
    assert pool.resets_by[how] >= 1
    assert set(pool.resets_by) == seen
    assert sum(pool.resets_by.values()) == pool.resets


def test_instance_without_an_allocator_says_which_hook_was_asked() -> None:
    with serving("fake", plugins=(Watcher(),), settings=memslot.Settings(plugins=())) as host:
        guest = hosts.prepare(host)
        with pytest.raises(memslot.PluginError, match="no plugin answered memslot_create_memory"):
            guest.instantiate()
        assert host.statistics().live_instances == 0


def test_handle_that_is_cut_short_while_it_is_made_goes_in_silence(monkeypatch: Any) -> None:
    def make(interrupted_at: int) -> None:
        lines = itertools.count(1)

        def trace(frame: FrameType, event: str, _: object) -> Any:
            if frame.f_code is not Instance.__init__.__code__:
                return None
            if event == "line" and next(lines) == interrupted_at:
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            Instance(guest, live, guest.binding)
        finally:
            sys.settrace(before)

    noise: list[object] = []
    with serving("fake") as host:
        guest = hosts.prepare(host)
        with guest.instantiate() as instance:
            live = instance._live()
            monkeypatch.setattr(sys, "unraisablehook", noise.append)
            for line in (1, 2, 3):
                with pytest.raises(KeyboardInterrupt):
                    make(line)
            make(4)
            assert noise == []
            host._dropped.clear()
        assert "closed" in repr(instance)


def test_guest_whose_image_could_not_be_unmapped_is_closed_again(
    inject: Any, resources: Any
) -> None:
    before = resources()
    with serving("fake", settings=memslot.Settings(plugins=["memfd"])) as host:
        guest = hosts.prepare(host)
        inject("munmap", error=12)
        with pytest.raises(memslot.SystemCallError, match="unmapping the image of"):
            guest.close()
        assert guest.closed
        for _ in range(2):
            guest.close()
            assert resources().image_mappings == before.image_mappings
