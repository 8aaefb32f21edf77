"""Hostile guests in each cell: the next tenant finds none of their bytes, and no access reaches a neighbour."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable

import pytest

import memslot_plugin as memslot
from memslot_plugin.tests.profiles import LONG

from . import cells, hostile, toy
from .cells import Cell
from .hostile import MAXIMUM, traps
from .toy import PAGE

pytestmark = pytest.mark.scales

TIMES = 6 if LONG else 1
"""Rounds of each attack with each way to end. The next tenant differs each time."""
PART = 1 if LONG else 12
"""Parts of the accesses out of bounds. Each cell tries one part."""

NEXT = ("attacker", "other image", "no image", "smaller", "larger", "spoiler")


def part_of(cell: Cell) -> int:
    """Return the part of this cell, equal in each run."""
    return zlib.crc32(str(cell).encode())


def prepare(host: memslot.Host) -> dict[str, memslot.Guest]:
    return {
        name: host.prepare(toy.assemble(hostile.text(name)), imports=hostile.IMPORTS, name=name)
        for name in hostile.GUESTS
    }


def look_around(instance: memslot.Instance, name: str) -> None:
    """Compare the reachable state of a tenant with its module."""
    expected = hostile.pristine(name)
    size = len(expected)
    memory, code = instance.memory, instance.guest.host.name != "fake"
    assert memory.byte_size == size
    assert memory.read(0, size) == expected
    assert instance.call("size") == size // PAGE
    assert instance.call("different", 0, 16, 0) == 0
    for address in (size, MAXIMUM * PAGE - 1, MAXIMUM * PAGE, -1):
        traps(instance, "load", address)
    assert memory.read(size, 0) == b""
    for offset, length in ((-1, 1), (size, 1), (size - 1, 2), (0, -1), (2**40, 1)):
        said = f"outside memory 0 of {size} bytes"
        with pytest.raises(memslot.AccessOutOfBounds, match=said):
            memory.read(offset, length)
    if code:  # Python functions keep state of their own
        assert instance.call("bump") == 8
        assert instance.call("sum_of_globals") == hostile.SUM_OF_GLOBALS
    if code and name == "spoiler":
        assert instance.call("ask_table", 0) == 1
        traps(instance, "ask_table", 1)
        instance.call("read_words")
        assert memory.read(0, 6) == b"secret"
    # Growth must bring zeros, where an earlier tenant wrote too.
    before = size // PAGE
    assert instance.call("grow", MAXIMUM - before) == before
    assert instance.call("different", size, (MAXIMUM - before) * PAGE, 0) == 0
    assert memory.read(size, (MAXIMUM - before) * PAGE) == bytes((MAXIMUM - before) * PAGE)


def attack_and_leave(guest: memslot.Guest, attack: hostile.Attack, way: str) -> None:
    if way == "lease":
        with guest.lease() as instance:
            attack(instance)
        return
    instance = guest.instantiate(tenant="mallory")
    attack(instance)
    if way == "reset":
        instance.reset()
        look_around(instance, guest.name)
    if way != "drop":
        instance.close()


def test_next_tenant_after_each_attack_finds_nothing(tenant_cell: Cell) -> None:
    """Try each attack, each way to end, and each kind of next tenant, in the only slot."""
    with tenant_cell.serving(slots=1) as host:
        guests = prepare(host)
        ways = ("close", "reset", "drop", "lease")
        attacks = itertools.product(hostile.attacks(tenant_cell.host), ways, range(TIMES))
        for turn, ((name, attack), way, _) in enumerate(attacks, start=part_of(tenant_cell)):
            # The next lease has the instance of the one before.
            after = name if way == "lease" else NEXT[turn % len(NEXT)]
            try:
                attack_and_leave(guests[name], attack, way)
                ask = guests[after].lease if way == "lease" else guests[after].instantiate
                with ask() as victim:
                    look_around(victim, after)
            except BaseException as error:
                what = f"{after} after {name} {attack.__name__}, {way}"
                raise AssertionError(what) from error
        for guest in guests.values():
            guest.close()


def test_snapshot_beside_an_attacker_takes_nothing_of_it(tenant_cell: Cell) -> None:
    with tenant_cell.serving(slots=4) as host:
        guests = prepare(host)
        with (
            guests["attacker"].instantiate() as mallory,
            guests["other image"].instantiate() as bob,
        ):
            hostile.every_byte(mallory)
            bob.call("fill", 100, 50, 0xBB)
            expected = bytearray(hostile.pristine("other image"))
            expected[100:150] = b"\xbb" * 50
            with bob.snapshot() as taken:
                for _ in range(2):
                    with taken.instantiate() as instance:
                        assert instance.memory.read(0, 2 * PAGE) == expected
                        hostile.grown(instance)
            assert bob.memory.read(0, 2 * PAGE) == expected
            assert mallory.call("different", 0, 2 * PAGE, 0xEE) == 0


def test_access_out_of_bounds_traps_and_reaches_no_neighbour(
    tenant_cell: Cell, note: Callable[[str, object], None]
) -> None:
    if tenant_cell.host == "fake":
        pytest.skip("impossible: the fake host runs no code")
    with tenant_cell.serving(slots=3) as host:
        neighbour, guest = host.prepare(toy.A), host.prepare(toy.assemble(hostile.accesses()))
        with (
            neighbour.instantiate() as below,
            guest.instantiate() as instance,
            neighbour.instantiate() as above,
        ):
            for each in (below, above):
                each.call("grow", MAXIMUM - 2)
                each.call("fill", 0, MAXIMUM * PAGE, 0xAA)
            tried = 0
            for pages in (2, 3):
                size = pages * PAGE
                for name, address in hostile.out_of_bounds(size)[
                    part_of(tenant_cell) % PART :: PART
                ]:
                    tried += 1
                    traps(instance, name, address)
                for call in (
                    ("fill", 0, size + 1), ("fill", size, 1), ("fill", size - 1, 2), ("fill", -1, 1),
                    ("fill", 1, -1), ("copy", size - 4, 0, 5), ("copy", 0, size - 4, 5), ("copy", -1, 0, 1),
                    ("copy", 0, -1, 1), ("copy", 0, 0, -1), ("init", size - 4, 0, 5), ("init", 0, 6, 5),
                    ("init", -1, 0, 1),
                ):  # fmt: skip
                    traps(instance, *call)
                assert instance.memory.read(0, size) == bytes(size), "a trap wrote something"
                for name, width in hostile.ACCESSES.items():
                    instance.call(f"{name}+0", size - width)  # the last offset inside
                instance.memory.write(size - 16, bytes(16))
                if pages == 2:
                    assert instance.call("grow", 1) == 2
            note("accesses out of bounds", tried)
            for each in (below, above):
                assert each.memory.read(0, MAXIMUM * PAGE) == b"\xaa" * MAXIMUM * PAGE
        cells.check(host, in_use=0)
