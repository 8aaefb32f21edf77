"""Every host does the same: calls, growth, traps, imports, WASI, ends; and each mistake is a clear error."""

from __future__ import annotations

import functools
import gc
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import hookimpl
from memslot_plugin import Guest, Host, Instance, Wasi
from memslot_plugin.smaps import status_bytes
from memslot_plugin.tests import hosts
from memslot_plugin.tests.hosts import CALLS_OUT, PAGE, STARTS_BADLY, WASI, Raises, check, in_use
from memslot_plugin.tests.patience import count_objects
from memslot_plugin.tests.profiles import FACTOR

Serve = Callable[..., AbstractContextManager[Host]]

on_runtimes = pytest.mark.parametrize("name", hosts.RUNTIMES, indirect=True)
on_deciding_hosts = pytest.mark.parametrize("name", hosts.DECIDING, indirect=True)


@pytest.fixture(scope="module", autouse=True)
def _wasi_runtime(_probed: None) -> None:
    hosts.start_wasi()


@pytest.fixture(params=hosts.HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    """The host's name."""
    return str(request.param)


@pytest.fixture
def serve(name: str, no_leaks: None) -> Serve:
    """Opens the host with settings of the test's own."""
    return functools.partial(hosts.serving, name)


@pytest.fixture
def host(serve: Serve) -> Iterator[Host]:
    with serve(slots=8) as opened:
        yield opened


@pytest.fixture
def guest(host: Host) -> Guest:
    return hosts.prepare(host)


@pytest.fixture
def instance(guest: Guest) -> Iterator[Instance]:
    with guest.instantiate() as started:
        yield started


def calling(host: Host, function: Any, text: str = CALLS_OUT) -> Guest:
    """A guest whose functions call this one."""
    return host.prepare(text, imports={"env": {"f": function}})


def test_next_instance_finds_nothing_in_the_same_slot(host: Host, guest: Guest) -> None:
    bases = set()
    for _ in range(3):
        with guest.instantiate() as instance:
            bases.add(instance._live().locate(0)[0])
            assert instance.memory.read(0, 16) == bytes(8) + b"hello" + bytes(3)
            assert instance.memory.read(2 * PAGE - 1, 1) == b"\0"
            instance.memory.write(0, b"\xff" * 16)
            instance.call("set", 2 * PAGE - 1, 255)
        check(host)
    assert len(bases) == 1


@on_runtimes
def test_function_of_before_a_reset_by_a_new_instance_is_refused(instance: Instance) -> None:
    assert instance.call("grow", 1) == 2
    stale = instance.function("get")
    instance.reset()
    with pytest.raises(memslot.UsedAfterClose):
        stale(8)
    assert instance.call("get", 8) == ord("h")


@on_runtimes
def test_results_are_none_one_value_or_a_list(host: Host, instance: Instance) -> None:
    assert instance.call("nop") is None
    assert instance.call("add", -1, 2**63, 1.5, 2.5) == 2.5
    assert instance.call("pair") == [1, 2]
    many = range(40)
    text = (
        f'(module (func (export "f") (param {"i32 " * len(many)}) (result {"i64 " * len(many)})'
        f"{' '.join(f'(i64.extend_i32_s (local.get {place}))' for place in reversed(many))}))"
    )
    with host.prepare(text).instantiate() as taking:
        assert taking.call("f", *many) == list(reversed(many))


@on_runtimes
def test_arguments_of_each_type_arrive_and_integers_come_back_signed(instance: Instance) -> None:
    for number in (0, 1, -1, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, True):
        assert instance.call("same32", number) == (number + 2**31) % 2**32 - 2**31
    for number in (0, -1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1):
        assert instance.call("same64", number) == (number + 2**63) % 2**64 - 2**63
    for given, got in ((1.0, 1.0), (0.1, 0.10000000149011612), (-0.0, -0.0), (1e300, float("inf"))):
        assert repr(instance.call("samef", given)) == repr(got)
    assert repr(instance.call("samef", float("nan"))) == "nan"


@on_runtimes
def test_arguments_that_do_not_fit_are_named(instance: Instance) -> None:
    for function, arguments, said in (
        ("same32", (), "1 (values|arguments).*0 were given"),
        ("set", (1,), "2 (values|arguments).*1 were given"),
        ("nop", (1,), "0 (values|arguments).*1 were given"),
        ("same32", (1.0,), "value 1 is an i32, and 1.0 is no integer"),
        ("same32", ("1",), "value 1 is an i32, and '1' is no integer"),
        ("set", (1, None), "value 2 is an i32, and None is no integer"),
        ("same32", ([1],), r"value 1 is an i32, and \[1\] is no integer"),
        ("same32", (2**32,), "value 1 is an i32, and 4294967296 is not in -2"),
        ("same32", (-(2**31) - 1,), "value 1 is an i32, and -2147483649 is not in -2"),
        ("same64", (2**64,), "value 1 is an i64, and 18446744073709551616 is not in -"),
        ("samef", ("x",), "value 1 is an f32, and 'x' is no (number|float)"),
        ("samef", (10**400,), "too large|is no float"),
        ("add", (1, 2, 3.0, None), "value 4 is an f64, and None is no (number|float)"),
    ):
        with pytest.raises(memslot.ArgumentError, match=f"{function} of .*echo.*{said}") as caught:
            instance.call(function, *arguments)
        assert isinstance(caught.value, TypeError)
    assert instance.call("get", 8) == ord("h")


@on_runtimes
def test_globals_are_read_and_set_within_their_types(instance: Instance) -> None:
    assert (instance.global_value("count"), instance.global_value("fixed")) == (5, 7)
    instance.set_global("count", 41)
    assert instance.call("next") == 42
    instance.set_global("real", 2.0)
    assert instance.global_value("real") == 2.0
    with pytest.raises(memslot.ArgumentError, match="not mutable"):
        instance.set_global("fixed", 1)
    for wrong in ("x", 2**64, 1.5):
        with pytest.raises(memslot.ArgumentError):
            instance.set_global("count", wrong)
    kinds = {name: instance.exports[name] for name in ("memory", "fixed", "get")}
    assert kinds == {"memory": "memory", "fixed": "global", "get": "func"}


MISSING_EXPORT = {
    "fake": "the fake host has no function {!r}; it has get, grow, set",
    "wasmtime": "the guest echo exports no func {!r}; it exports: add, divide, ",
    "wasmer": "echo has no func {!r}: it exports nothing of that name",
}


def test_export_that_does_not_exist_is_named(name: str, instance: Instance) -> None:
    for missing in ("lod", "", "__class__", "keys", "load\0"):
        said = re.escape(MISSING_EXPORT[name].format(missing))
        with pytest.raises(memslot.ExportNotFound, match=said):
            instance.call(missing)
    wrong = ["lod", "get"] if name == "fake" else ["lod", "get", "memory"]
    for other in wrong:
        for use in (instance.global_value, lambda name: instance.set_global(name, 1)):
            with pytest.raises(memslot.ExportNotFound, match=other):
                use(other)
    if name != "fake":
        for other, kind in (("memory", "memory"), ("count", "global")):
            with pytest.raises(memslot.ExportNotFound, match=rf"{other}.* a {kind}\b"):
                instance.call(other)


@on_runtimes
def test_exports_named_as_attributes_of_python_are_found(host: Host) -> None:
    text = """(module (func (export "__class__") (result i32) (i32.const 3))
                      (func (export "__len__") (result i32) (i32.const 4))
                      (func (export "") (result i32) (i32.const 5)))"""
    with host.prepare(text).instantiate() as instance:
        assert [instance.call(name) for name in ("__class__", "__len__", "")] == [3, 4, 5]


@on_runtimes
def test_guest_without_a_memory_has_none_to_read(host: Host) -> None:
    with host.prepare("(module)").instantiate() as instance:
        assert instance.memories == ()
        with pytest.raises(memslot.ExportNotFound, match="no linear memory"):
            instance.memory.read(0, 1)
        with pytest.raises(memslot.ExportNotFound, match=r"it exports: none|exports nothing"):
            instance.call("f")


def test_offsets_and_data_of_wrong_types_are_refused(instance: Instance) -> None:
    memory: Any = instance.memory
    for offset, length in (("0", 1), (0, "1"), (0.0, 1), (None, 1)):
        with pytest.raises(memslot.ArgumentError, match="offset and length are integers, in"):
            memory.read(offset, length)
    with pytest.raises(memslot.ArgumentError, match="offset and length are integers"):
        memory.write("0", b"x")
    for data in ("text", 3, None):
        with pytest.raises(memslot.ArgumentError, match="what is written are bytes"):
            memory.write(0, data)


@on_runtimes
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


@on_runtimes
def test_instance_dropped_during_its_call_ends_when_the_call_returns(host: Host) -> None:
    function = calling(host, lambda _: in_use(host)).instantiate().function("run")
    gc.collect()
    assert function(0) == 1
    assert in_use(host) == 0
    with pytest.raises(memslot.UsedAfterClose):
        function(0)


def test_closed_guest_gives_its_image_back(host: Host, resources: Any) -> None:
    before = resources()
    with hosts.prepare(host) as guest:
        guest.instantiate().close()
        assert (resources().image_mappings > before.image_mappings) == (
            "memfd" in {pool.plugin for pool in host.statistics().pools if pool.created}
        )
    now = resources()
    assert (now.image_mappings, now.descriptors) == (before.image_mappings, before.descriptors)


def test_growth_by_the_embedder_is_made_or_refused(name: str, instance: Instance) -> None:
    assert (instance.memory.grow(1), instance.memory.grow(0), instance.call("size")) == (2, 3, 3)
    instance.memory.write(3 * PAGE - 1, b"!")
    assert instance.call("get", 3 * PAGE - 1) == ord("!")
    for pages in (-1, 2**60):
        error = memslot.ArgumentError if name == "wasmer" else memslot.GrowthRefused
        with pytest.raises(error, match=r"memory 0 of (the guest )?echo"):
            instance.memory.grow(pages)


@on_deciding_hosts
def test_growth_is_decided_by_a_plugin_within_the_memory_limit(serve: Serve) -> None:
    growth = hosts.Growth(False)
    limited = serve(plugins=(growth,), memory_limit=3 * PAGE + 5)
    with limited as host, hosts.prepare(host).instantiate() as instance:
        assert (instance.call("grow", 1), instance.memory.byte_size) == (-1, 2 * PAGE)
        with pytest.raises(memslot.GrowthRefused):
            instance.memory.grow(1)
        growth.answer = None
        assert [instance.call("grow", pages) for pages in (2, 1, 1)] == [-1, 2, -1]
        assert growth.asked == [3 * PAGE] * 3


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, memslot.MemslotError])
def test_growth_raises_what_the_plugin_raised(serve: Serve, kind: type[BaseException]) -> None:
    error = kind("no")
    growth = hosts.Growth(error)
    with serve(plugins=(growth,)) as host:
        with hosts.prepare(host).instantiate() as instance:
            for grow in (lambda: instance.call("grow", 1), lambda: instance.memory.grow(1)):
                with pytest.raises(kind) as caught:
                    grow()
                assert caught.value is error
            growth.answer = None
            # wasmer tells of a growth that it has made.
            assert instance.call("size") == (4 if host.name == "wasmer" else 2)
        with hosts.prepare(host).instantiate() as instance:
            assert instance.call("grow", 1) == 2


