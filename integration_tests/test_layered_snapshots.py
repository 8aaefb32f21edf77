"""Snapshots of instances of snapshots: they store what differs, outlive their parents, and reset to what they are."""

from __future__ import annotations

import os
import random

import pytest

import memslot_plugin as memslot
from memslot_plugin import MemfdImage
from memslot_plugin._core import PAGE_SIZE
from memslot_plugin.image import MAX_EXTENTS

from . import cells, toy
from .cells import Cell

PAGE = toy.PAGE
TEXT = f"""(module (memory (export "memory") 40 60) (data (i32.const 16) "from the module") {toy.CODE})"""


def image_of(guest: memslot.Guest) -> memslot.Image:
    image = guest.images[0]
    assert isinstance(image, memslot.Image)
    return image


def content(instance: memslot.Instance) -> bytes:
    return instance.memory.read(0, instance.memory.byte_size)


def test_a_snapshot_of_a_snapshots_instance_stores_what_differs(plain_cell: Cell) -> None:
    with plain_cell.serving(slots=3, image_limit="64MiB") as host:
        first = host.prepare(toy.assemble(TEXT))
        with first.instantiate() as instance:
            instance.memory.write(0, b"x" * 20 * PAGE)
            parent = instance.snapshot("parent")
        assert image_of(parent).stored_bytes == 20 * PAGE
        with parent.instantiate() as instance:
            instance.memory.write(5 * PAGE, b"y")
            instance.memory.write(30 * PAGE, b"z")
            expected = content(instance)
            child = instance.snapshot("child")
        assert image_of(child).stored_bytes == 2 * PAGE_SIZE
        assert image_of(child).inherited_bytes == 20 * PAGE - PAGE_SIZE
        first.close()
        parent.close()
        for _ in range(2):
            with child.instantiate() as instance:
                for _ in range(3):
                    assert content(instance) == expected
                    instance.memory.write(4 * PAGE, b"!" * 10 * PAGE)
                    cells.check(host)
                    instance.reset()
                cells.check(host)
        child.close()


def test_generations_of_snapshots_hold_what_their_instances_held(plain_cell: Cell) -> None:
    rng = random.Random(7)
    with plain_cell.serving(slots=3, image_limit="64MiB") as host:
        guest = host.prepare(toy.assemble(TEXT))
        for _ in range(12):
            with guest.instantiate() as instance:
                for _ in range(rng.randrange(1, 6)):
                    at = rng.randrange(35) * PAGE + rng.randrange(PAGE)
                    instance.memory.write(
                        at, bytes([rng.randrange(3)]) * rng.randrange(1, 2 * PAGE)
                    )
                expected = content(instance)
                child = instance.snapshot()
            guest.close()
            guest = child
            assert len(image_of(guest).extents) <= MAX_EXTENTS
            with guest.instantiate() as instance:
                assert content(instance) == expected
                instance.memory.write(0, b"?" * 3 * PAGE)
                instance.reset()
                assert content(instance) == expected
                cells.check(host)
        guest.close()


@pytest.mark.parametrize("growth", ["mprotect", "ftruncate"])
def test_what_grew_since_the_parent_is_part_of_the_child(real_cell: Cell, growth: str) -> None:
    cell = real_cell.with_changes(growth=growth)
    if cell.refused:
        pytest.skip(cell.refused)
    with cell.serving(slots=3, image_limit="64MiB") as host:
        guest = host.prepare(toy.assemble(TEXT))
        with guest.instantiate() as instance:
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
            assert instance.call("size") == 45
            assert content(instance) == expected
            instance.call("store", 44 * PAGE, 10)
            instance.reset()
            assert content(instance) == expected
            cells.check(host)
        child.close()


