"""Two threads, or a thread and a signal handler, at one instance. The other acts where CPython may switch to it."""

from __future__ import annotations

import importlib
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import LinearMemory, MemoryRequest, hookimpl
from memslot_plugin.tests import hosts
from memslot_plugin.tests.hosts import DECIDING, HOSTS, RUNTIMES

WASMTIME = RUNTIMES[0]
SECRET = b"a secret"


def before(holder: Any, name: str, action: Callable[[], object]) -> None:
    """Run `action` once, just before the next call of the method `name` of `holder`."""
    original = getattr(holder, name)

    def switched(*arguments: Any, **named: Any) -> Any:
        setattr(holder, name, original)
        action()
        return original(*arguments, **named)

    setattr(holder, name, switched)


def at_the_call(holder: Any, name: str, action: Callable[[], object]) -> None:
    """Run `action` as `before` does, on another thread."""
    before(holder, name, lambda: hosts.elsewhere(action))


class Library:
    """The C core with another `ms_wt_close`, which is given the real one."""

    def __init__(self, core: Any, close: Callable[[Callable[[], int]], int]) -> None:
        self._core, self._close = core, close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def ms_wt_close(self, cell: Any, generation: int) -> int:
        return self._close(lambda: int(self._core.ms_wt_close(cell, generation)))


def closing_by(monkeypatch: pytest.MonkeyPatch, close: Callable[[Callable[[], int]], int]) -> None:
    """Replace the function by which the host closes cells."""
    module: Any = importlib.import_module("memslot_plugin.hosts.wasmtime.creator")
    monkeypatch.setattr(module, "lib", Library(module.lib, close))


@pytest.mark.parametrize("name", [WASMTIME])
def test_slot_in_a_store_of_the_embedder_stays_if_two_threads_close_its_instance(
    name: str,
) -> None:
    wasmtime = pytest.importorskip("wasmtime")
    with hosts.serving(name, slots=1) as host, hosts.prepare(host) as guest:
        store = wasmtime.Store(host.engine)
        instance = guest.instantiate(store=store)
        at_the_call(instance.live, "forget_views", instance.close)
        instance.close()
        assert hosts.in_use(host) == 1
        with pytest.raises(memslot.PoolExhausted):
            guest.instantiate()
        store.close()
        guest.instantiate().close()


class Keeps:
    """A plugin that keeps each memory until its release."""

    def __init__(self) -> None:
        self.kept: list[LinearMemory] = []

    @hookimpl
    def memslot_memory_created(self, memory: LinearMemory) -> None:
        self.kept.append(memory)

    @hookimpl(tryfirst=True)
    def memslot_release_memory(self, memory: LinearMemory) -> None:
        self.kept = [each for each in self.kept if each is not memory]


