"""Calls, growth, traps and ends on every host, and a clear error for each mistake."""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import hookimpl
from memslot_plugin import Guest, Host, Instance
from memslot_plugin.tests import hosts
from memslot_plugin.tests.faults import fail_next_reset
from memslot_plugin.tests.hosts import PAGE, STARTS_BADLY, assert_raises, check, in_use

Serve = Callable[..., AbstractContextManager[Host]]

on_runtimes = pytest.mark.parametrize("name", hosts.RUNTIMES, indirect=True)
on_deciding_hosts = pytest.mark.parametrize("name", hosts.DECIDING, indirect=True)


@pytest.fixture(params=hosts.HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    """Return the name of the host."""
    return str(request.param)


@pytest.fixture
def serve(name: str, no_leaks: None) -> Serve:
    """Return a function that opens the host with settings of the test."""
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


def test_next_instance_in_a_used_slot_finds_nothing(host: Host, guest: Guest) -> None:
    bases = set()
    for _ in range(3):
        with guest.instantiate() as instance:
            bases.add(instance.enter().locate(0)[0])
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
def test_call_of_any_function_returns_none_one_value_or_a_list(
    host: Host, instance: Instance
) -> None:
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
    integers, data = "offset and length are integers, in", "what is written are bytes"
    for use, arguments, said in (
        *((memory.read, wrong, integers) for wrong in (("0", 1), (0, "1"), (0.0, 1), (None, 1))),
        (memory.write, ("0", b"x"), integers),
        *((memory.write, (0, wrong), data) for wrong in ("text", 3, None)),
    ):
        with pytest.raises(memslot.ArgumentError, match=said):
            use(*arguments)


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


def test_memory_past_the_limit_is_refused_before_its_image_is_built(serve: Serve) -> None:
    class Builds:
        @hookimpl(tryfirst=True)
        def memslot_build_image(self, content: Any) -> None:
            raise AssertionError

    refused = pytest.raises(memslot.MemoryTooLarge, match=r"needs 131072 bytes.*memory_limit")
    with serve(plugins=(Builds(),), memory_limit=PAGE) as host, refused:
        hosts.prepare(host)


@on_deciding_hosts
def test_growth_within_the_memory_limit_is_decided_by_a_plugin(serve: Serve) -> None:
    growth = hosts.Growth(False)
    limited = serve(plugins=(growth,), memory_limit=3 * PAGE + 5)
    with limited as host, hosts.prepare(host).instantiate() as instance:
        assert (instance.call("grow", 1), instance.memory.byte_size) == (-1, 2 * PAGE)
        with pytest.raises(memslot.GrowthRefused):
            instance.memory.grow(1)
        growth.answer = None
        assert [instance.call("grow", pages) for pages in (2, 1, 1)] == [-1, 2, -1]
        assert growth.asked == [3 * PAGE] * 3


def test_growth_is_reported_and_a_failing_watcher_changes_nothing(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    grown = hosts.Grown()
    with serve(plugins=(grown,)) as host, hosts.prepare(host).instantiate() as instance:
        assert (instance.call("grow", 1), instance.memory.grow(0)) == (2, 3)
        assert grown.sizes == [3 * PAGE]
        grown.error = RuntimeError("no")
        assert (instance.memory.grow(1), instance.call("size")) == (3, 4)
        assert grown.sizes == [3 * PAGE, 4 * PAGE]
        instance.reset()
        assert (instance.call("size"), grown.sizes) == (2, [3 * PAGE, 4 * PAGE])
    assert caplog.text.count("plugin Grown failed in memslot_memory_grown") == 1


@on_deciding_hosts
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, memslot.MemslotError])
def test_growth_decided_by_a_plugin_that_raises_raises_its_error(
    serve: Serve, kind: type[BaseException]
) -> None:
    error = kind("no")
    growth = hosts.Growth(error)
    with serve(plugins=(growth,)) as host:
        with hosts.prepare(host).instantiate() as instance:
            assert_raises(error, lambda: instance.call("grow", 1))
            assert_raises(error, lambda: instance.memory.grow(1))
            growth.answer = None
            assert instance.call("size") == 2
        with hosts.prepare(host).instantiate() as instance:
            assert instance.call("grow", 1) == 2


