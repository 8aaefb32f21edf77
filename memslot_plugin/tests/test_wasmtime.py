"""wasmtime alone: its own objects, errors, references and vectors, and stores of the embedder."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from unittest import mock

import pytest

import memslot_plugin as memslot
from memslot_plugin._core import ffi, lib
from memslot_plugin.tests import hosts, runtimes
from memslot_plugin.tests.hosts import CALLS_OUT, ECHO, PAGE, STARTS_BADLY, WASI, Raises, in_use

try:
    import wasmtime

    from memslot_plugin.hosts.wasmtime import bridge as wasmtime_bridge
    from memslot_plugin.hosts.wasmtime.creator import Creator
    from memslot_plugin.hosts.wasmtime.errors import translated
    from memslot_plugin.hosts.wasmtime.host import WasmtimeHost
    from memslot_plugin.hosts.wasmtime.runtime import NativeInstance, WasmtimeTrap
except ImportError:
    if (reason := runtimes.missing("wasmtime")) is None:
        raise
    pytest.skip(reason, allow_module_level=True)


pytestmark = pytest.mark.usefixtures("wasi_runtime")


@pytest.fixture(autouse=True)
def _nothing_is_left(no_leaks: None) -> Iterator[None]:
    yield
    assert not wasmtime_bridge.KEPT, "what a host function raised"


@pytest.fixture
def host() -> Iterator[WasmtimeHost]:
    with hosts.serving("wasmtime", slots=8) as host:
        yield host
        assert in_use(host) == 0
        assert not host.runtime._creator._groups
        assert not host.runtime._creator.retained


@pytest.fixture
def store(host: WasmtimeHost) -> Iterator[wasmtime.Store]:
    """A store of the embedder's own."""
    with closing(wasmtime.Store(host.engine)) as store:
        yield store


def test_native_instance_gives_the_objects_of_wasmtime(host: WasmtimeHost) -> None:
    with host.prepare(ECHO).instantiate() as instance:
        native = instance.native
        assert isinstance(native, NativeInstance)
        exports: Any = native.exports(native.store)
        assert exports["next"](native.store) == 6
        assert instance.call("next") == 7
        assert bytes(exports["memory"].read(native.store, 8, 13)) == b"hello"
        native.store.close()  # ends nothing: the host ends the instance
        assert instance.call("next") == 8
    with pytest.raises(ValueError, match="closed"):
        exports["next"](native.store)


def test_error_of_wasmtime_is_caught_as_an_error_of_memslot_and_of_wasmtime(
    host: WasmtimeHost,
) -> None:
    with host.prepare(ECHO, name="echo").instantiate() as instance:
        for kind in (memslot.GuestTrap, wasmtime.Trap, memslot.MemslotError, RuntimeError):
            with pytest.raises(kind) as caught:
                instance.call("divide", 1, 0)
            assert isinstance(caught.value, WasmtimeTrap)
            assert str(caught.value) == "the guest echo trapped: integer divide by zero"
            assert caught.value.trap_code is wasmtime.TrapCode.INTEGER_DIVISION_BY_ZERO
            assert "backtrace" in caught.value.message
            assert [frame.func_index for frame in caught.value.frames] == [12]
            assert type(caught.value.native) is wasmtime.Trap
    text = '(module (tag $t (param i32)) (memory 1) (func (export "f") (throw $t (i32.const 1))))'
    with pytest.raises(memslot.GuestTrap, match="Wasm exception"):
        host.prepare(text).instantiate().call("f")
    for ended in (memslot.GuestExit, wasmtime.ExitTrap):
        with host.prepare(WASI).instantiate() as instance, pytest.raises(ended, match="status 3"):
            instance.call("exit", 3)


def test_every_error_class_of_wasmtime_is_translated() -> None:
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
        assert issubclass(type(ours), memslot.MemslotError)
        assert issubclass(type(ours), type(native))
        assert vars(ours)["native"] is native
    for native in (ValueError("x"), TypeError("x"), KeyboardInterrupt()):
        assert translated(native, "guest") is native


def test_bridge_names_no_symbol_twice() -> None:
    symbols = map(lib.ms_wt_symbol, itertools.count())
    names = [ffi.string(each) for each in itertools.takewhile(ffi.NULL.__ne__, symbols)]
    assert len(names) == len(set(names)) > 20


