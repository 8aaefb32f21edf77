"""A language runtime as a guest: QuickJS boots and evaluates JavaScript in slots of the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import memslot_plugin as memslot

from . import cells
from .cells import Cell
from .javascript import IMPORTS, Pooled, evaluate
from .leaks import MIB, Footprint

LEASES = 1000
RESIDENT_BOUND = 4 * MIB
"""How much more may be resident after so many leases: malloc and the interpreter breathe."""

LEAVE_A_MESSAGE = """
  globalThis.secret = "of " + tenant; Array.prototype.last = function () { return secret; };
  Object.prototype.left = secret; Math.random = () => secret; var kept = [secret].last(); kept
"""
LOOK_AROUND = "[typeof secret, typeof [].last, typeof {}.left, typeof Math.random(), typeof kept, typeof tenant].join()"
NOTHING = "undefined,undefined,undefined,number,undefined,undefined"


@pytest.fixture(scope="module")
def prepared(real_cell: Cell, quickjs: bytes) -> Iterator[tuple[memslot.Host, memslot.Guest]]:
    """One host for all tests of a cell: compiling takes longer than most of them."""
    with real_cell.serving(slots=4, audit=0.01, image_limit="1GiB") as host:
        guest = host.prepare(quickjs, name="quickjs", imports=IMPORTS, wasi=memslot.Wasi())
        with guest.instantiate(), guest.instantiate():
            pass  # the pool keeps what the tests find when they begin
        yield host, guest


def test_its_memory_is_a_slot_with_an_image(prepared) -> None:
    host, guest = prepared
    (memory,) = guest.report.memories
    assert guest.report.native is None
    assert (memory.image, memory.reason) == (True, None)
    assert memory.data_bytes > 10_000
    with guest.instantiate():
        (pool,) = host.statistics().pools
        assert (pool.plugin, pool.in_use) == (host.settings.plugins[0], 1)


def test_it_evaluates_javascript(prepared) -> None:
    _, guest = prepared
    with guest.instantiate() as instance:
        machine = Pooled(instance)
        assert evaluate(machine, "6 * 7") == "42"
        assert evaluate(machine, "globalThis.x = 40; x + 2") == "42"
        assert evaluate(machine, "x") == "40"
        assert evaluate(machine, "[3, 1, 2].sort().map(x => x ** 2).join('-')") == "1-4-9"
        assert (
            evaluate(
                machine,
                r"'caf\u00e9 \u2615'.split('').length + JSON.stringify({a: [1n.toString()]})",
            )
            == '6{"a":["1"]}'
        )
        assert evaluate(machine, "/(\\d+)-(\\d+)/.exec('in 10-20')[2]") == "20"
        assert evaluate(machine, "let f = n => n < 2 ? n : f(n - 1) + f(n - 2); f(15)") == "610"
        with pytest.raises(ValueError, match="TypeError: nothing at all"):
            evaluate(machine, "throw new TypeError('nothing at all')")
        with pytest.raises(ValueError, match="SyntaxError"):
            evaluate(machine, "6 *")
        assert evaluate(machine, "x") == "40", "it goes on after an exception"


def test_it_grows_and_traps_and_the_next_tenant_starts_anew(prepared) -> None:
    host, guest = prepared
    for _ in range(3):
        with guest.instantiate() as instance:
            machine = Pooled(instance)
            size = instance.memory.byte_size
            assert evaluate(machine, LOOK_AROUND) == NOTHING
            assert (
                evaluate(machine, "var big = new Uint8Array(6e6).fill(7); big.length") == "6000000"
            )
            assert instance.memory.byte_size > size + 5 * MIB
            cells.check(host, in_use=1)
        cells.check(host, in_use=0)
        with guest.instantiate() as instance:
            assert instance.memory.byte_size == size
            assert evaluate(Pooled(instance), "typeof big") == "undefined"


def test_tenants_never_see_each_others_globals(prepared) -> None:
    _, guest = prepared
    with guest.instantiate(tenant="ann") as first, guest.instantiate(tenant="bob") as second:
        ann, bob = Pooled(first), Pooled(second)
        assert evaluate(ann, f"var tenant = 'ann'; {LEAVE_A_MESSAGE}") == "of ann"
        assert evaluate(bob, LOOK_AROUND) == NOTHING
        assert evaluate(bob, f"var tenant = 'bob'; {LEAVE_A_MESSAGE}") == "of bob"
        assert (
            evaluate(ann, "[].last() + ({}).left + Math.random() + tenant")
            == "of annof annof annann"
        )
        first.reset()
        assert evaluate(Pooled(first), LOOK_AROUND) == NOTHING
        assert evaluate(bob, "secret") == "of bob"
    # One after the other in the same slots.
    for number in range(8):
        with guest.instantiate() as instance:
            machine = Pooled(instance)
            assert evaluate(machine, LOOK_AROUND) == NOTHING
            assert evaluate(machine, f"var tenant = {number}; {LEAVE_A_MESSAGE}") == f"of {number}"


def test_a_thousand_leases_leave_the_process_as_it_was(
    prepared, note: Callable[[str, object], None]
) -> None:
    host, guest = prepared

    def serve(number: int) -> None:
        with guest.instantiate() as instance:
            assert evaluate(
                Pooled(instance), f"globalThis.seen = (globalThis.seen ?? 0) + 1; seen * {number}"
            ) == str(number)

    for number in range(50):
        serve(number)
    leases = host.statistics().pools[0].leases
    before = Footprint.now()
    for number in range(LEASES):
        serve(number)
    after = Footprint.now()
    assert not after.lost_since(before, mappings=2)
    note("resident bytes more", after.resident - before.resident)
    assert after.resident <= before.resident + RESIDENT_BOUND
    (pool,) = host.statistics().pools
    assert pool.leases == leases + LEASES
    assert (pool.in_use, pool.failed_resets) == (0, 0)
    if host.growth == "decide":
        assert pool.created <= 2  # what the tests above had at once
    else:  # it grows when it boots, and wasmer cannot shrink it again: every memory is retired
        assert pool.created == pool.destroyed + pool.idle
