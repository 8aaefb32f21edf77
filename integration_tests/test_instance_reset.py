"""Resets of instances, in place or by a new instance: the instance then behaves as a new one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import memslot_plugin as memslot

from . import toy
from .cells import Cell
from .toy import PAGE

RESTORABLE = """(module
  (memory (export "memory") 1 4)
  (data (i32.const 16) "data at first")
  (global $hidden (mut i64) (i64.const -7))
  (global $real (mut f32) (f32.const nan:0x012345))
  (global $double (mut f64) (f64.const -0.0))
  (global $vector (mut v128) (v128.const i64x2 0x8123456789abcdef -2))
  (global $shown (export "shown") (mut i32) (i32.const -1))
  (global $reader (export "reader") i32 (i32.const 9))
  (func (export "spoil") (param i32)
    (i32.store (i32.const 16) (local.get 0))
    (i32.store (i32.const 65532) (local.get 0))
    (global.set $hidden (i64.extend_i32_s (local.get 0)))
    (global.set $real (f32.convert_i32_s (local.get 0)))
    (global.set $double (f64.convert_i32_s (local.get 0)))
    (global.set $vector (i32x4.splat (local.get 0)))
    (global.set $shown (local.get 0)))
  (func (export "hidden") (result i64) (global.get $hidden))
  (func (export "real") (result i32) (i32.reinterpret_f32 (global.get $real)))
  (func (export "double") (result i64) (i64.reinterpret_f64 (global.get $double)))
  (func (export "low") (result i64) (i64x2.extract_lane 0 (global.get $vector)))
  (func (export "high") (result i64) (i64x2.extract_lane 1 (global.get $vector)))
  (func (export "size") (result i32) (memory.size))
  (func (export "load") (param i32) (result i64) (i64.load (local.get 0)))
  (func (export "spoil_and_trap") (param i32) (call 0 (local.get 0)) unreachable)
  (func $deep (export "spoil_and_overflow") (param i32)
    (call 0 (local.get 0)) (call $deep (i32.add (local.get 0) (i32.const 1))))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))"""

LOOK: tuple[tuple[Any, ...], ...] = (
    ("hidden",), ("real",), ("double",), ("low",), ("high",), ("size",), ("load", 16), ("load", 24),
    ("load", PAGE - 8), ("load", PAGE), ("load", 100_000),
)  # fmt: skip


def done(instance: memslot.Instance, name: str, *arguments: Any) -> Any:
    """Return the result of a call, or a note that it trapped."""
    try:
        return instance.call(name, *arguments)
    except memslot.GuestTrap:
        return "trap"


def seen(instance: memslot.Instance) -> list[Any]:
    """Return the state of an instance that the guest and the embedder can see."""
    found: list[Any] = [instance.global_value("shown"), instance.memory.byte_size]
    return found + [done(instance, *call) for call in LOOK]


@contextmanager
def started(
    cell: Cell, text: str, **options: Any
) -> Iterator[tuple[memslot.Guest, memslot.Instance]]:
    with cell.serving(slots=4) as host:
        guest = host.prepare(toy.assemble(text), **options)
        with guest.instantiate() as instance:
            yield guest, instance


def resets(guest: memslot.Guest) -> tuple[int, int]:
    """Return the number of resets in place, and by a new instance."""
    counted = guest.host.statistics()
    assert counted.resets == counted.resets_in_place + counted.resets_by_instantiation
    return counted.resets_in_place, counted.resets_by_instantiation


def test_reset_in_place_restores_memories_and_globals_of_every_type(real_cell: Cell) -> None:
    with started(real_cell, RESTORABLE) as (guest, instance):
        assert guest.report.verdict.in_place
        with guest.instantiate() as fresh:
            new = seen(fresh)
        address, load = instance.enter().locate(0), instance.function("load")
        spoils = ("spoil", "spoil_and_trap", "spoil_and_overflow")
        for turn, spoil in enumerate(spoils, start=1):
            done(instance, spoil, turn)
            assert seen(instance) != new
            instance.set_global("shown", 77)
            instance.reset()
            assert seen(instance) == new
            assert instance.enter().locate(0) == address
            assert load(16) == new[8], "a function that was looked up before goes on"
            assert resets(guest) == (turn, 0)


def test_reset_of_a_grown_memory_makes_a_new_instance_that_once(real_cell: Cell) -> None:
    with started(real_cell, RESTORABLE) as (guest, instance):
        with guest.instantiate() as fresh:
            new = seen(fresh)
        for turn, grow in enumerate((instance.function("grow"), instance.memory.grow), start=1):
            assert grow(2) == 1
            instance.memory.write(3 * PAGE - 1, b"x")
            instance.reset()
            assert seen(instance) == new
            assert resets(guest) == (turn - 1, turn)
            assert instance.call("grow", 0) == 1
            assert instance.call("grow", 100) == -1, "neither grows anything"
            instance.call("spoil", 5)
            instance.reset()
            assert seen(instance) == new
            assert resets(guest) == (turn, turn)


def test_reset_after_the_runtimes_objects_were_taken_makes_a_new_instance(real_cell: Cell) -> None:
    with started(real_cell, RESTORABLE) as (guest, instance):
        assert instance.native is not None
        instance.reset()
        assert resets(guest) == (0, 1)
        instance.reset()
        assert resets(guest) == (1, 1)


def test_export_that_memslot_added_is_hidden_from_the_embedder(real_cell: Cell) -> None:
    with started(real_cell, RESTORABLE) as (guest, instance):
        names = {each.export_name for each in guest.plan.saved_globals}
        assert names
        assert not names & set(instance.exports)
        for name in names:
            assert name is not None
            for use in (
                instance.global_value,
                lambda each: instance.set_global(each, 0),
                instance.function,
            ):
                with pytest.raises(memslot.ExportNotFound):
                    use(name)


def test_reset_runs_a_start_function_again(real_cell: Cell) -> None:
    text = """(module (memory (export "memory") 1) (global $shown (export "shown") (mut i32) (i32.const 0))
      (func $start (global.set $shown (i32.const 5)) (i32.store (i32.const 0) (i32.const 6))) (start $start)
      (func (export "load") (param i32) (result i64) (i64.load (local.get 0))))"""
    with started(real_cell, text) as (guest, instance):
        instance.set_global("shown", 0)
        instance.memory.write(0, b"zz")
        instance.reset()
        assert (instance.global_value("shown"), instance.call("load", 0)) == (5, 6)
        assert resets(guest) == (0, 1)


WASI = """(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_close" (func $close (param i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_filestat_get" (func $look (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (global $shown (export "shown") (mut i32) (i32.const 0))
  (data (i32.const 0) "\\10\\00\\00\\00\\06\\00\\00\\00")
  (data (i32.const 16) "hello\\n")
  (data (i32.const 64) "note.txt")
  (func (export "write") (result i32)
    (global.set $shown (i32.const 1))
    (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 100)))
  (func (export "close") (param i32) (result i32) (call $close (local.get 0)))
  (func (export "open") (param i32) (result i32)
    (drop (call $open (local.get 0) (i32.const 0) (i32.const 64) (i32.const 8) (i32.const 0)
      (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 200)))
    (i32.load (i32.const 200)))
  (func (export "look") (param i32) (result i32)
    (call $look (local.get 0) (i32.const 0) (i32.const 80) (i32.const 1) (i32.const 208)))
  (data (i32.const 80) "."))"""


def test_reset_renews_captured_output_and_descriptors(real_cell: Cell, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("a note")
    folder = 3 if real_cell.host == "wasmtime" else 4
    wasi = memslot.Wasi(stdout="capture", preopened={"/data": str(tmp_path)})
    with started(real_cell, WASI, wasi=wasi) as (guest, instance):

        def writes() -> None:
            assert instance.call("write") == 0
            assert instance.stdout == b"hello\n"

        with guest.instantiate() as fresh:
            first = fresh.call("open", folder)
        writes()
        instance.reset()
        assert instance.stdout == b""
        assert resets(guest) == (1, 0)
        writes()
        assert [instance.call("open", folder), instance.call("open", folder)] == [first, first + 1]
        assert instance.call("close", 0) == 0
        instance.reset()
        writes()
        assert instance.call("open", folder) == first
        # wasmer cannot give an old instance a new environment.
        assert resets(guest) == ((2, 0) if real_cell.host == "wasmtime" else (1, 1))
