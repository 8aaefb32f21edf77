"""The fake host, whose functions are Python, and the counting of resets on any host."""

from __future__ import annotations

import collections
import errno
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import ResetResult, hookimpl
from memslot_plugin._core import PAGE_SIZE
from memslot_plugin.hosts.leases import Handle, Ready
from memslot_plugin.tests import hosts
from memslot_plugin.tests.faults import fail_next_reset
from memslot_plugin.tests.hosts import PAGE, assemble, in_use, serving

pytestmark = pytest.mark.usefixtures("no_leaks")

SMALL: dict[str, Any] = {"reserved": 1 << 20, "guard": PAGE}


class Watcher:
    """A plugin that records the way of each reset and its reason."""

    def __init__(self) -> None:
        self.resets: list[str] = []

    @hookimpl
    def memslot_memory_reset(self, result: ResetResult) -> None:
        self.resets.append(f"{result.strategy}: {result.reason}".removesuffix(": "))


def test_function_of_a_fake_guest_gets_memories_within_bounds_and_no_globals() -> None:
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


def test_lease_of_several_memories_gets_all_or_none() -> None:
    with serving("fake", slots=2, **SMALL) as host:
        guest = host.prepare(assemble("(module (memory 1) (memory 2))"))
        with guest.instantiate() as instance:
            assert [memory.byte_size for memory in instance.memories] == [PAGE, 2 * PAGE]
        with hosts.prepare(host).instantiate():
            with pytest.raises(memslot.PoolExhausted):
                guest.instantiate()
            assert in_use(host) == 1
        guest.instantiate().close()


def test_memory_destroyed_at_its_release_does_not_count_as_reset() -> None:
    watcher = Watcher()
    with hosts.started("fake", allocation="on-demand", plugins=(watcher,)) as instance:
        instance.reset()
    assert len(watcher.resets) == 1


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
                if how in watcher.resets:
                    break
        (pool,) = (pool for pool in host.statistics().pools if pool.resets)
    assert pool.resets_by[how] >= 1
    assert set(pool.resets_by) == set(watcher.resets)
    assert sum(pool.resets_by.values()) == pool.resets


def test_handle_interrupted_before_it_had_an_instance_ends_in_silence() -> None:
    Handle.__new__(Handle).__del__()


def test_guest_that_another_thread_prepares_while_guests_are_looked_at_is_no_error() -> None:
    class Prepares(Ready):
        def __len__(self) -> int:
            kept.append(hosts.prepare(host))
            return 0

    with serving("fake", slots=1, **SMALL) as host:
        kept = [hosts.prepare(host)]
        kept[0].ready = Prepares()
        assert host.statistics().ready_instances == 0
        with kept[0].instantiate():
            with pytest.raises(memslot.PoolExhausted):
                kept[0].instantiate()
            with pytest.raises(memslot.PoolTimeout):
                kept[0].instantiate(wait_timeout=0.001)
        assert len(kept) > 3
        kept[0].ready = Ready()


def test_dropped_instance_that_another_thread_reclaims_first_is_left_alone() -> None:
    class Taken(collections.deque[Any]):
        def popleft(self) -> Any:
            self.clear()
            raise IndexError

    with serving("fake", slots=2, **SMALL) as host:
        host.leases.dropped = Taken([None])
        assert host.statistics().live_instances == 0
        host.leases.dropped = collections.deque()


def test_dropped_instance_whose_reset_fails_is_logged_without_its_frames(
    inject: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with hosts.opened("fake", reset="madvise", **SMALL) as host:
        guest = hosts.prepare(host)
        guest.instantiate().memory.write(0, b"x")  # and dropped
        fail_next_reset(inject, errno.ENOMEM)
        assert host.statistics().live_instances == 0
        (record,) = caplog.records
        assert "its slot is destroyed" in record.message
        assert [type(each) for each in record.args or ()] == [str, str]
