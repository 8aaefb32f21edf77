"""Host functions and WASI on every runtime: results, errors, and instances that are inside a call."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin import Host, Wasi
from memslot_plugin.tests import hosts
from memslot_plugin.tests.hosts import CALLS_OUT, PAGE, WASI, Raises, assert_raises, calling, in_use

pytestmark = pytest.mark.usefixtures("wasi_runtime")


@pytest.fixture(params=hosts.RUNTIMES)
def host(request: pytest.FixtureRequest, no_leaks: None) -> Iterator[Host]:
    with hosts.serving(request.param, slots=8) as opened:
        yield opened


KINDS = (RuntimeError, TypeError, OverflowError, RecursionError, KeyboardInterrupt, SystemExit)


@pytest.mark.parametrize("kind", [*KINDS, memslot.GuestTrap])
def test_import_that_raises_reaches_the_caller_as_the_same_object(
    host: Host, kind: type[BaseException]
) -> None:
    error = kind("RuntimeError: unreachable")  # as wasmer says it
    raises = Raises(error)

    def plain(number: int) -> int:
        return raises(number)

    for function in (raises, raises.__call__, plain, functools.partial(plain)):
        with calling(host, function).instantiate() as instance:
            for _ in range(2):
                assert_raises(error, lambda: instance.call("run", 1))
            assert instance.memory.byte_size == PAGE


def test_import_that_raises_in_a_start_function_reaches_the_caller_as_the_same_object(
    host: Host,
) -> None:
    text = """(module (import "env" "f" (func $f (param i32) (result i32))) (memory (export "m") 1)
        (func $s (i32.store (i32.const 0) (i32.const 9)) (drop (call $f (i32.const 1)))) (start $s))"""
    error = RuntimeError("mine")
    guest = calling(host, Raises(error), text)
    for _ in range(3):
        assert_raises(error, guest.instantiate)
        assert in_use(host) == 0
    with guest.instantiate(imports={"env": {"f": abs}}) as instance:
        assert instance.memory.read(0, 1) == b"\x09"


def test_import_that_is_built_in_raises_its_own_error(host: Host) -> None:
    lock = threading.Lock()
    for function, expected in (
        ([].pop, IndexError),
        (lock.release, TypeError),
        ({}.__getitem__, KeyError),
        (functools.partial(lock.__exit__, None, None), RuntimeError),
    ):
        with calling(host, function).instantiate() as instance:
            with pytest.raises(expected) as caught:
                instance.call("run", 1)
            assert not isinstance(caught.value, memslot.MemslotError)


def test_import_that_returns_what_it_did_not_declare_is_named(host: Host) -> None:
    for wrong, said in (
        ("x", "'x' is no integer"),
        (2**40, "not in"),
        (None, "None is no integer"),
        ([1], "no integer"),
        (object(), "no integer"),
    ):
        named = (memslot.ArgumentError, f"env.f returned.*{said}")
        error, match = (memslot.LinkError, "host function") if host.name == "wasmer" else named
        with calling(host, lambda _, wrong=wrong: wrong).instantiate() as instance:
            with pytest.raises(error, match=match):
                instance.call("run", 1)
            with pytest.raises(memslot.ArgumentError):
                instance.call("run", "x")


def test_import_that_returns_several_values_passes_each(host: Host) -> None:
    text = """(module (import "env" "f" (func $f (param i32) (result i32 i64)))
      (func (export "two") (result i32 i64) (call $f (i32.const 4))))"""
    for function in (lambda value: (value, 2), lambda value: [value, 2]):
        with calling(host, function, text).instantiate() as instance:
            assert instance.call("two") == [4, 2]


def test_imports_of_an_instance_replace_those_of_its_guest(host: Host) -> None:
    guest = calling(host, lambda number: number + 1)
    with (
        guest.instantiate() as first,
        guest.instantiate(imports={"env": {"f": lambda number: number * 2}}) as second,
    ):
        assert (first.call("run", 41), second.call("run", 21)) == (42, 42)
        second.reset()
        assert (first.call("twice", 1), second.call("twice", 1)) == (4, 4)


def test_imports_that_a_mapping_makes_on_demand_are_found(host: Host, tmp_path: Path) -> None:
    asked: Any = defaultdict(lambda: defaultdict(lambda: lambda value: value + 1))
    with host.prepare(CALLS_OUT, imports=asked) as guest, guest.instantiate() as instance:
        assert instance.call("run", 6) == 7
        guest.save(tmp_path / "guest")
        with guest.share() as shared:
            for again in (
                host.load(tmp_path / "guest", imports=defaultdict(asked.default_factory)),
                host.attach(shared, imports=defaultdict(asked.default_factory)),
            ):
                with again, again.instantiate() as other:
                    assert other.call("run", 6) == 7


def test_import_that_calls_back_or_into_a_new_instance_returns(host: Host) -> None:
    def nested(value: int) -> int:
        if value == 0:
            return 1 // value
        if value % 2:
            return int(outer.call("run", value - 1)) + 1
        with guest.instantiate() as inner:
            try:
                return int(inner.call("run", value - 1)) + 1
            except ZeroDivisionError:
                return 100

    guest = calling(host, nested)
    with guest.instantiate() as outer:
        assert outer.call("run", 5) == 103
        with pytest.raises(ZeroDivisionError):
            outer.call("run", 1)


@pytest.mark.parametrize(
    ("imports", "said"),
    [
        ({}, r"imports env\.f, a func \(i32\) -> \(i32\), and (no such import|nothing) was given"),
        ({"env": {}}, r"env\.f.*(env has: nothing|nothing was given)"),
        ({"env": {"g": len}}, r"env\.f.*(env has: g|nothing was given)"),
        ({"other": {"f": len}}, r"env\.f.*(are the modules: other|nothing was given)"),
        ({"env": {"f": 5}}, r"env\.f.*and 5 was given"),
    ],
    ids=["none", "empty", "another-name", "another-module", "no-callable"],
)
def test_import_that_is_missing_or_wrong_is_named(host: Host, imports: Any, said: str) -> None:
    guest = host.prepare(CALLS_OUT, imports=imports)
    for _ in range(2):
        with pytest.raises(memslot.LinkError, match=said):
            guest.instantiate()
        assert in_use(host) == 0
    with guest.instantiate(imports={"env": {"f": abs}}) as instance:
        assert instance.call("run", -3) == 3
    text = '(module (import "env" "f" (global i32)) (memory 1))'
    with pytest.raises(memslot.LinkError, match=r"env\.f, a global.* given"):
        host.prepare(text, imports=imports).instantiate()


@pytest.mark.parametrize("given_to", ["guest", "instance"])
def test_import_is_freed_with_its_guest_or_instance(host: Host, given_to: str) -> None:
    def function(number: int) -> int:
        return number

    alive = weakref.ref(function)
    guest = calling(host, function if given_to == "guest" else abs)
    imports = {"env": {"f": function}} if given_to == "instance" else None
    with guest.instantiate(imports=imports) as instance:
        assert instance.call("run", 3) == 3
    if given_to == "guest":
        guest.close()
        del guest
    del function, imports, instance
    gc.collect()
    host.statistics()
    assert alive() is None


def test_wasi_with_arguments_environment_and_folders_passes_them_to_the_guest(
    host: Host, tmp_path: Path
) -> None:
    (tmp_path / "note.txt").write_text("inside\n")
    wasi = Wasi(
        arguments=("a", "b c"),
        environment={"KEY": "value"},
        preopened={"/data": str(tmp_path)},
        program="prog",
    )
    folder = 3 if host.name == "wasmtime" else 4
    with host.prepare(WASI, wasi=wasi).instantiate() as instance:
        instance.call("arguments")
        assert instance.memory.read(1000, 4) == b"\3\0\0\0"
        assert instance.memory.read(2000, 11) == b"prog\0a\0b c\0"
        instance.call("environment")
        assert instance.memory.read(2000, 10) == b"KEY=value\0"
        assert instance.call("open", folder) == 0
        assert instance.call("read", instance.memory.read(400, 1)[0]) == 0
        assert instance.memory.read(16, 6) == b"inside"
    with host.prepare(WASI, wasi=Wasi()).instantiate() as instance:
        assert instance.call("open", folder) != 0


def test_wasi_with_capture_keeps_each_stream_up_to_the_limit(host: Host) -> None:
    guest = host.prepare(WASI, wasi=Wasi(stdout="capture", stderr="capture", capture_limit=12))
    for _ in range(2):
        with guest.instantiate() as instance:
            assert instance.stdout == b""
            instance.call("_start")
            assert (instance.stdout, instance.stderr) == (b"hello\n", b"")
            assert instance.call("write", 2, 0, 1, 100) == 0
            instance.memory.write(16, b"again!")
            for _ in range(2):
                assert instance.call("write", 1, 0, 1, 100) == 0
                assert instance.memory.read(100, 4) == b"\6\0\0\0"
            assert (instance.stdout, instance.stderr) == (b"hello\nagain!", b"hello\n")
            instance.reset()
            assert (instance.stdout, instance.stderr) == (b"", b"")


def test_wasi_without_options_discards_output_and_has_nothing_to_read(
    host: Host, capfd: Any
) -> None:
    with host.prepare(WASI).instantiate() as instance:
        for stream in (1, 2):
            assert instance.call("write", stream, 0, 1, 100) == 0
        instance.call("arguments")
        assert instance.memory.read(2000, 6) == b"guest\0"
        instance.call("environment")
        assert instance.memory.read(1000, 4) == bytes(4)
        assert instance.call("read", 0) == 0
        assert instance.memory.read(100, 4) == bytes(4)
        assert instance.stdout == b""
    assert capfd.readouterr() == ("", "")


def test_wasi_with_an_inherited_stream_writes_in_order(host: Host, capfd: Any) -> None:
    with host.prepare(WASI, wasi=Wasi(stdout="inherit")).instantiate() as instance:
        for number in range(3):
            print("python", number, flush=True)
            instance.call("_start")
        assert instance.stdout == b""
    assert capfd.readouterr().out == "".join(f"python {number}\nhello\n" for number in range(3))


def test_wasi_exit_raises_with_the_status(host: Host) -> None:
    with host.prepare(WASI, wasi=Wasi(stdout="capture")).instantiate() as instance:
        instance.call("_start")
        statuses = {0: 0, 1: 1, 3: 3}
        if host.name == "wasmer":
            statuses.update({256: 0, -1: 255})
        for given, status in statuses.items():
            with pytest.raises(memslot.GuestExit) as caught:
                instance.call("exit", given)
            assert caught.value.code == status
        assert instance.stdout == b"hello\n"


def test_wasi_option_that_is_impossible_is_refused_by_name(host: Host) -> None:
    wrong: list[dict[str, Any]] = [
        {"preopened": {"/data": "/nonexistent"}},
        {"preopened": {"/data": "/tmp\0"}},
        {"preopened": {"/da\0ta": "/tmp"}},
        {"preopened": {"/data": 3}},
        {"arguments": ["a\0b"]},
        {"arguments": [3]},
        {"arguments": "text"},
        {"program": "\0"},
        {"environment": {"a": "c\0"}},
        {"environment": {"a\0": "c"}},
        {"environment": {"a=b": "c"}},
        {"environment": {"": "c"}},
        {"environment": {"a": "\udcff"}},
    ]
    for options in wrong:
        with pytest.raises(memslot.SettingError, match=r"wasi .*is not allowed.*: \w+"):
            host.prepare(WASI, wasi=Wasi(**options)).instantiate()
        assert in_use(host) == 0


@pytest.mark.parametrize("wasi", [None, Wasi()], ids=["alone", "in-part"])
def test_wasi_given_as_imports_of_the_embedder_is_used(host: Host, wasi: Wasi | None) -> None:
    text = """(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1) (func (export "f") (call $exit (i32.const 7))))"""
    seen: list[int] = []
    imports = {"wasi_snapshot_preview1": {"proc_exit": seen.append}}
    with host.prepare(text, wasi=wasi, imports=imports).instantiate() as instance:
        instance.call("f")
    assert seen == [7]


def test_instance_that_is_running_cannot_be_ended(host: Host) -> None:
    refused: list[Any] = []

    def end(_: int) -> int:
        for attempt in (running.close, running.reset, lambda: host.close(force=True)):
            with pytest.raises(memslot.InUse):
                attempt()
            refused.append(attempt)
        return int(running.memory.byte_size)

    with calling(host, end).instantiate() as running:
        assert running.call("run", 0) == PAGE
        assert len(refused) == 3
        assert not running.closed


def test_instance_dropped_during_its_call_ends_when_the_call_returns(host: Host) -> None:
    function = calling(host, lambda _: in_use(host)).instantiate().function("run")
    gc.collect()
    assert function(0) == 1
    assert in_use(host) == 0
    with pytest.raises(memslot.UsedAfterClose):
        function(0)