def test_vectors_and_references_passed_to_a_guest_come_back(host: WasmtimeHost) -> None:
    text = """(module (memory 1)
      (global (export "v") (mut v128) (v128.const i64x2 1 2))
      (global (export "x") (mut externref) (ref.null extern))
      (global (export "a") (mut anyref) (ref.null any))
      (func (export "vector") (param v128) (result v128) (local.get 0))
      (func (export "extern") (param externref i32) (result i32 externref) (local.get 1) (local.get 0))
      (func $f (export "func") (param funcref) (result funcref) (local.get 0))
      (func (export "any") (param anyref))
      (func (export "mixed") (param v128 externref)))"""
    with host.prepare(text).instantiate() as instance:
        vector, thing = bytes(range(16)), object()
        assert instance.call("vector", vector) == vector
        assert instance.global_value("v") == b"\1" + bytes(7) + b"\2" + bytes(7)
        instance.set_global("v", vector)
        assert instance.global_value("v") == vector
        number, same = instance.call("extern", thing, 3)
        assert (number, same is thing) == (3, True)
        assert instance.call("func", None) is None
        instance.set_global("x", thing)
        assert instance.global_value("x") is thing
        for name, arguments, said in (
            ("vector", (b"short",), "16 bytes"),
            ("vector", (5,), "16 bytes"),
            ("func", (5,), "5 is no wasmtime.Func"),
            ("extern", (thing, "x"), "."),
        ):
            with pytest.raises(memslot.ArgumentError, match=said):
                instance.call(name, *arguments)
        for name in ("any", "mixed"):
            with pytest.raises(memslot.Unsupported, match="cannot pass"):
                instance.call(name, None)
        with pytest.raises(memslot.Unsupported):
            instance.global_value("a")


def test_import_with_vectors_returns_what_it_declares(host: WasmtimeHost) -> None:
    text = """(module (import "e" "none" (func $none (param i64)))
      (import "e" "two" (func $two (param v128 f32) (result f64 v128))) (memory 1)
      (func (export "none") (call $none (i64.const -1)))
      (func (export "two") (result f64 v128) (call $two (v128.const i64x2 0 1) (f32.const 2))))"""
    seen: list[Any] = []
    imports = {"none": seen.append, "two": lambda vector, number: (number, vector)}
    guest = host.prepare(text, imports={"e": imports})
    with guest.instantiate() as instance:
        assert (instance.call("none"), seen) == (None, [-1])
        assert instance.call("two") == [2.0, bytes(8) + b"\1" + bytes(7)]
    for name, wrong, said in (
        ("two", lambda *_: 5, "a sequence of 2"),
        ("two", lambda *_: (1.0,), "2 values are wanted"),
        ("none", lambda _: 1, "nothing is wanted"),
    ):
        with pytest.raises(memslot.ArgumentError, match=said):
            guest.instantiate(imports={"e": {**imports, name: wrong}}).call(name)


def test_import_raises_its_own_error_also_with_references(host: WasmtimeHost) -> None:
    error: Exception = wasmtime.WasmtimeError("x")
    with hosts.calling(host, Raises(error)).instantiate() as instance:
        hosts.assert_raises(error, lambda: instance.call("run", 1))
    error = ValueError("mine")
    text = """(module (import "env" "f" (func $f (param externref) (result i32))) (memory 1)
      (func (export "run") (param externref) (result i32) (call $f (local.get 0)))
      (func (export "plain") (result i32) (call $f (ref.null extern))))"""
    with hosts.calling(host, Raises(error), text).instantiate() as instance:
        hosts.assert_raises(error, lambda: instance.call("run", "thing"))
        hosts.assert_raises(error, lambda: instance.call("plain"))
    with hosts.calling(host, len, text).instantiate() as instance:
        assert instance.call("run", "four") == 4
    from wasmtime import _func

    assert _func.LAST_EXCEPTION is None


def test_import_that_raised_in_a_bare_call_is_not_raised_at_a_later_trap(
    host: WasmtimeHost,
) -> None:
    with hosts.calling(host, Raises(ValueError("mine"))).instantiate() as instance:
        native = instance.native
        with pytest.raises(ValueError, match="mine"):
            native.exports(native.store)["run"](native.store, 1)
    with pytest.raises(WasmtimeTrap, match="unreachable"):
        host.prepare(ECHO).instantiate().call("trap")


def test_wasi_of_the_older_snapshot_is_refused(host: WasmtimeHost) -> None:
    text = '(module (import "wasi_unstable" "proc_exit" (func (param i32))) (memory 1))'
    with pytest.raises(memslot.LinkError, match="an older WASI than wasmtime has"):
        host.prepare(text).instantiate()


OF_THE_EMBEDDER = """(module (import "e" "g" (global $g (mut i32))) (import "e" "m" (memory 1))
  (memory (export "own") 1) (data (memory 1) (i32.const 0) "own")
  (func (export "next") (result i32)
    (global.set $g (i32.add (global.get $g) (i32.const 1))) (global.get $g)))"""


