"""Snapshots start at the state of an instance, forks go on from it, and layers store the differences."""

from __future__ import annotations

from pathlib import Path

import pytest

import memslot_plugin as memslot
from memslot_plugin._core import PAGE_SIZE

from . import cells, toy
from .cells import Cell
from .test_instance_reset import RESTORABLE, WASI, resets, seen, started
from .toy import PAGE

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
LARGE = f"""(module (memory (export "memory") 40 46) (data (i32.const 16) "from the module") {toy.CODE})"""


def image_of(guest: memslot.Guest) -> memslot.Image:
    image = guest.images[0]
    assert isinstance(image, memslot.Image)
    return image


def content(instance: memslot.Instance) -> bytes:
    return instance.memory.read(0, instance.memory.byte_size)


# Initialising


def test_init_export_runs_once_and_its_effect_is_in_every_instance(real_cell: Cell) -> None:
    called: list[int] = []
    imports = {"env": {"f": lambda: called.append(1)}}
    with real_cell.serving(slots=3, image_limit="64MiB") as host:
        guest = host.prepare(toy.assemble(INIT), imports=imports, init="_initialize", name="init")
        assert host.statistics().guests == 1, "the one that was initialised is gone"
        assert guest.report.verdict.in_place, "the start function does not run any more"
        assert guest.report.memories[0].minimum_bytes == 10 * PAGE
        stored = sum(extent.length for extent in image_of(guest).extents)
        assert stored <= 2 * PAGE_SIZE, "zeros are not stored"
        for _ in range(2):
            with guest.instantiate() as instance:
                for _ in range(2):
                    assert instance.memory.read(0, 8) == b"at first"
                    assert [instance.call("next"), instance.call("next")] == [41, 42]
                    assert (instance.call("hidden"), instance.call("started")) == (-1, 1)
                    assert (instance.call("size"), instance.call("load", 600_000)) == (10, 7)
                    instance.call("store", 600_000, 8)
                    instance.reset()
        assert called == [1]
        assert resets(guest) == (4, 0)


def test_init_in_python_runs_and_leaves_nothing_if_it_fails(real_cell: Cell) -> None:
    def init(instance: memslot.Instance) -> None:
        instance.memory.write(100, b"from python")
        instance.set_global("n", 7)

    module, imports = toy.assemble(INIT), {"env": {"f": lambda: None}}
    with real_cell.serving(slots=1) as host:
        for fails, expected in (
            ("no such export", memslot.ExportNotFound),
            (lambda instance: 1 / 0, ZeroDivisionError),
            (lambda instance: instance.call("load", -1), memslot.GuestTrap),
        ):
            with pytest.raises(expected):
                host.prepare(module, imports=imports, init=fails)
            assert host.statistics().guests == 0
        with host.prepare(module, imports=imports, init=init).instantiate() as instance:
            assert instance.memory.read(100, 11) == b"from python"
            assert instance.call("next") == 8


# Snapshots


def test_snapshot_of_any_globals_restores_them_without_its_parent(real_cell: Cell) -> None:
    with started(real_cell, RESTORABLE) as (guest, instance):
        instance.call("spoil", -5)
        now = seen(instance)
        captured = instance.snapshot("captured")
        assert captured.name == "captured"
        instance.call("spoil", 99)
        assert seen(instance) != now, "the original goes on"
        instance.reset()
        with guest.instantiate() as fresh:
            assert seen(instance) == seen(fresh), "and back to its own beginning"
        guest.close()
        instance.close()
        with captured.instantiate() as copy, captured.instantiate() as other:
            assert seen(copy) == now
            copy.call("spoil", 98)
            assert seen(other) == now
            copy.reset()
            assert seen(copy) == now
            with copy.snapshot().instantiate() as again:
                assert seen(again) == now


@pytest.mark.parametrize("growth", ["mprotect", "ftruncate"])
def test_snapshot_of_a_grown_memory_starts_grown(real_cell: Cell, growth: str) -> None:
    cell = real_cell.with_changes(growth=growth)
    if cell.refused:
        pytest.skip("impossible: wasmer owns its mappings and grows them by mprotect itself")
    with cell.serving(slots=3, image_limit="64MiB") as host:
        with host.prepare(toy.assemble(LARGE)).instantiate() as instance:
            instance.memory.write(3 * PAGE, b"x" * PAGE)
            parent = instance.snapshot()
        with parent.instantiate() as instance:
            assert instance.call("grow", 5) == 40
            instance.call("store", 44 * PAGE, 9)
            expected = content(instance)
            child = instance.snapshot()
        parent.close()
        assert image_of(child).stored_bytes == PAGE_SIZE
        with child.instantiate() as instance:
            for _ in range(2):
                assert instance.call("size") == 45
                assert content(instance) == expected
                instance.call("store", 44 * PAGE, 10)
                assert (instance.call("grow", 1), instance.call("grow", 1)) == (45, -1)
                instance.reset()
            cells.check(host)


