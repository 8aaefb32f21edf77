"""A slot in each cell of the matrix: leased, grown, reset, released, and pristine for each tenant."""

from __future__ import annotations

import pytest

import memslot_plugin as memslot

from . import cells, toy
from .cells import Cell
from .hostile import traps
from .toy import PAGE


def leave_traces(instance: memslot.Instance) -> None:
    """Write each byte, grow, write each new byte, change the global, and trap within another write."""
    size = instance.call("size")
    instance.call("fill", 0, size * PAGE, 0xEE)
    assert instance.call("grow", 3) == size
    instance.call("fill", size * PAGE, 3 * PAGE, 0xDD)
    instance.call("bump")
    traps(instance, "fill_and_trap", 100, 5000, 0xBB)
    assert instance.call("different", 100, 5000, 0xBB) == 0


def assert_pristine(instance: memslot.Instance, module: bytes, host: str) -> None:
    """Fail unless bytes, size and global are those of a new instance."""
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


def test_wasmer_with_growth_by_ftruncate_is_refused(refused_cell: Cell) -> None:
    with refused_cell.serving() as host:
        guest = host.prepare(toy.A)
        with pytest.raises(memslot.Unsupported, match=r"growth .*ftruncate"):
            guest.instantiate()


def test_instance_between_others_lives_in_a_slot_through_resets_and_gives_it_back(
    cell: Cell,
) -> None:
    with cell.serving() as host:
        guest = host.prepare(toy.A, name="a")
        assert guest.report.memories[0].image
        instance = guest.instantiate(tenant="ann")
        neighbours = [guest.instantiate() for _ in range(2)]
        for mark, neighbour in enumerate(neighbours, start=1):
            neighbour.call("fill", 0, 2 * PAGE, mark)
        for _ in range(3):
            leave_traces(instance)
            instance.reset()
            assert_pristine(instance, toy.A, cell.host)
            cells.check(host, in_use=3)
        (pool,) = host.statistics().pools
        assert (pool.plugin, pool.in_use, host.statistics().resets) == (cell.backend, 3, 3)
        for mark, neighbour in enumerate(neighbours, start=1):
            assert neighbour.call("different", 0, 2 * PAGE, mark) == 0
            neighbour.close()
        guest.close()
        leave_traces(instance)
        instance.close()
        cells.check(host, in_use=0)
        (pool,) = host.statistics().pools
        assert (pool.in_use, pool.warm, pool.failed_resets) == (0, 0, 0)
        assert host.statistics().guests == 0


def test_guests_after_each_other_in_one_slot_find_their_own_image(cell: Cell) -> None:
    """The order is another image, no image after an image, all zeros, and back."""
    with cell.serving(slots=1) as host:
        guests = {module: host.prepare(module) for module in (toy.A, toy.B, toy.ZEROS, toy.WIDE)}
        assert guests[toy.ZEROS].report.memories[0].image
        assert guests[toy.WIDE].report.memories[0].reason is not None
        a, b, zeros, wide = guests
        order = [a, b, a, zeros, b, wide, zeros, a, a, wide, a, wide, wide, b, zeros, zeros, a]
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
        with pytest.raises(memslot.GrowthRefused):
            instance.memory.grow(1)
        assert instance.call("size") == 8
