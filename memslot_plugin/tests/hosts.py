"""Hosts as parameters of tests, and guests that run on each of them."""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from memslot_hooks import LinearMemory, hookimpl
from memslot_plugin import GrowthRefused, Guest, GuestTrap, Host, Instance, Wasi, open_host
from memslot_plugin.allocators import PoolAllocator
from memslot_plugin.hosts.fake import FakeLive
from memslot_plugin.tests.runtimes import missing

PAGE = 65536

ECHO = """(module
  (memory (export "memory") 2 4)
  (global $count (export "count") (mut i32) (i32.const 5))
  (global (export "fixed") i64 (i64.const 7))
  (global (export "real") (mut f64) (f64.const 1.5))
  (data (i32.const 8) "hello")
  (func (export "get") (param i32) (result i32) (i32.load8_u (local.get 0)))
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
  (func (export "twice") (param i32) (result i32) (i32.add (call $f (local.get 0)) (call $f (local.get 0))))
  (func (export "grow_then_run") (param i32) (result i32)
    (drop (memory.grow (i32.const 1))) (call $f (local.get 0))))"""

STARTS_BADLY = """(module (memory (export "memory") 1) (data (i32.const 0) "x")
  (func $f (drop (memory.grow (i32.const 1))) (i32.store (i32.const 65536) (i32.const 9)) unreachable)
  (start $f))"""

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
  (import "wasi_snapshot_preview1" "path_open" (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\\10\\00\\00\\00\\06\\00\\00\\00")
  (data (i32.const 16) "hello\\n")
  (data (i32.const 64) "note.txt")
  (func (export "_start")
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 100))))
  (func (export "write") (param i32 i32 i32 i32) (result i32)
    (call $write (local.get 0) (local.get 1) (local.get 2) (local.get 3)))
  (func (export "read") (param i32) (result i32) (call $read (local.get 0) (i32.const 0) (i32.const 1) (i32.const 100)))
  (func (export "pread") (param i32) (result i32)
    (call $pread (local.get 0) (i32.const 0) (i32.const 1) (i64.const 0) (i32.const 100)))
  (func (export "pwrite") (param i32) (result i32)
    (call $pwrite (local.get 0) (i32.const 0) (i32.const 1) (i64.const 0) (i32.const 100)))
  (func (export "renumber") (param i32 i32) (result i32) (call $renumber (local.get 0) (local.get 1)))
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


HOSTS = [
    pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if reason else [])
    for name in ("fake", "wasmtime", "wasmer")
    for reason in [missing(name)]
]
RUNTIMES = HOSTS[1:]
"""Hosts that run code."""
INSTALLED = [name for name in ("wasmtime", "wasmer") if missing(name) is None]
"""Names of the runtimes' hosts that this Python can open."""
DECIDING = HOSTS[:2]
"""Hosts that ask before a memory grows, and whose instances serve any thread."""


@functools.cache
def assemble(text: str) -> bytes:
    """Assemble WebAssembly text with an installed runtime."""
    for name in ("wasmtime", "wasmer"):
        if missing(name) is None:
            return bytes(importlib.import_module(name).wat2wasm(text))
    pytest.skip("wasmtime is not installed")


def _get(live: FakeLive, address: int) -> int:
    return live.read(0, address % 2**32, 1)[0]


def _set(live: FakeLive, address: int, value: int) -> None:
    live.write(0, address % 2**32, bytes([value]))


def _grow(live: FakeLive, pages: int) -> int:
    try:
        return live.grow(0, pages)
    except GrowthRefused:
        return -1


def _trap(live: FakeLive) -> None:
    raise GuestTrap("unreachable")


FUNCTIONS = {
    "get": _get,
    "set": _set,
    "grow": _grow,
    "size": lambda live: live.locate(0)[1] // PAGE,
    "trap": _trap,
}
"""Functions of ECHO for the fake host, which runs no code."""


def opened(name: str, *, plugins: tuple[object, ...] = (), **options: Any) -> Any:
    """Open the host of this name; `options` are settings or keywords of the host."""
    if name == "fake":
        options.setdefault("functions", FUNCTIONS)
    return open_host(name, plugins=plugins, **{"slots": 4, **options})


@contextmanager
def serving(name: str, **options: Any) -> Iterator[Any]:
    """Open a host, and fail if it ends with a lease, an unsound slot or a failed reset."""
    with opened(name, **options) as host:
        yield host
        check(host)
        assert {(pool.in_use, pool.failed_resets) for pool in host.statistics().pools} <= {(0, 0)}


@contextmanager
def started(name: str, text: str = ECHO, **options: Any) -> Iterator[Instance]:
    """Instantiate a guest on a host of its own."""
    with serving(name, **options) as host, prepare(host, text).instantiate() as instance:
        yield instance


def in_use(host: Host) -> int:
    """Count the leased slots."""
    return sum(pool.in_use for pool in host.statistics().pools)


def check(host: Host) -> None:
    """Raise unless each slot is as its state says."""
    for _, plugin in host.plugins.manager.list_name_plugin():
        if isinstance(plugin, PoolAllocator) and plugin.pool is not None:
            plugin.pool.check()


def prepare(host: Host, text: str = ECHO, name: str = "echo") -> Guest:
    """Prepare a guest from text, for the fake host too, which has no assembler."""
    return host.prepare(assemble(text) if host.name == "fake" else text, name=name)


def calling(host: Host, function: Any, text: str = CALLS_OUT) -> Guest:
    """Prepare a guest whose functions call this one."""
    return host.prepare(text, imports={"env": {"f": function}})


class InTheMiddle:
    """A plugin that runs an action once, within the next reset of a memory."""

    def __init__(self) -> None:
        self.action: Callable[[], None] | None = None

    @hookimpl(tryfirst=True)
    def memslot_reset_memory(self, memory: LinearMemory) -> None:
        action, self.action = self.action, None
        if action is not None:
            action()


class Growth:
    """A plugin that records the sizes to which memories shall grow, and answers or raises."""

    def __init__(self, answer: bool | BaseException | None = None) -> None:
        self.answer = answer
        self.asked: list[int] = []

    @hookimpl(tryfirst=True)
    def memslot_grow_memory(self, memory: LinearMemory, byte_size: int) -> bool | None:
        self.asked.append(byte_size)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class Grown:
    """A plugin that records the sizes to which memories have grown, and raises its error."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.error: BaseException | None = None

    @hookimpl
    def memslot_memory_grown(self, memory: LinearMemory, byte_size: int) -> None:
        self.sizes.append(byte_size)
        assert memory.byte_size == byte_size
        if self.error is not None:
            raise self.error


class Raises:
    """A host function that raises one error at each call."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, _: object) -> int:
        raise self.error


def assert_raises(error: BaseException, call: Callable[[], object]) -> None:
    """Fail unless a call raises this very object."""
    with pytest.raises(type(error)) as caught:
        call()
    assert caught.value is error


def elsewhere(function: Callable[[], Any]) -> Any:
    """Run a function on another thread, and return its result or its exception."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:  # noqa: BLE001 - returned to the caller
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome[0]


@functools.cache
def start_wasi() -> None:
    """Start wasmtime's runtime for WASI, whose descriptors stay for as long as the process lives."""
    if missing("wasmtime") is None:
        wasi = Wasi(stdout="discard", preopened={"/": "."})
        with opened("wasmtime") as host, host.prepare(WASI, wasi=wasi).instantiate() as instance:
            instance.call("_start")
            instance.call("open", 3)