def test_snapshot_is_compiled_again_only_if_its_globals_cannot_be_set(real_cell: Cell) -> None:
    with started(real_cell, toy.TEXT_OF_A) as (guest, instance):
        assert instance.call("bump") == 8
        child = instance.snapshot()
        instance.call("grow", 1)
        grown = instance.snapshot()
        instance.reset()
        assert child.compiled.module is guest.compiled.module
        assert grown.compiled.module is not guest.compiled.module
        for each, pages in ((child, 2), (grown, 3)):
            with each.instantiate() as copy:
                for _ in range(2):
                    assert [copy.call("bump"), copy.call("bump")] == [9, 10]
                    assert copy.call("size") == pages
                    copy.reset()
                copy.call("bump")
                grandchild = copy.snapshot()
            assert grandchild.compiled.module is each.compiled.module
            with grandchild.instantiate() as copy:
                assert copy.call("bump") == 10
        assert instance.call("bump") == 8, "the parent's own globals are as they were"


STARTING = f"""(module (memory (export "memory") 2) (global $g (mut i32) (i32.const 1))
  (func $start (global.set $g (i32.const 5))) (start $start)
  (func (export "spoil") (param i32) (global.set $g (local.get 0)) (i32.store (i32.const {PAGE}) (local.get 0)))
  (func (export "seen") (result i32) (i32.add (global.get $g) (i32.load (i32.const {PAGE})))))"""
REFERRING = """(module (memory (export "memory") 1) (global $g (mut i32) (i32.const 1))
  (global $r (mut funcref) (ref.null func)) (elem declare func $f) (func $f (export "f"))
  (func (export "spoil") (param i32) (global.set $g (local.get 0)) (global.set $r (ref.null func)))
  (func (export "refer") (global.set $r (ref.func $f)))
  (func (export "seen") (result i32) (global.get $g)))"""


@pytest.mark.parametrize(("text", "factor"), [(STARTING, 2), (REFERRING, 1)], ids=["start", "refs"])
def test_snapshot_is_compiled_again_if_code_would_run_or_references_are_held(
    real_cell: Cell, text: str, factor: int
) -> None:
    if text is REFERRING and real_cell.host == "wasmer":
        pytest.skip("impossible: wasmer has no snapshots of globals that hold references")
    with started(real_cell, text) as (guest, instance):
        instance.call("spoil", 30)
        child = instance.snapshot()
        assert child.compiled.module is not guest.compiled.module
        with child.instantiate() as copy:
            assert copy.call("seen") == 30 * factor
            copy.call("spoil", 1)
            again = copy.snapshot()
        compiled = again.compiled.module is not child.compiled.module
        assert compiled == (text is REFERRING), "no start is left to run"
        with again.instantiate() as copy:
            assert copy.call("seen") == factor


def test_snapshot_ignores_segments_that_stay_and_failed_calls_of_wasi(real_cell: Cell) -> None:
    """Language runtimes look for files, which fails without folders."""
    text = """(module (memory (export "memory") 1) (data $p "passive")
      (func (export "use") (memory.init $p (i32.const 0) (i32.const 0) (i32.const 7))))"""
    with started(real_cell, text) as (_, instance):
        instance.call("use")
        with instance.snapshot().instantiate() as copy:
            assert copy.memory.read(0, 7) == b"passive"
            copy.memory.write(0, b"0000000")
            copy.call("use")
            assert copy.memory.read(0, 7) == b"passive"
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


def test_snapshot_needs_an_instance_without_open_descriptors(
    real_cell: Cell, tmp_path: Path
) -> None:
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


# Forks


def test_fork_of_an_instance_has_its_own_pages_and_the_bytes_of_its_parent(real_cell: Cell) -> None:
    count = 20
    with real_cell.serving(slots=count + 1, image_limit="64MiB") as host:
        with host.prepare(toy.assemble(LARGE)).instantiate() as instance:
            instance.memory.write(0, bytes(range(256)) * (30 * PAGE // 256))
            booted = instance.snapshot()
        with booted.instantiate() as parent:
            parent.call("store", 3 * PAGE, 1)
            before = content(parent)
            forks = parent.fork(count)
            guests = host.statistics().guests
            image = image_of(forks[0].guest)
            assert image.stored_bytes == PAGE_SIZE
            for number, fork in enumerate(forks):
                fork.memory.write(number * PAGE // 2, b"%d" % number)
            for number, fork in enumerate(forks):
                own, data = bytearray(before), b"%d" % number
                own[number * PAGE // 2 : number * PAGE // 2 + len(data)] = data
                assert content(fork) == own
            assert content(parent) == before
            forks[7].reset()
            assert content(forks[7]) == before
            for fork in forks[1:]:
                fork.close()
            assert host.statistics().guests == guests
            forks[0].close()
            assert host.statistics().guests == guests - 1, "the forks' guest goes with the last"


def test_fork_of_more_instances_than_slots_leaves_none(real_cell: Cell) -> None:
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
