"""Limits on the memory that a guest can make its host keep, for guests left to the runtime too."""

from __future__ import annotations

import gc
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import hookimpl
from memslot_plugin import wasm
from memslot_plugin.guest import target
from memslot_plugin.tests import hosts
from memslot_plugin.tests.hosts import PAGE, Growth, in_use, serving
from memslot_plugin.tests.runtimes import missing

wasmtime = pytest.importorskip("wasmtime", reason="wasmtime, which assembles the guests")

MIB = 1 << 20

on_wasmtime = pytest.mark.skipif(missing("wasmtime") is not None, reason=str(missing("wasmtime")))
on_wasmer = pytest.mark.skipif(missing("wasmer") is not None, reason=str(missing("wasmer")))
on_runtimes = pytest.mark.parametrize("name", hosts.RUNTIMES)


@pytest.fixture(autouse=True)
def _runtime_is_warm(_probed: None) -> None:
    hosts.start_wasi()


def _configure(config: Any) -> None:
    """Turn on every proposal that a hostile guest could use."""
    from wasmtime import _bindings

    _bindings.wasmtime_config_shared_memory_set(config.ptr(), True)
    _bindings.wasmtime_config_wasm_custom_page_sizes_set(config.ptr(), True)
    _bindings.wasmtime_config_wasm_gc_set(config.ptr(), True)


# Memories of the runtime

RUNTIMES_OWN = {
    "wide addresses and no maximum": "(memory {export} i64 {minimum})",
    "shared": "(memory {export} {minimum} 65536 shared)",
    "pages of a byte": "(memory {export} {minimum_bytes} (pagesize 1))",
}


def _own(kind: str, minimum: int = 1) -> str:
    memory = RUNTIMES_OWN[kind].format(
        export='(export "m")', minimum=minimum, minimum_bytes=minimum * PAGE
    )
    grow = "(memory.grow (local.get 0))"
    if "i64" in memory:
        grow = "(i32.wrap_i64 (memory.grow (i64.extend_i32_u (local.get 0))))"
    return f'(module {memory} (func (export "g") (param i32) (result i32) {grow}))'


