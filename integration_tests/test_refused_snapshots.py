"""Every refusal of a snapshot, a fork or a reset, with the sentence that a person acts on; nothing is lost by any."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import hookimpl
from memslot_plugin import analysis, wasm

from . import cells, toy
from .cells import Cell
from .test_instance_reset import started

SIMPLE = """(module (memory (export "memory") 1) (global $g (mut i32) (i32.const 0))
  (func (export "f") (global.set $g (i32.const 1))))"""

TABLES = """(module (memory (export "memory") 1) (table $t 4 funcref) (func $f (export "f"))
  (elem $e func $f) (func (export "change") {}))"""

NOT_SAVED = 'The code has {} in function 1 (exported as "change"), at byte 0x'
SEGMENT = "Element segment 0 may have been dropped, and code still uses it; a new instance would have it again;"

REFUSED = {
    "table.set": (TABLES.format("(table.set $t (i32.const 0) (ref.null func))"), NOT_SAVED),
    "table.grow": (
        TABLES.format("(drop (table.grow $t (ref.null func) (i32.const 1)))"),
        NOT_SAVED,
    ),
    "table.fill": (
        TABLES.format("(table.fill $t (i32.const 0) (ref.null func) (i32.const 1))"),
        NOT_SAVED,
    ),
    "table.copy": (
        TABLES.format("(table.copy $t $t (i32.const 0) (i32.const 1) (i32.const 1))"),
        NOT_SAVED,
    ),
    "table.init": (
        TABLES.format("(table.init $t $e (i32.const 0) (i32.const 0) (i32.const 1))"),
        NOT_SAVED,
    ),
    "elem.drop": (
        TABLES.format(
            "(table.init $t $e (i32.const 0) (i32.const 0) (i32.const 1)) (elem.drop $e)"
        ),
        "The code has table.init in function 1",
    ),
    "data.drop": (
        """(module (memory 1) (data $p "passive") (func (export "change")
             (memory.init $p (i32.const 0) (i32.const 0) (i32.const 1)) (data.drop $p)))""",
        "Data segment 0 may have been dropped, and code still uses it; a new instance would have it again;",
    ),
}


def snapshots(instance: memslot.Instance) -> Iterator[Any]:
    """Each way to ask for one."""
    yield instance.snapshot
    yield instance.fork
    yield lambda: instance.fork(0)


@contextmanager
def nothing_lost(host: memslot.Host) -> Iterator[None]:
    """Guests and instances are as many as before."""
    before = host.statistics()
    yield
    after = host.statistics()
    assert (after.guests, after.live_instances) == (before.guests, before.live_instances)
    cells.check(host, in_use=after.live_instances)


@pytest.mark.parametrize("name", REFUSED)
def test_what_code_may_have_changed_for_good(real_cell: Cell, name: str) -> None:
    text, said = REFUSED[name]
    with started(real_cell, text) as (guest, instance):
        sentence = f"the instance of {guest.name} cannot be captured: {said.format(name)}"
        for ask in snapshots(instance):
            with (
                nothing_lost(guest.host),
                pytest.raises(memslot.SnapshotRefused, match=re.escape(sentence)),
            ):
                ask()
        instance.call("change")
        instance.reset()
        instance.call("change")
    with real_cell.serving(slots=2) as host:
        with pytest.raises(memslot.SnapshotRefused, match=re.escape(said.format(name))):
            host.prepare(toy.assemble(text), init="change")
        assert (host.statistics().guests, host.statistics().live_instances) == (0, 0)


def test_a_dropped_element_segment_that_is_still_used_has_its_own_sentence() -> None:
    """Whatever uses an element segment changes a table, which is said first; so this is the analysis alone."""
    module = wasm.parse(toy.assemble(REFUSED["elem.drop"][0]))
    report = analysis.analyse(module)
    kept = tuple(each for each in report.occurrences if not each.instruction.startswith("table."))
    alone = replace(report, occurrences=kept)
    assert analysis.reason_against_snapshots(module, alone, given_away=False) == (
        f"{SEGMENT} use the guest without a snapshot."
    )


def test_where_no_plugin_builds_images(real_cell: Cell) -> None:
    class NoImages:
        """Stands before every builder of images, and fails to build."""

        @hookimpl(wrapper=True)
        def memslot_build_image(self, content: Any) -> Any:
            yield
            return None

    with (
        real_cell.open(slots=2, plugins=(NoImages(),)) as host,
        host.prepare(toy.assemble(SIMPLE)).instantiate() as instance,
        nothing_lost(host),
        pytest.raises(memslot.SnapshotRefused, match="no plugin builds images"),
    ):
        instance.snapshot()


def test_a_closed_instance_has_nothing_to_capture_or_reset(plain_cell: Cell) -> None:
    with plain_cell.serving(slots=2) as host:
        instance = host.prepare(toy.A, name="toy").instantiate()
        instance.close()
        for ask in (*snapshots(instance), instance.reset):
            with pytest.raises(
                memslot.UsedAfterClose, match="the instance of toy was closed; instantiate"
            ):
                ask()
        assert host.statistics().guests == 1


def test_a_number_of_forks_is_a_number(plain_cell: Cell) -> None:
    with plain_cell.serving(slots=2) as host, host.prepare(toy.A).instantiate() as instance:
        for wrong in (-1, 1.5, "2", None):
            with nothing_lost(host), pytest.raises(memslot.ArgumentError, match="number of forks"):
                instance.fork(wrong)


def test_what_initialises_is_a_name_or_a_callable(plain_cell: Cell) -> None:
    with plain_cell.serving(slots=2) as host:
        for wrong in (7, b"_initialize", ["_initialize"]):
            with (
                nothing_lost(host),
                pytest.raises(memslot.ArgumentError, match="init is the name of"),
            ):
                host.prepare(toy.A, init=wrong)


def test_another_thread_is_told_whose_instance_it_is(real_cell: Cell) -> None:
    with started(real_cell, SIMPLE) as (guest, instance):
        said: list[BaseException] = []

        def elsewhere() -> None:
            for ask in (*snapshots(instance), instance.reset, guest.lease().__enter__):
                try:
                    ask()
                except memslot.WrongThread as error:
                    said.append(error)

        if real_cell.host == "wasmtime":
            with instance.snapshot():
                return
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert len(said) == 5
        assert all("open one host per thread" in str(error) for error in said)
        instance.reset()


def test_an_instance_in_a_store_of_the_embedders_own_is_not_reset() -> None:
    cell = Cell("wasmtime", cells.backends()[0])
    if cell.missing:
        pytest.skip(cell.missing)
    import wasmtime

    with cell.open(slots=2) as host:
        guest = host.prepare(toy.assemble(SIMPLE))
        with wasmtime.Store(host.engine) as store:
            instance = guest.instantiate(store=store)
            with pytest.raises(
                memslot.InUse, match=r"embedder's own cannot be reset: end the store"
            ):
                instance.reset()
            instance.call("f")
            with instance.snapshot() as captured, captured.instantiate() as copy:
                copy.call("f")
                copy.reset()
            instance.close()
        assert host.statistics().live_instances == 0


def test_a_reference_that_cannot_be_read_is_refused() -> None:
    cell = Cell("wasmtime", cells.backends()[0])
    if cell.missing:
        pytest.skip(cell.missing)
    text = """(module (memory (export "memory") 1) (global $r (mut anyref) (ref.null any))
      (func (export "set") (global.set $r (ref.i31 (i32.const 5)))))"""

    with (
        memslot.open_host(
            "wasmtime",
            settings=cell.settings(),
            configure=lambda config: setattr(config, "wasm_gc", True),
        ) as host,
        host.prepare(toy.assemble(text)).instantiate() as instance,
        nothing_lost(host),
        pytest.raises(
            memslot.SnapshotRefused,
            match=r"holds references, \(ref null any\), which cannot be read",
        ),
    ):
        instance.snapshot()
