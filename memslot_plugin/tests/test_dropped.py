"""Handles that are dropped instead of closed: a collection at any moment gives everything back, on each host."""

from __future__ import annotations

import ctypes
import gc
import importlib
import signal
import sys
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from memslot_plugin import Guest, Host, Instance, UsedAfterClose
from memslot_plugin.hosts.leases import Handle
from memslot_plugin.tests import hosts
from memslot_plugin.tests.leaks import Footprint

on_hosts = pytest.mark.parametrize("name", hosts.HOSTS)
on_runtimes = pytest.mark.parametrize("name", hosts.RUNTIMES)

pytestmark = pytest.mark.usefixtures("no_leaks")


@contextmanager
def collecting_every(objects: int) -> Iterator[None]:
    """Collect garbage after this many allocations."""
    before = gc.get_threshold()
    gc.set_threshold(objects)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Response:
    """A response that streams the output of a guest and refers to itself: only a collection ends it."""

    def __init__(self, guest: Guest, how: str) -> None:
        self.itself = self
        self.body = self.stream(guest, how)
        next(self.body)

    @staticmethod
    def stream(guest: Guest, how: str) -> Generator[bytes, None, None]:
        with getattr(guest, how)() as instance:
            while True:
                yield instance.memory.read(0, 1)


@pytest.mark.parametrize("how", ["instantiate", "lease"])
@on_hosts
def test_stream_that_is_collected_while_its_thread_changes_the_pool_ends(
    name: str, how: str
) -> None:
    with hosts.serving(name, slots=50) as host, hosts.prepare(host) as guest:
        for objects in (5, 7, 700):
            with collecting_every(objects):
                for number in range(100):
                    Response(guest, how)
                    if number % 40 == 39:  # a threshold of its own may be too high for 50 slots
                        gc.collect()
            gc.collect()


@on_hosts
def test_signal_handler_may_ask_for_statistics_at_any_moment(name: str) -> None:
    asked: list[Any] = []
    with hosts.serving(name) as host:
        guest = hosts.prepare(host)
        before = signal.signal(signal.SIGALRM, lambda *_: asked.append(host.statistics()))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
            while len(asked) < 50:
                guest.instantiate().close()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert {each.live_instances for each in asked} <= {0, 1}


SUM = """(module
  (import "env" "sum" (func $sum (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "add_one") (param i32) (result i32) (call $sum (local.get 0) (i32.const 1))))"""


@contextmanager
def knowing_itself(host: Host, given_to: str) -> Iterator[Instance]:
    """Make an instance that its own host function refers to. The guest or the instance is given the function."""
    known: list[object] = []

    def add(one: int, other: int) -> int:
        assert known
        return one + other

    imports = {"env": {"sum": add}}
    if given_to == "guest":
        instance = host.prepare(SUM, imports=imports).instantiate()
    else:
        instance = host.prepare(SUM).instantiate(imports=imports)
    known += instance, instance.function("add_one"), instance.memory
    yield instance


@pytest.mark.parametrize("given_to", ["guest", "instance"])
@on_runtimes
def test_instance_that_its_imports_refer_to_is_released_by_a_collection(
    name: str, given_to: str
) -> None:
    with hosts.serving(name, slots=2) as host:
        for _ in range(10):
            with knowing_itself(host, given_to) as instance:
                assert instance.call("add_one", 41) == 42
            del instance
            gc.collect()
        assert host.statistics().live_instances == 0
        assert host.statistics().guests == 0


@pytest.mark.parametrize("given_to", ["guest", "instance"])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "open"])
@on_runtimes
def test_host_that_an_import_refers_to_is_released_by_a_collection(
    name: str, given_to: str, closed: bool
) -> None:
    host = hosts.opened(name)
    with knowing_itself(host, given_to) as instance:
        instance.call("add_one", 41)
    found = weakref.ref(host)
    if closed:
        instance.close()
        host.close()
    del host, instance
    gc.collect()
    assert found() is None  # and `no_leaks` looks for its reservation and its descriptors


@on_hosts
def test_host_that_is_dropped_is_released_by_a_collection(name: str) -> None:
    before = Footprint.now()
    for _ in range(20):
        host = hosts.opened(name)
        guest = hosts.prepare(host)
        kept = [guest.instantiate(), guest.instantiate().function("get")]
        with guest.lease() as instance:
            instance.call("set", 0, 1)
        assert kept
    del host, guest, kept, instance
    assert Footprint.now().lost_since(before, mappings=20) == []


@on_hosts
def test_slot_of_a_dropped_pool_stays_mapped_while_a_memory_has_it(name: str) -> None:
    instance = hosts.prepare(hosts.opened(name)).instantiate()
    memory = instance.enter().memories[0]
    del instance
    gc.collect()
    assert ctypes.string_at(memory.base, 1)


@on_hosts
def test_instance_whose_finalizer_is_interrupted_gives_its_slot_back(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Handle) -> None:
        raise KeyboardInterrupt

    heard: list[Any] = []
    with hosts.serving(name) as host:
        guest = hosts.prepare(host)
        with monkeypatch.context() as patch:
            patch.setattr(Handle, "__del__", interrupted)
            patch.setattr(sys, "unraisablehook", lambda each: heard.append(each.exc_type))
            guest.instantiate()
        assert heard == [KeyboardInterrupt]
        assert host.statistics().live_instances == 0


@pytest.mark.parametrize("step", ["__init__", "reset_in_place"])
@on_hosts
def test_lease_that_is_interrupted_gives_its_slot_back_without_a_collection(
    name: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = getattr(Instance, step)

    def interrupted(*arguments: Any) -> None:
        monkeypatch.undo()
        if step == "reset_in_place":
            done(*arguments)
        raise KeyboardInterrupt

    with hosts.serving(name, slots=1) as host, hosts.prepare(host) as guest:
        for _ in range(2):
            with guest.lease() as instance:
                instance.call("set", 0, 1)
        gc.disable()
        try:
            monkeypatch.setattr(Instance, step, interrupted)
            with pytest.raises(KeyboardInterrupt), guest.lease() as instance:
                instance.call("set", 0, 1)
            with guest.lease() as following:
                assert following.call("get", 0) == 0
            with pytest.raises(UsedAfterClose):
                instance.call("get", 0)
        finally:
            gc.enable()


@pytest.mark.parametrize("name", hosts.RUNTIMES[:1])
def test_import_in_an_own_store_can_be_called_after_instance_and_host_were_dropped(
    name: str,
) -> None:
    def make() -> tuple[Any, ...]:
        host = hosts.opened(name)
        store = importlib.import_module(name).Store(host.engine)
        instance = hosts.calling(host, lambda number: number + 1).instantiate(store=store)
        exports = instance.native.exports(store)
        return weakref.ref(host), store, exports["run"], exports["memory"]

    host, store, run, memory = make()
    gc.collect()
    assert run(store, 41) == 42
    assert memory.write(store, b"x") == 1
    del store
    gc.collect()
    assert host() is None
