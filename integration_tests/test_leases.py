"""Instances that wait ready for the next request, and what makes each instance of a snapshot its own."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import hookimpl

from . import cells, toy
from .cells import Cell

COUNTER = """(module (memory (export "memory") 1) (global $n (mut i32) (i32.const 0))
  (func (export "next") (result i32)
    (global.set $n (i32.add (global.get $n) (i32.const 1)))
    (i32.store (i32.const 8) (global.get $n))
    (i32.load (i32.const 8)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "trap") unreachable))"""

SEEDED = """(module (import "env" "seed" (func $seed (result i64)))
  (memory (export "memory") 1) (global $state (mut i64) (i64.const 1))
  (func (export "reseed") (global.set $state (call $seed)))
  (func (export "draw") (result i64)
    (global.set $state (i64.mul (global.get $state) (i64.const 6364136223846793005))) (global.get $state))
  (func (export "bad") unreachable))"""


def test_each_lease_finds_a_pristine_instance(real_cell: Cell) -> None:
    with real_cell.serving(slots=2) as host:
        guest = host.prepare(toy.assemble(COUNTER))
        for _ in range(5):
            with guest.lease() as instance:
                assert [instance.call("next"), instance.call("next")] == [1, 2]
            with pytest.raises(memslot.UsedAfterClose):
                instance.call("next")
            cells.check(host)
        counted = host.statistics()
        assert (counted.instances, counted.resets_in_place) == (1, 5)
        assert (counted.live_instances, counted.ready_instances) == (1, 1)
        guest.close()
        assert host.statistics().live_instances == 0


def test_it_is_reset_however_the_block_ended(real_cell: Cell) -> None:
    with real_cell.serving(slots=1) as host:
        guest = host.prepare(toy.assemble(COUNTER))

        def request(name: str) -> None:
            with guest.lease() as instance:
                assert instance.call("next") == 1
                instance.call(name)

        for name, error in (("trap", memslot.GuestTrap), ("missing", memslot.ExportNotFound)) * 2:
            with pytest.raises(error):
                request(name)
        with guest.lease() as instance:
            assert instance.call("grow", 1) == 1
        with guest.lease() as instance:
            assert instance.call("grow", 1) == 1
            instance.close()
        with guest.lease() as instance:
            assert instance.call("next") == 1
        guest.close()


def test_as_many_as_the_setting_says_wait(real_cell: Cell) -> None:
    with real_cell.serving(slots=4, ready_instances=2) as host:
        guest = host.prepare(toy.assemble(COUNTER))
        leases = [guest.lease() for _ in range(3)]
        for lease in leases:
            lease.__enter__()
        with pytest.raises(memslot.InUse):
            leases[0].__enter__()
        for lease in leases:
            lease.__exit__()
        assert host.statistics().ready_instances == 2
        guest.close()
    with real_cell.serving(slots=1, ready_instances=0) as host:
        guest = host.prepare(toy.assemble(COUNTER))
        with guest.lease() as instance:
            instance.call("next")
        assert host.statistics().live_instances == 0


def test_who_waits_ready_makes_room(real_cell: Cell) -> None:
    with real_cell.serving(slots=2) as host:
        first, second = (host.prepare(toy.assemble(COUNTER)) for _ in range(2))
        with first.lease(), first.lease():
            with pytest.raises(memslot.PoolExhausted):
                second.instantiate()
            with pytest.raises(memslot.PoolTimeout), second.lease(wait_timeout=0.05):
                pass
        assert host.statistics().ready_instances == 2
        with second.lease() as instance, second.instantiate(wait_timeout=1):
            assert instance.call("next") == 1
            assert host.statistics().ready_instances == 0
        with first.lease() as instance:
            assert instance.call("next") == 1
        for guest in (first, second):
            guest.close()


def test_a_host_that_closes_ends_who_waits(real_cell: Cell) -> None:
    host = real_cell.open(slots=2)
    guest = host.prepare(toy.assemble(COUNTER))
    with guest.lease():
        pass
    host.close()
    with pytest.raises(memslot.UsedAfterClose), guest.lease():
        pass
    host = real_cell.open(slots=2)
    guest = host.prepare(toy.assemble(COUNTER))
    with guest.lease():
        host.close(force=True)
    host = real_cell.open(slots=2)
    guest = host.prepare(toy.assemble(COUNTER))
    with guest.lease():
        guest.close()
    assert host.statistics().live_instances == 0
    host.close()


def test_threads_share_what_waits_or_are_told_not_to(real_cell: Cell) -> None:
    with real_cell.serving(slots=3) as host:
        guest = host.prepare(toy.assemble(COUNTER))
        wrong: list[BaseException] = []
        served: list[int] = []

        def serve() -> None:
            try:
                for _ in range(100):
                    with guest.lease(wait_timeout=20) as instance:
                        assert [instance.call("next"), instance.call("next")] == [1, 2]
                        if len(served) % 10 == 0:
                            time.sleep(0.001)
                    served.append(1)
            except BaseException as error:  # noqa: BLE001 - looked at below
                wrong.append(error)

        tasks = Path("/proc/self/task")
        before = len(list(tasks.iterdir()))
        threads = [threading.Thread(target=serve) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while (
            len(list(tasks.iterdir())) > before
        ):  # the kernel's thread ends a little after Python's
            time.sleep(0.001)
        if real_cell.host == "wasmer":
            assert {type(error) for error in wrong} == {memslot.WrongThread}
        else:
            assert not wrong
            assert len(served) == 800
        guest.close()
        cells.check(host, in_use=0)


def test_a_deadline_begins_with_the_lease_and_not_with_the_wait_before_it() -> None:
    if cells.Cell("wasmtime", "memfd").missing:
        pytest.skip("wasmtime is not installed")
    spin = '(module (memory (export "memory") 1) (func (export "spin") (loop br 0)) (func (export "f")))'

    def configure(config: Any) -> None:
        config.epoch_interruption = True

    wrong: list[str] = []

    def configure_store(store: Any) -> None:
        if wrong:
            raise ValueError(wrong.pop())
        store.set_epoch_deadline(3)

    with memslot.open_host(
        "wasmtime", slots=1, configure=configure, configure_store=configure_store
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
            for _ in range(10):  # nobody leases it meanwhile
                host.increment_epoch()
        assert host.statistics().instances == 1
        wrong.append("no deadline today")
        with pytest.raises(ValueError, match="no deadline today"), guest.lease():
            pass
        assert host.statistics().live_instances == 0
        with guest.lease() as instance:
            instance.call("f")


def test_every_instance_of_a_snapshot_draws_its_own_numbers(real_cell: Cell) -> None:
    seeds = iter(range(100, 1000))

    def seed() -> int:
        return next(seeds)

    with real_cell.serving(slots=4) as host:
        module, imports = toy.assemble(SEEDED), {"env": {"seed": seed}}

        def init(instance: memslot.Instance) -> None:
            instance.call("draw")

        same = host.prepare(module, imports=imports, init=init)
        with same.instantiate() as first, same.instantiate() as second:
            assert first.call("draw") == second.call("draw")
        own = host.prepare(module, imports=imports, init=init, reseed="reseed")
        with own.instantiate() as first, own.instantiate() as second:
            drawn = [first.call("draw"), second.call("draw")]
            first.reset()
            drawn.append(first.call("draw"))
            (fork,) = first.fork()
            drawn += [fork.call("draw"), first.call("draw")]
            fork.close()
            assert len(set(drawn)) == 5
        bad = host.prepare(module, imports=imports, init=init, reseed="bad")
        with pytest.raises(memslot.GuestTrap):
            bad.instantiate()
        assert host.statistics().live_instances == 0


def test_what_cannot_reseed_is_refused_before_anything_runs(plain_cell: Cell) -> None:
    with plain_cell.serving(slots=2) as host:
        fake = plain_cell.host == "fake"
        module = toy.A if fake else toy.assemble(COUNTER)
        ran: list[object] = []
        for init in (None, ran.append):
            for reseed, error, said in (
                (
                    "missing",
                    memslot.ExportNotFound,
                    "exports no function 'missing' to be called after",
                ),
                ("memory", memslot.ExportNotFound, "exports no function 'memory'.*it exports: "),
                (7, memslot.ArgumentError, "reseed is the name of an export, and not 7"),
            ):
                with pytest.raises(error, match=said):
                    host.prepare(module, init=init, reseed=reseed)
                assert (host.statistics().guests, host.statistics().live_instances) == (0, 0)
        assert ran == []


def test_an_instance_of_a_lease_is_seeded_before_each_request(real_cell: Cell) -> None:
    seeds = iter(range(100, 1000))

    def seed() -> int:
        return next(seeds)

    with real_cell.serving(slots=2) as host:
        module, imports = toy.assemble(SEEDED), {"env": {"seed": seed}}
        guest = host.prepare(module, imports=imports, init="draw", reseed="reseed")
        drawn = []
        for _ in range(5):
            with guest.lease() as instance:
                drawn.append(instance.call("draw"))
        assert len(set(drawn)) == 5
        assert host.statistics().instances == 2, "the one that was captured, and one for all leases"
        guest.close()


def test_what_a_host_function_raises_after_a_lease_is_logged(
    real_cell: Cell, caplog: pytest.LogCaptureFixture
) -> None:
    """The request was served, and what its block raised is what its caller hears."""
    fails = [False]

    def draw() -> int:
        if fails[0]:
            raise KeyError("no seed")
        return 4

    module = toy.assemble("""(module (import "env" "draw" (func $draw (result i32))) (memory (export "memory") 1)
      (func (export "init")) (func (export "reseed") (i32.store (i32.const 0) (call $draw))))""")
    with real_cell.serving(slots=2) as host:
        guest = host.prepare(module, imports={"env": {"draw": draw}}, init="init", reseed="reseed")
        with guest.lease() as instance:
            assert instance.memory.read(0, 1) == b"\4"
            fails[0] = True
        fails[0] = False

        def fail() -> None:
            with guest.lease():
                fails[0] = True
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert caplog.text.count("could not be reset after its lease") == 2
        assert "no seed" in caplog.text
        fails[0] = False
        with guest.lease():
            pass
        guest.close()


def test_an_instance_of_a_closed_guest_goes_on_and_cannot_be_reset(plain_cell: Cell) -> None:
    with plain_cell.serving(slots=2) as host:
        guest = host.prepare(toy.A)
        with guest.instantiate() as instance:
            instance.call("fill", 0, 8, 7)
            guest.close()
            with pytest.raises(memslot.UsedAfterClose, match="cannot be reset; prepare it again"):
                instance.reset()
            assert instance.memory.read(0, 8) == bytes([7]) * 8
            assert instance.call("different", 0, 8, 7) == 0


def test_how_long_a_lease_may_wait_is_seconds(plain_cell: Cell) -> None:
    with plain_cell.serving(slots=1) as host, host.prepare(toy.A) as guest:
        for _ in range(2):
            for wrong in ("soon", -1, float("nan")):
                with pytest.raises(memslot.SettingError, match="it is seconds, at least 0"):
                    guest.lease(wait_timeout=wrong)
            with guest.lease(wait_timeout=0):
                pass


def test_memslot_instance_restored_is_told(real_cell: Cell) -> None:
    class Reseed:
        def __init__(self) -> None:
            self.told: list[Any] = []

        @hookimpl
        def memslot_instance_restored(self, instance: Any) -> None:
            self.told.append(instance)
            instance.memory.write(0, bytes([len(self.told)]))

    plugin = Reseed()
    with real_cell.open(slots=2, plugins=(plugin,)) as host:
        guest = host.prepare(toy.assemble(COUNTER))
        with guest.instantiate() as plain:
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


@pytest.mark.parametrize("grown", [False, True], ids=["in place", "anew"])
def test_an_instance_that_could_not_be_given_its_own_randomness_is_closed(
    real_cell: Cell, grown: bool
) -> None:
    class Reseed:
        entropy = True

        @hookimpl
        def memslot_instance_restored(self) -> None:
            if not self.entropy:
                raise OSError("no entropy")

    plugin = Reseed()
    with real_cell.open(slots=2, plugins=(plugin,)) as host:
        with host.prepare(toy.assemble(COUNTER)).instantiate() as plain:
            captured = plain.snapshot()
        instance = captured.instantiate()
        if grown:
            instance.call("grow", 1)
        plugin.entropy = False
        with pytest.raises(OSError, match="no entropy"):
            instance.reset()
        assert instance.closed
        with pytest.raises(OSError, match="no entropy"):
            captured.instantiate()
        with pytest.raises(OSError, match="no entropy"), captured.lease():
            pass
        cells.check(host, in_use=0)
        plugin.entropy = True
        with captured.lease():
            plugin.entropy = False
        cells.check(host, in_use=0)  # its request was served: what came after it is logged
        plugin.entropy = True
        captured.instantiate().close()


@pytest.mark.parametrize("source", ["random_get", "clock_time_get"])
def test_who_may_repeat_random_numbers_is_warned(real_cell: Cell, source: str) -> None:
    signature = {"random_get": "i32 i32", "clock_time_get": "i32 i64 i32"}[source]
    text = f"""(module (import "wasi_snapshot_preview1" "{source}" (func (param {signature}) (result i32)))
      (memory (export "memory") 1) (func (export "reseed")) (func (export "init")))"""
    with real_cell.serving(slots=2) as host:
        module, wasi = toy.assemble(text), memslot.Wasi()
        with pytest.warns(memslot.RepeatedRandomness, match=rf"{source}.*reseed=") as caught:
            host.prepare(module, wasi=wasi, init="init")
        assert caught[0].filename == __file__
        host.prepare(module, wasi=wasi, init="init", reseed="reseed")
        with host.prepare(module, wasi=wasi).instantiate() as instance:
            with pytest.warns(memslot.RepeatedRandomness) as caught:
                instance.snapshot()
            assert caught[0].filename == __file__
            with pytest.warns(memslot.RepeatedRandomness):
                instance.fork()[0].close()
