"""A snapshot starts where an instance was, a fork goes on from there, and what cannot be captured is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import memslot_plugin as memslot

from . import cells, toy
from .cells import Cell
from .test_instance_reset import (
    EVERYTHING,
    GROWING,
    LOOK,
    PAGE,
    RESTORABLE,
    WASI,
    done,
    generated,
    resets,
    seen,
    started,
)

INIT = """(module (import "env" "f" (func $f))
  (memory (export "memory") 1 20) (data (i32.const 0) "at first")
  (global $n (export "n") (mut i32) (i32.const 1)) (global $hidden (mut i64) (i64.const 5))
  (global $started (mut i32) (i32.const 0))
  (func $start (global.set $started (i32.add (global.get $started) (i32.const 1)))) (start $start)
  (func (export "_initialize")
    (call $f) (global.set $n (i32.const 40)) (global.set $hidden (i64.const -1))
    (drop (memory.grow (i32.const 9))) (i64.store (i32.const 600000) (i64.const 7)))
  (func (export "next") (result i32) (global.set $n (i32.add (global.get $n) (i32.const 1))) (global.get $n))
  (func (export "hidden") (result i64) (global.get $hidden))
  (func (export "started") (result i32) (global.get $started))
  (func (export "size") (result i32) (memory.size))
  (func (export "load") (param i32) (result i64) (i64.load (local.get 0)))
  (func (export "store") (param i32 i64) (i64.store (local.get 0) (local.get 1))))"""


def test_init_runs_once_and_its_effect_is_in_every_instance(real_cell: Cell) -> None:
    called: list[int] = []

    def f() -> None:
        called.append(1)

    with real_cell.serving(slots=3, image_limit="64MiB") as host:
        guest = host.prepare(
            toy.assemble(INIT), imports={"env": {"f": f}}, init="_initialize", name="init"
        )
        assert host.statistics().guests == 1, "the one that was initialised is gone"
        assert guest.report.verdict.in_place, "the start function does not run any more"
        assert guest.report.memories[0].minimum_bytes == 10 * PAGE
        (image,) = guest.images.values()
        assert sum(extent.length for extent in image.extents) <= 2 * 4096, "zeros are not stored"
        for _ in range(3):
            with guest.instantiate() as instance:
                for _ in range(3):
                    assert instance.memory.read(0, 8) == b"at first"
                    assert [instance.call("next"), instance.call("next")] == [41, 42]
                    assert (instance.call("hidden"), instance.call("started")) == (-1, 1)
                    assert (instance.call("size"), instance.call("load", 600_000)) == (10, 7)
                    instance.call("store", 600_000, 8)
                    instance.call("store", 70_000, 8)
                    instance.reset()
                cells.check(host)
        assert called == [1]
        assert resets(guest) == (9, 0)


def test_init_may_be_python(real_cell: Cell) -> None:
    def init(instance: memslot.Instance) -> None:
        instance.memory.write(100, b"from python")
        instance.set_global("n", 7)

    with real_cell.serving(slots=2) as host:
        guest = host.prepare(toy.assemble(INIT), imports={"env": {"f": lambda: None}}, init=init)
        with guest.instantiate() as instance:
            assert instance.memory.read(100, 11) == b"from python"
            assert instance.call("next") == 8


def test_init_that_fails_leaves_nothing(real_cell: Cell) -> None:
    with real_cell.serving(slots=1) as host:
        for init, expected in (
            ("no such export", memslot.ExportNotFound),
            (lambda instance: 1 / 0, ZeroDivisionError),
            (lambda instance: instance.call("load", -1), memslot.GuestTrap),
        ):
            with pytest.raises(expected):
                host.prepare(toy.assemble(INIT), imports={"env": {"f": lambda: None}}, init=init)
            assert host.statistics().guests == 0


def test_every_kind_of_global_keeps_its_bits(real_cell: Cell) -> None:
    with started(real_cell, RESTORABLE) as (guest, instance):
        for value in (3, -5):
            instance.call("spoil", value)
            now = seen(instance)
            captured = instance.snapshot("captured")
            assert captured.name == "captured"
            instance.call("spoil", 99)
            with captured.instantiate() as copy:
                assert seen(copy) == now
                copy.call("spoil", 98)
                copy.reset()
                assert seen(copy) == now
                again = copy.snapshot()
            with again.instantiate() as copy:
                assert seen(copy) == now
            assert seen(instance) != now, "the original went on"
            captured.close()
            again.close()
        instance.reset()
        with guest.instantiate() as fresh:
            assert seen(instance) == seen(fresh), "and goes back to its own beginning"


def test_a_grown_memory_is_the_minimum_of_its_snapshot(real_cell: Cell) -> None:
    with started(real_cell, GROWING) as (_, instance):
        assert instance.call("grow", 2) == 1
        instance.memory.write(3 * PAGE - 3, b"end")
        captured = instance.snapshot()
        with captured.instantiate() as copy:
            assert copy.memory.byte_size == 3 * PAGE
            assert copy.memory.read(3 * PAGE - 3, 3) == b"end"
            assert (copy.call("grow", 1), copy.call("grow", 1)) == (3, -1)
            copy.reset()
            assert (copy.call("size"), copy.memory.read(3 * PAGE - 3, 3)) == (3, b"end")


def test_a_snapshot_outlives_its_parent(real_cell: Cell) -> None:
    with real_cell.serving(slots=2) as host:
        parent = host.prepare(toy.assemble(RESTORABLE))
        with parent.instantiate() as instance:
            instance.call("spoil", 4)
            now = seen(instance)
            captured = instance.snapshot()
        parent.close()
        with captured.instantiate() as copy:
            assert seen(copy) == now


def test_fifty_forks_see_their_own_pages_and_the_parent_none(real_cell: Cell) -> None:
    text = """(module (memory (export "memory") 60) (data (i32.const 0) "x")
      (func (export "store") (param i32 i64) (i64.store (local.get 0) (local.get 1)))
      (func (export "load") (param i32) (result i64) (i64.load (local.get 0))))"""
    with real_cell.serving(slots=51, image_limit="64MiB") as host:
        guest = host.prepare(toy.assemble(text))
        with guest.instantiate() as parent:
            for place in range(60):
                parent.call("store", place * PAGE, 1000 + place)
            forks = parent.fork(50)
            assert host.statistics().guests == 2
            for number, fork in enumerate(forks):
                for place in range(number, number + 10):
                    fork.call("store", place * PAGE, number)
            parent.call("store", 0, 5)
            for number, fork in enumerate(forks):
                own = range(number, number + 10)
                expected = [number if place in own else 1000 + place for place in range(60)]
                assert [fork.call("load", place * PAGE) for place in range(60)] == expected
            assert [parent.call("load", place * PAGE) for place in range(60)] == [
                5,
                *range(1001, 1060),
            ]
            forks[7].reset()
            assert forks[7].call("load", 7 * PAGE) == 1007
            for fork in forks[1:]:
                fork.close()
            assert host.statistics().guests == 2
            assert forks[0].call("load", PAGE) == 0
            forks[0].close()
            assert host.statistics().guests == 1, "the forks' guest went with the last of them"
            assert parent.call("load", PAGE) == 1001


def test_forks_that_do_not_fit_leave_none(real_cell: Cell) -> None:
    with real_cell.serving(slots=3) as host:
        guest = host.prepare(toy.assemble(RESTORABLE))
        with guest.instantiate() as parent:
            with pytest.raises(memslot.PoolExhausted):
                parent.fork(3)
            assert (host.statistics().guests, host.statistics().live_instances) == (1, 1)
            assert parent.fork(0) == []
            (fork,) = parent.fork()
            del fork
            assert (host.statistics().guests, host.statistics().live_instances) == (1, 1)


REFUSED = {
    "a table that code changes": (
        EVERYTHING,
        "table.set in function .*what that changes cannot be saved",
    ),
    "a data segment that was dropped": (
        """(module (memory 1) (data $p "passive")
             (func (export "use") (memory.init $p (i32.const 0) (i32.const 0) (i32.const 1)))
             (func (export "drop") (data.drop $p)))""",
        "Data segment 0 may have been dropped, and code still uses it",
    ),
    "data for an imported memory": (
        """(module (import "env" "memory" (memory 1)) (data (i32.const 0) "x"))""",
        "Each new instance copies data into the memory that is imported as env.memory",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_refused(real_cell: Cell, name: str) -> None:
    text, said = REFUSED[name]
    with real_cell.serving(slots=2) as host:
        options: dict[str, Any] = {}
        if "imported memory" in name:
            if real_cell.host == "wasmtime":
                import wasmtime

                store = wasmtime.Store(host.engine)
                kind = wasmtime.MemoryType(wasmtime.Limits(1, 2))
                options = {
                    "imports": {"env": {"memory": wasmtime.Memory(store, kind)}},
                    "store": store,
                }
            else:
                import wasmer

                memory = wasmer.Memory(host.store, wasmer.MemoryType(1, 2, False))
                options = {"imports": {"env": {"memory": memory}}}
        with host.prepare(toy.assemble(text)).instantiate(**options) as instance:
            with pytest.raises(memslot.SnapshotRefused, match=said):
                instance.snapshot()
            with pytest.raises(memslot.SnapshotRefused, match=said):
                instance.fork(2)
        if "store" in options:
            options["store"].close()
        assert host.statistics().live_instances == 0


def test_segments_that_nobody_uses_again_are_no_reason(real_cell: Cell) -> None:
    text = """(module (memory (export "memory") 1) (data $p "passive")
      (func (export "use") (memory.init $p (i32.const 0) (i32.const 0) (i32.const 7))))"""
    with started(real_cell, text) as (_, instance):
        instance.call("use")
        with instance.snapshot().instantiate() as copy:
            assert copy.memory.read(0, 7) == b"passive"
            copy.memory.write(0, b"0000000")
            copy.call("use")
            assert copy.memory.read(0, 7) == b"passive"


def test_a_reference_that_is_not_null_is_refused(real_cell: Cell) -> None:
    text = """(module (memory (export "memory") 1) (global $r (mut funcref) (ref.null func))
      (elem declare func $f)
      (func $f (export "f")) (func (export "set") (global.set $r (ref.func $f)))
      (func (export "clear") (global.set $r (ref.null func)))
      (func (export "is_null") (result i32) (ref.is_null (global.get $r))))"""
    with started(real_cell, text) as (_, instance):
        if real_cell.host == "wasmer":
            with pytest.raises(memslot.SnapshotRefused, match="which wasmer-python cannot read"):
                instance.snapshot()
            return
        instance.call("set")
        with pytest.raises(memslot.SnapshotRefused, match=r"holds a reference, .*that is not null"):
            instance.snapshot()
        instance.call("clear")
        with instance.snapshot().instantiate() as copy:
            assert copy.call("is_null") == 1
            copy.call("set")
            assert copy.call("is_null") == 0


def test_objects_of_the_runtime_are_a_reason_where_a_table_is_exported(real_cell: Cell) -> None:
    text = """(module (memory (export "memory") 1) (table (export "t") 1 funcref) (elem (i32.const 0) $f) (func $f))"""
    with started(real_cell, text) as (_, instance):
        instance.snapshot().close()
        assert instance.native is not None
        with pytest.raises(memslot.SnapshotRefused, match='Table 0 is exported as "t"'):
            instance.snapshot()
        instance.reset()
        instance.snapshot().close()


def test_a_module_with_shared_memory_is_refused(real_cell: Cell) -> None:
    if real_cell.host == "wasmer":
        pytest.skip("impossible: wasmer does not compile shared memories")

    def shared(config: Any) -> None:
        bindings.wasmtime_config_shared_memory_set(config.ptr(), True)

    bindings = pytest.importorskip("wasmtime")._bindings
    settings = real_cell.settings(slots=1)
    with (
        memslot.open_host("wasmtime", settings=settings, configure=shared) as host,
        host.prepare(toy.assemble('(module (memory (export "m") 1 1 shared))')) as guest,
        guest.instantiate() as instance,
        pytest.raises(
            memslot.SnapshotRefused,
            match=r"cannot be captured: the module is left to the runtime\. Memory 0 is shared",
        ),
    ):
        instance.snapshot()


def test_a_module_with_the_table_of_another_is_refused(real_cell: Cell) -> None:
    """wasmer's is left to it, and wasmtime's puts functions of its own into what is not its own."""
    giving = '(module (memory 1) (table (export "t") 1 funcref))'
    taking = (
        '(module (import "env" "t" (table 1 funcref)) (memory 1) (func $f) (elem (i32.const 0) $f))'
    )
    with (
        real_cell.serving(slots=2) as host,
        host.prepare(toy.assemble(giving)) as first,
        first.instantiate() as giver,
    ):
        if real_cell.host == "wasmer":
            table, store = giver.native.exports.t, {}
            said = r"the module is left to the runtime\. It imports the table env\.t"
        else:
            native = giver.native
            table, store = native.exports(native.store)["t"], {"store": native.store}
            said = (
                r"Each new instance may put its functions into the table that is imported as env\.t"
            )
        with host.prepare(toy.assemble(taking), imports={"env": {"t": table}}) as second:
            instance = second.instantiate(**store)
            with pytest.raises(memslot.SnapshotRefused, match=f"cannot be captured: {said}"):
                instance.snapshot()
            instance.close()


def test_a_running_call_is_no_call_boundary(real_cell: Cell) -> None:
    text = '(module (import "env" "f" (func $f)) (memory 1) (func (export "run") (call $f)))'
    held: list[memslot.Instance] = []

    def capture() -> None:
        held[0].snapshot()

    with started(real_cell, text, imports={"env": {"f": capture}}) as (_, instance):
        held.append(instance)
        with pytest.raises(memslot.InUse):
            instance.call("run")
        held.clear()


def test_an_image_beyond_the_limit_is_refused(real_cell: Cell) -> None:
    text = '(module (memory (export "memory") 20))'
    with (
        real_cell.open(slots=2, image_limit="256KiB") as host,
        host.prepare(toy.assemble(text)).instantiate() as instance,
    ):
        instance.memory.write(0, b"x")
        instance.memory.write(19 * PAGE, b"x")
        with pytest.raises(memslot.MemoryTooLarge, match="image_limit"):
            instance.snapshot()
        assert host.statistics().guests == 1
        instance.memory.write(0, b"\0")
        instance.snapshot().close()


def test_descriptors_that_may_be_open_are_a_reason(real_cell: Cell, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("a note")
    wasi = memslot.Wasi(stdout="capture", preopened={"/data": str(tmp_path)})
    with started(real_cell, WASI, wasi=wasi) as (guest, instance):
        if real_cell.host == "wasmer":
            instance.snapshot().close()
            instance.call("open", 4)
            instance.reset()
            instance.call("look", 4)
        with pytest.raises(memslot.SnapshotRefused, match=r"descriptors|opened files"):
            instance.snapshot()
        with guest.instantiate(wasi=memslot.Wasi(stdout="capture")) as alone:
            alone.call("write")
            captured = alone.snapshot()
        with captured.instantiate() as copy:
            assert copy.global_value("shown") == 1
            assert copy.stdout == b""
            copy.call("write")
            assert copy.stdout == b"hello\n"


def test_a_call_of_wasi_that_failed_or_only_looked_is_no_reason(real_cell: Cell) -> None:
    """Language runtimes look for files even where there are none."""
    with started(real_cell, WASI, wasi=memslot.Wasi()) as (guest, instance):
        for descriptor in (3, 4, 99):
            instance.memory.write(200, b"none")
            instance.call("open", descriptor)
            assert instance.memory.read(200, 4) == b"none", "nothing was opened"
            instance.call("look", descriptor)
        assert instance.call("close", 99) != 0
        instance.snapshot().close()
        instance.reset()
        assert resets(guest) == (1, 0)


@pytest.mark.parametrize("seed", range(3))
def test_generated_modules_go_on_from_their_snapshots(real_cell: Cell, seed: int) -> None:
    rng = random.Random(1000 + seed)
    captured = 0
    with real_cell.serving(slots=3) as host:
        for _ in range(10):
            text, changes, look = generated(rng)
            before = rng.choices((*changes, *look), k=6)
            after = look + tuple(rng.choices(changes, k=3)) + look
            guest = host.prepare(toy.assemble(text))
            with guest.instantiate() as instance:
                for call in before:
                    done(instance, *call)
                try:
                    copied = instance.snapshot()
                except memslot.SnapshotRefused:
                    continue
                finally:
                    guest.close()
                captured += 1
                expected = [done(instance, *call) for call in after]
                with copied.instantiate() as copy:
                    for _ in range(2):
                        assert [done(copy, *call) for call in after] == expected, text
                        copy.reset()
                copied.close()
    assert captured >= 3


@pytest.mark.parametrize("look", [LOOK])
def test_a_snapshot_takes_no_part_in_what_its_parent_does_later(real_cell: Cell, look: Any) -> None:
    with started(real_cell, RESTORABLE) as (guest, instance):
        instance.call("spoil", 1)
        captured = instance.snapshot()
        guest.close()
        instance.call("spoil", 2)
        instance.close()
        with captured.instantiate() as first, captured.instantiate() as second:
            first.call("spoil", 3)
            assert second.call("load", 16) & 0xFFFFFFFF == 1
            cells.check(guest.host)
