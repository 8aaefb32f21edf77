"""wasmer-python: what a guest computes, what a slot costs, and every way in which it goes wrong."""

from __future__ import annotations

import functools
import gc
import inspect
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from memslot_hooks import hookimpl
from memslot_plugin._core import counters
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
    SystemCallError,
    Unsupported,
    UsedAfterClose,
    WrongThread,
)
from memslot_plugin.hosts import Wasi, open_host
from memslot_plugin.settings import Settings
from memslot_plugin.smaps import mappings, status_bytes
from memslot_plugin.tests.patience import attempts, count_objects

try:
    import wasmer
    from wasmer_compiler_cranelift import Compiler

    from memslot_plugin.hosts import wasmer_errors
    from memslot_plugin.hosts.wasmer import WasmerHost
    from memslot_plugin.hosts.wasmer_runtime import address_of, reserved_bytes
except (ImportError, HostUnavailable) as missing:
    if sys.version_info < (3, 11):
        raise  # it should be here: a leg that should exist and does not run fails
    pytest.skip(
        f"impossible: wasmer 1.1.0 has no build for CPython 3.11 and later ({missing})",
        allow_module_level=True,
    )

PAGE = 65536

ECHO = """(module
  (memory (export "memory") 2 4)
  (global $count (export "count") (mut i32) (i32.const 5))
  (global (export "fixed") i64 (i64.const 7))
  (data (i32.const 8) "hello")
  (func (export "get") (param i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "set") (param i32 i32) (i32.store8 (local.get 0) (local.get 1)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "size") (result i32) (memory.size))
  (func (export "next") (result i32)
    (global.set $count (i32.add (global.get $count) (i32.const 1))) (global.get $count))
  (func (export "pair") (result i32 i64) (i32.const 1) (i64.const 2))
  (func (export "add") (param i32 i64 f32 f64) (result f64) (local.get 3))
  (func (export "trap") unreachable)
  (func (export "divide") (param i32 i32) (result i32) (i32.div_s (local.get 0) (local.get 1)))
  (func $recurse (export "recurse") (call $recurse)))"""

CALLS_OUT = """(module
  (import "env" "f" (func $f (param i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "run") (param i32) (result i32) (call $f (local.get 0)))
  (func (export "grow_then_run") (param i32) (result i32)
    (drop (memory.grow (i32.const 1))) (call $f (local.get 0))))"""

WASI = """(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_pread" (func $pread (param i32 i32 i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_pwrite" (func $pwrite (param i32 i32 i32 i64 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_renumber" (func $renumber (param i32 i32) (result i32)))
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
  (func (export "write") (param i32 i32 i32 i32) (result i32)
    (call $write (local.get 0) (local.get 1) (local.get 2) (local.get 3)))
  (func (export "read") (param i32) (result i32)
    (call $read (local.get 0) (i32.const 0) (i32.const 1) (i32.const 100)))
  (func (export "pread") (param i32) (result i32)
    (call $pread (local.get 0) (i32.const 0) (i32.const 1) (i64.const 0) (i32.const 100)))
  (func (export "pwrite") (param i32) (result i32)
    (call $pwrite (local.get 0) (i32.const 0) (i32.const 1) (i64.const 0) (i32.const 100)))
  (func (export "renumber") (param i32 i32) (result i32)
    (call $renumber (local.get 0) (local.get 1)))
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


@pytest.fixture
def host(no_leaks: None) -> Iterator[WasmerHost]:
    with WasmerHost(Settings(slots=8)) as opened:
        yield opened
        for pool in opened.statistics().pools:
            assert pool.failed_resets == 0


def check_slots(host: WasmerHost) -> None:
    """Every slot is what its state says."""
    for _, plugin in host.plugins.manager.list_name_plugin():
        pool = getattr(plugin, "pool", None)
        if pool is not None:
            pool.check()


def descriptors() -> int:
    """How many descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def python(source: str, given: str = "") -> None:
    """Run `source` in a process of its own; it has to end well."""
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, input=given, check=False)
    assert done.returncode == 0, done.stderr


def in_use(host: WasmerHost) -> int:
    return sum(pool.in_use for pool in host.statistics().pools)


def destroyed(host: WasmerHost) -> int:
    return sum(pool.destroyed for pool in host.statistics().pools)


