"""Leases: instances that wait ready, and reseeding of instances that repeat a snapshot."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import hookimpl

from . import cells, toy
from .cells import Cell

COUNTER = toy.assemble("""(module (memory (export "memory") 1) (global $n (mut i32) (i32.const 0))
  (func (export "next") (result i32)
    (global.set $n (i32.add (global.get $n) (i32.const 1)))
    (i32.store (i32.const 8) (global.get $n))
    (i32.load (i32.const 8)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "trap") unreachable))""")

SEEDED = toy.assemble("""(module (import "env" "seed" (func $seed (result i64)))
  (memory (export "memory") 1) (global $state (mut i64) (i64.const 1))
  (func (export "reseed") (global.set $state (call $seed)))
  (func (export "draw") (result i64)
    (global.set $state (i64.mul (global.get $state) (i64.const 6364136223846793005))) (global.get $state))
  (func (export "bad") unreachable))""")


@pytest.fixture
def counter(real_cell: Cell) -> Iterator[memslot.Guest]:
    with real_cell.serving(slots=2) as host, host.prepare(COUNTER) as guest:
        yield guest


def lease_and(guest: memslot.Guest, *calls: str) -> list[Any]:
    """Return the results of calls in a new lease."""
    with guest.lease() as instance:
        return [instance.call(name) for name in calls]


def test_lease_resets_one_instance_after_each_request(counter: memslot.Guest) -> None:
    host = counter.host
    for _ in range(5):
        with counter.lease() as instance:
            assert [instance.call("next"), instance.call("next")] == [1, 2]
        with pytest.raises(memslot.UsedAfterClose):
            instance.call("next")
        cells.check(host)
    counted = host.statistics()
    assert (counted.instances, counted.resets_in_place) == (1, 5)
    assert (counted.live_instances, counted.ready_instances) == (1, 1)
    counter.close()
    assert host.statistics().live_instances == 0


def test_lease_after_one_that_trapped_grew_or_was_closed_starts_anew(
    counter: memslot.Guest,
) -> None:
    for name, error in (("trap", memslot.GuestTrap), ("missing", memslot.ExportNotFound)) * 2:
        with pytest.raises(error):
            lease_and(counter, "next", name)
        assert lease_and(counter, "next") == [1]
    with counter.lease() as instance:
        assert instance.call("grow", 1) == 1
    with counter.lease() as instance:
        assert instance.call("grow", 1) == 1
        instance.close()
    assert lease_and(counter, "next") == [1]


def test_ready_instances_are_at_most_as_many_as_the_setting_says(real_cell: Cell) -> None:
    with real_cell.serving(slots=4, ready_instances=2) as host, host.prepare(COUNTER) as guest:
        leases = [guest.lease() for _ in range(3)]
        for lease in leases:
            lease.__enter__()
        with pytest.raises(memslot.InUse):
            leases[0].__enter__()
        for lease in leases:
            lease.__exit__()
        assert host.statistics().ready_instances == 2
    with real_cell.serving(slots=1, ready_instances=0) as host:
        assert lease_and(host.prepare(COUNTER), "next") == [1]
        assert host.statistics().live_instances == 0


def test_ready_instance_of_another_guest_makes_room(counter: memslot.Guest) -> None:
    host = counter.host
    with host.prepare(COUNTER) as second:
        with counter.lease(), counter.lease():
            with pytest.raises(memslot.PoolExhausted):
                second.instantiate()
            with pytest.raises(memslot.PoolTimeout), second.lease(wait_timeout=0.05):
                pass
        assert host.statistics().ready_instances == 2
        with second.lease() as instance, second.instantiate(wait_timeout=1):
            assert instance.call("next") == 1
            assert host.statistics().ready_instances == 0
        assert lease_and(counter, "next") == [1]


def test_ready_instances_end_with_their_guest_and_their_host(real_cell: Cell) -> None:
    for closed in ("host", "host by force", "guest"):
        with real_cell.open(slots=2) as host:
            guest = host.prepare(COUNTER)
            assert lease_and(guest, "next") == [1]
            with nullcontext() if closed == "host" else guest.lease():
                guest.close() if closed == "guest" else host.close(force=closed == "host by force")
            if closed == "guest":
                assert host.statistics().live_instances == 0
            with pytest.raises(memslot.UsedAfterClose), guest.lease():
                pass


def test_lease_that_ends_makes_room_for_a_thread_that_waits(counter: memslot.Guest) -> None:
    host = counter.host
    if host.name == "wasmer":
        pytest.skip("impossible: wasmer's objects live on one thread")
    with host.prepare(COUNTER) as second:
        thread = threading.Thread(target=lambda: second.instantiate(wait_timeout=60).close())
        with counter.lease(), counter.lease():
            thread.start()
            while thread.is_alive() and not host.leases.waiting:
                time.sleep(0.001)
        thread.join()
        assert host.statistics().instances == 3


def test_deadline_begins_with_the_lease_and_not_with_the_wait_before_it() -> None:
    if reason := Cell("wasmtime", "memfd").missing:
        pytest.skip(reason)
    spin = '(module (memory (export "memory") 1) (func (export "spin") (loop br 0)) (func (export "f")))'
    wrong: list[str] = []

    def configure_store(store: Any) -> None:
        if wrong:
            raise ValueError(wrong.pop())
        store.set_epoch_deadline(3)

    with memslot.open_host(
        "wasmtime",
        slots=1,
        configure=lambda config: setattr(config, "epoch_interruption", True),
        configure_store=configure_store,
    ) as host:
        guest = host.prepare(toy.assemble(spin))
        for _ in range(3):
            with guest.lease() as instance:
                for _ in range(2):
                    host.increment_epoch()
                instance.call("f")
                timer = threading.Timer(0.05, lambda: [host.increment_epoch() for _ in range(3)])
                timer.start()
                with pytest.raises(memslot.GuestTrap, match="interrupt"):
                    instance.call("spin")
                timer.join()
            for _ in range(10):  # while the instance waits for its next lease
                host.increment_epoch()
        assert host.statistics().instances == 1
        wrong.append("no deadline today")
        with pytest.raises(ValueError, match="no deadline today"):
            lease_and(guest)
        assert host.statistics().live_instances == 0
        lease_and(guest, "f")


def test_reseed_gives_each_instance_and_each_lease_of_a_snapshot_its_own_numbers(
    real_cell: Cell,
) -> None:
    imports = {"env": {"seed": itertools.count(100).__next__}}
    with real_cell.serving(slots=4) as host:
        same = host.prepare(SEEDED, imports=imports, init=lambda instance: instance.call("draw"))
        with same.instantiate() as first, same.instantiate() as second:
            assert first.call("draw") == second.call("draw")
        own = host.prepare(SEEDED, imports=imports, init="draw", reseed="reseed")
        with own.instantiate() as first, own.instantiate() as second:
            drawn = [first.call("draw"), second.call("draw")]
            first.reset()
            drawn.append(first.call("draw"))
            (fork,) = first.fork()
            drawn += [fork.call("draw"), first.call("draw")]
            fork.close()
        made = host.statistics().instances
        drawn += [lease_and(own, "draw")[0] for _ in range(5)]
        assert host.statistics().instances == made + 1, "one for all leases"
        assert len(set(drawn)) == 10
        own.close()
        bad = host.prepare(SEEDED, imports=imports, init="draw", reseed="bad")
        with pytest.raises(memslot.GuestTrap):
            bad.instantiate()


def test_reseed_that_is_no_function_is_refused_before_anything_runs(plain_cell: Cell) -> None:
    module = toy.A if plain_cell.host == "fake" else COUNTER
    missing = memslot.ExportNotFound
    with plain_cell.serving(slots=2) as host:
        ran: list[object] = []
        for reseed, error, said in (
            ("missing", missing, "exports no function 'missing' to be called after"),
            ("memory", missing, "exports no function 'memory'.*it exports: "),
            (7, memslot.ArgumentError, "reseed is the name of an export, and not 7"),
        ):
            for init in (None, ran.append):
                with pytest.raises(error, match=said):
                    host.prepare(module, init=init, reseed=reseed)
                assert (host.statistics().guests, host.statistics().live_instances) == (0, 0)
        assert ran == []


def test_reseed_that_raises_after_a_lease_is_logged(
    real_cell: Cell, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller gets the exception of the block, and not the one of reseeding: the request was served."""
    fails = [False]

    def draw() -> int:
        if fails[0]:
            raise KeyError("no seed")
        return 4

    def request(error: type[BaseException] | None = None) -> None:
        fails[0] = False
        with guest.lease() as instance:
            assert instance.memory.read(0, 1) == b"\4"
            fails[0] = True
            if error:
                raise error

    module = toy.assemble("""(module (import "env" "draw" (func $draw (result i32))) (memory (export "memory") 1)
      (func (export "init")) (func (export "reseed") (i32.store (i32.const 0) (call $draw))))""")
    with real_cell.serving(slots=2) as host:
        guest = host.prepare(module, imports={"env": {"draw": draw}}, init="init", reseed="reseed")
        request()
        with pytest.raises(ZeroDivisionError):
            request(ZeroDivisionError)
        assert caplog.text.count("could not be reset after its lease") == 2
        assert "no seed" in caplog.text
        assert host.statistics().live_instances == 0