def test_traps_are_guest_traps_and_the_instance_goes_on(name: str, instance: Instance) -> None:
    traps: list[tuple[str, tuple[int, ...], str]] = [
        ("trap", (), "unreachable"),
        ("get", (2 * PAGE,), "out of bounds memory access"),
        ("get", (-1,), "out of bounds memory access"),
    ]
    if name != "fake":
        traps += [
            ("divide", (1, 0), "integer divide by zero"),
            ("recurse", (), "call stack exhausted"),
        ]
    for function, arguments, said in traps:
        with pytest.raises(memslot.GuestTrap, match=said) as caught:
            instance.call(function, *arguments)
        assert isinstance(caught.value, RuntimeError)
    assert instance.call("get", 2 * PAGE - 1) == 0


@on_runtimes
def test_trap_of_a_start_function_gives_the_slot_back(serve: Serve) -> None:
    with serve(slots=1) as host:
        guest = host.prepare(STARTS_BADLY)
        for _ in range(3):
            with pytest.raises(memslot.GuestTrap, match="unreachable"):
                guest.instantiate()
            assert in_use(host) == 0
        with hosts.prepare(host).instantiate() as instance:
            assert instance.call("get", 8) == ord("h")


BUILTIN = (RuntimeError, TypeError, OverflowError, RecursionError, KeyboardInterrupt, SystemExit)