class TestAnInstance:
    def test_runs_on_its_image(self, host: WasmerHost) -> None:
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
            assert instance.call("add", -1, 2**63, 1.5, 2.5) == 2.5
            assert isinstance(instance.native, wasmer.Instance)

    def test_leaves_nothing_to_the_next(self, host: WasmerHost) -> None:
        guest = host.prepare(ECHO)
        bases = set()
        for _ in range(3):
            with guest.instantiate() as instance:
                bases.add(instance.memories[0]._instance._live().locate(0)[0])
                assert instance.memory.read(0, 16) == b"\0" * 8 + b"hello\0\0\0"
                assert instance.call("next") == 6
                instance.memory.write(0, b"\xff" * 16)
                instance.memory.write(2 * PAGE - 1, b"\xff")
            check_slots(host)
        assert len(bases) == 1

    def test_keeps_its_handle_over_a_reset(self, host: WasmerHost) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            instance.call("next")
            instance.call("set", 8, 0)
            assert instance.call("grow", 1) == 2
            stale = instance.function("get")
            instance.reset()
            assert instance.memory.read(8, 5) == b"hello"
            assert instance.call("next") == 6
            with pytest.raises(UsedAfterClose):
                stale(8)
            check_slots(host)
        assert host.statistics().resets == 1

    def test_has_globals_and_exports(self, host: WasmerHost) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            assert instance.global_value("count") == 5
            instance.set_global("count", 41)
            assert instance.call("next") == 42
            assert instance.exports["memory"] == "memory"
            assert instance.exports["fixed"] == "global"
            assert instance.exports["get"] == "func"
            with pytest.raises(ArgumentError, match="not mutable"):
                instance.set_global("fixed", 1)
            for wrong in ("x", 2**64):
                with pytest.raises(ArgumentError):
                    instance.set_global("count", wrong)

    def test_finds_exports_that_python_shadows(self, host: WasmerHost) -> None:
        text = """(module (func (export "__class__") (result i32) (i32.const 3))
                          (func (export "__len__") (result i32) (i32.const 4))
                          (func (export "") (result i32) (i32.const 5)))"""
        with host.prepare(text).instantiate() as instance:
            assert [instance.call(name) for name in ("__class__", "__len__", "")] == [3, 4, 5]

    def test_says_what_it_does_not_export(self, host: WasmerHost) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            with pytest.raises(ExportNotFound, match="nothing of that name"):
                instance.call("nope")
            with pytest.raises(ExportNotFound, match="a global of that name"):
                instance.call("count")
            with pytest.raises(ExportNotFound):
                instance.global_value("get")
            with pytest.raises(ExportNotFound):
                instance.set_global("nope", 1)

    @pytest.mark.parametrize(
        "arguments",
        [
            (),
            (1,),
            (1, 2, 3.0, 4.0, 5),
            ("x", 2, 3.0, 4.0),
            (1.5, 2, 3.0, 4.0),
            (None, 2, 3.0, 4.0),
            (2**32, 2, 3.0, 4.0),
            (-(2**31) - 1, 2, 3.0, 4.0),
            (1, 2**64, 3.0, 4.0),
            (1, 2, 3, 4.0),
            (1, 2, 3.0, ""),
        ],
    )
    def test_refuses_arguments_that_do_not_fit(self, host: WasmerHost, arguments: Any) -> None:
        with host.prepare(ECHO).instantiate() as instance, pytest.raises(ArgumentError):
            instance.call("add", *arguments)

    def test_with_references_is_refused_before_wasmer_panics(self, host: WasmerHost) -> None:
        text = """(module (func (export "f") (param externref) (result externref) (local.get 0))
                          (func (export "g") (result funcref) (ref.null func))
                          (global (export "r") (mut externref) (ref.null extern)))"""
        with host.prepare(text).instantiate() as instance:
            for name in ("f", "g"):
                with pytest.raises(Unsupported, match="references"):
                    instance.call(name, *([None] if name == "f" else []))
            with pytest.raises(Unsupported, match="reference"):
                instance.global_value("r")

    def test_with_vectors(self, host: WasmerHost) -> None:
        text = '(module (func (export "f") (param v128) (result v128) (local.get 0)))'
        with host.prepare(text).instantiate() as instance:
            assert instance.call("f", 2**127 + 5) == 2**127 + 5

    def test_is_given_back_when_its_handle_is_dropped(self, host: WasmerHost) -> None:
        guest = host.prepare(ECHO)
        instance = guest.instantiate()
        function = instance.function("get")
        del instance
        assert in_use(host) == 0
        with pytest.raises(UsedAfterClose):
            function(0)

    def test_cannot_end_while_it_runs(self, host: WasmerHost) -> None:
        raised: list[InUse] = []

        def close(_: int) -> int:
            for attempt in (instance.close, instance.reset, lambda: host.close(force=True)):
                try:
                    attempt()
                except InUse as error:
                    raised.append(error)
            return instance.memory.byte_size

        instance = host.prepare(CALLS_OUT, imports={"env": {"f": close}}).instantiate()
        assert instance.call("run", 0) == PAGE
        assert len(raised) == 3
        assert not instance.closed
        instance.close()

    def test_whose_handle_was_dropped_goes_on_until_its_call_returns(
        self, host: WasmerHost
    ) -> None:
        def count(_: int) -> int:
            return in_use(host)

        function = (
            host.prepare(CALLS_OUT, imports={"env": {"f": count}}).instantiate().function("run")
        )
        gc.collect()
        assert function(0) == 1
        assert in_use(host) == 0


class TestASlot:
    def test_costs_nothing_to_lease_again(self, host: WasmerHost) -> None:
        guest = host.prepare(ECHO)
        guest.instantiate().close()
        before = counters()
        for _ in range(5):
            with guest.instantiate() as instance:
                instance.call("set", 0, 1)
        made = {name: n - before[name] for name, n in counters().items() if n != before[name]}
        assert made.keys() <= {"pagemap_scan", "madvise"}

    def test_is_remapped_for_another_guest_of_its_shape(self, no_leaks: None) -> None:
        empty = ECHO.replace('(data (i32.const 8) "hello")', "")
        with WasmerHost(Settings(slots=1)) as small:
            guests = [small.prepare(text) for text in (ECHO, ECHO.replace("hello", "world"), empty)]
            for _ in range(2):
                for guest, seen in zip(guests, (b"hello", b"world", b"\0" * 5), strict=True):
                    with guest.instantiate() as instance:
                        assert instance.memory.read(8, 5) == seen
                        assert instance.call("get", 8) == seen[0]
                        instance.memory.write(0, b"\xff" * 32)
                    check_slots(small)
            assert sum(pool.created for pool in small.statistics().pools) == 1

    def test_of_another_shape_takes_the_place_of_an_idle_one(self, no_leaks: None) -> None:
        with WasmerHost(Settings(slots=1)) as host:
            one, two = host.prepare(ECHO), host.prepare(ECHO.replace("2 4", "3 4"))
            for guest, size in ((one, 2), (two, 3), (one, 2)):
                with guest.instantiate() as instance:
                    assert instance.call("size") == size
            check_slots(host)

    def test_is_as_large_as_wasmer_makes_it(self, host: WasmerHost) -> None:
        assert reserved_bytes() == 6 << 30
        with host.prepare(ECHO).instantiate() as instance:
            base, size = instance._live().locate(0)
            inside = [
                (mapping.start - base, mapping.permissions)
                for mapping in mappings(base, base + reserved_bytes())
            ]
            assert sum(permissions == "---p" for _, permissions in inside) == 1
            assert inside[-1][0] == size

    def test_exhausts(self, host: WasmerHost) -> None:
        guest = host.prepare(ECHO)
        instances = [guest.instantiate() for _ in range(8)]
        with pytest.raises(PoolExhausted) as caught:
            guest.instantiate()
        assert (caught.value.limit, caught.value.in_use) == (8, 8)
        instances.pop().close()
        guest.instantiate().close()
        for instance in instances:
            instance.close()
            instance.close()
        assert in_use(host) == 0

    def test_needs_address_space(self, no_leaks: None) -> None:
        source = f"""
import resource
from memslot_plugin.errors import SystemCallError
from memslot_plugin.hosts.wasmer import WasmerHost
host = WasmerHost()
guest = host.prepare({ECHO!r})
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
try:
    guest.instantiate()
except SystemCallError as error:
    assert "RLIMIT_AS" in str(error), error
else:
    raise SystemExit("no error")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with guest.instantiate() as instance:
    assert instance.memory.read(8, 5) == b"hello"
host.close()
"""
        python(source)

    def test_survives_many_cycles_without_growing(self, host: WasmerHost) -> None:
        guest = host.prepare(CALLS_OUT, imports={"env": {"f": lambda value: value}})
        plain = host.prepare(ECHO)

        def cycle(times: int) -> None:
            for number in range(times):
                with guest.instantiate() as instance:
                    instance.call("run", 3)
                with plain.instantiate() as instance:
                    instance.call("set", 0, 1)
                    if number % 50 == 0:
                        instance.call("grow", 1)

        cycle(500)
        gc.collect()
        before = (
            descriptors(),
            sum(1 for _ in mappings(0, 1 << 64)),
            status_bytes("VmRSS"),
            count_objects(),
        )
        cycle(2500)
        gc.collect()
        assert descriptors() == before[0]
        assert abs(sum(1 for _ in mappings(0, 1 << 64)) - before[1]) <= 8
        assert status_bytes("VmRSS") - before[2] < 2 << 20
        assert count_objects() - before[3] < 500


