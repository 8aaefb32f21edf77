"""Every cell of the matrix does the same: hands out, grows, keeps tenants apart, resets and takes back."""

from __future__ import annotations

import itertools

import pytest

import memslot_plugin as memslot

from . import cells, toy
from .cells import Cell
from .hostile import traps
from .toy import PAGE


def leave_traces(instance: memslot.Instance) -> None:
    """Write every byte, grow, write every new byte, change the global, and trap in the middle of more."""
    size = instance.call("size")
    instance.call("fill", 0, size * PAGE, 0xEE)
    assert instance.call("grow", 3) == size
    instance.call("fill", size * PAGE, 3 * PAGE, 0xDD)
    instance.call("bump")
    traps(instance, "fill_and_trap", 100, 5000, 0xBB)
    assert instance.call("different", 100, 5000, 0xBB) == 0


def assert_pristine(instance: memslot.Instance, module: bytes, host: str) -> None:
    """Bytes, size and global are what a new instance of the module starts with."""
    expected = toy.pristine(module, host)
    assert instance.memory.byte_size == len(expected)
    assert instance.memory.read(0, len(expected)) == expected
    assert instance.call("size") == len(expected) // PAGE
    traps(instance, "load", len(expected))
    assert instance.call("bump") == 8


def test_pairwise_cells_cover_every_possible_pair_of_coordinates() -> None:
    possible = [cell for cell in cells.EVERY_CELL if not (cell.missing or cell.refused)]
    assert set(cells.PAIRWISE_CELLS) <= set(possible)
    left = set().union(*(cell.pairs for cell in possible))
    assert not left.difference(*(cell.pairs for cell in cells.PAIRWISE_CELLS))


def test_wasmer_refuses_growth_by_ftruncate(refused_cell: Cell) -> None:
    with refused_cell.serving() as host:
        guest = host.prepare(toy.A)
        with pytest.raises(memslot.Unsupported, match=r"growth .*ftruncate"):
            guest.instantiate()


def test_instance_lives_in_a_slot_and_gives_it_back(cell: Cell) -> None:
    with cell.serving() as host:
        guest = host.prepare(toy.A, name="a")
        assert guest.report.memories[0].image
        instance = guest.instantiate(tenant="ann")
        cells.check(host, in_use=1)
        assert not instance.closed
        assert instance.exports["load"] == "func"
        assert instance.function("load64")(20) == int.from_bytes(b"lettersf", "little")
        assert instance.call("store", 0, 5) is None
        assert instance.memory.read(0, 2) == b"\5\0"
        instance.memory.write(1, b"\6")
        assert instance.call("load", 1) == 6
        (pool,) = host.statistics().pools
        assert (pool.plugin, pool.in_use) == (cell.backend, 1)
        guest.close()
        leave_traces(instance)
        instance.close()
        assert instance.closed
        cells.check(host, in_use=0)
        (pool,) = host.statistics().pools
        assert (pool.leases, pool.in_use, pool.warm, pool.failed_resets) == (1, 0, 0, 0)
        assert host.statistics().guests == 0


def test_tenants_side_by_side_do_not_meet(cell: Cell) -> None:
    with cell.serving() as host:
        guest = host.prepare(toy.A)
        tenants = [guest.instantiate() for _ in range(4)]
        for mark, instance in enumerate(tenants, start=1):
            assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
            instance.call("fill", 0, 2 * PAGE, mark)
        tenants[2].reset()
        for mark, instance in enumerate(tenants, start=1):
            if mark == 3:
                assert_pristine(instance, toy.A, cell.host)
            else:
                assert instance.call("different", 0, 2 * PAGE, mark) == 0
            instance.close()
            cells.check(host)


def test_reset_brings_everything_back_behind_the_same_handle(cell: Cell) -> None:
    with cell.serving(slots=1) as host, host.prepare(toy.A).instantiate() as instance:
        memory = instance.memory
        for _ in range(3):
            leave_traces(instance)
            instance.reset()
            assert memory.byte_size == 2 * PAGE
            assert_pristine(instance, toy.A, cell.host)
            cells.check(host, in_use=1)
        assert host.statistics().resets == 3