@on_runtimes
@pytest.mark.parametrize("kind", [*BUILTIN, memslot.GuestTrap])
def test_import_that_raises_is_heard_as_it_is(host: Host, kind: type[BaseException]) -> None:
    error = kind("RuntimeError: unreachable")  # as wasmer says it
    raises = Raises(error)

    def plain(number: int) -> int:
        return raises(number)

    for function in (raises, raises.__call__, plain, functools.partial(plain)):
        with calling(host, function).instantiate() as instance:
            for _ in range(2):
                with pytest.raises(kind) as caught:
                    instance.call("run", 1)
                assert caught.value is error
            assert instance.memory.byte_size == PAGE
    error.__traceback__ = None


@on_runtimes
def test_import_that_raises_in_a_start_function_is_heard_as_it_is(host: Host) -> None:
    text = """(module (import "env" "f" (func $f (param i32) (result i32))) (memory (export "m") 1)
        (func $s (i32.store (i32.const 0) (i32.const 9)) (drop (call $f (i32.const 1)))) (start $s))"""
    error = RuntimeError("mine")
    guest = calling(host, Raises(error), text)
    for _ in range(3):
        with pytest.raises(RuntimeError) as caught:
            guest.instantiate()
        assert caught.value is error
        assert in_use(host) == 0
    with guest.instantiate(imports={"env": {"f": abs}}) as instance:
        assert instance.memory.read(0, 1) == b"\x09"
    error.__traceback__ = None