class TestGrowth:
    def test_is_reported_and_the_slot_retired(self, host: WasmerHost) -> None:
        reported: list[tuple[int, int]] = []

        class Watcher:
            @hookimpl(tryfirst=True)
            def memslot_grow_memory(self, memory: Any, byte_size: int) -> None:
                reported.append((memory.byte_size, byte_size))

        host.plugins.register(Watcher())
        guest = host.prepare(ECHO)
        with guest.instantiate() as instance:
            base = instance._live().locate(0)[0]
            assert instance.call("grow", 1) == 2
            assert reported == [(2 * PAGE, 3 * PAGE)]
            assert instance.memory.byte_size == 3 * PAGE
            instance.memory.write(3 * PAGE - 1, b"\xff")
            assert instance.memory.grow(1) == 3
            assert reported[1:] == [(3 * PAGE, 4 * PAGE)]
            assert (
                instance._live().locate(0)[0] == base == address_of(instance.native.exports.memory)
            )
            assert instance.call("grow", 1) == -1
            with pytest.raises(GrowthRefused):
                instance.memory.grow(1)
            wrong: Any
            for wrong in (-1, "x", 2**40):
                with pytest.raises(ArgumentError):
                    instance.memory.grow(wrong)
            assert instance.call("size") == 4
            check_slots(host)
        assert destroyed(host) == 1
        with guest.instantiate() as instance:
            assert instance.call("size") == 2
            assert instance.call("grow", 2) == 2
            assert instance.memory.read(2 * PAGE, 2 * PAGE) == bytes(2 * PAGE)
        check_slots(host)

    def test_is_undone_by_a_reset(self, host: WasmerHost) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            instance.call("grow", 1)
            instance.memory.write(0, b"\xff" * 3 * PAGE)
            instance.reset()
            assert instance.call("size") == 2
            assert instance.memory.read(8, 5) == b"hello"
            check_slots(host)

    def test_stops_at_the_memory_limit(self, no_leaks: None) -> None:
        with WasmerHost(Settings(slots=2, memory_limit=3 * PAGE + 5)) as host:
            with host.prepare(ECHO).instantiate() as instance:
                assert instance.call("grow", 2) == -1
                assert instance.call("grow", 1) == 2
                assert instance.call("grow", 1) == -1
            with host.prepare(
                '(module (memory 1) (func (export "g") (result i32) (memory.grow (i32.const 3))))'
            ).instantiate() as instance:
                assert instance.call("g") == -1
            with pytest.raises(MemoryTooLarge):
                host.prepare("(module (memory 4))")

    def test_is_seen_inside_a_call(self, host: WasmerHost) -> None:
        def size(_: int) -> int:
            return instance.memory.byte_size // PAGE

        guest = host.prepare(CALLS_OUT, imports={"env": {"f": size}})
        instance = guest.instantiate()
        assert instance.call("grow_then_run", 0) == 2
        instance.close()
        assert destroyed(host) == 1

    def test_by_the_native_handle_is_found_at_release(self, host: WasmerHost) -> None:
        guest = host.prepare('(module (memory (export "memory") 1 4))')
        instance = guest.instantiate()
        instance.native.exports.memory.grow(1)
        instance.memory.write(PAGE, b"secret")
        instance.close()
        assert destroyed(host) == 1
        with guest.instantiate() as instance:
            assert instance.memory.grow(1) == 1
            assert instance.memory.read(PAGE, 6) == bytes(6)

    @pytest.mark.parametrize("answer", [False, ValueError("no")])
    def test_that_a_plugin_dislikes_still_retires_the_slot(
        self, host: WasmerHost, answer: Any
    ) -> None:
        class Limit:
            @hookimpl(tryfirst=True)
            def memslot_grow_memory(self, memory: Any, byte_size: int) -> bool:
                if isinstance(answer, Exception):
                    raise answer
                return False

        host.plugins.register(Limit())
        guest = host.prepare(ECHO)
        instance = guest.instantiate()
        if isinstance(answer, Exception):
            with pytest.raises(ValueError, match="no"):
                instance.call("grow", 1)
        else:
            assert instance.call("grow", 1) == 2
        instance.memory.write(2 * PAGE, b"secret")
        instance.close()
        host.plugins.unregister("Limit")
        with guest.instantiate() as instance:
            assert instance.call("grow", 1) == 2
            assert instance.memory.read(2 * PAGE, 6) == bytes(6)

    def test_in_a_start_function_that_fails_retires_the_slot(self, host: WasmerHost) -> None:
        text = """(module (memory (export "memory") 1) (global (export "g") (mut i32) (i32.const 0))
            (func $s (drop (memory.grow (i32.const 1))) (i32.store (i32.const 65536) (i32.const 9))
            unreachable) (start $s))"""
        with pytest.raises(GuestTrap, match="unreachable"):
            host.prepare(text).instantiate()
        assert (in_use(host), destroyed(host)) == (0, 1)


