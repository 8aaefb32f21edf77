"""Refusals of snapshots, forks and resets, each with a sentence to act on and without loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import hookimpl
from memslot_plugin import wasm
from memslot_plugin.guest import analysis
from memslot_plugin.guest.verdict import uncaptured_state
from memslot_plugin.tests.hosts import elsewhere

from . import cells, toy
from .cells import Cell
from .test_instance_reset import started
from .toy import PAGE

SIMPLE = """(module (memory (export "memory") 1) (global $g (mut i32) (i32.const 0))
  (func (export "f") (global.set $g (i32.const 1))))"""

TABLE_GROWN = """(module (memory (export "memory") 1) (table $t 4 funcref)
  (func (export "change") (drop (table.grow $t (ref.null func) (i32.const 1)))))"""
DATA_DROPPED = """(module (memory 1) (data $p "passive") (func (export "change")
  (memory.init $p (i32.const 0) (i32.const 0) (i32.const 1)) (data.drop $p)))"""
ELEMENTS_DROPPED = """(module (table $t 4 funcref) (elem $e func)
  (func (table.init $t $e (i32.const 0) (i32.const 0) (i32.const 0)) (elem.drop $e)))"""
DROPPED = (
    "segment 0 may have been dropped, and code still uses it; a new instance would have it again;"
)


def test_snapshot_without_a_dropped_element_segment_that_is_still_used_is_refused() -> None:
    """Code that uses an element segment changes a table, which is the first reason. The report here lacks it."""
    module = wasm.parse(toy.assemble(ELEMENTS_DROPPED))
    report = analysis.analyse(module)
    alone = replace(report, occurrences=())
    reason = uncaptured_state(module, alone, native_exposed=False)
    assert reason == f"Element {DROPPED} use the guest without a snapshot."


@contextmanager
def refused(
    host: memslot.Host, said: str, expected: type[Exception] = memslot.SnapshotRefused
) -> Iterator[None]:
    """Fail unless the block raises this error and keeps the numbers of guests and instances."""
    before = host.statistics()
    with pytest.raises(expected, match=said):
        yield
    cells.check(host)
    after = host.statistics()
    assert (after.guests, after.live_instances) == (before.guests, before.live_instances)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            TABLE_GROWN,
            r'The code has table\.grow in function 0 \(exported as "change"\), at byte 0x',
        ),
        (DATA_DROPPED, f"Data {DROPPED}"),
    ],
    ids=["table", "data"],
)
def test_snapshot_fork_and_init_that_are_refused_leave_nothing(
    real_cell: Cell, text: str, said: str
) -> None:
    with started(real_cell, text) as (guest, instance):
        for ask in (instance.snapshot, instance.fork, lambda: instance.fork(0)):
            with refused(guest.host, f"the instance of {guest.name} cannot be captured: {said}"):
                ask()
        instance.call("change")
        instance.reset()
        instance.call("change")
        with refused(guest.host, said):
            guest.host.prepare(toy.assemble(text), init="change")


def test_snapshot_fork_and_init_of_a_module_with_state_that_it_imports_are_refused(
    real_cell: Cell,
) -> None:
    """On wasmer, memslot leaves a module with an imported table to the runtime."""
    giving = """(module (memory (export "memory") 1) (table (export "table") 1 funcref)
      (global (export "mutable global") (mut i32) (i32.const 0)))"""
    texts = {
        "memory": '(module (import "env" "memory" (memory 1)) (func (export "f")))',
        "table": '(module (import "env" "table" (table 1 funcref)) (memory 1) (func (export "f")))',
        "mutable global": """(module (import "env" "mutable global" (global (mut i32))) (memory 1)
          (func (export "f")))""",
    }
    with started(real_cell, giving) as (guest, giver):
        native, options = giver.native, {}
        given = (
            dict(iter(native.exports))
            if real_cell.host == "wasmer"
            else native.exports(native.store)
        )
        if real_cell.host == "wasmtime":
            options = {"store": native.store}
        for name, text in texts.items():
            said = rf"cannot be captured: The {name} that is imported as env\.{name} is not the guest's own"
            if name == "table" and real_cell.host == "wasmer":
                said = r"the module is left to the runtime\. It imports the table env\.t"
            imports = {"env": {name: given[name]}}
            module = toy.assemble(text)
            with (
                guest.host.prepare(module) as taker,
                taker.instantiate(imports=imports, **options) as instance,
            ):
                for ask in (instance.snapshot, instance.fork):
                    with refused(guest.host, said):
                        ask()
            if real_cell.host == "wasmer":
                with refused(guest.host, said):
                    guest.host.prepare(module, imports=imports, init="f")


def test_snapshot_without_a_plugin_that_builds_images_is_refused(real_cell: Cell) -> None:
    class NoImages:
        @hookimpl(wrapper=True)
        def memslot_build_image(self, content: Any) -> Any:
            yield
            return None

    with (
        real_cell.open(slots=2, plugins=(NoImages(),)) as host,
        host.prepare(toy.assemble(SIMPLE)).instantiate() as instance,
        refused(host, "no plugin builds images"),
    ):
        instance.snapshot()


def test_snapshot_beyond_the_image_limit_is_refused(real_cell: Cell) -> None:
    module = toy.assemble('(module (memory (export "memory") 20))')
    opened = real_cell.open(slots=2, image_limit="256KiB")
    with opened as host, host.prepare(module).instantiate() as instance:
        instance.memory.write(0, b"x")
        instance.memory.write(19 * PAGE, b"x")
        with refused(host, "image_limit", memslot.MemoryTooLarge):
            instance.snapshot()
        instance.memory.write(0, b"\0")
        instance.snapshot().close()


def test_snapshot_in_a_running_call_is_refused(real_cell: Cell) -> None:
    text = '(module (import "env" "f" (func $f)) (memory 1) (func (export "run") (call $f)))'
    held: list[memslot.Instance] = []
    imports = {"env": {"f": lambda: held.pop().snapshot()}}
    with started(real_cell, text, imports=imports) as (_, instance):
        held.append(instance)
        with pytest.raises(memslot.InUse):
            instance.call("run")


def test_snapshot_with_wrong_arguments_or_of_a_closed_instance_is_refused(plain_cell: Cell) -> None:
    with plain_cell.serving(slots=2) as host, host.prepare(toy.A, name="toy") as guest:
        for wrong in (7, b"_initialize", ["_initialize"]):
            with refused(host, "init is the name of", memslot.ArgumentError):
                host.prepare(toy.A, init=wrong)
        with guest.instantiate() as instance:
            for number in (-1, 1.5, "2", None):
                with refused(host, "number of forks", memslot.ArgumentError):
                    instance.fork(number)
        said = "the instance of toy was closed, or its lease"
        for ask in (instance.snapshot, instance.fork):
            with refused(host, said, memslot.UsedAfterClose):
                ask()


def test_snapshot_of_a_reference_that_is_not_null_is_refused(real_cell: Cell) -> None:
    text = """(module (memory (export "memory") 1) (global $r (mut funcref) (ref.null func))
      (elem declare func $f)
      (func $f (export "f")) (func (export "set") (global.set $r (ref.func $f)))
      (func (export "clear") (global.set $r (ref.null func)))
      (func (export "is_null") (result i32) (ref.is_null (global.get $r))))"""
    with started(real_cell, text) as (guest, instance):
        if real_cell.host == "wasmer":
            with refused(guest.host, "which wasmer-python cannot read"):
                instance.snapshot()
            return
        instance.call("set")
        with refused(guest.host, r"holds a reference, .*that is not null"):
            instance.snapshot()
        instance.call("clear")
        with instance.snapshot().instantiate() as copy:
            assert copy.call("is_null") == 1
            copy.call("set")
            assert copy.call("is_null") == 0


def test_snapshot_after_an_exported_table_was_given_away_is_refused(real_cell: Cell) -> None:
    text = """(module (memory (export "memory") 1) (table (export "t") 1 funcref)
      (elem (i32.const 0) $f) (func $f))"""
    with started(real_cell, text) as (guest, instance):
        instance.snapshot().close()
        assert instance.native is not None
        with refused(guest.host, 'Table 0 is exported as "t"'):
            instance.snapshot()
        instance.reset()
        instance.snapshot().close()


def test_snapshot_fork_and_lease_on_another_thread_are_refused_by_wasmer() -> None:
    cell = Cell("wasmer", "memfd")
    if cell.missing:
        pytest.skip(cell.missing)
    with started(cell, SIMPLE) as (guest, instance):
        for ask in (instance.snapshot, instance.fork, guest.lease().__enter__):
            with refused(guest.host, "open one host per thread", memslot.WrongThread):
                raise elsewhere(ask)


def test_reset_in_a_store_of_the_embedders_own_is_refused() -> None:
    wasmtime = pytest.importorskip("wasmtime")
    with Cell("wasmtime", "memfd").serving(slots=2) as host, wasmtime.Store(host.engine) as store:
        instance = host.prepare(toy.assemble(SIMPLE)).instantiate(store=store)
        with refused(host, "embedder's own cannot be reset: end the store", memslot.InUse):
            instance.reset()
        instance.call("f")
        with instance.snapshot() as captured, captured.instantiate() as copy:
            copy.call("f")
            copy.reset()
        instance.close()


ANYREF = """(module (memory (export "memory") 1) (global $r (mut anyref) (ref.null any))
  (func (export "set") (global.set $r (ref.i31 (i32.const 5)))))"""
SHARED = '(module (memory (export "m") 1 1 shared))'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ANYREF, r"holds references, \(ref null any\), which cannot be read"),
        (SHARED, r"cannot be captured: the module is left to the runtime\. Memory 0 is shared"),
    ],
)
def test_snapshot_of_what_only_some_settings_allow_is_refused(text: str, said: str) -> None:
    def configure(config: Any) -> None:
        config.wasm_gc = config.shared_memory = True

    pytest.importorskip("wasmtime")
    settings = Cell("wasmtime", "memfd").settings(slots=2)
    with (
        memslot.open_host("wasmtime", settings=settings, configure=configure) as host,
        host.prepare(toy.assemble(text)).instantiate() as instance,
        refused(host, said),
    ):
        instance.snapshot()