@pytest.mark.parametrize("name", [WASMTIME])
def test_two_closes_at_once_release_the_memory_and_tell_the_plugins(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second close looks at the memories before the first has released them, and ends afterwards."""
    reached, go_on, plugin = threading.Event(), threading.Event(), Keeps()
    with hosts.serving(name, plugins=(plugin,)) as host, hosts.prepare(host) as guest:
        instance = guest.instantiate()
        live: Any = instance.live
        first = threading.Thread(target=instance.close)

        def stop() -> None:
            reached.set()
            go_on.wait()

        def let_the_first_begin() -> None:
            before(host.leases, "release", stop)
            first.start()
            reached.wait()

        def close(really: Callable[[], int]) -> int:
            if threading.current_thread() is not first and first.is_alive():
                go_on.set()
                first.join()
            return really()

        closing_by(monkeypatch, close)
        before(live, "forget_views", let_the_first_begin)
        instance.close()
        assert (hosts.in_use(host), plugin.kept) == (0, [])


@pytest.mark.parametrize("name", [WASMTIME])
def test_native_objects_are_not_given_away_in_the_middle_of_the_end_of_a_lease(name: str) -> None:
    given, middle = list[object](), hosts.InTheMiddle()
    options: dict[str, Any] = {"configure_store": lambda _: None}  # makes a view of each store
    with hosts.serving(name, plugins=(middle,), **options) as host, hosts.prepare(host) as guest:
        with guest.lease() as instance:
            middle.action = lambda: given.append(hosts.elsewhere(lambda: instance.native))
        assert isinstance(given[0], memslot.InUse)


@pytest.mark.parametrize("use", ["reset", "snapshot"])
@pytest.mark.parametrize("name", HOSTS)
def test_handler_that_is_refused_as_a_hold_begins_leaves_nothing_held(name: str, use: str) -> None:
    """The handler raises InUse as `acquire` returns."""
    with hosts.serving(name) as host, hosts.prepare(host) as guest:
        instance = guest.instantiate()
        live: Any = instance.live
        hold = live.acquire

        def interrupted(*arguments: Any, **named: Any) -> None:
            live.acquire = hold
            hold(*arguments, **named)
            signal.raise_signal(signal.SIGUSR1)

        before = signal.signal(signal.SIGUSR1, lambda *_: instance.close())
        live.acquire = interrupted
        try:
            with pytest.raises(memslot.InUse):
                getattr(instance, use)()
        finally:
            signal.signal(signal.SIGUSR1, before)
        del live.acquire
        assert (live.running, live.held) == (0, 0)
        with suppress(memslot.UsedAfterClose):  # a reset that raises ends the instance
            assert instance.memory.read(0, 1) == b"\0"
        instance.close()


@pytest.mark.parametrize("name", HOSTS)
def test_interrupt_of_a_refused_reset_leaves_the_outer_reset_alone(name: str) -> None:
    refused, middle = list[type[BaseException]](), hosts.InTheMiddle()

    def reset() -> None:
        live: Any = instance.live
        hold = live.acquire

        def interrupted(*arguments: Any, **named: Any) -> None:
            live.acquire = hold
            with suppress(memslot.InUse):
                hold(*arguments, **named)
            raise KeyboardInterrupt

        live.acquire = interrupted
        with pytest.raises(KeyboardInterrupt):
            instance.reset()
        with pytest.raises(memslot.InUse) as raised:
            instance.memory.read(0, 1)
        refused.append(raised.type)

    with hosts.started(name, plugins=(middle,)) as instance:
        middle.action = reset
        instance.reset()
        assert refused == [memslot.InUse]
        assert instance.memory.read(0, 1) == b"\0"


def test_lease_on_the_fake_host_does_not_end_under_a_running_call() -> None:
    ended: list[object] = []

    def looks(live: Any) -> bytes:
        ended.append(hosts.elsewhere(lambda: lease.__exit__(None, None, None)))
        return bytes(live.read(0, 64, 8))

    with hosts.serving("fake", functions={"looks": looks}) as host, hosts.prepare(host) as guest:
        lease = guest.lease()
        instance = lease.__enter__()
        assert instance.call("looks") == bytes(8)
        assert isinstance(ended[0], memslot.InUse)
        instance.close()


@pytest.mark.parametrize("name", [WASMTIME])
def test_lease_never_begins_with_an_instance_that_ended(name: str) -> None:
    """A close is let in while the lease ends, and refused."""
    holding, go_on, answers = threading.Event(), threading.Event(), list[int]()
    middle = hosts.InTheMiddle()

    def stop() -> None:
        holding.set()
        go_on.wait()

    with hosts.serving(name, plugins=(middle,)) as host, hosts.prepare(host) as guest:
        lease = guest.lease()
        instance = lease.__enter__()
        live: Any = instance.live
        ending = threading.Thread(target=lease.__exit__, args=(None, None, None))
        dispose = live.close

        def disposed(generation: int | None = None) -> bool | None:
            live.close = dispose
            middle.action = stop
            ending.start()
            holding.wait()
            try:
                return dispose(generation)  # type: ignore[no-any-return]
            finally:
                go_on.set()
                ending.join()
                with guest.lease() as following:  # before the close goes on
                    answers.append(following.call("get", 8))

        live.close = disposed
        with pytest.raises(memslot.InUse):
            instance.close()
        assert answers == [ord("h")]


@pytest.mark.parametrize("name", [WASMTIME])
def test_close_that_a_call_refuses_leaves_no_reference(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call returns before the close does."""
    inside, leave = threading.Event(), threading.Event()

    def wait(number: int) -> int:
        inside.set()
        leave.wait()
        return number

    def close(really: Callable[[], int]) -> int:
        answer = really()
        if threading.current_thread() is not calling:
            leave.set()
            calling.join()
        return answer

    def call() -> None:
        calling.start()
        inside.wait()
        closing_by(monkeypatch, close)

    with hosts.serving(name) as host, hosts.calling(host, wait) as guest:
        instance = guest.instantiate()
        calling = threading.Thread(target=instance.call, args=("run", 1))
        before(instance.live, "forget_views", call)
        with pytest.raises(memslot.InUse):
            instance.close()
        monkeypatch.undo()
        assert instance.call("run", 2) == 2
        instance.close()


@pytest.mark.parametrize("name", DECIDING)
def test_second_reset_does_not_take_away_what_the_first_one_made(name: str) -> None:
    with hosts.serving(name) as host, hosts.prepare(host) as guest, guest.instantiate() as instance:
        instance.memory.grow(1)  # no reset in place
        at_the_call(instance.live, "require_idle", instance.reset)
        with pytest.raises(memslot.InUse):
            instance.reset()
        assert not instance.closed
        assert instance.call("get", 64) == 0


@pytest.mark.parametrize("name", DECIDING)
def test_reset_that_comes_late_does_not_revive_a_closed_instance(name: str) -> None:
    text = '(module (table (export "t") 1 funcref) (func (export "get") (table.set 0 (i32.const 0) (ref.null func))))'
    with hosts.serving(name) as host, hosts.prepare(host, text) as guest:
        instance = guest.instantiate()
        at_the_call(instance.live, "require_idle", instance.close)
        with pytest.raises(memslot.UsedAfterClose):
            instance.reset()
        assert instance.closed
        assert host.statistics().live_instances == 0


@pytest.mark.parametrize("name", [WASMTIME])
def test_close_by_an_old_handle_takes_nothing_from_the_close_of_the_next_lease(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def stop() -> None:
        begun.set()
        go_on.wait()

    def close(really: Callable[[], int]) -> int:
        answer = really()
        if threading.current_thread() is not late:
            go_on.set()
            late.join()
        return answer

    with hosts.serving(name, slots=1) as host, hosts.prepare(host) as guest:
        lease = guest.lease()
        old = lease.__enter__()
        before(old.live, "forget_views", stop)
        late = threading.Thread(target=old.close)
        late.start()
        begun.wait()
        lease.__exit__(None, None, None)
        following = guest.lease().__enter__()
        kept = following.function("get")
        closing_by(monkeypatch, close)
        following.close()
        monkeypatch.undo()
        assert hosts.in_use(host) == 0
        with pytest.raises(memslot.UsedAfterClose):
            kept(8)
        guest.instantiate().close()


class Interrupts(dict[int, Any]):
    """A container that raises KeyboardInterrupt once, after an entry was taken out."""

    armed = True

    def pop(self, *arguments: Any) -> Any:
        found = super().pop(*arguments)
        if found is not None and self.armed:
            self.armed = False
            raise KeyboardInterrupt
        return found


@pytest.mark.parametrize("taken_from", ["_groups", "_cells"])
@pytest.mark.parametrize("name", [WASMTIME])
def test_close_that_is_interrupted_is_finished_by_the_next_call(name: str, taken_from: str) -> None:
    with hosts.serving(name, slots=1) as host, hosts.prepare(host) as guest:
        instance = guest.instantiate()
        before = getattr(host.runtime._creator, taken_from)
        setattr(host.runtime._creator, taken_from, Interrupts(before))
        with pytest.raises(KeyboardInterrupt):
            instance.close()
        host.statistics()
        assert (instance.closed, hosts.in_use(host)) == (True, 0)
        guest.instantiate().close()


def test_call_that_begins_as_the_fake_host_closes_reads_its_own_bytes() -> None:
    inside, go_on, found = threading.Event(), threading.Event(), list[bytes]()
    functions = {"looks": lambda live: live.read(0, 64, 8)}
    with hosts.serving("fake", slots=1, functions=functions) as host, hosts.prepare(host) as guest:
        instance = guest.instantiate()
        live: Any = instance.live
        at = live._at
        calling = threading.Thread(target=lambda: found.append(instance.call("looks")))

        def found_at(*arguments: int) -> Any:
            place = at(*arguments)
            inside.set()
            go_on.wait()
            return place

        def call() -> None:
            calling.start()
            inside.wait()

        live._at = found_at
        before(live, "close", call)
        with pytest.raises(memslot.InUse):
            instance.close()
        with pytest.raises(memslot.PoolExhausted):
            guest.instantiate()
        go_on.set()
        calling.join()
        assert found == [bytes(8)]
        instance.close()


def test_request_whose_ready_instance_another_thread_takes_waits_for_a_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with hosts.serving("fake", slots=1) as host, hosts.prepare(host) as guest:
        with guest.lease():
            pass  # and wait ready

        def take() -> bool:
            monkeypatch.undo()
            instance = guest.lease().__enter__()
            threading.Timer(0.05, instance.close).start()
            return False

        monkeypatch.setattr(host.leases, "end_a_ready_one", take)
        guest.instantiate(wait_timeout=30).close()


@pytest.mark.parametrize("name", [WASMTIME])
def test_reset_while_another_thread_releases_ended_memories_keeps_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hosts.serving(name) as host, hosts.prepare(host) as guest:

        def close(close: Callable[[], int]) -> int:
            answer = close()
            monkeypatch.undo()
            hosts.elsewhere(lambda: guest.instantiate().close())  # looks for ended memories
            return answer

        with guest.instantiate() as instance:
            instance.memory.grow(1)  # no reset in place
            closing_by(monkeypatch, close)
            instance.reset()
            assert instance.memory.read(8, 5) == b"hello"


@pytest.mark.parametrize("name", DECIDING)
def test_reset_whose_guest_another_thread_closes_meanwhile_ends_or_is_done(name: str) -> None:
    with hosts.serving(name) as host:
        guest = hosts.prepare(host)
        with guest.instantiate() as instance:
            instance.memory.grow(1)  # no reset in place
            before(instance.leases, "renew", guest.close)
            with suppress(memslot.UsedAfterClose):
                instance.reset()
                assert instance.memory.byte_size == 2 * hosts.PAGE
        assert hosts.in_use(host) == 0


@pytest.mark.parametrize("name", DECIDING)
def test_end_of_a_lease_whose_guest_another_thread_closes_ends_the_instance(name: str) -> None:
    with hosts.serving(name) as host:
        guest = hosts.prepare(host)
        with guest.lease() as instance:
            instance.memory.grow(1)  # no reset in place
            before(guest, "open_code", guest.close)
        assert instance.closed
        assert hosts.in_use(host) == 0


@pytest.mark.parametrize("name", DECIDING)
def test_request_whose_wait_ends_while_another_one_is_served_raises_pool_timeout(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hosts.serving(name, slots=1) as host, hosts.prepare(host) as guest:
        instance = guest.instantiate()
        served = threading.Thread(target=lambda: guest.instantiate(wait_timeout=60).close())

        def serve_the_other(*_: object) -> bool:
            instance.close()
            served.join()
            return False

        monkeypatch.setattr(MemoryRequest, "__eq__", serve_the_other)
        served.start()
        while not host.leases.waiting:
            time.sleep(0.001)
        with pytest.raises(memslot.PoolTimeout):
            guest.instantiate(wait_timeout=0.01)
        serve_the_other()