class TestErrors:
    def test_of_the_guest_are_traps(self, host: WasmerHost) -> None:
        with host.prepare(ECHO).instantiate() as instance:
            for name, arguments, text in (
                ("trap", (), "unreachable"),
                ("divide", (1, 0), "integer divide by zero"),
                ("get", (2 * PAGE,), "out of bounds memory access"),
                ("get", (-1,), "out of bounds memory access"),
                ("recurse", (), "call stack exhausted"),
            ):
                with pytest.raises(GuestTrap, match=text) as caught:
                    instance.call(name, *arguments)
                assert isinstance(caught.value, RuntimeError)
                assert type(caught.value.native) is RuntimeError
                assert caught.value.__cause__ is caught.value.native
            assert instance.call("get", 2 * PAGE - 1) == 0

    def test_do_not_keep_the_instance_alive(self, host: WasmerHost) -> None:
        guest = host.prepare(CALLS_OUT, imports={"env": {"f": {}.__getitem__}})
        gc.collect()
        gc.disable()
        try:
            instance = guest.instantiate()
            alive = weakref.ref(instance._live())
            with pytest.raises(ArgumentError):
                instance.call("run", "x")
            with pytest.raises(KeyError):
                instance.call("run", 1)
            instance.close()
            del instance
            assert alive() is None
        finally:
            gc.enable()

    def test_do_not_keep_the_host_alive(self) -> None:
        """Or else the garbage collector ends it and its code together, on any thread, where nobody closed either."""
        host = WasmerHost(Settings(slots=2))
        guest = host.prepare(ECHO)
        gc.collect()
        gc.disable()
        try:
            with guest.instantiate() as instance:
                instance.call("get", 0)
            alive = weakref.ref(host), weakref.ref(guest.compiled)
            del instance, guest, host
            assert [each() for each in alive] == [None, None]
        finally:
            gc.enable()

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("RuntimeError: unreachable"),
            TypeError("x"),
            OverflowError("x"),
            KeyboardInterrupt(),
            SystemExit(3),
            GuestTrap("mine"),
            ValueError("x"),
            RecursionError("x"),
        ],
    )
    def test_of_host_functions_come_through_as_they_are(
        self, host: WasmerHost, error: BaseException
    ) -> None:
        def fail(_: int) -> int:
            raise error

        class Function:
            def __call__(self, _: int) -> int:
                raise error

            def method(self, _: int) -> int:
                raise error

        for function in (fail, Function(), Function().method):
            with host.prepare(
                CALLS_OUT, imports={"env": {"f": function}}
            ).instantiate() as instance:
                with pytest.raises(type(error)) as caught:
                    instance.call("run", 1)
                assert caught.value is error

    def test_of_builtin_host_functions_come_through_as_they_are(self, host: WasmerHost) -> None:
        expected: type[Exception]
        function: Callable[..., Any]
        for function, expected in (
            ([].pop, IndexError),
            (threading.Lock().release, TypeError),
            ({}.__getitem__, KeyError),
            (functools.partial(threading.Lock().__exit__, None, None), RuntimeError),
        ):
            with host.prepare(
                CALLS_OUT, imports={"env": {"f": function}}
            ).instantiate() as instance:
                with pytest.raises(expected) as caught:
                    instance.call("run", 1)
                assert not isinstance(caught.value, MemslotError)

    @pytest.mark.parametrize("result", ["x", 1.5, None, 2**40])
    def test_of_a_host_functions_result_name_it(self, host: WasmerHost, result: Any) -> None:
        imports = {"env": {"f": lambda _: result}}
        with host.prepare(CALLS_OUT, imports=imports).instantiate() as instance:
            with pytest.raises(LinkError, match="host function"):
                instance.call("run", 1)
            with pytest.raises(ArgumentError):
                instance.call("run", "x")

    def test_of_a_module_say_that_wasmer_refuses_it(self, host: WasmerHost) -> None:
        assert wasmer.wat2wasm("(module)") == b"\0asm\1\0\0\0"
        for source in (
            b"hello",
            b"",
            b"\0asm\1\0\0\0\1",
            b"\0asm\x0d\0\1\0",
            b"(module)",
            "(module (func (i32.foo)))",
            "(module (memory 1) (memory 1))",
            "(module (memory 1 2 shared))",
            "(module (memory i64 1))",
            '(module (func (export "f") (result i32)))',
            bytes(wasmer.wat2wasm(ECHO))[:-3],
        ):
            with pytest.raises(InvalidModule):
                host.prepare(source)
        assert host.statistics().guests == 0

    def test_of_a_module_that_the_compiler_panics_at_are_its_own(self, host: WasmerHost) -> None:
        """wasmer's engine is locked for good by a panic; the module is valid, and has a tag."""
        guest = host.prepare(ECHO)
        hostile = b"\0asm\1\0\0\0" + b"\1\4\1\x60\0\0" + b"\x0d\3\1\0\0"
        for _ in range(2):
            with pytest.raises(InvalidModule, match="wasmer refuses module: "):
                host.prepare(hostile)
        for each in (guest, host.prepare(ECHO)):
            with each.instantiate():
                pass
        assert in_use(host) == 0

    def test_of_linking_name_the_import(self, host: WasmerHost) -> None:
        other = wasmer.FunctionType([wasmer.Type.I64], [wasmer.Type.I32])
        for imports, text in (
            ({}, r"env\.f, a func \(i32\) -> \(i32\).*nothing was given"),
            ({"env": {"g": int}}, r"env\.f.*nothing was given"),
            ({"env": {"f": 3}}, r"env\.f.*3 was given"),
            ({"env": {"f": wasmer.Global(host.store, wasmer.Value.i32(1))}}, r"env\.f.*was given"),
            ({"env": {"f": wasmer.Function(host.store, int, other)}}, r"env\.f.*incompatible"),
        ):
            guest = host.prepare(CALLS_OUT, imports=imports)
            with pytest.raises(LinkError, match=text):
                guest.instantiate()
            assert in_use(host) == 0
            with guest.instantiate(imports={"env": {"f": abs}}) as instance:
                assert instance.call("run", -3) == 3

    def test_of_a_start_function_leave_the_slot_in_the_pool(self, host: WasmerHost) -> None:
        text = """(module (import "env" "f" (func $f)) (memory 1) (data (i32.const 0) "x")
            (func $s (i32.store (i32.const 0) (i32.const 9)) (call $f)) (start $s)
            (func (export "get") (result i32) (i32.load8_u (i32.const 0))))"""
        error = RuntimeError("mine")

        def fail() -> None:
            raise error

        guest = host.prepare(text, imports={"env": {"f": fail}})
        for _ in range(3):
            with pytest.raises(RuntimeError) as caught:
                guest.instantiate()
            assert caught.value is error
        assert in_use(host) == 0
        with guest.instantiate(imports={"env": {"f": lambda: None}}) as instance:
            assert instance.call("get") == 9
            with pytest.raises(LinkError):
                guest.instantiate(imports={})
        assert in_use(host) == 0
        check_slots(host)

    def test_of_every_foreign_class_are_mapped(self) -> None:
        """Whatever class wasmer raises, by its own documentation, is in the boundary's list."""
        listed = inspect.getdoc(wasmer_errors)
        assert listed is not None
        panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
        for error, at_call in (
            (RuntimeError("RuntimeError: unreachable"), GuestTrap),
            (RuntimeError("RuntimeError: WASI exited with code: 7"), GuestExit),
            (RuntimeError("RuntimeError: Dynamic function returned wrong signature."), LinkError),
            (TypeError("'str' object cannot be converted to 'PyLong'"), ArgumentError),
            (OverflowError("out of range integral type conversion attempted"), ArgumentError),
            (panic("wasmer::instance::Instance is unsendable, but sent"), WrongThread),
            (panic("not implemented"), Unsupported),
        ):
            name = type(error).__name__
            assert name in listed
            assert wasmer_errors.made_by_wasmer(error)
            mapped = wasmer_errors.at_call(error, "f", host_function_is_wrong=False)
            assert type(mapped) is at_call
            assert isinstance(wasmer_errors.at_compile(error, "m"), InvalidModule)
        for text, at_instantiate in (
            ('Error while importing "a"."b": unknown import.', LinkError),
            ("Host env initialization error: Missing export memory", LinkError),
            ("Insufficient resources: no memory", SystemCallError),
            ("RuntimeError: unreachable", GuestTrap),
        ):
            mapped = wasmer_errors.at_instantiate(RuntimeError(text), "m")
            assert type(mapped) is at_instantiate


