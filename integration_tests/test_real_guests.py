"""A language runtime as a guest: QuickJS boots and evaluates JavaScript in slots of the pool."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import memslot_plugin as memslot
from memslot_plugin.settings import MIB

from .cells import Cell
from .javascript import IMPORTS, Pooled, evaluate

LEAVE_A_MESSAGE = """
  globalThis.secret = "of " + tenant; Array.prototype.last = function () { return secret; };
  Object.prototype.left = secret; Math.random = () => secret; var kept = [secret].last();
  var big = new Uint8Array(6e6).fill(7); kept
"""
LOOK_AROUND = "[typeof secret, typeof [].last, typeof {}.left, typeof Math.random(), typeof kept, typeof big].join()"
NOTHING = "undefined,undefined,undefined,number,undefined,undefined"


@pytest.fixture(scope="module")
def guest(real_cell: Cell, quickjs: bytes) -> Iterator[memslot.Guest]:
    """Prepare one guest for all tests of a cell: compiling takes longer than most tests."""
    with real_cell.serving(slots=4, audit=0.01, image_limit="1GiB") as host:
        prepared = host.prepare(quickjs, name="quickjs", imports=IMPORTS, wasi=memslot.Wasi())
        with prepared.instantiate(), prepared.instantiate():
            pass  # the pool keeps its slots: later leak checks count them from the start
        yield prepared


def test_quickjs_evaluates_javascript_in_a_slot_with_an_image(guest: memslot.Guest) -> None:
    (memory,) = guest.report.memories
    assert (guest.report.native, memory.image, memory.reason) == (None, True, None)
    assert memory.data_bytes > 10_000
    with guest.instantiate() as instance:
        (pool,) = guest.host.statistics().pools
        assert (pool.plugin, pool.in_use) == (guest.host.settings.plugins[0], 1)
        machine = Pooled(instance)
        for source, value in (
            ("globalThis.x = 40; x + 2", "42"),
            ("[3, 1, 2].sort().map(x => x ** 2).join('-')", "1-4-9"),
            (r"'caf\u00e9 \u2615'.split('').length + JSON.stringify([1n.toString()])", '6["1"]'),
            (r"/(\d+)-(\d+)/.exec('in 10-20')[2]", "20"),
            ("let f = n => n < 2 ? n : f(n - 1) + f(n - 2); f(15)", "610"),
        ):
            assert evaluate(machine, source) == value
        with pytest.raises(ValueError, match="TypeError: nothing at all"):
            evaluate(machine, "throw new TypeError('nothing at all')")
        with pytest.raises(ValueError, match="SyntaxError"):
            evaluate(machine, "6 *")
        assert evaluate(machine, "x") == "40", "it goes on after an exception"


def test_quickjs_tenants_that_grow_never_see_each_others_globals(guest: memslot.Guest) -> None:
    with guest.instantiate(tenant="ann") as first, guest.instantiate(tenant="bob") as second:
        ann, bob, size = Pooled(first), Pooled(second), first.memory.byte_size
        assert evaluate(ann, f"var tenant = 'ann'; {LEAVE_A_MESSAGE}") == "of ann"
        assert first.memory.byte_size > size + 5 * MIB
        assert evaluate(bob, LOOK_AROUND) == NOTHING
        assert evaluate(bob, f"var tenant = 'bob'; {LEAVE_A_MESSAGE}") == "of bob"
        said = evaluate(ann, "[].last() + ({}).left + Math.random() + tenant")
        assert said == "of annof annof annann"
        first.reset()
        assert first.memory.byte_size == size
        assert evaluate(Pooled(first), LOOK_AROUND) == NOTHING
        assert evaluate(bob, "secret") == "of bob"
    # One after the other, in the same slots.
    for number in range(4):
        with guest.instantiate() as instance:
            assert evaluate(Pooled(instance), LOOK_AROUND) == NOTHING
            said = evaluate(Pooled(instance), f"var tenant = {number}; {LEAVE_A_MESSAGE}")
            assert said == f"of {number}"
