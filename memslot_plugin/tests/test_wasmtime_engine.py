"""wasmtime's engine: heaps of its garbage collector, shared memories, small slots, and the embedder's configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin.tests import hosts, runtimes
from memslot_plugin.tests.hosts import ECHO, PAGE, in_use

try:
    import wasmtime

    from memslot_plugin.hosts.wasmtime import bridge as wasmtime_bridge
    from memslot_plugin.hosts.wasmtime.host import WasmtimeHost
    from memslot_plugin.hosts.wasmtime.runtime import WasmtimeTrap
except ImportError:
    if (reason := runtimes.missing("wasmtime")) is None:
        raise
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("no_leaks")

GC_HEAP_FIRST = """(module
  (memory (export "memory") 0 3) (memory (export "other") 2) (table (export "t") 4 externref)
  (type $a (array (mut i32)))
  (func (export "many") (param i32) (result i32) (array.len (array.new_default $a (local.get 0))))
  (func (export "grow") (result i32) (memory.grow (i32.const 1))))"""


@pytest.fixture
def host() -> Iterator[WasmtimeHost]:
    with hosts.serving("wasmtime") as host:
        yield host
        assert in_use(host) == 0


def test_heap_of_the_garbage_collector_comes_before_the_memories(host: WasmtimeHost) -> None:
    guest = host.prepare(GC_HEAP_FIRST)
    assert guest.plan.native is None
    for _ in range(2):
        with guest.instantiate() as instance:
            assert instance.call("many", 100_000) == 100_000
            assert instance.call("grow") == 0
            assert [each.byte_size for each in instance.memories] == [PAGE, 2 * PAGE]
            assert in_use(host) == 2


def test_heap_beyond_the_memory_limit_traps() -> None:
    with hosts.started("wasmtime", GC_HEAP_FIRST, memory_limit="1MiB") as instance:
        assert instance.call("many", 10_000) == 10_000
        with pytest.raises(memslot.GuestTrap):
            instance.call("many", 10_000_000)


def test_heap_that_the_kernel_does_not_unmap_is_logged_and_leaked_once(child: Any) -> None:
    source = """
import errno, logging, sys
from memslot_plugin import _core
from memslot_plugin.tests import hosts
from memslot_plugin.tests.test_wasmtime_engine import GC_HEAP_FIRST
logging.basicConfig(stream=sys.stdout, format="%(message)s")
with hosts.opened("wasmtime") as host:
    guest = host.prepare(GC_HEAP_FIRST)
    instance = guest.instantiate()
    _core.inject("munmap", error=errno.ENOMEM)
    instance.close()
    print(hosts.in_use(host), hosts.in_use(host), _core.leaks.total())
    with guest.instantiate() as instance:
        print(instance.call("many", 10))
"""
    logged, live, answer = child(source).stdout.splitlines()
    assert logged.startswith("1 heaps of wasmtime's garbage collector could not be unmapped")
    assert (live, answer) == ("0 0 1", "10")


def test_shared_memory_is_refused_unless_configured(host: WasmtimeHost) -> None:
    def shared(config: wasmtime.Config) -> None:
        wasmtime_bridge.bindings.wasmtime_config_shared_memory_set(config.ptr(), True)

    text = '(module (memory (export "m") 1 2 shared) (data (i32.const 0) "shared"))'
    with pytest.raises(memslot.LinkError, match="shared memory support is disabled"):
        host.prepare(text).instantiate()
    with hosts.started("wasmtime", text, configure=shared) as instance:
        assert instance.memory.read(0, 6) == b"shared"
        assert (instance.memory.grow(1), instance.memory.byte_size) == (1, 2 * PAGE)


def test_growth_in_a_small_slot_ends_at_its_size() -> None:
    text = ECHO.replace("2 4)", "1)")
    with hosts.started("wasmtime", text, reserved="256KiB", guard="64KiB") as instance:
        assert (instance.call("grow", 4), instance.call("grow", 3)) == (-1, 1)
        assert instance.call("get", 4 * PAGE - 1) == 0
        for address in (4 * PAGE, 5 * PAGE, 2**31, 2**32 - 1):
            with pytest.raises(WasmtimeTrap):
                instance.call("get", address)


def test_configure_store_with_a_limit_refuses_a_larger_memory() -> None:
    def limit(store: Any) -> None:
        store.set_limits(memory_size=PAGE)

    refused = pytest.raises(memslot.MemoryTooLarge, match="exceeds memory limits")
    with hosts.serving("wasmtime", configure_store=limit) as host, refused:
        host.prepare(ECHO).instantiate()


def test_configure_that_turns_off_needed_options_is_overruled() -> None:
    def configure(config: wasmtime.Config) -> None:
        config.memory_init_cow = True  # with a creator and active data this ends the process
        config.memory_may_move = True
        config.wasm_gc = False

    with hosts.started("wasmtime", image_limit=0, configure=configure) as instance:
        assert instance.memory.read(8, 5) == b"hello"


def test_configure_of_a_pool_and_an_unknown_layout_are_refused(child: Any) -> None:
    # In a child: a pool and a bridge's answer stay for as long as the process lives.
    source = """
from wasmtime import _bindings as b
from memslot_plugin import HostUnavailable, Unsupported
from memslot_plugin.hosts.wasmtime import bridge as wasmtime_bridge
from memslot_plugin.hosts.wasmtime.host import WasmtimeHost
def configure(config):
    pool = b.wasmtime_pooling_allocation_config_new()
    b.wasmtime_pooling_allocation_config_total_memories_set(pool, 4)
    b.wasmtime_pooling_allocation_strategy_set(config.ptr(), pool)
layout, wasmtime_bridge._layout = wasmtime_bridge._layout, lambda: [1, 2]
try:
    WasmtimeHost()
except HostUnavailable as error:
    print(error)
wasmtime_bridge._layout = layout
try:
    WasmtimeHost(configure=configure)
except Unsupported as error:
    print(error)
"""
    unknown, pool = child(source).stdout.splitlines()
    assert "lays its structures out as [1, 2]" in unknown
    assert "a pool of wasmtime's own" in pool