class TestMemories:
    def run(self, host: WasmerHost, text: str, *calls: tuple[Any, ...]) -> list[Any]:
        """What calls give through the pool, compared with what wasmer alone gives."""

        def outcomes(call: Callable[..., Any]) -> list[Any]:
            seen = []
            for name, *arguments in calls:
                try:
                    seen.append(call(name, *arguments))
                except RuntimeError as error:
                    seen.append(str(getattr(error, "native", error)).splitlines()[0])
            return seen

        module = wasmer.Module(host.store, text)
        try:
            alone = wasmer.Instance(module)
        except RuntimeError as error:
            refused = str(error)
            with pytest.raises(GuestTrap) as caught:
                host.prepare(text).instantiate()
            assert str(caught.value.native) == refused
            return []
        expected = outcomes(lambda name, *a: getattr(alone.exports, name)(*a))
        guest = host.prepare(text)
        for _ in range(2):
            with guest.instantiate() as instance:
                assert outcomes(instance.call) == expected
            check_slots(host)
        return expected

    GET = '(func (export "get") (param i32) (result i32) (i32.load8_u (local.get 0)))'
    SIZE = '(func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))'

    def test_none(self, host: WasmerHost) -> None:
        text = '(module (func (export "f") (result i32) (i32.const 7)))'
        assert self.run(host, text, ("f",)) == [7]
        with host.prepare(text).instantiate() as instance, pytest.raises(ExportNotFound):
            instance.memory.read(0, 1)

    def test_with_nothing_in_it(self, host: WasmerHost) -> None:
        text = f"(module (memory 0 2) {self.GET} {self.SIZE})"
        seen = self.run(host, text, ("get", 0), ("grow", 1), ("get", 0), ("grow", 2), ("get", PAGE))
        assert seen[1:4] == [0, 0, -1]
        with host.prepare(text).instantiate() as instance:
            assert instance.memory.byte_size == 0
            assert instance.memory.read(0, 0) == b""
            instance.memory.grow(2)
            assert instance.memory.read(2 * PAGE - 1, 1) == b"\0"

    def test_with_no_room_at_all(self, host: WasmerHost) -> None:
        assert self.run(host, f"(module (memory 0 0) {self.SIZE})", ("grow", 0), ("grow", 1)) == [
            0,
            -1,
        ]

    @pytest.mark.parametrize(
        "data",
        [
            '(data (i32.const 65533) "end")',
            '(data (i32.const 65534) "end")',
            '(data (i32.const 0) "x") (data (i32.const 65536) "")',
            '(data (i32.const 65537) "")',
            '(data (i32.const -1) "x")',
            '(data (i32.const 0) "abc") (data (i32.const 1) "z")',
            '(data "passive") (data (i32.const 5) "active")',
            '(data (global.get 0) "dynamic")',
        ],
    )
    def test_with_data(self, host: WasmerHost, data: str) -> None:
        text = f"(module (memory 1) (global i32 (i32.const 9)) {self.GET} {data})"
        try:
            wasmer.Module(host.store, text)
        except RuntimeError:
            with pytest.raises(InvalidModule):
                host.prepare(text)
            return
        self.run(host, text, *(("get", place) for place in (0, 1, 2, 5, 9, 65533, 65535, 65536)))

    def test_with_data_at_an_imported_offset(self, host: WasmerHost) -> None:
        text = f'(module (import "env" "at" (global i32)) (memory 1) {self.GET} (data (global.get 0) "x"))'
        for offset in (0, 65535):
            given = wasmer.Global(host.store, wasmer.Value.i32(offset))
            with host.prepare(text, imports={"env": {"at": given}}).instantiate() as instance:
                assert instance.call("get", offset) == ord("x")
        given = wasmer.Global(host.store, wasmer.Value.i32(65536))
        with pytest.raises(GuestTrap, match="out of bounds memory access"):
            host.prepare(text, imports={"env": {"at": given}}).instantiate()
        assert in_use(host) == 0

    def test_of_the_embedder(self, host: WasmerHost) -> None:
        text = f'(module (import "env" "m" (memory 1)) (export "m" (memory 0)) {self.GET} (data (i32.const 3) "x"))'
        memory = wasmer.Memory(host.store, wasmer.MemoryType(1, 2, False))
        guest = host.prepare(text, imports={"env": {"m": memory}})
        with guest.instantiate() as instance:
            assert instance.call("get", 3) == ord("x")
            assert instance.memory.read(3, 1) == b"x"
            assert in_use(host) == 0
        assert memory.uint8_view()[3] == ord("x")
        with pytest.raises(LinkError, match=r"env\.m"):
            guest.instantiate(imports={})

    def test_of_a_guest_that_imports_a_table_are_left_to_wasmer(self, host: WasmerHost) -> None:
        text = f"""(module (import "env" "t" (table 1 funcref)) (memory (export "m") 1) {self.GET}
            (data (i32.const 3) "x"))"""
        table = wasmer.Instance(
            wasmer.Module(host.store, '(module (table (export "t") 1 funcref))')
        ).exports.t
        guest = host.prepare(text, imports={"env": {"t": table}})
        assert "table env.t" in (guest.report.native or "")
        with guest.instantiate() as instance:
            assert instance.memory.read(3, 1) == b"x"
            assert instance.memory.grow(1) == 1
            assert in_use(host) == 0

    def test_without_images(self, no_leaks: None) -> None:
        with WasmerHost(Settings(slots=2, image_limit=0)) as host:
            self.run(host, ECHO, ("get", 8), ("set", 8, 1), ("get", 8), ("next",))

    @pytest.mark.parametrize("settings", [{"memfd": "off"}, {"allocation": "on-demand"}])
    @pytest.mark.parametrize("reset", ["auto", "madvise", "copy"])
    def test_on_every_backend(self, no_leaks: None, settings: Any, reset: Any) -> None:
        with WasmerHost(Settings(slots=2, reset=reset, **settings)) as host:
            self.run(host, ECHO, ("get", 8), ("set", 8, 1), ("grow", 1), ("get", 8), ("next",))