STARTING = f"""(module (memory (export "memory") 2) (global $g (mut i32) (i32.const 1))
  (func $start (global.set $g (i32.const 5))) (start $start)
  (func (export "spoil") (param i32) (global.set $g (local.get 0)) (i32.store (i32.const {PAGE}) (local.get 0)))
  (func (export "seen") (result i32) (i32.add (global.get $g) (i32.load (i32.const {PAGE})))))"""
REFERRING = """(module (memory (export "memory") 1) (global $g (mut i32) (i32.const 1))
  (global $r (mut funcref) (ref.null func))
  (elem declare func $f) (func $f (export "f"))
  (func (export "spoil") (param i32) (global.set $g (local.get 0)) (global.set $r (ref.null func)))
  (func (export "refer") (global.set $r (ref.func $f)))
  (func (export "seen") (result i32) (global.get $g)))"""


def compiled_again(child: memslot.Guest, parent: memslot.Guest) -> bool:
    return child.compiled.module is not parent.compiled.module


def test_a_snapshot_is_not_compiled_again_where_its_globals_can_be_set(real_cell: Cell) -> None:
    with real_cell.serving(slots=3, image_limit="64MiB") as host:
        guest = host.prepare(toy.assemble(TEXT))
        with guest.instantiate() as instance:
            assert instance.call("bump") == 8
            child = instance.snapshot()
            instance.call("grow", 1)
            grown = instance.snapshot()
        assert not compiled_again(child, guest)
        assert compiled_again(grown, guest)
        for each, pages in ((child, 40), (grown, 41)):
            with each.instantiate() as instance:
                for _ in range(2):
                    assert [instance.call("bump"), instance.call("bump")] == [9, 10]
                    assert instance.call("size") == pages
                    instance.reset()
                instance.call("bump")
                grandchild = instance.snapshot()
            assert not compiled_again(grandchild, each)
            with grandchild.instantiate() as instance:
                assert instance.call("bump") == 10
            grandchild.close()
        with guest.instantiate() as instance:
            assert instance.call("bump") == 8, "the parent's own globals are as they were"


def test_a_snapshot_is_compiled_again_where_code_would_run_or_references_are_held(
    real_cell: Cell,
) -> None:
    with real_cell.serving(slots=3) as host:
        for text in (STARTING, REFERRING):
            if text is REFERRING and real_cell.host == "wasmer":
                continue  # has no snapshots of it
            guest = host.prepare(toy.assemble(text))
            with guest.instantiate() as instance:
                instance.call("spoil", 30)
                child = instance.snapshot()
            assert compiled_again(child, guest)
            with child.instantiate() as instance:
                found = instance.call("seen")
                assert found == (60 if text is STARTING else 30)
                instance.call("spoil", 1)
                again = instance.snapshot()
            assert compiled_again(again, child) == (text is REFERRING), "no start is left to run"
            with again.instantiate() as instance:
                assert instance.call("seen") == (2 if text is STARTING else 1)


def test_forks_store_only_what_their_parent_wrote(real_cell: Cell) -> None:
    with real_cell.serving(slots=52, image_limit="64MiB") as host:
        guest = host.prepare(toy.assemble(TEXT))
        with guest.instantiate() as instance:
            instance.memory.write(0, os.urandom(30 * PAGE))
            booted = instance.snapshot()
        with booted.instantiate() as parent:
            parent.call("store", 3 * PAGE, 1)
            before = content(parent)
            forks = parent.fork(50)
            image = image_of(forks[0].guest)
            assert image.stored_bytes == PAGE_SIZE
            if isinstance(image, MemfdImage):
                held = {each.inode for each in image.backings}
                assert held > {each.inode for each in image_of(booted).backings}
            for number, fork in enumerate(forks):
                fork.memory.write(number * PAGE // 2, b"%d" % number)
            for number, fork in enumerate(forks):
                own = bytearray(before)
                data = b"%d" % number
                own[number * PAGE // 2 : number * PAGE // 2 + len(data)] = data
                assert content(fork) == own
            assert content(parent) == before
            for fork in forks:
                fork.close()
        booted.close()