def objects_of(store: wasmtime.Store, value: wasmtime.Val) -> tuple[Any, Any]:
    """Make a global with this value and a memory of a page."""
    made = wasmtime.Global(store, wasmtime.GlobalType(value.type, True), value)
    return made, wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))


def test_own_store_of_the_embedder_gives_its_objects_and_keeps_memories(
    host: WasmtimeHost, store: Any
) -> None:
    number, memory = objects_of(store, wasmtime.Val.i32(41))
    memory.write(store, b"theirs")
    guest = host.prepare(OF_THE_EMBEDDER)
    instance = guest.instantiate(imports={"e": {"g": number, "m": memory}}, store=store)
    assert (instance.call("next"), number.value(store)) == (42, 42)
    assert instance.memories[0].read(0, 6) == b"theirs"
    assert instance.memories[1].read(0, 3) == b"own"
    with pytest.raises(memslot.InUse, match="end the store"):
        instance.reset()
    instance.close()
    assert in_use(host) == 1, "the store still has it"
    with pytest.raises(memslot.InUse, match="close their stores"):
        host.close(force=True)


def test_own_store_raises_what_its_functions_raise(host: WasmtimeHost, store: Any) -> None:
    error, i32 = ValueError("theirs"), wasmtime.ValType.i32()
    function = wasmtime.Func(store, wasmtime.FuncType([i32], [i32]), Raises(error))
    imports = {"env": {"f": function}}
    with host.prepare(CALLS_OUT).instantiate(imports=imports, store=store) as instance:
        hosts.assert_raises(error, lambda: instance.call("run", 1))


def test_own_store_that_ends_before_its_instance_ends_every_use(
    host: WasmtimeHost, store: Any
) -> None:
    instance = host.prepare(ECHO).instantiate(store=store)
    function = instance.function("next")
    assert function() == 6
    store.close()
    for use in (
        function,
        lambda: instance.call("next"),
        lambda: instance.global_value("count"),
        lambda: instance.native,
        lambda: instance.memory.grow(1),
    ):
        with pytest.raises(memslot.UsedAfterClose, match="store"):
            use()
    assert in_use(host) == 0
    instance.close()


def test_own_store_keeps_the_memory_of_a_failed_start(host: WasmtimeHost, store: Any) -> None:
    with pytest.raises(WasmtimeTrap):
        host.prepare(STARTS_BADLY).instantiate(store=store)
    assert in_use(host) == 1


def test_own_store_that_does_not_fit_is_refused(host: WasmtimeHost, store: Any) -> None:
    for wrong in (wasmtime.Store(), object()):
        with pytest.raises(memslot.LinkError, match=r"must be a wasmtime\.Store of host\.engine"):
            host.prepare(ECHO).instantiate(store=wrong)
    number, memory = objects_of(store, wasmtime.Val.i64(41))
    guest = host.prepare(OF_THE_EMBEDDER)
    for given_store, given, said in (
        (None, number, r"pass that one to instantiate\(store=...\)"),
        (store, number, "memory of at least 1 pages, and a global was given"),
        (store, memory, r"incompatible import type for e\.g; .* expected global of type"),
    ):
        with pytest.raises(memslot.LinkError, match=said):
            guest.instantiate(imports={"e": {"g": number, "m": given}}, store=given_store)


def test_own_store_collected_on_another_thread_gives_its_slots_back(host: WasmtimeHost) -> None:
    guest = host.prepare(ECHO)

    def make() -> None:
        store = wasmtime.Store(host.engine)
        guest.instantiate(store=store).close()
        cycle: list[Any] = [store]
        cycle.append(cycle)

    gc.disable()  # the collection must run on the other thread
    try:
        for _ in range(4):
            make()
        assert len(host.runtime._creator.retained) == 4
        hosts.elsewhere(gc.collect)
    finally:
        gc.enable()
    assert in_use(host) == 0


def test_guest_of_several_memories_has_a_slot_for_each(host: WasmtimeHost) -> None:
    text = """(module (memory (export "a") 1) (memory 2) (memory (export "c") 0 5)
      (data (memory 0) (i32.const 0) "first") (data (memory 1) (i32.const 65536) "second")
      (func (export "grow") (result i32) (memory.grow 2 (i32.const 1))))"""
    with host.prepare(text).instantiate() as instance:
        first, second, third = instance.memories
        assert (first.read(0, 5), second.read(PAGE, 6)) == (b"first", b"second")
        assert (third.byte_size, instance.call("grow"), third.byte_size) == (0, 0, PAGE)
        assert third.grow(2) == 1
        with pytest.raises(memslot.ExportNotFound, match=r"memory 1 .* is not exported"):
            second.grow(1)
        assert in_use(host) == 3