class TestThreads:
    @staticmethod
    def elsewhere(function: Callable[[], Any]) -> Any:
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.append(function())
            except BaseException as error:  # noqa: BLE001 - it is what the test looks at
                outcome.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return outcome[0]

    def test_cannot_use_anothers_host(self, host: WasmerHost, capfd: Any) -> None:
        guest = host.prepare(ECHO)
        instance = guest.instantiate()
        function = instance.function("get")
        memory = instance.memory
        for attempt in (
            lambda: host.prepare(ECHO),
            guest.instantiate,
            lambda: instance.call("get", 0),
            lambda: function(0),
            lambda: memory.read(0, 1),
            lambda: memory.grow(0),
            lambda: instance.global_value("count"),
            instance.reset,
            instance.close,
            host.statistics,
            host.close,
        ):
            assert isinstance(self.elsewhere(attempt), WrongThread)
        assert instance.call("get", 8) == ord("h")
        assert "panicked" not in capfd.readouterr().err

    def test_can_drop_a_handle(self, host: WasmerHost, capfd: Any) -> None:
        box = [host.prepare(ECHO).instantiate()]
        function = box[0].function("get")
        self.elsewhere(box.clear)
        assert host._dropped
        self.elsewhere(lambda: None)
        assert in_use(host) == 0
        holder = [function]
        del function
        self.elsewhere(holder.clear)
        assert "panicked" not in capfd.readouterr().err

    def test_cannot_import_what_another_made(self, host: WasmerHost, capfd: Any) -> None:
        text = '(module (import "env" "g" (global i32)) (memory 1))'
        made = self.elsewhere(lambda: wasmer.Global(host.store, wasmer.Value.i32(1)))
        if isinstance(made, BaseException):  # wasmer checks the store first
            made = self.elsewhere(
                lambda: wasmer.Global(
                    wasmer.Store(wasmer.engine.Universal(Compiler)), wasmer.Value.i32(1)
                )
            )
        with pytest.raises(WrongThread):
            host.prepare(text, imports={"env": {"g": made}}).instantiate()
        assert in_use(host) == 0
        capfd.readouterr()

    def test_have_a_host_each(self, no_leaks: None) -> None:
        def serve() -> int:
            with WasmerHost(Settings(slots=2)) as host:
                guest = host.prepare(ECHO)
                for _ in range(20):
                    with guest.instantiate() as instance:
                        instance.call("set", 8, 1)
                return host.statistics().instances

        assert [self.elsewhere(serve) for _ in range(3)] == [20] * 3


class TestAHost:
    def test_is_opened_by_name(self) -> None:
        with open_host("wasmer") as host:
            assert isinstance(host, WasmerHost)

    def test_with_live_instances_does_not_close(self, host: WasmerHost) -> None:
        instance = host.prepare(ECHO).instantiate()
        with pytest.raises(InUse, match="1 live instances"):
            host.close()
        assert instance.call("get", 8) == ord("h")
        host.close(force=True)
        host.close()
        assert instance.closed
        instance.close()
        with pytest.raises(UsedAfterClose):
            instance.call("get", 8)
        with pytest.raises(UsedAfterClose):
            host.prepare(ECHO)

    @pytest.fixture
    def host(self, no_leaks: None) -> Iterator[WasmerHost]:
        opened = WasmerHost(Settings(slots=8))
        yield opened
        opened.close(force=True)

    def test_that_leaves_its_block_ends_everything(self, no_leaks: None) -> None:
        with WasmerHost() as host:
            instance = host.prepare(ECHO).instantiate()
            function = instance.function("get")
        with pytest.raises(UsedAfterClose):
            function(8)
        assert instance.closed

    def test_closes_guests_and_goes_on(self, host: WasmerHost) -> None:
        guest = host.prepare(ECHO)
        instance = guest.instantiate()
        guest.close()
        guest.close()
        with pytest.raises(UsedAfterClose):
            guest.instantiate()
        assert instance.call("get", 8) == ord("h")
        instance.close()
        assert sum(pool.warm for pool in host.statistics().pools) == 0

    def test_gives_back_what_a_closed_guest_held(self, host: WasmerHost) -> None:
        class Weighty:
            def __call__(self, value: int) -> int:
                return value

        weighty = Weighty()
        alive = weakref.ref(weighty)
        guest = host.prepare(CALLS_OUT, imports={"env": {"f": weighty}})
        with guest.instantiate() as instance:
            assert instance.call("run", 3) == 3
        guest.close()
        del guest, instance, weighty
        gc.collect()
        assert alive() is None

    def test_refuses_stores_of_others(self, host: WasmerHost) -> None:
        with pytest.raises(Unsupported, match="stores"):
            host.prepare(ECHO).instantiate(store=object())
        assert in_use(host) == 0