@on_runtimes
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


@on_runtimes
def test_import_that_returns_what_it_did_not_declare_is_named(name: str, host: Host) -> None:
    for wrong, said in (
        ("x", "'x' is no integer"),
        (2**40, "not in"),
        (None, "None is no integer"),
        ([1], "no integer"),
        (object(), "no integer"),
    ):
        named = (memslot.ArgumentError, f"env.f returned.*{said}")
        error, match = (memslot.LinkError, "host function") if name == "wasmer" else named
        with calling(host, lambda _, wrong=wrong: wrong).instantiate() as instance:
            with pytest.raises(error, match=match):
                instance.call("run", 1)
            with pytest.raises(memslot.ArgumentError):
                instance.call("run", "x")


@on_runtimes
def test_import_may_return_several_values(host: Host) -> None:
    text = """(module (import "env" "f" (func $f (param i32) (result i32 i64)))
      (func (export "two") (result i32 i64) (call $f (i32.const 4))))"""
    for function in (lambda value: (value, 2), lambda value: [value, 2]):
        with calling(host, function, text).instantiate() as instance:
            assert instance.call("two") == [4, 2]


@on_runtimes
def test_imports_of_an_instance_replace_those_of_its_guest(host: Host) -> None:
    guest = calling(host, lambda number: number + 1)
    with (
        guest.instantiate() as first,
        guest.instantiate(imports={"env": {"f": lambda number: number * 2}}) as second,
    ):
        assert (first.call("run", 41), second.call("run", 21)) == (42, 42)
        second.reset()
        assert (first.call("twice", 1), second.call("twice", 1)) == (4, 4)