@on_wasmtime
@pytest.mark.parametrize("kind", RUNTIMES_OWN)
def test_memory_of_the_runtimes_own_stays_within_the_memory_limit(kind: str) -> None:
    pages = 1 if kind.startswith("pages") else PAGE
    with serving("wasmtime", memory_limit=3 * PAGE, configure=_configure) as host:
        with host.prepare(_own(kind)).instantiate() as instance:
            assert instance.call("g", 2 * PAGE // pages) == PAGE // pages
            assert instance.call("g", 1) == -1
            assert instance.memory.byte_size == 3 * PAGE
        with pytest.raises(memslot.MemoryTooLarge, match=r"196608 \(memory_limit\)"):
            host.prepare(_own(kind, minimum=4))


@on_wasmtime
@pytest.mark.parametrize("kind", RUNTIMES_OWN)
def test_memory_of_the_runtimes_own_takes_the_place_of_a_slot(kind: str) -> None:
    with serving("wasmtime", slots=1, configure=_configure) as host:
        guest, other = host.prepare(_own(kind)), hosts.prepare(host)
        with guest.instantiate() as instance:
            for each in (guest, other):
                with pytest.raises(memslot.PoolExhausted, match="raise the setting slots"):
                    each.instantiate()
            instance.reset()
            assert in_use(host) == 1
        with other.lease():
            assert in_use(host) == 1
        with guest.lease():  # a waiting instance makes room
            assert in_use(host) == 1
        guest.close()


@pytest.fixture
def not_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the reader refuse each module as a newer one."""

    def refuse(_: bytes) -> None:
        raise wasm.NotUnderstood("it is new")

    monkeypatch.setattr(wasm, "parse", refuse)


@on_wasmtime
def test_module_that_is_not_understood_is_limited_by_the_runtime(not_understood: None) -> None:
    limits: dict[str, Any] = {
        "memory_limit": 3 * PAGE,
        "table_limit": 10,
        "tables_per_instance": 2,
    }
    with serving("wasmtime", slots=1, **limits) as host:
        with host.prepare("(module (memory 3))").instantiate():
            assert in_use(host) == 1
        for text, setting in (
            ("(memory 4)", "memory_limit"),
            ("(memory 1) (memory 1)", "single one"),
            ("(table 11 funcref)", "table_limit"),
            ("(table 1 funcref)" * 3, "tables_per_instance"),
        ):
            with pytest.raises(memslot.MemoryTooLarge, match=setting):
                host.prepare(f"(module {text})").instantiate()
            assert in_use(host) == 0


@on_wasmer
def test_module_that_is_not_understood_is_refused_where_the_runtime_has_no_limits(
    not_understood: None,
) -> None:
    refused = pytest.raises(memslot.Unsupported, match=r"cannot be bounded by the settings.*is new")
    with serving("wasmer") as host, refused:
        host.prepare("(module (memory 3))")


@on_wasmer
def test_memory_of_wasmers_own_has_a_lower_maximum() -> None:
    import wasmer

    text = """(module (import "e" "t" (table 1 funcref)) (memory (export "m") 1)
      (func (export "g") (param i32) (result i32) (memory.grow (local.get 0))))"""
    with serving("wasmer", slots=1, memory_limit=3 * PAGE) as host:
        giving = wasmer.Module(host.store, '(module (table (export "t") 1 funcref))')
        imports = {"e": {"t": wasmer.Instance(giving).exports.t}}
        guest = host.prepare(text, imports=imports)
        assert guest.report.native is not None
        assert "Maximums of memories and tables are lowered" in guest.report.changes[-1]
        with guest.instantiate() as instance:
            assert (instance.call("g", 2), instance.call("g", 1)) == (1, -1)
            with pytest.raises(memslot.PoolExhausted):
                guest.instantiate()
        with pytest.raises(memslot.MemoryTooLarge, match=r"\(memory_limit\)"):
            host.prepare(text.replace('"m") 1', '"m") 4'), imports=imports)


# Numbers of memories and tables

GROWS_TABLE = """(module (memory (export "m") 1) (table $t (export "t") {limits} funcref)
  (func (export "g") (param i32) (result i32) (table.grow $t (ref.null func) (local.get 0))))"""


@on_runtimes
@pytest.mark.parametrize(("limits", "most"), [("1", 10), ("1 5", 5), ("1 4000000000", 10)])
def test_table_grows_to_its_limit(name: str, limits: str, most: int) -> None:
    with serving(name, table_limit=10) as host:
        guest = host.prepare(GROWS_TABLE.format(limits=limits))
        with guest.instantiate() as instance:
            assert (instance.call("g", most - 1), instance.call("g", 1)) == (1, -1)


@on_runtimes
def test_table_with_contents_computes_the_same_after_its_maximum_is_lowered(name: str) -> None:
    text = """(module (type $f (func (result i32))) (memory 1) (table 2 funcref) (table $u 3 4000000000 externref)
      (elem (i32.const 1) $seven) (func $seven (result i32) (i32.const 7))
      (func (export "f") (param i32) (result i32) (call_indirect (type $f) (local.get 0)))
      (func (export "size") (result i32) (table.size $u)))"""
    with serving(name, table_limit=10) as host, host.prepare(text).instantiate() as instance:
        assert (instance.call("f", 1), instance.call("size")) == (7, 3)
        with pytest.raises(memslot.GuestTrap):
            instance.call("f", 0)


@on_wasmtime
def test_table_of_a_guest_left_to_the_runtime_grows_to_its_limit() -> None:
    text = GROWS_TABLE.format(limits="1").replace('"m") 1', '"m") i64 1')
    with hosts.started("wasmtime", text, table_limit=10) as instance:
        assert (instance.call("g", 9), instance.call("g", 1)) == (1, -1)


@on_runtimes
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(memory 1)" * 9, r"needs 9 memories, and the settings allow 8 \(memories_per_inst"),
        ("(table 0 funcref)" * 17, r"needs 17 tables, and the settings allow 16 \(tables_per_"),
        (
            "(table 1000001 funcref)",
            r"needs 1000001 elements for table 0, .* 1000000 \(table_limit",
        ),
    ],
)
def test_module_with_more_than_the_settings_allow_is_refused_with_the_setting(
    name: str, text: str, said: str
) -> None:
    with serving(name) as host, pytest.raises(memslot.MemoryTooLarge, match=said):
        host.prepare(bytes(wasmtime.wat2wasm(f"(module {text})")))


@on_wasmtime
def test_limits_of_configure_store_are_within_those_of_the_settings() -> None:
    text = GROWS_TABLE.format(limits="1")
    for own, most in ((5, 5), (-1, 10), (1000, 10)):
        limit = {"configure_store": lambda store, own=own: store.set_limits(table_elements=own)}
        with hosts.started("wasmtime", text, table_limit=10, **limit) as instance:
            assert (instance.call("g", most - 1), instance.call("g", 1)) == (1, -1)


# Heaps of wasmtime's garbage collector

HOLDS = """(module (memory (export "m") 1)
  (type $a (array (mut i8))) (type $n (struct (field (ref null $n)) (field (ref $a))))
  (func (export "hold") (param i32) (local $x (ref null $n))
    (loop (local.set $x (struct.new $n (local.get $x) (array.new $a (i32.const 7) (i32.const 100000))))
      (br_if 0 (local.tee 0 (i32.sub (local.get 0) (i32.const 1)))))))"""


@on_wasmtime
@pytest.mark.parametrize("memory", ["1", "0", "i64 1", "i64 0"])
def test_heap_grows_to_its_limit(memory: str) -> None:
    text = HOLDS.replace('"m") 1', f'"m") {memory}')
    limits = {"memory_limit": MIB} if "i64" in memory else {"heap_limit": MIB}
    with hosts.started("wasmtime", text, configure=_configure, **limits) as instance:
        instance.call("hold", 5)
        with pytest.raises(memslot.MemslotError, match="GC heap out of memory"):
            instance.call("hold", 20)


@on_wasmtime
def test_heap_past_keep_resident_ends_with_its_lease() -> None:
    with serving("wasmtime", keep_resident=MIB, configure=_configure) as host:
        guest = host.prepare(HOLDS)
        assert guest.in_place
        counts = []
        for arrays in (2, 2, 20, 2):
            with guest.lease() as instance:
                instance.call("hold", arrays)
            found = host.statistics()
            counts.append((found.resets_in_place, found.resets_by_instantiation))
        guest.close()
        assert counts == [(1, 0), (2, 0), (2, 1), (3, 1)]


@on_wasmtime
def test_heaps_are_as_many_as_slots() -> None:
    text = HOLDS.replace('(memory (export "m") 1)', "")
    with serving("wasmtime", slots=2, configure=_configure) as host:
        guest = host.prepare(text)
        instances = [guest.instantiate() for _ in range(2)]
        for each in instances:
            each.call("hold", 1)
        with pytest.raises(memslot.MemslotError, match=r"\(slots\)"):
            guest.instantiate().call("hold", 1)
        with pytest.raises(memslot.PoolExhausted, match=r"\(slots\)"):
            host.prepare(_holding_at_start(text)).instantiate()
        instances.pop().close()
        with guest.instantiate() as instance:
            instance.call("hold", 1)
        instances.pop().close()


def _holding_at_start(text: str) -> str:
    """Return HOLDS with a start function that keeps 20 arrays."""
    named = text.replace('(func (export "hold")', '(func $hold (export "hold")').rstrip()
    return f"{named[:-1]} (func $begin (call $hold (i32.const 20))) (start $begin))"


@on_wasmtime
def test_heap_past_its_limit_at_start_is_refused_by_name() -> None:
    with serving("wasmtime", heap_limit=MIB, configure=_configure) as host:
        guest = host.prepare(_holding_at_start(HOLDS))
        with pytest.raises(memslot.MemoryTooLarge, match="heap_limit"):
            guest.instantiate()


@on_wasmtime
def test_bare_instance_on_the_engine_of_a_host_stays_within_the_limits() -> None:
    with serving("wasmtime", slots=2, memory_limit=3 * PAGE, configure=_configure) as host:
        # The second memory looks like a heap: it begins empty and has no maximum.
        for minimum in (1, 0):
            text = f"""(module (memory (export "m") {minimum})
              (func (export "g") (param i32) (result i32) (memory.grow (local.get 0))))"""
            module, stores = wasmtime.Module(host.engine, text), []
            for _ in range(2):
                stores.append(store := wasmtime.Store(host.engine))
                grow = wasmtime.Instance(store, module, []).exports(store)["g"]
                assert (grow(store, 3 - minimum), grow(store, 1)) == (minimum, -1)
            with pytest.raises(wasmtime.WasmtimeError, match="slots"):
                wasmtime.Instance(wasmtime.Store(host.engine), module, [])
            del store, grow, stores
            gc.collect()
            assert in_use(host) == 0
        large = wasmtime.Module(host.engine, "(module (memory 4))")
        with pytest.raises(wasmtime.WasmtimeError, match="the settings allow"):
            wasmtime.Instance(wasmtime.Store(host.engine), large, [])


# Exceptions, and globals


@on_wasmtime
def test_only_the_first_exception_of_the_growths_of_a_call_is_kept() -> None:
    from memslot_plugin.hosts.wasmtime import bridge as wasmtime_bridge

    text = """(module (memory (export "m") 1 100) (func (export "g") (param i32)
      (loop (drop (memory.grow (i32.const 1))) (br_if 0 (local.tee 0 (i32.sub (local.get 0) (i32.const 1)))))))"""
    growth = Growth(RuntimeError("no"))
    with hosts.started("wasmtime", text, plugins=(growth,)) as instance:
        with pytest.raises(RuntimeError, match="no"):
            instance.call("g", 100)
        assert (len(growth.asked), wasmtime_bridge.KEPT) == (100, {})


@on_wasmtime
def test_only_the_last_exception_that_host_functions_caught_is_kept() -> None:
    from memslot_plugin.hosts.wasmtime import bridge as wasmtime_bridge

    def fails(_: int) -> int:
        raise RuntimeError("no")

    def catches(number: int) -> int:
        with pytest.raises(wasmtime.WasmtimeError):
            native.exports(native.store)["run"](native.store, number)
        return number

    with serving("wasmtime") as host, hosts.calling(host, fails).instantiate() as failing:
        native = failing.native
        with hosts.calling(host, catches).instantiate() as instance:
            with pytest.raises(RuntimeError, match="no"):
                instance.call("twice", 1)
            assert wasmtime_bridge.KEPT == {}


@on_wasmtime
def test_guest_with_very_many_globals_is_reset_by_a_new_instance() -> None:
    for many in (target.MOST_GLOBALS, target.MOST_GLOBALS + 1):
        every = "".join(f'(global (export "{n}") (mut i32) (i32.const {n}))' for n in range(many))
        with serving("wasmtime") as host, host.prepare(f"(module (memory 1) {every})") as guest:
            in_place = many == target.MOST_GLOBALS
            assert (guest.in_place, guest.report.verdict.in_place) == (in_place, in_place)
            with guest.instantiate() as instance:
                instance.set_global("7", 1)
                instance.reset()
                assert instance.global_value("7") == 7


@on_wasmtime
def test_host_functions_that_single_instances_were_given_do_not_pile_up() -> None:
    from memslot_plugin.hosts.wasmtime import bridge as wasmtime_bridge

    with serving("wasmtime") as host:
        guest = hosts.calling(host, lambda number: number)
        before = len(wasmtime_bridge.FUNCTIONS)
        for _ in range(5):
            with guest.instantiate(imports={"env": {"f": lambda number: number}}) as instance:
                assert instance.call("run", 3) == 3
        assert len(wasmtime_bridge.FUNCTIONS) <= before + 1


@pytest.mark.parametrize("name", hosts.RUNTIMES)
def test_snapshot_past_the_image_limit_is_refused_before_its_image_is_built(name: str) -> None:
    class Builds:
        asked = 0

        @hookimpl(tryfirst=True)
        def memslot_build_image(self, content: Any) -> None:
            self.asked += 1

    builds = Builds()
    with hosts.started(name, plugins=(builds,), image_limit=PAGE) as instance:
        instance.memory.write(2 * PAGE - 1, b"x")
        with pytest.raises(memslot.MemoryTooLarge, match="spans 131072 bytes and the limit"):
            instance.snapshot()
        assert builds.asked == 1