class TestImports:
    def test_are_python_callables_or_native(self, host: WasmerHost) -> None:
        text = """(module
            (import "env" "two" (func $two (param i32) (result i32 i64)))
            (import "env" "g" (global $g (mut i32)))
            (import "env" "native" (func $native (param f64) (result f64)))
            (func (export "two") (result i32 i64) (call $two (i32.const 4)))
            (func (export "bump") (global.set $g (i32.add (global.get $g) (i32.const 1))))
            (func (export "native") (result f64) (call $native (f64.const 2))))"""
        shared = wasmer.Global(host.store, wasmer.Value.i32(1), mutable=True)
        f64 = wasmer.Type.F64
        native = wasmer.Function(
            host.store, lambda value: value * 2, wasmer.FunctionType([f64], [f64])
        )
        for two in (lambda value: (value, 2), lambda value: [value, 2]):
            imports = {"env": {"two": two, "g": shared, "native": native}}
            with host.prepare(text, imports=imports).instantiate() as instance:
                assert instance.call("two") == [4, 2]
                instance.call("bump")
                assert instance.call("native") == 4.0
        assert shared.value == 3

    def test_can_be_given_per_instance(self, host: WasmerHost) -> None:
        guest = host.prepare(CALLS_OUT, imports={"env": {"f": lambda value: value + 1}})
        with (
            guest.instantiate() as first,
            guest.instantiate(imports={"env": {"f": lambda value: value + 2}}) as second,
        ):
            assert (first.call("run", 1), second.call("run", 1)) == (2, 3)
            second.reset()
            assert second.call("run", 1) == 3

    def test_can_instantiate_the_same_guest(self, host: WasmerHost) -> None:
        def nested(value: int) -> int:
            if value == 0:
                return 0
            with guest.instantiate() as inner:
                return int(inner.call("run", value - 1)) + 1

        guest = host.prepare(CALLS_OUT, imports={"env": {"f": nested}})
        with guest.instantiate() as instance:
            assert instance.call("run", 5) == 5
        assert in_use(host) == 0


