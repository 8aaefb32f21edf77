"""wasmtime-py: what a guest computes, what an instance costs, and every way in which it goes wrong."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from memslot_hooks import hookimpl
from memslot_plugin._core import counters, ffi, lib
from memslot_plugin.errors import (
    ArgumentError,
    ExportNotFound,
    GrowthRefused,
    GuestExit,
    GuestTrap,
    HostUnavailable,
    InUse,
    InvalidModule,
    LinkError,
    MemoryTooLarge,
    MemslotError,
    PoolExhausted,
    SettingError,
    Unsupported,
    UsedAfterClose,
)
from memslot_plugin.hosts import Wasi, open_host
from memslot_plugin.settings import Settings
from memslot_plugin.smaps import status_bytes
from memslot_plugin.tests.patience import count_objects

try:
    import wasmtime

    from memslot_plugin.hosts import wasmtime_bridge
    from memslot_plugin.hosts.wasmtime import NativeInstance, WasmtimeHost, WasmtimeTrap
except (ImportError, HostUnavailable) as missing:
    pytest.skip(f"wasmtime cannot be imported: {missing}", allow_module_level=True)

PAGE = 65536

ECHO = """(module
  (memory (export "memory") 2 4)
  (global $count (export "count") (mut i32) (i32.const 5))
  (global (export "fixed") i64 (i64.const 7))
  (global (export "real") (mut f64) (f64.const 1.5))
  (data (i32.const 8) "hello")
  (func (export "get") (param i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "get64") (param i32) (result i64) (i64.load (local.get 0)))
  (func (export "set") (param i32 i32) (i32.store8 (local.get 0) (local.get 1)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "size") (result i32) (memory.size))
  (func (export "next") (result i32)
    (global.set $count (i32.add (global.get $count) (i32.const 1))) (global.get $count))
  (func (export "pair") (result i32 i64) (i32.const 1) (i64.const 2))
  (func (export "add") (param i32 i64 f32 f64) (result f64) (local.get 3))
  (func (export "same32") (param i32) (result i32) (local.get 0))
  (func (export "same64") (param i64) (result i64) (local.get 0))
  (func (export "samef") (param f32) (result f32) (local.get 0))
  (func (export "nop"))
  (func (export "trap") unreachable)
  (func (export "divide") (param i32 i32) (result i32) (i32.div_s (local.get 0) (local.get 1)))
  (func $recurse (export "recurse") (call $recurse)))"""

CALLS_OUT = """(module
  (import "env" "f" (func $f (param i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "run") (param i32) (result i32) (call $f (local.get 0)))
  (func (export "twice") (param i32) (result i32) (i32.add (call $f (local.get 0)) (call $f (local.get 0)))))"""

STARTS_BADLY = '(module (memory 1) (func $f unreachable) (start $f) (data (i32.const 0) "x"))'

GC_HEAP_FIRST = """(module
  (memory (export "memory") 0 3) (memory (export "other") 2) (table (export "t") 4 externref)
  (type $a (array (mut i32)))
  (func (export "many") (param i32) (result i32) (array.len (array.new_default $a (local.get 0))))
  (func (export "grow") (result i32) (memory.grow (i32.const 1))))"""

WASI = """(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $argc (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $envc (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $env (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\\10\\00\\00\\00\\06\\00\\00\\00")
  (data (i32.const 16) "hello\\n")
  (data (i32.const 64) "note.txt")
  (func (export "_start")
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 100))))
  (func (export "write") (param i32) (result i32)
    (call $write (local.get 0) (i32.const 0) (i32.const 1) (i32.const 100)))
  (func (export "read") (param i32) (result i32)
    (call $read (local.get 0) (i32.const 0) (i32.const 1) (i32.const 100)))
  (func (export "exit") (param i32) (call $exit (local.get 0)))
  (func (export "arguments")
    (drop (call $argc (i32.const 1000) (i32.const 1004)))
    (drop (call $args (i32.const 1008) (i32.const 2000))))
  (func (export "environment")
    (drop (call $envc (i32.const 1000) (i32.const 1004)))
    (drop (call $env (i32.const 1008) (i32.const 2000))))
  (func (export "open") (param i32) (result i32)
    (call $open (local.get 0) (i32.const 0) (i32.const 64) (i32.const 8) (i32.const 0)
      (i64.const 2) (i64.const 2) (i32.const 0) (i32.const 400))))"""


@pytest.fixture(scope="module", autouse=True)
def _wasi_runtime(_probed: None) -> None:
    """wasmtime's WASI starts a runtime of its own once, which keeps descriptors for as long as the process lives."""
    with WasmtimeHost(Settings(slots=1)) as opened:
        wasi = Wasi(stdout="discard", preopened={"/": "."})
        with opened.prepare(WASI, wasi=wasi).instantiate() as instance:
            instance.call("_start")
            instance.call("open", 3)


@pytest.fixture
def host(no_leaks: None) -> Iterator[WasmtimeHost]:
    with WasmtimeHost(Settings(slots=8)) as opened:
        yield opened
        if not opened._closed:
            check_slots(opened)
            for pool in opened.statistics().pools:
                assert pool.failed_resets == 0


def check_slots(host: WasmtimeHost) -> None:
    """Every slot is what its state says."""
    for _, plugin in host.plugins.manager.list_name_plugin():
        pool = getattr(plugin, "pool", None)
        if pool is not None:
            pool.check()


def in_use(host: WasmtimeHost) -> int:
    return sum(pool.in_use for pool in host.statistics().pools)


class Clock:
    """Grants growth only up to `limit` bytes, and remembers what it was asked."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.asked: list[int] = []
        self.raises: BaseException | None = None

    @hookimpl
    def memslot_grow_memory(self, memory: Any, byte_size: int) -> bool | None:
        self.asked.append(byte_size)
        if self.raises is not None:
            raise self.raises
        return False if byte_size > self.limit else None


class TestAnInstance:
    def test_runs_on_its_image(self, host: WasmtimeHost) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            assert instance.memory.read(8, 5) == b"hello"
            assert instance.call("get", 9) == ord("e")
            instance.call("set", 9, 65)
            assert instance.memory.read(8, 5) == b"hAllo"
            instance.memory.write(0, b"xyz")
            assert instance.call("get", 2) == ord("z")
            assert instance.memory.byte_size == 2 * PAGE
            assert instance.call("pair") == [1, 2]
            assert instance.call("set", 0, 0) is None

    def test_leaves_nothing_to_the_next(self, host: WasmtimeHost) -> None:
        guest = host.prepare(ECHO)
        bases = set()
        for _ in range(3):
            with guest.instantiate() as instance:
                bases.add(instance._live().locate(0)[0])
                assert instance.memory.read(0, 16) == b"\0" * 8 + b"hello\0\0\0"
                assert instance.call("next") == 6
                instance.memory.write(0, b"\xff" * 16)
                instance.memory.write(2 * PAGE - 1, b"\xff")
            check_slots(host)
        assert len(bases) == 1

    def test_keeps_its_handle_over_a_reset(self, host: WasmtimeHost) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            instance.call("next")
            instance.call("set", 8, 0)
            assert instance.call("grow", 1) == 2
            stale = instance.function("get")
            instance.reset()
            assert instance.memory.read(8, 5) == b"hello"
            assert instance.memory.byte_size == 2 * PAGE
            assert instance.call("size") == 2
            assert instance.call("next") == 6
            with pytest.raises(UsedAfterClose):
                stale(8)
            check_slots(host)
        assert host.statistics().resets == 1

    def test_costs_no_mapping_call_on_the_slot_it_had(
        self, host: WasmtimeHost, calls: Callable[[], AbstractContextManager[dict[str, int]]]
    ) -> None:
        guest = host.prepare(ECHO)
        with guest.instantiate() as instance:
            instance.call("set", 8, 0)
        with calls() as made:
            for _ in range(10):
                with guest.instantiate() as instance:
                    instance.call("set", 8, 0)
        assert not {"mmap", "munmap", "mprotect", "ftruncate"} & set(made)

    def test_has_globals_and_exports(self, host: WasmtimeHost) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            assert instance.global_value("count") == 5
            assert instance.global_value("fixed") == 7
            instance.set_global("count", 41)
            assert instance.call("next") == 42
            instance.set_global("count", 2**32 - 1)
            assert instance.global_value("count") == -1
            instance.set_global("real", 2)
            assert instance.global_value("real") == 2.0
            assert instance.exports["memory"] == "memory"
            assert instance.exports["fixed"] == "global"
            assert instance.exports["get"] == "func"
            with pytest.raises(ArgumentError, match="not mutable"):
                instance.set_global("fixed", 1)
            for wrong in ("x", 2**64, 1.5):
                with pytest.raises(ArgumentError):
                    instance.set_global("count", wrong)
            for name in ("none", "memory"):
                with pytest.raises(ExportNotFound, match=name):
                    instance.global_value(name)

    def test_says_which_export_is_missing(self, host: WasmtimeHost) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            with pytest.raises(ExportNotFound, match="exports no func 'none'; it exports: add"):
                instance.call("none")
            with pytest.raises(ExportNotFound, match="is a memory, not a func"):
                instance.call("memory")

    def test_has_wasmtimes_own_objects(self, host: WasmtimeHost) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            native = instance.native
            assert isinstance(native, NativeInstance)
            exports: Any = native.exports(native.store)
            assert exports["next"](native.store) == 6
            assert instance.call("next") == 7
            assert bytes(exports["memory"].read(native.store, 8, 13)) == b"hello"
            native.store.close()  # ours to end, not theirs
            assert instance.call("next") == 8
        with pytest.raises(ValueError, match="closed"):
            exports["next"](native.store)

    def test_ends_once_and_says_so(self, host: WasmtimeHost) -> None:
        instance = host.prepare(ECHO).instantiate()
        get, memory = instance.function("get"), instance.memory
        instance.close()
        instance.close()
        for use in (
            lambda: instance.call("get", 8),
            lambda: get(8),
            lambda: memory.read(0, 1),
            lambda: instance.native,
            instance.reset,
        ):
            with pytest.raises(UsedAfterClose):
                use()
        assert in_use(host) == 0

    def test_that_is_dropped_comes_back(self, host: WasmtimeHost) -> None:
        guest = host.prepare(ECHO)
        for _ in range(20):
            guest.instantiate()
        gc.collect()
        assert in_use(host) == 0

    def test_of_a_closed_guest_goes_on(self, host: WasmtimeHost) -> None:
        guest = host.prepare(ECHO)
        with guest.instantiate() as instance:
            guest.close()
            assert instance.call("get", 8) == ord("h")
            with pytest.raises(UsedAfterClose, match="prepare it again"):
                instance.reset()
        with pytest.raises(UsedAfterClose):
            guest.instantiate()
        assert in_use(host) == 0

    @pytest.mark.parametrize("bounds", ["guard", "code"])
    @pytest.mark.parametrize("plugin", ["memfd", "anonymous"])
    def test_is_the_same_on_every_allocator(self, plugin: str, bounds: str, no_leaks: None) -> None:
        settings = Settings(slots=2, plugins=(plugin,), bounds_checks=bounds)
        with WasmtimeHost(settings) as host, host.prepare(ECHO).instantiate() as instance:
            assert instance.memory.read(8, 5) == b"hello"
            assert instance.call("grow", 2) == 2
            instance.call("set", 4 * PAGE - 1, 1)
            with pytest.raises(wasmtime.Trap):
                instance.call("get", 4 * PAGE)
            instance.reset()
            assert instance.memory.read(4, 9) == b"\0\0\0\0hello"
            with pytest.raises(wasmtime.Trap):
                instance.call("get", 2 * PAGE)
            check_slots(host)


class TestGrowth:
    def test_is_decided_by_a_plugin(self, no_leaks: None) -> None:
        clock = Clock(3 * PAGE)
        with (
            WasmtimeHost(Settings(slots=2), plugins=[clock]) as host,
            host.prepare(ECHO).instantiate() as instance,
        ):
            assert instance.call("grow", 1) == 2
            assert instance.memory.byte_size == 3 * PAGE
            assert instance.call("grow", 1) == -1
            assert instance.call("size") == 3
            assert clock.asked == [3 * PAGE, 4 * PAGE]
            with pytest.raises(GrowthRefused):
                instance.memory.grow(1)
            clock.limit = 4 * PAGE
            assert instance.memory.grow(1) == 3
            assert instance.call("size") == 4

    def test_stops_at_the_memorys_own_maximum(self, host: WasmtimeHost) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            assert instance.call("grow", 3) == -1
            assert instance.call("grow", 2) == 2
            assert instance.call("grow", 0) == 4
            for pages in (1, -1, 2**60):
                with pytest.raises(GrowthRefused):
                    instance.memory.grow(pages)

    def test_stops_at_the_limit_of_the_settings(self, no_leaks: None) -> None:
        clock = Clock(1 << 40)
        with WasmtimeHost(Settings(slots=2, memory_limit=3 * PAGE), plugins=[clock]) as host:
            with host.prepare(ECHO).instantiate() as instance:
                assert instance.call("grow", 2) == -1
                assert instance.call("grow", 1) == 2
            assert clock.asked == [3 * PAGE]
            with pytest.raises(MemoryTooLarge, match="memory_limit"):
                host.prepare("(module (memory 4))")

    def test_goes_by_ftruncate_where_code_checks_bounds(self, no_leaks: None) -> None:
        settings = Settings(slots=2, growth="ftruncate", bounds_checks="code", plugins=("memfd",))
        with WasmtimeHost(settings) as host, host.prepare(ECHO).instantiate() as instance:
            before = counters()
            assert instance.call("grow", 1) == 2
            after = counters()
            assert after["ftruncate"] == before["ftruncate"] + 1
            assert after["mprotect"] == before["mprotect"]
            instance.call("set", 3 * PAGE - 1, 7)
            with pytest.raises(WasmtimeTrap):
                instance.call("get", 3 * PAGE)
            instance.reset()
            assert instance.call("size") == 2

    @pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), MemslotError("no")])
    def test_raises_what_the_plugin_raised_and_goes_on(
        self, error: BaseException, no_leaks: None
    ) -> None:
        clock = Clock(1 << 40)
        with (
            WasmtimeHost(Settings(slots=2), plugins=[clock]) as host,
            host.prepare(ECHO).instantiate() as instance,
        ):
            clock.raises = error
            with pytest.raises(type(error)) as caught:
                instance.call("grow", 1)
            assert caught.value is error
            with pytest.raises(type(error)) as caught:
                instance.memory.grow(1)
            assert caught.value is error
            clock.raises = None
            assert instance.call("size") == 2
            assert instance.call("grow", 1) == 2
        assert not wasmtime_bridge._kept

    def test_in_small_slots_is_bounded_by_the_slot(self, no_leaks: None) -> None:
        with (
            WasmtimeHost(Settings(slots=2, reserved="256KiB", guard="64KiB")) as host,
            host.prepare(
                '(module (memory (export "m") 1) (func (export "grow") (param i32) (result i32)'
                ' (memory.grow (local.get 0))) (func (export "get") (param i32) (result i32)'
                " (i32.load (local.get 0))))"
            ).instantiate() as instance,
        ):
            assert instance.call("grow", 4) == -1
            assert instance.call("grow", 3) == 1
            assert instance.call("get", 4 * PAGE - 4) == 0
            for address in (4 * PAGE - 3, 4 * PAGE, 5 * PAGE, 2**31, 2**32 - 1):
                with pytest.raises(WasmtimeTrap):
                    instance.call("get", address)


class TestTraps:
    def test_stay_traps_at_every_boundary(self, host: WasmtimeHost) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            assert instance.call("get64", 2 * PAGE - 8) == 0
            for address in (2 * PAGE - 7, 2 * PAGE - 1, 2 * PAGE, 4 * PAGE, 2**31, 2**32 - 1):
                with pytest.raises(wasmtime.Trap) as caught:
                    instance.call("get64", address)
                assert caught.value.trap_code is wasmtime.TrapCode.MEMORY_OUT_OF_BOUNDS
            instance.call("grow", 1)
            assert instance.call("get64", 3 * PAGE - 8) == 0
            with pytest.raises(GuestTrap):
                instance.call("get64", 3 * PAGE)

    def test_are_caught_as_ours_and_as_wasmtimes(self, host: WasmtimeHost) -> None:
        with host.prepare(ECHO, name="echo").instantiate() as instance:
            for kind in (GuestTrap, wasmtime.Trap, MemslotError, RuntimeError):
                with pytest.raises(kind) as caught:
                    instance.call("divide", 1, 0)
                assert isinstance(caught.value, WasmtimeTrap)
                assert str(caught.value) == "the guest echo trapped: integer divide by zero"
                assert caught.value.trap_code is wasmtime.TrapCode.INTEGER_DIVISION_BY_ZERO
                assert "backtrace" in caught.value.message
                assert [frame.func_index for frame in caught.value.frames] == [13]
                assert type(caught.value.native) is wasmtime.Trap
            with pytest.raises(wasmtime.Trap, match="call stack exhausted"):
                instance.call("recurse")
            with pytest.raises(wasmtime.Trap, match="unreachable"):
                instance.call("trap")
            assert instance.call("next") == 6

    def test_of_a_start_function_give_the_slot_back(self, host: WasmtimeHost) -> None:
        guest = host.prepare(STARTS_BADLY)
        for _ in range(20):
            with pytest.raises(WasmtimeTrap, match="unreachable"):
                guest.instantiate()
        assert in_use(host) == 0
        assert not host._groups

    def test_of_an_uncaught_wasm_exception(self, host: WasmtimeHost) -> None:
        source = (
            '(module (tag $t (param i32)) (memory 1) (func (export "f") (throw $t (i32.const 1))))'
        )
        with (
            host.prepare(source).instantiate() as instance,
            pytest.raises(GuestTrap, match="Wasm exception"),
        ):
            instance.call("f")


class TestArguments:
    @pytest.mark.parametrize("number", [0, 1, -1, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, True])
    def test_i32_signed_and_unsigned(self, host: WasmtimeHost, number: int) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            assert instance.call("same32", number) == (number + 2**31) % 2**32 - 2**31

    @pytest.mark.parametrize("number", [0, -1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1])
    def test_i64_signed_and_unsigned(self, host: WasmtimeHost, number: int) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            assert instance.call("same64", number) == (number + 2**63) % 2**64 - 2**63

    @pytest.mark.parametrize(
        ("given", "got"),
        [(1, 1.0), (0.1, 0.10000000149011612), (1e300, float("inf")), (-0.0, -0.0)],
    )
    def test_f32(self, host: WasmtimeHost, given: float, got: float) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            assert repr(instance.call("samef", given)) == repr(got)
            assert repr(instance.call("samef", float("nan"))) == "nan"

    @pytest.mark.parametrize(
        ("name", "arguments", "said"),
        [
            ("same32", (), "1 values are wanted and 0 were given"),
            ("same32", (1, 2), "1 values are wanted and 2 were given"),
            ("nop", (1,), "0 values are wanted and 1 were given"),
            ("same32", (1.0,), "1.0 is no integer"),
            ("same32", ("1",), "'1' is no integer"),
            ("same32", (None,), "None is no integer"),
            ("same32", (2**32,), "not in -2\\*\\*31 to 2\\*\\*32 - 1"),
            ("same32", (-(2**31) - 1,), "not in"),
            ("same64", (2**64,), "not in"),
            ("samef", ("x",), "'x' is no number"),
            ("samef", (10**400,), "too large"),
            ("add", (1, 2, 3, None), "value 4 is an f64, and None is no number"),
        ],
    )
    def test_that_do_not_fit(
        self, host: WasmtimeHost, name: str, arguments: tuple[Any, ...], said: str
    ) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            with pytest.raises(ArgumentError, match=said):
                instance.call(name, *arguments)
            assert instance.call("next") == 6

    def test_in_any_number(self, host: WasmtimeHost) -> None:
        count = 40
        source = (
            f'(module (func (export "f") (param {"i32 " * count}) (result {"i64 " * count})'
            + " ".join(f"(i64.extend_i32_s (local.get {i}))" for i in reversed(range(count)))
            + "))"
        )
        with host.prepare(source).instantiate() as instance:
            assert instance.call("f", *range(count)) == list(reversed(range(count)))

    def test_of_vectors_and_references(self, host: WasmtimeHost) -> None:
        source = """(module (memory 1)
          (global (export "v") (mut v128) (v128.const i64x2 1 2))
          (global (export "x") (mut externref) (ref.null extern))
          (global (export "a") (mut anyref) (ref.null any))
          (func (export "vector") (param v128) (result v128) (local.get 0))
          (func (export "extern") (param externref i32) (result i32 externref) (local.get 1) (local.get 0))
          (func $f (export "func") (param funcref) (result funcref) (local.get 0))
          (func (export "any") (param anyref))
          (func (export "mixed") (param v128 externref)))"""
        with host.prepare(source).instantiate() as instance:
            vector = bytes(range(16))
            assert instance.call("vector", vector) == vector
            assert instance.global_value("v") == (1).to_bytes(8, "little") + (2).to_bytes(
                8, "little"
            )
            instance.set_global("v", vector)
            assert instance.global_value("v") == vector
            for wrong in (b"short", 5):
                with pytest.raises(ArgumentError, match="16 bytes"):
                    instance.call("vector", wrong)
            thing = object()
            number, same = instance.call("extern", thing, 3)
            assert (number, same is thing) == (3, True)
            assert instance.call("func", None) is None
            instance.set_global("x", thing)
            assert instance.global_value("x") is thing
            with pytest.raises(ArgumentError):
                instance.call("func", 5)
            with pytest.raises(ArgumentError):
                instance.call("extern", thing, "x")
            for name in ("any", "mixed"):
                with pytest.raises(Unsupported, match="cannot pass"):
                    instance.call(name, None)
            with pytest.raises(Unsupported):
                instance.global_value("a")


class TestImports:
    def test_are_python_callables(self, host: WasmtimeHost) -> None:
        guest = host.prepare(CALLS_OUT, imports={"env": {"f": lambda number: number + 1}})
        with guest.instantiate() as instance:
            assert instance.call("run", 41) == 42
            instance.reset()
            assert instance.call("twice", 1) == 4
        with guest.instantiate(imports={"env": {"f": lambda number: number * 2}}) as instance:
            assert instance.call("run", 21) == 42
        with guest.instantiate() as instance:
            assert instance.call("run", -1) == 0

    @pytest.mark.parametrize(
        "error",
        [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), wasmtime.WasmtimeError("x")],
    )
    def test_raise_the_very_same_exception(self, host: WasmtimeHost, error: BaseException) -> None:
        def fail(number: int) -> int:
            raise error

        with host.prepare(CALLS_OUT, imports={"env": {"f": fail}}).instantiate() as instance:
            for _ in range(3):
                with pytest.raises(type(error)) as caught:
                    instance.call("run", 1)
                assert caught.value is error
            assert instance.memory.byte_size == PAGE
        assert not wasmtime_bridge._kept

    def test_raise_it_also_where_references_travel(self, host: WasmtimeHost) -> None:
        error = ValueError("mine")

        def fail(thing: object) -> int:
            raise error

        source = """(module (import "env" "f" (func $f (param externref) (result i32))) (memory 1)
          (func (export "run") (param externref) (result i32) (call $f (local.get 0)))
          (func (export "plain") (result i32) (call $f (ref.null extern))))"""
        with host.prepare(source, imports={"env": {"f": fail}}).instantiate() as instance:
            for call in (lambda: instance.call("run", "thing"), lambda: instance.call("plain")):
                with pytest.raises(ValueError, match="mine") as caught:
                    call()
                assert caught.value is error
        with host.prepare(source, imports={"env": {"f": len}}).instantiate() as instance:
            assert instance.call("run", "four") == 4
        from wasmtime import _func

        assert _func.LAST_EXCEPTION is None
        assert not wasmtime_bridge._kept

    def test_do_not_leave_an_exception_to_a_later_trap(self, host: WasmtimeHost) -> None:
        """Bare wasmtime-py made the call, and must not be the one that hears of it at our next."""

        def fail(number: int) -> int:
            raise ValueError("mine")

        with host.prepare(CALLS_OUT, imports={"env": {"f": fail}}).instantiate() as instance:
            native = instance.native
            with pytest.raises(ValueError, match="mine"):
                native.exports(native.store)["run"](native.store, 1)
        with (
            host.prepare(ECHO).instantiate() as instance,
            pytest.raises(WasmtimeTrap, match="unreachable"),
        ):
            instance.call("trap")

    def test_may_call_back_and_into_others(self, host: WasmtimeHost) -> None:
        inner = host.prepare(
            CALLS_OUT, imports={"env": {"f": lambda number: 1 // number}}
        ).instantiate()

        def outer(number: int) -> int:
            if number > 10:
                return int(instance.call("run", number - 1)) + 1
            try:
                return int(inner.call("run", number))
            except ZeroDivisionError:
                return 100

        with (
            host.prepare(CALLS_OUT, imports={"env": {"f": outer}}).instantiate() as instance,
            inner,
        ):
            assert instance.call("run", 0) == 100
            assert instance.call("run", 1) == 1
            assert instance.call("run", 20) == 10
            assert instance.call("twice", 0) == 200

    def test_may_not_end_what_calls_them(self, host: WasmtimeHost) -> None:
        def end(number: int) -> int:
            (instance.close if number else instance.reset)()
            return 0

        with host.prepare(CALLS_OUT, imports={"env": {"f": end}}).instantiate() as instance:
            for number in (0, 1):
                with pytest.raises(InUse):
                    instance.call("run", number)
            assert not instance.closed

    @pytest.mark.parametrize(
        ("result", "said"),
        [
            ("x", "'x' is no integer"),
            (2**32, "not in"),
            (None, "None is no integer"),
            ([1], "no integer"),
        ],
    )
    def test_must_return_what_they_declare(
        self, host: WasmtimeHost, result: Any, said: str
    ) -> None:
        guest = host.prepare(CALLS_OUT, imports={"env": {"f": lambda _: result}})
        with (
            guest.instantiate() as instance,
            pytest.raises(ArgumentError, match=f"env.f returned.*{said}"),
        ):
            instance.call("run", 1)

    def test_may_return_nothing_or_several(self, host: WasmtimeHost) -> None:
        source = """(module (import "e" "none" (func $none (param i64)))
          (import "e" "two" (func $two (param v128 f32) (result f64 v128))) (memory 1)
          (func (export "none") (call $none (i64.const -1)))
          (func (export "two") (result f64 v128) (call $two (v128.const i64x2 0 1) (f32.const 2))))"""
        seen: list[Any] = []
        imports = {"e": {"none": seen.append, "two": lambda vector, number: (number, vector)}}
        with host.prepare(source, imports=imports).instantiate() as instance:
            assert instance.call("none") is None
            assert seen == [-1]
            assert instance.call("two") == [2.0, bytes(8) + b"\1" + bytes(7)]
        for wrong, said in (
            (lambda *_: 5, "a sequence of 2"),
            (lambda *_: (1.0,), "2 values are wanted"),
        ):
            with (
                host.prepare(
                    source, imports={"e": {**imports["e"], "two": wrong}}
                ).instantiate() as instance,
                pytest.raises(ArgumentError, match=said),
            ):
                instance.call("two")
        with (
            host.prepare(
                source, imports={"e": {**imports["e"], "none": lambda _: 1}}
            ).instantiate() as instance,
            pytest.raises(ArgumentError, match="nothing is wanted"),
        ):
            instance.call("none")

    @pytest.mark.parametrize(
        ("imports", "said"),
        [
            ({}, r"imports env.f, a func \(i32\) -> \(i32\), and no such import was given"),
            ({"env": {}}, "env has: nothing"),
            ({"env": {"g": len}}, "env has: g"),
            ({"other": {}}, "given are the modules: other"),
            ({"env": {"f": 5}}, "and 5 was given"),
        ],
    )
    def test_that_are_missing_or_wrong(self, host: WasmtimeHost, imports: Any, said: str) -> None:
        guest = host.prepare(CALLS_OUT, imports=imports)
        for _ in range(3):
            with pytest.raises(LinkError, match=said):
                guest.instantiate()
        assert in_use(host) == 0

    def test_are_forgotten_with_those_who_need_them(self, host: WasmtimeHost) -> None:
        import weakref

        class Function:
            def __call__(self, number: int) -> int:
                return number

        wasmtime_bridge.drop_functions()
        before = len(wasmtime_bridge.FUNCTIONS)
        function = Function()
        alive = weakref.ref(function)
        guest = host.prepare(CALLS_OUT)
        with guest.instantiate(imports={"env": {"f": function}}) as instance:
            del function
            assert instance.call("run", 3) == 3
        del instance
        gc.collect()
        host.statistics()
        assert alive() is None
        assert len(wasmtime_bridge.FUNCTIONS) == before


class TestAStoreOfTheEmbeddersOwn:
    SOURCE = """(module (import "e" "g" (global $g (mut i32))) (import "e" "m" (memory 1))
      (memory (export "own") 1) (data (memory 1) (i32.const 0) "own")
      (func (export "next") (result i32)
        (global.set $g (i32.add (global.get $g) (i32.const 1))) (global.get $g)))"""

    def test_takes_its_objects(self, host: WasmtimeHost) -> None:
        guest = host.prepare(self.SOURCE)
        store = wasmtime.Store(host.engine)
        number = wasmtime.Global(
            store, wasmtime.GlobalType(wasmtime.ValType.i32(), True), wasmtime.Val.i32(41)
        )
        memory = wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
        memory.write(store, b"theirs")
        instance = guest.instantiate(imports={"e": {"g": number, "m": memory}}, store=store)
        assert instance.call("next") == 42
        assert number.value(store) == 42
        assert instance.memories[0].read(0, 6) == b"theirs"
        assert instance.memories[1].read(0, 3) == b"own"
        with pytest.raises(InUse, match="end the store"):
            instance.reset()
        instance.close()
        assert in_use(host) == 1  # the store still has it
        with pytest.raises(InUse, match="close their stores"):
            host.close(force=True)
        store.close()
        assert in_use(host) == 0

    def test_raises_what_its_functions_raise(self, host: WasmtimeHost) -> None:
        store = wasmtime.Store(host.engine)
        error = ValueError("theirs")

        def fail(number: int) -> int:
            raise error

        number = wasmtime.ValType.i32()
        given = wasmtime.Func(store, wasmtime.FuncType([number], [number]), fail)
        guest = host.prepare(CALLS_OUT)
        with guest.instantiate(imports={"env": {"f": given}}, store=store) as instance:
            with pytest.raises(ValueError, match="theirs") as caught:
                instance.call("run", 1)
            assert caught.value is error
        store.close()

    def test_may_go_before_the_instance(self, host: WasmtimeHost) -> None:
        store = wasmtime.Store(host.engine)
        instance = host.prepare(ECHO).instantiate(store=store)
        assert instance.call("next") == 6
        next_one = instance.function("next")
        store.close()
        for use in (
            next_one,
            lambda: instance.call("next"),
            lambda: instance.global_value("count"),
            lambda: instance.native,
            lambda: instance.memory.grow(1),
        ):
            with pytest.raises(UsedAfterClose, match="store"):
                use()
        assert in_use(host) == 1
        instance.close()
        assert in_use(host) == 0

    def test_keeps_the_memory_of_a_failed_start(self, host: WasmtimeHost) -> None:
        store = wasmtime.Store(host.engine)
        with pytest.raises(WasmtimeTrap):
            host.prepare(STARTS_BADLY).instantiate(store=store)
        assert in_use(host) == 1
        store.close()
        assert in_use(host) == 0

    def test_must_be_of_the_right_engine(self, host: WasmtimeHost) -> None:
        for wrong in (wasmtime.Store(), object()):
            with pytest.raises(LinkError, match=r"must be a wasmtime\.Store of host\.engine"):
                host.prepare(ECHO).instantiate(store=wrong)
        assert in_use(host) == 0

    def test_is_asked_for_where_it_is_needed(self, host: WasmtimeHost) -> None:
        store = wasmtime.Store(host.engine)
        number = wasmtime.Global(
            store, wasmtime.GlobalType(wasmtime.ValType.i64(), True), wasmtime.Val.i64(41)
        )
        guest = host.prepare(self.SOURCE)
        with pytest.raises(LinkError, match=r"pass that one to instantiate\(store=...\)"):
            guest.instantiate(imports={"e": {"g": number, "m": number}})
        with pytest.raises(LinkError, match="memory of at least 1 pages, and a global was given"):
            guest.instantiate(imports={"e": {"g": number, "m": number}}, store=store)
        memory = wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
        with pytest.raises(
            LinkError, match=r"incompatible import type for e\.g; .* expected global of type i32"
        ):
            guest.instantiate(imports={"e": {"g": number, "m": memory}}, store=store)
        assert in_use(host) == 0

    def test_ends_in_a_collection_on_any_thread(self, host: WasmtimeHost) -> None:
        guest = host.prepare(ECHO)

        def make() -> None:
            store = wasmtime.Store(host.engine)
            instance = guest.instantiate(store=store)
            instance.call("set", 8, 0)
            instance.close()
            cycle: list[Any] = [store]
            cycle.append(cycle)

        for _ in range(4):
            make()
        assert len(host._retained) == 4
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()
        assert in_use(host) == 0
        with guest.instantiate() as instance:
            assert instance.memory.read(8, 5) == b"hello"


class TestManyKindsOfModules:
    def test_without_a_memory(self, host: WasmtimeHost) -> None:
        with host.prepare(
            '(module (func (export "f") (result i32) (i32.const 3)))'
        ).instantiate() as instance:
            assert instance.call("f") == 3
            with pytest.raises(ExportNotFound, match="no linear memory"):
                instance.memory.read(0, 1)
            instance.reset()
            assert instance.call("f") == 3
        assert in_use(host) == 0

    def test_with_several_memories(self, host: WasmtimeHost) -> None:
        source = """(module (memory (export "a") 1) (memory 2) (memory (export "c") 0 5)
          (data (memory 0) (i32.const 0) "first") (data (memory 1) (i32.const 65536) "second")
          (func (export "get") (result i32) (i32.load8_u 1 (i32.const 65536)))
          (func (export "put") (i32.store8 0 (i32.const 0) (i32.const 0))
            (i32.store8 1 (i32.const 65536) (i32.const 0)))
          (func (export "grow") (result i32) (memory.grow 2 (i32.const 1))))"""
        guest = host.prepare(source)
        for _ in range(2):
            with guest.instantiate() as instance:
                first, second, third = instance.memories
                assert first.read(0, 5) == b"first"
                assert second.read(PAGE, 6) == b"second"
                assert third.byte_size == 0
                assert instance.call("grow") == 0
                assert third.byte_size == PAGE
                third.write(0, b"x")
                assert third.grow(2) == 1
                with pytest.raises(ExportNotFound, match=r"memory 1 .* is not exported"):
                    second.grow(1)
                instance.call("put")
                assert in_use(host) == 3
        assert in_use(host) == 0

    def test_with_a_heap_of_the_garbage_collector(self, host: WasmtimeHost) -> None:
        """wasmtime asks the creator for that heap too, and before the memories."""
        guest = host.prepare(GC_HEAP_FIRST)
        assert guest.plan.native is None
        for _ in range(3):
            with guest.instantiate() as instance:
                assert instance.call("many", 100_000) == 100_000
                assert instance.call("grow") == 0
                first, second = instance.memories
                assert (first.byte_size, second.byte_size) == (PAGE, 2 * PAGE)
                first.write(0, b"x")
                assert in_use(host) == 2
        assert in_use(host) == 0

    def test_with_a_heap_within_the_memory_limit(self, no_leaks: None) -> None:
        with (
            WasmtimeHost(Settings(slots=4, memory_limit="1MiB")) as host,
            host.prepare(GC_HEAP_FIRST).instantiate() as instance,
        ):
            assert instance.call("many", 10_000) == 10_000
            with pytest.raises(GuestTrap):
                instance.call("many", 10_000_000)

    @pytest.mark.parametrize("ends", ["statistics", "close"])
    def test_with_a_heap_that_could_not_be_unmapped_at_first(
        self, no_leaks: None, inject: Callable[..., None], calls: Any, ends: str
    ) -> None:
        with WasmtimeHost(Settings(slots=4)) as host:
            instance = host.prepare(GC_HEAP_FIRST).instantiate()
            inject("munmap", error=12)
            instance.close()
            with calls() as made:
                host.statistics() if ends == "statistics" else host.close()
            assert made["munmap"] >= 1

    def test_that_run_natively(self, host: WasmtimeHost) -> None:
        source = """(module (memory (export "m") i64 1) (data (i64.const 5) "far")
          (func (export "get") (param i64) (result i32) (i32.load8_u (local.get 0))))"""
        guest = host.prepare(source)
        assert guest.report.native is not None
        with guest.instantiate() as instance:
            assert instance.memory.read(5, 3) == b"far"
            assert instance.call("get", 5) == ord("f")
            assert instance.memory.grow(1) == 1
            assert instance.memory.byte_size == 2 * PAGE
            with pytest.raises(WasmtimeTrap):
                instance.call("get", 2 * PAGE)
            instance.reset()
            assert instance.memory.byte_size == PAGE
            assert in_use(host) == 0

    def test_with_shared_memory_as_wasmtime_alone(self, no_leaks: None) -> None:
        source = '(module (memory (export "m") 1 2 shared) (data (i32.const 0) "shared"))'
        with (
            WasmtimeHost(Settings(slots=2)) as host,
            pytest.raises(LinkError, match="shared memory support is disabled"),
        ):
            host.prepare(source).instantiate()

        def shared(config: wasmtime.Config) -> None:
            wasmtime_bridge.bindings.wasmtime_config_shared_memory_set(config.ptr(), True)

        with (
            WasmtimeHost(Settings(slots=2), configure=shared) as host,
            host.prepare(source).instantiate() as instance,
        ):
            assert instance.memory.read(0, 6) == b"shared"
            assert instance.memory.grow(1) == 1
            assert instance.memory.byte_size == 2 * PAGE

    @pytest.mark.parametrize(
        ("source", "said"),
        [
            (b"not wasm", "."),
            (b"\0asm\1\0\0\0\5\3", "."),
            (b"\0asm\x0d\0\1\0", "component"),
            ("(module (func (result i32)))", "expected"),
            ("(module (func", "."),
            (b"", "."),
        ],
    )
    def test_that_are_none(self, host: WasmtimeHost, source: Any, said: str) -> None:
        with pytest.raises(InvalidModule, match=said) as caught:
            host.prepare(source)
        assert "\n" not in str(caught.value)


class TestBareWasmtimeOnOurEngine:
    def test_gets_memories_from_the_hooks(self, host: WasmtimeHost) -> None:
        store = wasmtime.Store(host.engine)
        module = wasmtime.Module(host.engine, ECHO)
        instance = wasmtime.Instance(store, module, [])
        exports: Any = instance.exports(store)
        assert bytes(exports["memory"].read(store, 8, 13)) == b"hello"
        assert exports["grow"](store, 1) == 2
        exports["set"](store, 3 * PAGE - 1, 1)
        with pytest.raises(wasmtime.Trap):
            exports["get"](store, 3 * PAGE)
        assert in_use(host) == 1
        with pytest.raises(InUse):
            host.close()
        store.close()
        assert in_use(host) == 0

    def test_hears_why_there_is_none(self, no_leaks: None) -> None:
        with WasmtimeHost(Settings(slots=1)) as host:
            module = wasmtime.Module(host.engine, ECHO)
            with (
                host.prepare(ECHO).instantiate(),
                pytest.raises(wasmtime.WasmtimeError, match="PoolExhausted: all 1 slots"),
            ):
                wasmtime.Instance(wasmtime.Store(host.engine), module, [])
            engine = host.engine
        with pytest.raises(wasmtime.WasmtimeError, match="the host was closed"):
            wasmtime.Instance(wasmtime.Store(engine), module, [])

    def test_may_fail_to_grow_without_us(
        self, no_leaks: None, caplog: pytest.LogCaptureFixture
    ) -> None:
        clock = Clock(1 << 40)
        clock.raises = ValueError("no")
        with WasmtimeHost(Settings(slots=1), plugins=[clock]) as host:
            store = wasmtime.Store(host.engine)
            exports: Any = wasmtime.Instance(store, wasmtime.Module(host.engine, ECHO), []).exports(
                store
            )
            assert exports["grow"](store, 1) == -1
            store.close()
        assert "deciding about it failed" in caplog.text
        assert not wasmtime_bridge._kept


class TestConfiguration:
    def test_may_count_epochs(self, no_leaks: None) -> None:
        def configure(config: wasmtime.Config) -> None:
            config.epoch_interruption = True

        source = '(module (memory 1) (func (export "spin") (loop $again (br $again))))'
        with (
            WasmtimeHost(
                Settings(slots=2),
                configure=configure,
                configure_store=lambda store: store.set_epoch_deadline(1),
            ) as host,
            host.prepare(source).instantiate() as instance,
        ):
            timer = threading.Timer(0.05, host.increment_epoch)
            timer.start()
            with pytest.raises(wasmtime.Trap) as caught:
                instance.call("spin")
            assert caught.value.trap_code is wasmtime.TrapCode.INTERRUPT
            timer.join()

    def test_may_limit_a_store(self, no_leaks: None) -> None:
        with WasmtimeHost(
            Settings(slots=2), configure_store=lambda store: store.set_limits(memory_size=PAGE)
        ) as host:
            with pytest.raises(MemoryTooLarge, match="exceeds memory limits"):
                host.prepare(ECHO).instantiate()
            assert in_use(host) == 0

    def test_may_not_turn_off_what_memory_needs(self, no_leaks: None) -> None:
        def configure(config: wasmtime.Config) -> None:
            config.memory_init_cow = True  # with a creator and active data this ends the process
            config.memory_may_move = True
            config.wasm_gc = False

        with (
            WasmtimeHost(Settings(slots=2, image_limit=0), configure=configure) as host,
            host.prepare(ECHO).instantiate() as instance,
        ):
            assert instance.memory.read(8, 5) == b"hello"

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_refuses_a_pool_of_wasmtimes_own(self, child: Callable[..., Any], when: str) -> None:
        """In a process of its own: what such a combination does is wasmtime's to decide."""
        source = """
import wasmtime
from wasmtime import _bindings as b
from memslot_plugin.errors import Unsupported
from memslot_plugin.hosts.wasmtime import WasmtimeHost
from memslot_plugin.settings import Settings
def configure(config):
    pool = b.wasmtime_pooling_allocation_config_new()
    b.wasmtime_pooling_allocation_config_total_memories_set(pool, 4)
    b.wasmtime_pooling_allocation_strategy_set(config.ptr(), pool)
try:
    WasmtimeHost(Settings(slots=2), configure=configure)
except Unsupported as error:
    print(error)
"""
        assert "a pool of wasmtime's own" in child(source).stdout

    def test_names_what_an_unknown_wasmtime_lacks(self, child: Callable[..., Any]) -> None:
        source = """
from memslot_plugin.errors import HostUnavailable
from memslot_plugin.hosts import wasmtime_bridge
from memslot_plugin.hosts.wasmtime import WasmtimeHost
wasmtime_bridge._layout = lambda: [1, 2]
try:
    WasmtimeHost()
except HostUnavailable as error:
    print(error)
"""
        assert "lays its structures out as [1, 2]" in child(source).stdout


class TestWasi:
    def test_arguments_environment_and_folders(self, host: WasmtimeHost, tmp_path: Path) -> None:
        (tmp_path / "note.txt").write_text("inside\n")
        wasi = Wasi(
            arguments=("a", "b c"),
            environment={"KEY": "value"},
            preopened={"/data": str(tmp_path)},
            program="prog",
        )
        with host.prepare(WASI, wasi=wasi).instantiate() as instance:
            instance.call("arguments")
            assert instance.memory.read(2000, 11) == b"prog\0a\0b c\0"
            instance.call("environment")
            assert instance.memory.read(2000, 10) == b"KEY=value\0"
            assert instance.call("open", 3) == 0
            descriptor = int.from_bytes(instance.memory.read(400, 4), "little")
            instance.memory.write(0, (16).to_bytes(4, "little") + (7).to_bytes(4, "little"))
            assert instance.call("read", descriptor) == 0
            assert instance.memory.read(16, 7) == b"inside\n"

    def test_keeps_no_more_of_a_captured_stream_than_the_limit(self, host: WasmtimeHost) -> None:
        with host.prepare(WASI, wasi=Wasi(stdout="capture")).instantiate() as instance:
            instance.call("_start")
            whole = instance.stdout
        assert len(whole) > 3
        limited = Wasi(stdout="capture", capture_limit=3)
        with host.prepare(WASI, wasi=limited).instantiate() as instance:
            instance.call("_start")
            assert instance.stdout == whole[:3]

    def test_captures_what_is_written(self, host: WasmtimeHost) -> None:
        guest = host.prepare(WASI, wasi=Wasi(stdout="capture", stderr="capture"))
        with guest.instantiate() as instance:
            assert instance.stdout == b""
            instance.call("_start")
            assert (instance.stdout, instance.stderr) == (b"hello\n", b"")
            assert instance.call("write", 2) == 0
            instance.memory.write(16, b"again!")
            assert instance.call("write", 1) == 0
            assert (instance.stdout, instance.stderr) == (b"hello\nagain!", b"hello\n")
            instance.reset()
            assert (instance.stdout, instance.stderr) == (b"", b"")

    def test_discards_and_has_nothing_to_read(self, host: WasmtimeHost) -> None:
        with host.prepare(WASI, wasi=Wasi(stdout="discard")).instantiate() as instance:
            assert instance.call("write", 1) == 0
            assert instance.stdout == b""
            assert instance.call("read", 0) == 0
            assert int.from_bytes(instance.memory.read(100, 4), "little") == 0

    def test_inherits_in_order(self) -> None:
        source = f"""
import sys
from memslot_plugin.hosts.wasmtime import WasmtimeHost
with WasmtimeHost() as host, host.prepare({WASI!r}).instantiate() as instance:
    for number in range(3):
        print("python", number, flush=True)
        instance.call("_start")
"""
        done = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout == "".join(f"python {number}\nhello\n" for number in range(3))

    @pytest.mark.parametrize("status", [0, 1, 3])
    def test_exits(self, host: WasmtimeHost, status: int) -> None:
        with host.prepare(WASI, wasi=Wasi(stdout="capture")).instantiate() as instance:
            instance.call("_start")
            for kind in (GuestExit, wasmtime.ExitTrap):
                with pytest.raises(kind) as caught:
                    instance.call("exit", status)
                assert vars(caught.value)["code"] == status
            assert instance.stdout == b"hello\n"

    def test_names_a_missing_folder(self, host: WasmtimeHost, tmp_path: Path) -> None:
        guest = host.prepare(WASI, wasi=Wasi(preopened={"/data": str(tmp_path / "none")}))
        with pytest.raises(SettingError, match=r"'/data' = .*none.* there is no such folder"):
            guest.instantiate()
        assert in_use(host) == 0

    def test_is_not_for_those_who_bring_their_own(self, host: WasmtimeHost) -> None:
        source = """(module (import "wasi_snapshot_preview1" "proc_exit" (func $e (param i32)))
          (memory 1) (func (export "f") (call $e (i32.const 7))))"""
        seen: list[int] = []
        guest = host.prepare(source, imports={"wasi_snapshot_preview1": {"proc_exit": seen.append}})
        with guest.instantiate() as instance:
            instance.call("f")
        assert seen == [7]

    def test_is_not_the_older_one(self, host: WasmtimeHost) -> None:
        source = '(module (import "wasi_unstable" "proc_exit" (func (param i32))) (memory 1))'
        with pytest.raises(LinkError, match="an older WASI than wasmtime has"):
            host.prepare(source).instantiate()


class TestThreads:
    def test_instantiate_and_call_at_once(self, host: WasmtimeHost) -> None:
        guest = host.prepare(ECHO)
        other = host.prepare(CALLS_OUT, imports={"env": {"f": lambda number: number + 1}})
        failures: list[BaseException] = []
        gate = threading.Barrier(4)

        def work(number: int) -> None:
            try:
                gate.wait()
                for _ in range(300):
                    with guest.instantiate() as instance, other.instantiate() as second:
                        assert instance.memory.read(8, 5) == b"hello"
                        instance.memory.write(8, bytes([number] * 5))
                        assert second.call("run", number) == number + 1
                        assert instance.call("grow", 1) == 2
                        assert instance.call("get", 9) == number
                        with pytest.raises(WasmtimeTrap):
                            instance.call("trap")
            except BaseException as error:  # noqa: BLE001 - handed to the thread that asserts
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert in_use(host) == 0

    def test_run_guests_in_parallel(self, host: WasmtimeHost) -> None:
        """A call lets other threads run: Python works while a guest does."""
        inside, go_on = threading.Event(), threading.Event()
        source = """(module (memory (export "memory") 1) (func (export "wait")
          (loop $again (br_if $again (i32.eqz (i32.load (i32.const 0)))))))"""
        with host.prepare(source).instantiate() as instance:
            done: list[Any] = []

            def call() -> None:
                inside.set()
                done.append(instance.call("wait"))

            thread = threading.Thread(target=call)
            thread.start()
            inside.wait()
            while not instance._live().running:
                time.sleep(0.001)
            with pytest.raises(InUse, match="another thread is inside"):
                instance.call("wait")
            with pytest.raises(InUse):
                instance.close()
            with pytest.raises(InUse):
                instance.reset()
            instance.memory.write(0, b"\1")
            thread.join()
            assert done == [None]
            go_on.set()

    def test_may_end_it_in_the_last_moment(self, host: WasmtimeHost) -> None:
        """What is ended during a call ends when the call returns, and not under it."""
        guest = host.prepare(CALLS_OUT)
        live: Any = None

        def end(number: int) -> int:
            assert live.dispose() is False
            assert in_use(host) == 1
            return number

        instance = guest.instantiate(imports={"env": {"f": end}})
        live = instance._live()
        host._live.discard(live)
        assert live.function("run")(5) == 5
        assert in_use(host) == 0
        assert not host._retained
        assert not host._groups
        with pytest.raises(UsedAfterClose):
            live.function("run")(5)


class TestTheHost:
    def test_may_be_forgotten_at_the_end_of_the_process(self, child: Callable[..., Any]) -> None:
        source = f"""
import atexit, threading, wasmtime
from memslot_plugin.hosts.wasmtime import WasmtimeHost
host = WasmtimeHost()
guest = host.prepare({ECHO!r})
kept = [guest.instantiate() for _ in range(3)]
store = wasmtime.Store(host.engine)
borrowed = guest.instantiate(store=store)
bare = wasmtime.Instance(store, wasmtime.Module(host.engine, {ECHO!r}), [])
native = kept[0].native
print(kept[0].call("next"))
"""
        assert child(source).stdout == "6\n"

    def test_serves_a_forked_child(self, host: WasmtimeHost) -> None:
        guest = host.prepare(ECHO)
        with guest.instantiate() as instance:
            instance.call("set", 8, 72)
            process = os.fork()
            if process == 0:
                status = 1
                with contextlib.suppress(BaseException):
                    with guest.instantiate() as other:
                        same = instance.memory.read(8, 5) == b"Hello" and other.call(
                            "get", 8
                        ) == ord("h")
                        instance.call("set", 8, 0)
                    with contextlib.suppress(GuestTrap):
                        other = guest.instantiate()
                        other.call("trap")
                        same = False
                    status = 0 if same else 2
                os._exit(status)
            assert os.waitpid(process, 0)[1] == 0
            assert instance.memory.read(8, 5) == b"Hello"

    def test_does_not_close_under_live_instances(self, host: WasmtimeHost) -> None:
        instance = host.prepare(ECHO).instantiate()
        with pytest.raises(InUse, match="1 live instances"):
            host.close()
        assert instance.call("next") == 6
        host.close(force=True)
        host.close()
        for use in (
            lambda: instance.call("next"),
            lambda: host.prepare(ECHO),
            lambda: host.engine,
            host.statistics,
        ):
            with pytest.raises(UsedAfterClose):
                use()

    def test_is_what_auto_opens(self) -> None:
        with open_host("auto", slots=2) as host:
            assert isinstance(host, WasmtimeHost)

    def test_serves_on_after_exhaustion(self, no_leaks: None) -> None:
        with WasmtimeHost(Settings(slots=2)) as host:
            guest = host.prepare(ECHO)
            kept = [guest.instantiate() for _ in range(2)]
            with pytest.raises(PoolExhausted):
                guest.instantiate()
            kept.pop().close()
            with guest.instantiate() as instance:
                assert instance.call("next") == 6
            kept.pop().close()

    def test_gives_everything_back_when_a_release_fails(
        self, no_leaks: None, inject: Callable[..., None]
    ) -> None:
        with WasmtimeHost(Settings(slots=2, reset="madvise")) as host:
            guest = host.prepare(ECHO)
            instance = guest.instantiate()
            inject("madvise", error=12)
            with pytest.raises(MemslotError):
                instance.close()
            assert in_use(host) == 0
            with guest.instantiate() as instance:
                assert instance.memory.read(8, 5) == b"hello"

    @pytest.mark.parametrize("wasi", [False, True])
    def test_stays_flat(self, no_leaks: None, wasi: bool) -> None:
        """5,000 instances leave descriptors, mappings, memory and Python objects as they were."""

        def serve(count: int) -> None:
            for number in range(count):
                with guest.instantiate() as instance:
                    if wasi:
                        instance.call("_start")
                        assert instance.stdout == b"hello\n"
                        continue
                    instance.call("set", number % PAGE, 1)
                    instance.call("grow", 1)
                    if number % 50 == 0:
                        with pytest.raises(WasmtimeTrap):
                            instance.call("trap")
                    if number % 70 == 0:
                        instance.native.exports(instance.native.store)

        def measured() -> tuple[int, int, int, int]:
            gc.collect()
            mappings = len(Path("/proc/self/maps").read_bytes().splitlines())
            return (
                len(list(Path("/proc/self/fd").iterdir())),
                mappings,
                count_objects(),
                status_bytes("VmRSS"),
            )

        with WasmtimeHost(Settings(slots=4)) as host:
            guest = host.prepare(WASI if wasi else ECHO, wasi=Wasi(stdout="capture"))
            serve(1000)
            before = measured()
            serve(5000)
            after = measured()
        assert after[0] == before[0]
        assert abs(after[1] - before[1]) <= 4
        assert abs(after[2] - before[2]) < 200
        assert after[3] - before[3] < 2 * 1024 * 1024
        assert not host._groups
        assert not host._retained


def test_every_foreign_class_is_known(host: WasmtimeHost) -> None:
    """Whatever wasmtime-py can raise leaves the boundary as ours; a host function's own goes through."""
    from memslot_plugin.hosts.wasmtime_errors import translated

    foreign = [
        value
        for value in vars(wasmtime).values()
        if isinstance(value, type) and issubclass(value, BaseException)
    ]
    assert {each.__name__ for each in foreign} == {"Trap", "WasmtimeError", "ExitTrap"}
    exited = wasmtime.ExitTrap.__new__(wasmtime.ExitTrap)
    exited.code = 4
    native: BaseException
    for native in (wasmtime.Trap("t"), wasmtime.WasmtimeError("e"), exited):
        ours = translated(native, "guest")
        assert issubclass(type(ours), MemslotError)
        assert issubclass(type(ours), type(native))
        assert vars(ours)["native"] is native
    for native in (ValueError("x"), TypeError("x"), KeyboardInterrupt()):
        assert translated(native, "guest") is native


def test_the_bridge_names_no_symbol_twice() -> None:
    names = []
    for index in itertools.count():
        symbol = lib.ms_wt_symbol(index)
        if symbol == ffi.NULL:
            break
        names.append(ffi.string(symbol))
    assert len(names) == len(set(names)) > 20