@on_deciding_hosts
def test_growth_refused_once_the_slot_has_grown_leaves_the_next_lease_its_size(
    serve: Serve,
) -> None:
    class Refuses:
        """A plugin that lets the memory grow, and refuses then."""

        @hookimpl(wrapper=True)
        def memslot_grow_memory(self) -> Generator[None, bool, bool]:
            yield
            return False

    with serve(plugins=(Refuses(),)) as host, hosts.prepare(host) as guest:
        for _ in range(3):
            with guest.lease() as instance:
                assert instance.memory.byte_size == 2 * PAGE
                with pytest.raises(memslot.AccessOutOfBounds):
                    instance.memory.read(2 * PAGE, 1)
                assert instance.call("grow", 1) == -1


def test_trap_of_any_kind_raises_guest_trap_and_the_instance_goes_on(
    name: str, instance: Instance
) -> None:
    traps: list[tuple[str, tuple[int, ...], str]] = [
        ("trap", (), "unreachable"),
        ("get", (2 * PAGE,), "out of bounds memory access"),
        ("get", (-1,), "out of bounds memory access"),
        ("divide", (1, 0), "integer divide by zero"),
        ("recurse", (), "call stack exhausted"),
    ]
    for function, arguments, said in traps[: 3 if name == "fake" else None]:
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
        # wasmer grew the memory in the start function by itself: such slots are destroyed.
        assert host.statistics().pools[0].destroyed == (3 if host.name == "wasmer" else 0)
        with hosts.prepare(host).instantiate() as instance:
            assert instance.call("get", 8) == ord("h")


def test_host_is_opened_by_name_or_as_the_first_runtime_with_settings_as_keywords(
    name: str,
) -> None:
    with memslot.open_host(name, slots=2) as host:
        assert (host.name, host.settings.slots) == (name, 2)
    assert memslot.available_hosts()[name] is None
    with pytest.raises(memslot.SettingError, match=r"slots: expected .*, got 0"):
        memslot.open_host(name, slots=0)
    if hosts.INSTALLED:
        with memslot.open_host("auto") as host:
            assert host.name == hosts.INSTALLED[0]


def test_failed_reset_closes_the_instance_and_loses_no_slot(
    name: str, no_leaks: None, inject: Any
) -> None:
    with hosts.opened(name, slots=2, reset="madvise") as host:
        guest = hosts.prepare(host)
        for end in (Instance.reset, Instance.close):
            instance = guest.instantiate()
            fail_next_reset(inject, 12)
            with pytest.raises(memslot.SystemCallError, match="mapping over a slot in a reset"):
                end(instance)
            assert instance.closed
            assert ", closed" in repr(instance)
            assert in_use(host) == 0
        with guest.instantiate() as first, guest.instantiate() as second:
            assert first.memory.read(8, 5) == second.memory.read(8, 5) == b"hello"
        assert sum(pool.failed_resets for pool in host.statistics().pools) == 2


class Refuses:
    """A plugin that fails each release, as a kernel may refuse a reset."""

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
def test_close_that_cannot_unmap_the_pool_closes_the_host_and_leaks_address_space(
    name: str, inject: Any, caplog: pytest.LogCaptureFixture, forced: bool
) -> None:
    host = hosts.opened(name)
    with hosts.prepare(host) as guest:
        guest.instantiate().close()
    inject("munmap", error=12)
    host.close(force=forced)
    assert "bytes of address space: Cannot allocate memory" in caplog.text
    with pytest.raises(memslot.UsedAfterClose):
        hosts.prepare(host)