class TestWasi:
    def test_keeps_no_more_of_a_captured_stream_than_the_limit(self, host: WasmerHost) -> None:
        with host.prepare(WASI, wasi=Wasi(stdout="capture")).instantiate() as instance:
            instance.call("_start")
            whole = instance.stdout
        assert len(whole) > 3
        limited = Wasi(stdout="capture", capture_limit=3)
        with host.prepare(WASI, wasi=limited).instantiate() as instance:
            instance.call("_start")
            assert instance.stdout == whole[:3]

    def test_captures(self, host: WasmerHost) -> None:
        guest = host.prepare(WASI, wasi=Wasi(stdout="capture", stderr="capture"))
        with guest.instantiate() as instance:
            instance.call("_start")
            assert instance.stdout == b"hello\n"
            assert instance.memory.read(100, 4) == b"\6\0\0\0"
            assert instance.call("write", 2, 0, 1, 100) == 0
            assert (instance.stdout, instance.stderr) == (b"hello\n", b"hello\n")
            for wrong in ((1, 65535, 1, 100), (1, 0, 1, 65535), (1, 0, 2**30, 100), (1, -1, 1, 1)):
                assert instance.call("write", *wrong) == 21
            instance.memory.write(0, b"\xf0\xff\0\0\xff\0\0\0")
            assert instance.call("write", 1, 0, 1, 100) == 21
            assert instance.stdout == b"hello\n"
            instance.reset()
            assert instance.stdout == b""
            instance.call("_start")
        with guest.instantiate() as instance:
            assert instance.stdout == b""

    def test_inherits_and_discards(self, host: WasmerHost, capfd: Any) -> None:
        guest = host.prepare(WASI)
        with guest.instantiate(wasi=Wasi()) as instance:
            instance.call("_start")
            assert capfd.readouterr().out == "hello\n"
            assert instance.stdout == b""
        with guest.instantiate(wasi=Wasi(stdout="discard", stderr="capture")) as instance:
            instance.call("_start")
            assert instance.call("write", 2, 0, 1, 100) == 0
            assert (instance.stdout, instance.stderr) == (b"", b"hello\n")
        assert capfd.readouterr().out == ""

    def test_shows_nothing_of_our_standard_input(self, no_leaks: None) -> None:
        source = f"""
from memslot_plugin.hosts import Wasi
from memslot_plugin.hosts.wasmer import WasmerHost
with WasmerHost() as host, host.prepare({WASI!r}, wasi=Wasi()).instantiate() as instance:
    assert instance.call("read", 0) == 0
    assert instance.memory.read(100, 4) == bytes(4)
    assert instance.call("pread", 0) == 70
    assert instance.call("renumber", 0, 9) == 58
    assert instance.call("read", 9) == 8
    assert instance.memory.read(16, 6) == b"hello\\n"
assert input() == "secret"
"""
        python(source, "secret\n")

    def test_has_no_way_around_a_stream_that_is_not_inherited(
        self, host: WasmerHost, capfd: Any
    ) -> None:
        with host.prepare(WASI, wasi=Wasi(stdout="capture")).instantiate() as instance:
            assert instance.call("pwrite", 1) == 70
            assert instance.call("renumber", 1, 9) == 58
            assert instance.call("renumber", 2, 1) == 58
        assert capfd.readouterr().out == ""

    def test_exits(self, host: WasmerHost) -> None:
        with host.prepare(WASI, wasi=Wasi()).instantiate() as instance:
            for given, code in ((0, 0), (3, 3), (256, 0), (-1, 255)):
                with pytest.raises(GuestExit) as caught:
                    instance.call("exit", given)
                assert caught.value.code == code

    def test_passes_arguments_and_environment(self, host: WasmerHost) -> None:
        wasi = Wasi(arguments=["one", "two"], environment={"KEY": "value"}, program="prog")
        with host.prepare(WASI, wasi=wasi).instantiate() as instance:
            instance.call("arguments")
            assert instance.memory.read(1000, 4) == b"\3\0\0\0"
            assert instance.memory.read(2000, 13) == b"prog\0one\0two\0"
            instance.call("environment")
            assert instance.memory.read(2000, 10) == b"KEY=value\0"

    def test_opens_folders(self, host: WasmerHost, tmp_path: Path) -> None:
        (tmp_path / "note.txt").write_text("notes!")
        guest = host.prepare(WASI, wasi=Wasi(preopened={"/d": str(tmp_path)}))
        before = descriptors()
        with guest.instantiate() as instance:
            assert instance.call("open", 4) == 0
            descriptor = instance.memory.read(400, 1)[0]
            assert instance.call("read", descriptor) == 0
            assert instance.memory.read(16, 6) == b"notes!"
        assert descriptors() == before
        with host.prepare(WASI, wasi=Wasi()).instantiate() as instance:
            assert instance.call("open", 4) != 0

    @pytest.mark.parametrize(
        "wasi",
        [
            Wasi(preopened={"/d": "/nonexistent"}),
            Wasi(arguments=["a\0b"]),
            Wasi(environment={"a=b": "c"}),
            Wasi(arguments=[3]),  # type: ignore[list-item]
        ],
    )
    def test_says_what_is_not_allowed(self, host: WasmerHost, wasi: Wasi) -> None:
        with pytest.raises(SettingError, match="wasi"):
            host.prepare(WASI, wasi=wasi).instantiate()
        assert in_use(host) == 0

    def test_is_not_given_by_itself(self, host: WasmerHost) -> None:
        with pytest.raises(LinkError, match=r"wasi_snapshot_preview1\..*wasi=Wasi"):
            host.prepare(WASI).instantiate()
        with pytest.raises(LinkError, match="'memory'"):
            host.prepare(WASI.replace('(export "memory")', ""), wasi=Wasi()).instantiate()
        assert in_use(host) == 0

    def test_can_be_replaced_in_part(self, host: WasmerHost) -> None:
        written = []

        def write(*arguments: int) -> int:
            written.append(arguments)
            return 0

        imports = {"wasi_snapshot_preview1": {"fd_write": write}}
        with host.prepare(WASI, wasi=Wasi(), imports=imports).instantiate() as instance:
            instance.call("_start")
            assert instance.call("read", 0) == 0
        assert written == [(1, 0, 1, 100)]

    def test_of_the_older_snapshot(self, host: WasmerHost) -> None:
        text = WASI.replace("wasi_snapshot_preview1", "wasi_unstable")
        with host.prepare(text, wasi=Wasi(stdout="capture")).instantiate() as instance:
            instance.call("_start")
            assert instance.stdout == b"hello\n"

    def test_works_on_a_memory_of_the_embedder(self, host: WasmerHost) -> None:
        text = WASI.replace(
            '(memory (export "memory") 1)',
            '(import "env" "m" (memory 1)) (export "memory" (memory 0))',
        )
        memory = wasmer.Memory(host.store, wasmer.MemoryType(1, None, False))
        guest = host.prepare(text, wasi=Wasi(stdout="capture"), imports={"env": {"m": memory}})
        with guest.instantiate() as instance:
            instance.call("_start")
            assert instance.stdout == b"hello\n"

    def test_survives_many_instances(self, host: WasmerHost, tmp_path: Path) -> None:
        guest = host.prepare(WASI, wasi=Wasi(stdout="capture", preopened={"/d": str(tmp_path)}))

        def cycle(times: int) -> None:
            for _ in range(times):
                with guest.instantiate() as instance:
                    instance.call("_start")
                    assert instance.stdout == b"hello\n"

        cycle(200)
        before = status_bytes("VmRSS"), descriptors()
        cycle(1500)
        assert descriptors() == before[1]
        assert status_bytes("VmRSS") - before[0] < 2 << 20


@pytest.mark.timing
def test_a_new_instance_is_sixty_times_faster_than_wasmers_own() -> None:
    """4 MiB of data, one page written per request, a new instance per request."""
    content = "".join(f"\\{byte:02x}" for byte in random.Random(5).randbytes(4 << 20))
    text = f"""(module (memory (export "memory") 65)
        (func (export "touch") (param i32) (i32.store8 (local.get 0) (i32.const 7)))
        (data (i32.const 0) "{content}"))"""
    with WasmerHost(Settings(slots=4)) as host:
        source = bytes(wasmer.wat2wasm(text))
        guest = host.prepare(source)
        module = wasmer.Module(host.store, source)

        def pooled() -> None:
            with guest.instantiate() as instance:
                instance.call("touch", 5000)

        def alone() -> None:
            wasmer.Instance(module).exports.touch(5000)

        def seconds(function: Callable[[], None], times: int) -> float:
            began = time.perf_counter()
            for _ in range(times):
                function()
            return (time.perf_counter() - began) / times

        # The best of each: another machine's work on the same core makes Python twice as slow, and copying hardly.
        slow, fast = [], []
        for _ in attempts(8):
            for _ in range(15):
                slow.append(seconds(alone, 20))
                fast.append(seconds(pooled, 400))
            ratio = min(slow) / min(fast)
            print(
                f"{ratio:.0f} times: {min(slow) * 1e6:.0f} / {min(fast) * 1e6:.1f} us, medians"
                f" {median(slow) * 1e6:.0f} / {median(fast) * 1e6:.1f} us"
            )
            if ratio >= 60:
                break
        assert ratio >= 60