@on_runtimes
def test_import_may_call_back_and_into_new_instances(host: Host) -> None:
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


@on_runtimes
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


@on_runtimes
def test_import_that_is_no_function_is_named(host: Host) -> None:
    text = '(module (import "env" "g" (global i32)) (memory 1))'
    for imports in ({}, {"env": {"g": 4}}):
        with pytest.raises(memslot.LinkError, match=r"env\.g, a global.* given"):
            host.prepare(text, imports=imports).instantiate()
    assert in_use(host) == 0


@on_runtimes
@pytest.mark.parametrize("given_to", ["guest", "instance"])
def test_import_is_forgotten_with_what_needed_it(host: Host, given_to: str) -> None:
    class Function:
        def __call__(self, number: int) -> int:
            return number

    function = Function()
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


@on_runtimes
def test_wasi_gives_arguments_environment_and_folders(host: Host, tmp_path: Path) -> None:
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


@on_runtimes
def test_wasi_captures_each_stream_up_to_the_limit(host: Host) -> None:
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


@on_runtimes
def test_wasi_discards_a_stream_and_has_nothing_to_read(host: Host, capfd: Any) -> None:
    with host.prepare(WASI, wasi=Wasi(stdout="discard")).instantiate() as instance:
        assert instance.call("write", 1, 0, 1, 100) == 0
        assert instance.call("read", 0) == 0
        assert instance.memory.read(100, 4) == bytes(4)
        assert instance.stdout == b""
    assert capfd.readouterr().out == ""


@on_runtimes
def test_wasi_inherits_a_stream_in_order(host: Host, capfd: Any) -> None:
    with host.prepare(WASI, wasi=Wasi()).instantiate() as instance:
        for number in range(3):
            print("python", number, flush=True)
            instance.call("_start")
        assert instance.stdout == b""
    assert capfd.readouterr().out == "".join(f"python {number}\nhello\n" for number in range(3))


@on_runtimes
def test_wasi_exit_has_the_status(host: Host) -> None:
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


@on_runtimes
def test_wasi_that_cannot_be_is_refused_by_name(host: Host) -> None:
    wrong: list[dict[str, Any]] = [{"preopened": {"/data": "/nonexistent"}}]
    if host.name == "wasmer":
        wrong += [{"arguments": ["a\0b"]}, {"environment": {"a=b": "c"}}, {"arguments": [3]}]
    for options in wrong:
        with pytest.raises(memslot.SettingError, match=r"wasi .*is not allowed.*: \w+"):
            host.prepare(WASI, wasi=Wasi(**options)).instantiate()
        assert in_use(host) == 0


@on_runtimes
@pytest.mark.parametrize("wasi", [None, Wasi()], ids=["alone", "in-part"])
def test_wasi_may_be_the_embedders_own(host: Host, wasi: Wasi | None) -> None:
    text = """(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1) (func (export "f") (call $exit (i32.const 7))))"""
    seen: list[int] = []
    imports = {"wasi_snapshot_preview1": {"proc_exit": seen.append}}
    with host.prepare(text, wasi=wasi, imports=imports).instantiate() as instance:
        instance.call("f")
    assert seen == [7]


def test_host_is_opened_by_name_with_settings_as_keywords(name: str) -> None:
    with memslot.open_host(name, slots=2) as host:
        assert (host.name, host.settings.slots) == (name, 2)
    assert memslot.available_hosts()[name] is None
    with pytest.raises(memslot.SettingError, match="slots = 0 is not allowed"):
        memslot.open_host(name, slots=0)