class Reseed:
    """A plugin that writes a count into each instance that repeats a snapshot, until its entropy runs out."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.entropy = True

    @hookimpl
    def memslot_instance_restored(self, instance: Any) -> None:
        if not self.entropy:
            raise OSError("no entropy")
        self.told.append(instance)
        instance.memory.write(0, bytes([len(self.told)]))


def test_hook_instance_restored_is_called_after_each_restore(real_cell: Cell) -> None:
    plugin = Reseed()
    with real_cell.open(slots=2, plugins=(plugin,)) as host:
        with host.prepare(COUNTER).instantiate() as plain:
            plain.reset()
            assert plugin.told == [], "only a snapshot repeats anything"
            captured = plain.snapshot()
        with captured.instantiate() as instance:
            assert instance.memory.read(0, 1) == b"\1"
            instance.reset()
            assert instance.memory.read(0, 1) == b"\2"
            instance.call("grow", 1)
            instance.reset()
            assert instance.memory.read(0, 1) == b"\3"
            assert plugin.told == [instance] * 3
        plugin.told.clear()


def test_hook_instance_restored_that_raises_closes_the_instance(real_cell: Cell) -> None:
    plugin = Reseed()
    with real_cell.open(slots=2, plugins=(plugin,)) as host:
        with host.prepare(COUNTER).instantiate() as plain:
            captured = plain.snapshot()
        for pages in (0, 1):  # a reset in place, and one by a new instance
            plugin.entropy = True
            instance = captured.instantiate()
            instance.call("grow", pages)
            plugin.entropy = False
            for attempt in (instance.reset, captured.instantiate, captured.lease().__enter__):
                with pytest.raises(OSError, match="no entropy"):
                    attempt()
            assert instance.closed
            cells.check(host, in_use=0)
        plugin.told.clear()


@pytest.mark.parametrize(
    ("source", "signature"), [("random_get", "i32 i32"), ("clock_time_get", "i32 i64 i32")]
)
def test_snapshot_that_may_repeat_random_numbers_warns(
    real_cell: Cell, source: str, signature: str
) -> None:
    text = f"""(module (import "wasi_snapshot_preview1" "{source}" (func (param {signature}) (result i32)))
      (memory (export "memory") 1) (func (export "reseed")) (func (export "init")))"""
    with real_cell.serving(slots=2) as host:
        module, wasi = toy.assemble(text), memslot.Wasi()
        with pytest.warns(memslot.RepeatedRandomness, match=rf"{source}.*reseed=") as caught:
            host.prepare(module, wasi=wasi, init="init")
        host.prepare(module, wasi=wasi, init="init", reseed="reseed")
        with host.prepare(module, wasi=wasi).instantiate() as instance:
            with pytest.warns(memslot.RepeatedRandomness) as again:
                instance.snapshot()
            with pytest.warns(memslot.RepeatedRandomness):
                instance.fork()[0].close()
        assert {caught[0].filename, again[0].filename} == {__file__}