def test_bare_instance_of_wasmtime_gets_and_grows_memories_by_the_hooks(
    host: WasmtimeHost, store: Any, caplog: Any
) -> None:
    exports: Any = wasmtime.Instance(store, wasmtime.Module(host.engine, ECHO), []).exports(store)
    assert bytes(exports["memory"].read(store, 8, 13)) == b"hello"
    assert exports["grow"](store, 1) == 2
    exports["set"](store, 3 * PAGE - 1, 1)
    with pytest.raises(wasmtime.Trap):
        exports["get"](store, 3 * PAGE)
    host.plugins.register(hosts.Growth(ValueError("no")))
    assert exports["grow"](store, 1) == -1
    assert "deciding about it failed" in caplog.text
    assert in_use(host) == 1
    with pytest.raises(memslot.InUse):
        host.close()


def test_bare_instance_of_wasmtime_without_a_memory_raises_the_reason() -> None:
    with hosts.serving("wasmtime", slots=1) as host:
        engine, module = host.engine, wasmtime.Module(host.engine, ECHO)
        full = pytest.raises(wasmtime.WasmtimeError, match="PoolExhausted: all 1 slots")
        with host.prepare(ECHO).instantiate(), full:
            wasmtime.Instance(wasmtime.Store(engine), module, [])
    with pytest.raises(memslot.UsedAfterClose):
        assert host.engine
    with pytest.raises(wasmtime.WasmtimeError, match="the host was closed"):
        wasmtime.Instance(wasmtime.Store(engine), module, [])


def test_call_in_progress_lets_other_threads_run_and_refuses_their_use(host: WasmtimeHost) -> None:
    text = """(module (memory (export "memory") 1) (func (export "wait")
      (loop $again (br_if $again (i32.eqz (i32.load (i32.const 0)))))))"""
    with host.prepare(text).instantiate() as instance:
        done: list[Any] = []
        thread = threading.Thread(target=lambda: done.append(instance.call("wait")))
        thread.start()
        while not instance.enter().running:
            time.sleep(0.001)
        with pytest.raises(memslot.InUse, match="another thread is inside"):
            instance.call("wait")
        for end in (instance.close, instance.reset):
            with pytest.raises(memslot.InUse):
                end()
        instance.memory.write(0, b"\1")
        thread.join()
        assert done == [None]


def test_host_forgotten_at_the_end_of_the_process_ends_in_silence(child: Any) -> None:
    source = f"""
import wasmtime
from memslot_plugin.hosts.wasmtime.host import WasmtimeHost
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


def test_interrupt_between_instance_and_globals_gives_the_slot_back(
    host: WasmtimeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = mock.Mock(wraps=lib)
    library.ms_wt_globals_write.side_effect = KeyboardInterrupt
    with host.prepare(ECHO).instantiate() as instance:
        instance.set_global("count", 6)
        taken = instance.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr("memslot_plugin.hosts.wasmtime.globals.lib", library)
        with pytest.raises(KeyboardInterrupt):
            taken.instantiate()
    assert in_use(host) == 0
    with taken.instantiate() as instance:
        assert instance.global_value("count") == 6


def test_interrupt_after_wasmtime_named_unused_memories_loses_no_slot(
    host: WasmtimeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drain(*arguments: Any) -> None:
        assert lib.ms_wt_drain(*arguments) == 1
        raise KeyboardInterrupt

    with closing(wasmtime.Store(host.engine)) as store:
        host.prepare(ECHO).instantiate(store=store).close()
    library = mock.Mock(wraps=lib)
    library.ms_wt_drain.side_effect = drain
    with monkeypatch.context() as patch:
        patch.setattr("memslot_plugin.hosts.wasmtime.creator.lib", library)
        with pytest.raises(KeyboardInterrupt):
            host.statistics()
    assert in_use(host) == 0


def test_interrupt_after_bare_wasmtime_leased_a_memory_loses_no_slot(
    host: WasmtimeHost, store: wasmtime.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    leased = Creator.leased

    def interrupted(*arguments: Any) -> None:
        leased(*arguments)
        raise KeyboardInterrupt

    module = wasmtime.Module(host.engine, "(module (memory 1))")
    with monkeypatch.context() as patch:
        patch.setattr(Creator, "leased", interrupted)
        with pytest.raises(wasmtime.WasmtimeError, match="KeyboardInterrupt"):
            wasmtime.Instance(store, module, [])
    assert in_use(host) == 0


def test_interrupt_while_an_instance_ends_gives_the_slot_back(
    host: WasmtimeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = host.prepare(ECHO).instantiate()
    library = mock.Mock(wraps=lib)
    library.ms_wt_close.side_effect = KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr("memslot_plugin.hosts.wasmtime.creator.lib", library)
        with pytest.raises(KeyboardInterrupt):
            instance.close()
    host.statistics()
    assert in_use(host) == 0
