"""Entries: each use of a handle is one, and is refused once the lease of the handle has ended."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import InitialContent, LinearMemory, hookimpl
from memslot_plugin.tests import hosts
from memslot_plugin.tests.hosts import DECIDING, HOSTS, RUNTIMES

SECRET = b"a secret"


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Switch threads as often as CPython can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def handles(instance: memslot.Instance) -> dict[str, Callable[[], object]]:
    """Return a use of each handle that an instance hands out, made now."""
    memory, get, put = instance.memory, instance.function("get"), instance.function("set")
    return {
        "call": lambda: instance.call("set", 64, 1),
        "function that reads": lambda: get(64),
        "function that writes": lambda: put(64, 1),
        "read": lambda: memory.read(64, 1),
        "write": lambda: memory.write(64, b"x"),
        "size": lambda: memory.byte_size,
        "grow": lambda: memory.grow(1),
        "global": lambda: instance.global_value("count"),
        "set global": lambda: instance.set_global("count", 9),
        "stdout": lambda: instance.stdout,
        "reset": instance.reset,
        "snapshot": instance.snapshot,
        "fork": instance.fork,
        "native": lambda: instance.native,
    }


def refuses_all(uses: dict[str, Callable[[], object]]) -> None:
    for name, use in uses.items():
        with pytest.raises(memslot.UsedAfterClose, match="lease has ended"):
            pytest.fail(f"{name} gave {use()!r}")


@pytest.mark.parametrize("name", HOSTS)
def test_handles_of_a_lease_are_refused_once_it_has_ended(name: str) -> None:
    with hosts.serving(name) as host, hosts.prepare(host) as guest:
        with guest.lease() as first:
            old = handles(first)
        refuses_all(old)  # the instance waits
        with guest.lease() as second:
            refuses_all(old)  # the instance serves another lease
            first.close()
            assert second.memory.read(64, 8) == bytes(8)
            second.call("set", 64, 7)
            assert (second.call("get", 64), second.memory.byte_size) == (7, 2 * hosts.PAGE)
        assert (host.statistics().instances, first.closed) == (1, True)


@pytest.mark.parametrize("name", HOSTS)
def test_ended_handle_while_the_next_lease_is_reset_is_refused(name: str) -> None:
    middle = hosts.InTheMiddle()
    with hosts.serving(name, plugins=(middle,)) as host, hosts.prepare(host) as guest:
        with guest.lease() as first:
            old = handles(first)
        with guest.lease() as second:
            middle.action = lambda: refuses_all(old)
            second.reset()
            assert middle.action is None


@pytest.mark.parametrize("name", DECIDING)
def test_ended_handle_while_another_thread_is_in_the_next_lease_is_refused(name: str) -> None:
    with hosts.serving(name) as host, hosts.prepare(host) as guest:
        with guest.lease() as first:
            old = handles(first)
        with guest.lease() as second:
            live: Any = second.live
            live.acquire(second.generation, 1)
            assert hosts.elsewhere(lambda: refuses_all(old)) is None
            live.release(1)


@pytest.mark.parametrize("name", HOSTS)
def test_instance_is_in_use_and_not_closed_while_a_reset_makes_another_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    middle, seen = hosts.InTheMiddle(), list[object]()

    def end_lease() -> None:
        lease = guest.lease()
        lease._instance = instance
        lease.__exit__(None, None, None)

    def look() -> None:
        for use in (*handles_of_now.values(), instance.close, end_lease):
            with pytest.raises(memslot.InUse):
                seen.append(use())
        assert not instance.closed

    with hosts.serving(name, plugins=(middle,)) as host, hosts.prepare(host) as guest:
        with guest.lease() as instance:
            monkeypatch.setattr(instance.live, "can_restore", lambda: False)
            handles_of_now = {
                name: use
                for name, use in handles(instance).items()
                if "function" not in name  # these handles are of the instance that ends
            }
            middle.action = look
            instance.reset()
            assert (seen, instance.closed) == ([], False)
            assert instance.memory.read(64, 1) == b"\0"
        assert (hosts.in_use(host), len(guest.ready)) == (1, 1)


@pytest.mark.parametrize("name", DECIDING)
def test_close_and_reset_of_one_instance_give_its_memory_back_once(name: str) -> None:
    """The close begins after the reset ended the live instance, and before it took the memories."""
    with hosts.serving(name) as host, hosts.prepare(host) as guest:
        instance = guest.instantiate()
        instance.memory.grow(1)  # no reset in place
        live: Any = instance.live
        end, dispose = host.leases.end, live.close

        def dispose_and_close(generation: int | None = None) -> bool | None:
            live.close = dispose
            done: bool | None = dispose(generation)
            assert hosts.elsewhere(lambda: end(live, generation)) is None
            return done

        live.close = dispose_and_close
        with suppress(memslot.UsedAfterClose):  # if the other thread was first
            instance.reset()
        assert hosts.in_use(host) == (not instance.closed)
        instance.close()
        assert hosts.in_use(host) == 0
        instances = [guest.instantiate() for _ in range(4)]
        for each in instances:
            each.memory.write(64, SECRET)
            assert [other.memory.read(64, 8) for other in instances].count(SECRET) == 1
            each.close()
            instances[instances.index(each)] = guest.instantiate()
        for each in instances:
            each.close()


@pytest.mark.parametrize("name", DECIDING)
def test_instance_closed_while_a_reset_begins_is_closed_after_it(name: str) -> None:
    middle = hosts.InTheMiddle()
    with hosts.serving(name, plugins=(middle,)) as host, hosts.prepare(host) as guest:
        instance = guest.instantiate()
        instance.memory.grow(1)  # no reset in place

        def close() -> None:
            instance.live = None  # as a close that had begun before the reset leaves it

        middle.action = close
        with pytest.raises(memslot.UsedAfterClose):
            instance.reset()
        assert (instance.closed, hosts.in_use(host)) == (True, 0)


@pytest.mark.parametrize("name", DECIDING)
def test_reset_by_an_old_handle_does_not_end_the_next_lease(name: str) -> None:
    """The lease ends after the reset was let in."""
    with hosts.serving(name) as host, hosts.prepare(host) as guest:
        lease = guest.lease()
        old = lease.__enter__()
        live: Any = old.live
        live.can_restore = lambda: False
        dispose, following = live.close, guest.lease()
        kept: list[memslot.Instance] = []

        def lease_again(generation: int | None = None) -> bool | None:
            del live.close, live.can_restore
            old.live = live
            lease.__exit__(None, None, None)
            kept.append(following.__enter__())
            kept[0].memory.write(64, SECRET)
            return dispose(generation)  # type: ignore[no-any-return]

        live.close = lease_again
        with pytest.raises(memslot.UsedAfterClose):
            old.reset()
        host.statistics()  # the next call of the host ends dropped instances
        assert kept[0].memory.read(64, 8) == SECRET
        following.__exit__(None, None, None)


@pytest.mark.parametrize("name", HOSTS)
def test_handles_of_a_closed_instance_are_refused(name: str) -> None:
    with hosts.serving(name, slots=1) as host:
        guest = hosts.prepare(host)
        with guest.instantiate() as first:
            old = handles(first)
        with guest.instantiate() as second:
            refuses_all(old)
            assert second.memory.read(64, 8) == bytes(8)


@pytest.mark.parametrize("name", HOSTS)
def test_handle_after_a_reset_in_place_is_still_good(name: str) -> None:
    with hosts.started(name) as instance:
        get, put = instance.function("get"), instance.function("set")
        put(64, 7)
        instance.reset()
        assert (get(64), instance.memory.read(8, 5)) == (0, b"hello")


@pytest.mark.parametrize("name", RUNTIMES)
def test_argument_whose_index_calls_the_instance_arrives_unchanged(name: str) -> None:
    text = """(module (memory (export "memory") 1)
      (func (export "add") (param i64 i64) (result i64) (i64.add (local.get 0) (local.get 1))))"""

    class Calls(int):
        def __index__(self) -> int:
            instance.call("add", 100, 200)
            return 5

    with hosts.started(name, text) as instance:
        with suppress(memslot.ArgumentError):  # wasmer takes integers alone
            assert instance.call("add", 1, Calls(5)) == 6
        assert instance.call("add", 1, 2) == 3


@pytest.mark.parametrize("name", HOSTS)
def test_entry_during_a_reset_is_refused_on_the_same_thread_too(name: str) -> None:
    refused: list[type[BaseException]] = []

    class Enters:
        @hookimpl(tryfirst=True)
        def memslot_reset_memory(self, memory: LinearMemory) -> None:
            for use in (lambda: put(64, 7), lambda: view.read(0, 1), lambda: view.write(64, b"x")):
                with pytest.raises(memslot.InUse) as raised:
                    use()
                refused.append(raised.type)

    with hosts.serving(name, plugins=(Enters(),)) as host, hosts.prepare(host) as guest:
        with guest.lease() as instance:
            put, view = instance.function("set"), instance.memory
        assert refused == [memslot.InUse] * 3
        with guest.lease() as instance:
            assert instance.memory.read(64, 1) == b"\0"
            put, view = instance.function("set"), instance.memory


@pytest.mark.usefixtures("eager_switches")
@pytest.mark.parametrize("allocation", ["pooling", "on-demand"])
@pytest.mark.parametrize("name", [HOSTS[1]])
def test_memory_handle_of_an_ended_instance_never_reads_the_next_tenant(
    name: str, allocation: str
) -> None:
    current: list[memslot.Instance] = []
    stolen: list[bytes] = []
    stop = threading.Event()

    def use_old_handles() -> None:
        while not stop.is_set():
            for instance in current[-1:]:
                with suppress(memslot.UsedAfterClose, memslot.InUse):
                    stolen.extend({instance.memory.read(0, 8)} - {bytes(8)})
                    instance.memory.write(16, b"not mine")

    with hosts.serving(name, slots=1, allocation=allocation) as host:
        guest = host.prepare('(module (memory (export "memory") 1))')
        thread = threading.Thread(target=use_old_handles)
        thread.start()
        try:
            for _ in range(300):
                with guest.instantiate() as first:
                    current[:] = [first]
                with guest.instantiate() as second:
                    second.memory.write(0, SECRET)
                    assert second.memory.read(16, 8) == bytes(8)
        finally:
            stop.set()
            thread.join()
    assert stolen == []


@pytest.mark.usefixtures("eager_switches")
@pytest.mark.parametrize("name", [HOSTS[1]])
def test_threads_on_one_instance_get_their_own_answers_or_in_use(name: str) -> None:
    text = """(module (memory 1)
      (func (export "same") (param i64) (result i64) (local.get 0))
      (func (export "negative") (param i64) (result i64) (i64.sub (i64.const 0) (local.get 0))))"""
    wrong: list[Any] = []

    def call(function: str, sign: int) -> None:
        for number in range(3000):
            with suppress(memslot.InUse):
                answer = instance.call(function, number)
                if answer != sign * number:
                    wrong.append((function, number, answer))

    with hosts.started(name, text) as instance:
        threads = [
            threading.Thread(target=call, args=each) for each in (("same", 1), ("negative", -1))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


READS = """(module (import "a" "memory" (memory 1))
  (func (export "peek") (param i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "poke") (param i32 i32) (i32.store8 (local.get 0) (local.get 1))))"""


@pytest.mark.parametrize("name", [HOSTS[2]])
def test_slot_that_native_objects_reach_is_not_handed_on(name: str) -> None:
    with hosts.serving(name) as host:
        guest = hosts.prepare(host)
        first = guest.instantiate()
        linked = host.prepare(READS).instantiate(
            imports={"a": {"memory": first.native.exports.memory}}
        )
        first.close()
        with guest.instantiate() as second:
            second.memory.write(100, SECRET)
            assert bytes(linked.call("peek", 100 + each) for each in range(8)) == bytes(8)
            linked.call("poke", 8, ord("X"))
            assert second.memory.read(8, 5) == b"hello"
        linked.close()


@pytest.mark.parametrize("name", [HOSTS[2]])
@pytest.mark.parametrize("end", ["lease", "reset"])
def test_native_objects_kept_over_the_end_reach_nothing(name: str, end: str) -> None:
    with hosts.serving(name) as host, hosts.prepare(host) as guest:
        if end == "lease":
            with guest.lease() as request:
                kept = request.native
            with guest.lease() as request:
                memoryview(kept.exports.memory.buffer)[8:13] = b"KEPT!"
                assert request.memory.read(8, 5) == b"hello"
        else:
            with guest.instantiate() as instance:
                kept = instance.native
                instance.reset()
                memoryview(kept.exports.memory.buffer)[8:13] = b"KEPT!"
                assert instance.memory.read(8, 5) == b"hello"


@pytest.mark.parametrize("name", [HOSTS[1]])
def test_native_objects_are_refused_once_their_lease_has_ended(name: str) -> None:
    with hosts.serving(name) as host, hosts.prepare(host) as guest:
        with guest.lease() as request:
            native = request.native
            kept = native.exports(native.store)
        for use in (
            lambda: kept["get"](native.store, 8),
            lambda: kept["memory"].read(native.store, 8, 13),
        ):
            with pytest.raises(memslot.UsedAfterClose, match="lease has ended"):
                use()


@pytest.mark.parametrize("name", [HOSTS[1]])
def test_memory_outside_of_slots_is_read_and_written_in_each_lease(name: str) -> None:
    wasmtime = pytest.importorskip("wasmtime")

    def shared_memory(config: Any) -> None:
        config.shared_memory = True

    text = '(module (import "e" "m" (memory $m 1 2 shared)) (export "m" (memory $m)) (memory (export "own") 1))'
    with hosts.serving(name, configure=shared_memory) as host:
        kind = wasmtime.MemoryType(wasmtime.Limits(1, 2), shared=True)
        given = wasmtime.SharedMemory(host.engine, kind)
        with host.prepare(text, imports={"e": {"m": given}}) as guest:
            for turn in range(3):
                with guest.lease() as instance:
                    instance.memory.write(turn, b"x")
                    assert instance.memory.read(0, 4) == b"x" * (turn + 1) + bytes(3 - turn)


@pytest.mark.parametrize("name", [RUNTIMES[0]])
def test_native_objects_that_two_threads_ask_for_end_with_the_instance(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = importlib.import_module("memslot_plugin.hosts.wasmtime.live")
    found, make = list[Any](), module.BorrowedStore

    def in_the_middle(*arguments: Any) -> Any:
        monkeypatch.setattr(module, "BorrowedStore", make)
        for other in (lambda: found.append(instance.native), instance.close):
            assert isinstance(hosts.elsewhere(other), memslot.InUse)
        return make(*arguments)

    with hosts.started(name) as instance:
        monkeypatch.setattr(module, "BorrowedStore", in_the_middle)
        found.append(instance.native)
        instance.close()
        for native in found:
            with pytest.raises(memslot.UsedAfterClose):
                native.exports(native.store)["get"](native.store, 8)


@pytest.mark.parametrize("name", HOSTS)
def test_instance_that_is_captured_or_reset_cannot_be_ended_by_what_interrupts(name: str) -> None:
    refused: list[str] = []

    class Interrupts:
        def close(self, what: str) -> None:
            with pytest.raises(memslot.InUse):
                instance.close()
            refused.append(what)

        @hookimpl(tryfirst=True)
        def memslot_build_image(self, content: InitialContent) -> None:
            if content.memory is not None:
                self.close("captured")

        @hookimpl(tryfirst=True)
        def memslot_reset_memory(self, memory: LinearMemory) -> None:
            self.close("reset")

    with hosts.serving(name, plugins=(Interrupts(),)) as host, hosts.prepare(host) as guest:
        with guest.instantiate() as instance:
            instance.snapshot().close()
            instance.reset()
        assert refused == ["captured", "reset"]


@pytest.mark.parametrize("name", RUNTIMES)
def test_signal_within_a_close_finds_the_instance_closed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hosts.serving(name) as host, hosts.prepare(host) as guest:
        instance = guest.instantiate()
        function, seen = instance.function("get"), []
        release = host.leases.release

        def interrupted(memories: Any) -> None:  # the runtime's part is over
            for use in (
                lambda: instance.call("get", 64),
                lambda: instance.call("size"),
                lambda: function(64),
                lambda: instance.global_value("count"),
                lambda: instance.set_global("count", 1),
                lambda: instance.memory.read(64, 1),
                lambda: instance.memory.byte_size,
            ):
                with pytest.raises(memslot.UsedAfterClose):
                    seen.append(use())
            release(memories)

        monkeypatch.setattr(host.leases, "release", interrupted)
        instance.close()
        assert seen == []