def test_guests_after_each_other_in_one_slot_find_their_own_image(cell: Cell) -> None:
    """Another image, no image after an image, all zeros, and back."""
    with cell.serving(slots=1) as host:
        guests = {module: host.prepare(module) for module in (toy.A, toy.B, toy.ZEROS, toy.WIDE)}
        assert guests[toy.ZEROS].report.memories[0].image
        assert guests[toy.WIDE].report.memories[0].reason is not None
        a, b, zeros, wide = guests
        order = [a, b, a, zeros, b, wide, zeros, a, a, wide, a, wide, wide, b, zeros, zeros, a]
        pairs = set(itertools.pairwise(order))
        assert {(a, b), (b, a), (a, zeros), (a, wide), (wide, zeros), (zeros, zeros)} <= pairs
        for turn, module in enumerate(order):
            with guests[module].instantiate() as instance:
                assert_pristine(instance, module, cell.host)
                if turn % 3:
                    leave_traces(instance)
            cells.check(host, in_use=0)


def test_growth_by_the_guest_ends_at_the_maximum_of_the_memory(cell: Cell) -> None:
    with cell.serving(slots=1) as host, host.prepare(toy.A).instantiate() as instance:
        for pages, before in ((0, 2), (1, 2), (2, 3), (3, 5), (0, 8)):
            assert instance.call("grow", pages) == before
            size = (before + pages) * PAGE
            assert instance.memory.byte_size == size
            assert instance.call("load", size - 1) == (ord("t") if size == 2 * PAGE else 0)
            traps(instance, "load", size)
            cells.check(host, in_use=1)
        assert instance.call("different", 2 * PAGE, 6 * PAGE, 0) == 0
        for pages in (1, 100, 65535, 65536):
            assert instance.call("grow", pages) == -1
        assert instance.call("size") == 8


def test_growth_by_the_embedder_ends_at_the_memory_limit(cell: Cell) -> None:
    unbounded = toy.assemble(toy.text("zeros", "2"))
    with cell.serving(memory_limit=4 * PAGE) as host:
        for module in (toy.A, unbounded):
            with host.prepare(module).instantiate() as instance:
                assert instance.call("grow", 3) == -1
                assert instance.memory.grow(2) == 2
                assert instance.call("size") == 4
                instance.memory.write(4 * PAGE - 1, b"!")
                assert instance.call("load", 4 * PAGE - 1) == ord("!")
                traps(instance, "store", 4 * PAGE, 1)
                with pytest.raises(memslot.GrowthRefused):
                    instance.memory.grow(1)
                assert instance.call("grow", 1) == -1
                assert instance.memory.byte_size == 4 * PAGE
                cells.check(host, in_use=1)


BOUNDARIES = (-1, -8, -PAGE, 2**31 - 8, 2**31 - 1, -(2**31), 2 * PAGE, 2 * PAGE + 4096, 3 * PAGE, 8 * PAGE)  # fmt: skip
"""Addresses (as i32) of which every byte is outside a memory of two pages."""


def test_accesses_at_every_boundary_trap_and_write_nothing(cell: Cell) -> None:
    with cell.serving() as host:
        guest = host.prepare(toy.A)
        with guest.instantiate() as neighbour, guest.instantiate() as instance, guest.instantiate():
            neighbour.call("fill", 0, 2 * PAGE, 0x11)
            for address in BOUNDARIES:
                for call in (("load", address), ("load64", address), ("store", address, 1)):
                    traps(instance, *call)
            for before_the_end in range(1, 8):
                traps(instance, "load64", 2 * PAGE - before_the_end)
                traps(instance, "store64", 2 * PAGE - before_the_end, -1)
            last = int.from_bytes(b"\0\0\0\0last", "little")
            assert instance.call("load64", 2 * PAGE - 8) == last
            assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
            assert neighbour.call("different", 0, 2 * PAGE, 0x11) == 0
            # A fill that runs over the end has written everything up to it.
            traps(instance, "fill", 2 * PAGE - 100, 101, 0x22)
            assert instance.call("different", 2 * PAGE - 100, 100, 0x22) == 0


def test_embedder_outside_of_the_memory_is_refused(cell: Cell) -> None:
    with cell.serving() as host, host.prepare(toy.A).instantiate() as instance:
        memory = instance.memory
        assert memory.read(2 * PAGE, 0) == b""
        memory.write(2 * PAGE, b"")
        for offset, length in ((-1, 1), (2 * PAGE, 1), (2 * PAGE - 1, 2), (0, -1), (2**40, 1)):
            with pytest.raises(memslot.AccessOutOfBounds, match="outside memory 0 of 131072 bytes"):
                memory.read(offset, length)
        with pytest.raises(memslot.AccessOutOfBounds):
            memory.write(2 * PAGE - 2, b"abc")
        assert memory.read(2 * PAGE - 4, 4) == b"last"