@on_runtimes
def test_host_auto_is_the_first_runtime_that_is_installed(name: str) -> None:
    with memslot.open_host("auto") as host:
        assert host.name == ("wasmtime" if hosts.missing("wasmtime") is None else name)


def test_failed_reset_closes_the_instance_and_loses_no_slot(
    name: str, no_leaks: None, inject: Any
) -> None:
    with hosts.opened(name, slots=2, reset="madvise") as host:
        guest = hosts.prepare(host)
        for end in (Instance.reset, Instance.close):
            instance = guest.instantiate()
            inject("madvise", error=12)
            with pytest.raises(memslot.SystemCallError, match="MADV_DONTNEED in a reset"):
                end(instance)
            assert instance.closed
            assert in_use(host) == 0
        with guest.instantiate() as first, guest.instantiate() as second:
            assert first.memory.read(8, 5) == second.memory.read(8, 5) == b"hello"
        assert sum(pool.failed_resets for pool in host.statistics().pools) == 2


class Refuses:
    """Lets every release fail, as a kernel may refuse a reset."""

    failing = True

    @hookimpl(wrapper=True)
    def memslot_release_memory(self) -> Any:
        result = yield
        if self.failing:
            raise memslot.SystemCallError(12, "the kernel refuses")
        return result


def test_forced_close_goes_on_after_a_failed_release(name: str, caplog: Any) -> None:
    host = hosts.opened(name, plugins=(Refuses(),))
    guest = hosts.prepare(host)
    instances = [guest.instantiate() for _ in range(3)]
    host.close(force=True)
    assert all(instance.closed for instance in instances)
    assert caplog.text.count("the kernel refuses") == 3


def test_dropped_instance_whose_release_fails_is_no_error_of_the_next_caller(
    serve: Serve, caplog: Any
) -> None:
    refuses = Refuses()
    with serve(plugins=(refuses,)) as host:
        guest = hosts.prepare(host)
        guest.instantiate()
        gc.collect()
        with guest.instantiate():
            assert "the kernel refuses" in caplog.text
            refuses.failing = False


@on_deciding_hosts
@pytest.mark.parametrize("forced", [False, True])
def test_closing_again_gives_back_what_could_not_be_unmapped(
    name: str, no_leaks: None, inject: Any, forced: bool
) -> None:
    host = hosts.opened(name)
    with hosts.prepare(host) as guest:
        guest.instantiate().close()
    inject("munmap", error=12)
    with pytest.raises(memslot.SystemCallError, match="unmapping the pool's reservation"):
        host.close(force=forced)
    with pytest.raises(memslot.UsedAfterClose):
        hosts.prepare(host)
    host.close(force=forced)
    host.close()


@on_runtimes
@pytest.mark.scales
def test_many_instances_leave_the_process_as_it_was(serve: Serve) -> None:
    def requests(count: int) -> None:
        for number in range(count):
            with writing.instantiate() as instance:
                instance.call("_start")
                assert instance.stdout == b"hello\n"
            with guest.instantiate() as instance:
                instance.call("set", number % PAGE, 1)
                if number % 50 == 0:
                    instance.call("grow", 1)
                    with pytest.raises(memslot.GuestTrap):
                        instance.call("trap")
                    assert instance.native is not None

    def measured() -> SimpleNamespace:
        gc.collect()
        return SimpleNamespace(
            descriptors=len(list(Path("/proc/self/fd").iterdir())),
            mappings=Path("/proc/self/maps").read_bytes().count(b"\n"),
            objects=count_objects(),
            resident=status_bytes("VmRSS"),
        )

    with serve() as host:
        guest, writing = hosts.prepare(host), host.prepare(WASI, wasi=Wasi(stdout="capture"))
        requests(300)
        before = measured()
        requests(1000 * FACTOR)
        after = measured()
    assert after.descriptors == before.descriptors
    assert abs(after.mappings - before.mappings) <= 8
    assert after.objects - before.objects < 200
    assert after.resident - before.resident < 2 << 20
