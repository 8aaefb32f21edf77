"""Objects of another store, engine or kind on wasmtime, and closed stores: an error instead of a crash."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin.tests import hosts
from memslot_plugin.tests.hosts import in_use
from memslot_plugin.tests.runtimes import missing

if reason := missing("wasmtime"):
    pytest.skip(reason, allow_module_level=True)

import wasmtime

from memslot_plugin.hosts.wasmtime.host import WasmtimeHost

REFERENCES = """(module
  (memory (export "m") 1) (global $n (mut i32) (i32.const 1))
  (func $f (export "f") (result i32) (global.get $n)) (elem declare func $f)
  (func (export "set") (param i32) (global.set $n (local.get 0)))
  (global (export "funcs") (mut funcref) (ref.func $f)) (global (export "externs") (mut externref) (ref.null extern))
  (func (export "give") (result funcref) (ref.func $f))
  (func (export "take") (param funcref) (global.set 1 (local.get 0)))
  (func (export "same") (param externref i32) (result externref) (local.get 0)))"""


@pytest.fixture
def host(no_leaks: None) -> Iterator[WasmtimeHost]:
    with hosts.serving("wasmtime", slots=6) as opened:
        yield opened


@pytest.fixture
def guest(host: WasmtimeHost) -> memslot.Guest:
    return host.prepare(REFERENCES, name="refs")


def refuses(error: type[Exception], said: str, *uses: Callable[[], object]) -> None:
    """Fail unless each use raises this error with a message that matches."""
    for use in uses:
        with pytest.raises(error, match=said) as caught:
            use()
        assert isinstance(caught.value, memslot.MemslotError)


def test_instance_in_a_closed_store_refuses_every_use(
    host: WasmtimeHost, guest: memslot.Guest
) -> None:
    store = wasmtime.Store(host.engine)
    instance = guest.instantiate(store=store)
    give, memory = instance.function("give"), instance.memory
    store.close()
    with guest.instantiate() as following:  # in the slot that came back
        following.memory.write(0, b"secret")
        refuses(
            memslot.UsedAfterClose,
            "closed",
            give,
            instance.snapshot,
            instance.fork,
            lambda: instance.native,
            lambda: instance.call("f"),
            lambda: instance.global_value("funcs"),
            lambda: instance.set_global("externs", None),
            lambda: memory.read(0, 6),
            lambda: memory.write(0, b"x"),
            lambda: memory.grow(1),
            lambda: memory.byte_size,
        )
        refuses(memslot.InUse, "end the store", instance.reset)
        assert following.memory.read(0, 6) == b"secret"
    instance.close()
    assert in_use(host) == 0


def test_store_that_runs_an_instance_cannot_be_closed(host: WasmtimeHost) -> None:
    store = wasmtime.Store(host.engine)
    refused: list[BaseException] = []

    def close(number: int) -> int:
        refuses(memslot.InUse, "runs an instance of module", store.close)
        refused.append(hosts.elsewhere(store.close))
        return number

    imports = {"env": {"f": close}}
    with host.prepare(hosts.CALLS_OUT).instantiate(imports=imports, store=store) as instance:
        assert instance.call("run", 5) == 5
        assert isinstance(refused.pop(), memslot.InUse)
        store.close()
        refuses(memslot.UsedAfterClose, "closed", lambda: instance.call("run", 5))


def test_instance_cannot_end_while_another_one_runs_in_its_store(
    host: WasmtimeHost, guest: memslot.Guest
) -> None:
    owner = guest.instantiate()

    def close(number: int) -> int:
        refuses(memslot.InUse, "cannot be closed", owner.close, owner.reset)
        return number

    calls_out = host.prepare(hosts.CALLS_OUT)
    other = calls_out.instantiate(imports={"env": {"f": close}}, store=owner.native.store)
    assert other.call("run", 6) == 6
    assert owner.call("f") == 1
    owner.close()
    refuses(
        memslot.UsedAfterClose,
        "closed",
        lambda: other.call("run", 6),
        lambda: other.memory.read(0, 1),
        other.snapshot,
    )
    other.close()
    assert in_use(host) == 0


def test_function_of_another_store_is_refused_as_argument_and_as_global(
    host: WasmtimeHost, guest: memslot.Guest
) -> None:
    with guest.instantiate() as ended:
        ended.reset()
        of_ended = ended.global_value("funcs")
    with (
        guest.instantiate() as instance,
        guest.instantiate() as other,
        hosts.serving("wasmtime") as elsewhere,
        elsewhere.prepare(REFERENCES).instantiate() as foreign,
        closing(wasmtime.Store(host.engine)) as store,
    ):
        before = instance.call("give")
        assert instance.native  # so that the reset makes a new instance, in a new store
        instance.reset()
        own = wasmtime.Func(store, wasmtime.FuncType([], []), lambda: None)
        for given in (of_ended, before, other.call("give"), foreign.call("give"), own):
            for value in (given, wasmtime.Val.funcref(given)):
                refuses(
                    memslot.ArgumentError,
                    "a function of another store",
                    lambda value=value: instance.call("take", value),  # type: ignore[misc]
                    lambda value=value: instance.set_global("funcs", value),  # type: ignore[misc]
                )
        for fits in (instance.call("give"), wasmtime.Val.funcref(None), None):
            instance.call("take", fits)
            instance.set_global("funcs", fits)


@pytest.mark.parametrize("wrong", [3, "f", wasmtime.Val.i32(3), wasmtime.Val.externref([])])
def test_value_that_is_no_function_is_refused_for_a_funcref(
    guest: memslot.Guest, wrong: object
) -> None:
    with guest.instantiate() as instance:
        refuses(
            memslot.ArgumentError,
            "value 1 .* funcref",
            lambda: instance.call("take", wrong),
            lambda: instance.set_global("funcs", wrong),
        )


def test_object_of_any_kind_passed_as_externref_comes_back_identical(guest: memslot.Guest) -> None:
    with guest.instantiate() as instance, guest.instantiate() as other:
        things = (
            instance,
            other,
            guest,
            guest.host,
            instance.memory,
            other.call("give"),
            5,
            object(),
        )
        for thing in things:
            assert instance.call("same", thing, 0) is thing
            assert instance.call("same", wasmtime.Val.externref(thing), 0) is thing
            instance.set_global("externs", thing)
            assert instance.global_value("externs") is thing
        refuses(
            memslot.ArgumentError,
            "value 1 is of the type externref, and a wasmtime.Val of another kind",
            lambda: instance.call("same", wasmtime.Val.i32(3), 0),
            lambda: instance.set_global("externs", wasmtime.Val.funcref(None)),
        )
        refuses(
            memslot.ArgumentError,
            "value 2 is an i32",
            lambda: instance.call("same", None, wasmtime.Val.i32(3)),
        )


def test_instance_that_its_own_guest_refers_to_may_live_until_the_process_ends() -> None:
    code = f"""import memslot_plugin as memslot
instance = memslot.open_host("wasmtime", slots=1).prepare({REFERENCES!r}).instantiate()
instance.set_global("externs", instance)"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def _imports(store: wasmtime.Store) -> Iterator[tuple[str, object]]:
    limits = wasmtime.Limits(1, None)
    yield (
        "(global (mut i32))",
        wasmtime.Global(
            store, wasmtime.GlobalType(wasmtime.ValType.i32(), mutable=True), wasmtime.Val.i32(1)
        ),
    )
    yield (
        "(table 1 funcref)",
        wasmtime.Table(store, wasmtime.TableType(wasmtime.ValType.funcref(), limits), None),
    )
    yield "(memory 1)", wasmtime.Memory(store, wasmtime.MemoryType(limits))
    yield "(func)", wasmtime.Func(store, wasmtime.FuncType([], []), lambda: None)
    yield "(tag)", wasmtime.Tag(store, wasmtime.TagType(wasmtime.FuncType([], [])))


def test_import_of_another_store_is_refused(host: WasmtimeHost) -> None:
    stores = wasmtime.Store(host.engine), wasmtime.Store(), wasmtime.Store(host.engine)
    theirs = [each for store in stores for each in _imports(store)]
    stores[-1].close()
    with closing(wasmtime.Store(host.engine)) as store:
        for kind, given in theirs:
            with host.prepare(f'(module (import "e" "x" {kind}))') as guest:
                refuses(
                    memslot.LinkError,
                    "imports e.x, a .*, and the .* belongs to another store",
                    functools.partial(guest.instantiate, imports={"e": {"x": given}}, store=store),
                )
    for store in stores:
        store.close()
    with closing(wasmtime.Store(host.engine)) as store:
        for kind, given in _imports(store):
            with host.prepare(f'(module (import "e" "x" {kind}))') as guest:
                guest.instantiate(imports={"e": {"x": given}}, store=store).close()


def test_closed_store_is_refused_at_instantiation(host: WasmtimeHost, guest: memslot.Guest) -> None:
    store = wasmtime.Store(host.engine)
    store.close()
    refuses(memslot.UsedAfterClose, "was closed", lambda: guest.instantiate(store=store))


def test_host_function_that_returns_a_wrong_reference_is_refused(
    host: WasmtimeHost, guest: memslot.Guest
) -> None:
    returns: list[Any] = []
    caller = host.prepare(
        '(module (import "e" "f" (func $f (result funcref))) (func (export "go") (result funcref) (call $f)))',
        imports={"e": {"f": lambda: returns[-1]}},
    )
    with caller.instantiate() as instance, guest.instantiate() as other:
        for wrong in (3, wasmtime.Val.i32(3), wasmtime.Val.externref(None)):
            returns.append(wrong)
            refuses(memslot.ArgumentError, "e.f returned: value 1", lambda: instance.call("go"))
        returns.append(other.call("give"))
        refuses(memslot.GuestTrap, "wrong store", lambda: instance.call("go"))
        returns.append(None)
        assert instance.call("go") is None


def test_function_in_a_table_of_the_embedder_keeps_the_slot_from_others(host: WasmtimeHost) -> None:
    store = wasmtime.Store(host.engine)
    table = wasmtime.Table(
        store, wasmtime.TableType(wasmtime.ValType.funcref(), wasmtime.Limits(1, None)), None
    )
    writes = host.prepare(
        """(module (import "e" "t" (table 1 funcref)) (memory 1) (elem (i32.const 0) func $write)
             (func $write (param i32) (i32.store8 (local.get 0) (i32.const 66))))"""
    )
    writes.instantiate(imports={"e": {"t": table}}, store=store).close()
    write: Any = table.get(store, 0)
    with host.prepare(hosts.ECHO).instantiate() as following:
        write(store, 5)
        assert following.memory.read(5, 1) == b"\0"
        assert in_use(host) == 2
    del write
    store.close()
    assert in_use(host) == 0


def test_shared_memory_of_the_embedder_can_be_imported() -> None:
    def configure(config: wasmtime.Config) -> None:
        config.shared_memory = True

    with hosts.serving("wasmtime", configure=configure) as host:
        kind = wasmtime.MemoryType(wasmtime.Limits(1, 2), shared=True)
        given = wasmtime.SharedMemory(host.engine, kind)
        given.data_ptr()[8] = 7
        reads = host.prepare(
            """(module (import "e" "m" (memory 1 2 shared))
                 (func (export "get") (result i32) (i32.load8_u (i32.const 8))))""",
            imports={"e": {"m": given}},
        )
        with reads.instantiate() as instance:
            assert instance.call("get") == 7
        given.close()
        refuses(
            memslot.LinkError,
            "that was given is closed",
            lambda: reads.instantiate(imports={"e": {"m": given}}),
        )


LEFT_TO_THE_RUNTIME = """(module (memory (export "m") i64 1) (data (i64.const 0) "\\05")
  (func (export "f") (result i32) (i32.load8_u (i64.const 0))))"""


def test_guest_without_a_memory_of_its_own_runs_in_stores_of_both_engines(
    host: WasmtimeHost,
) -> None:
    owner = host.prepare(LEFT_TO_THE_RUNTIME, name="owner")
    user = host.prepare(
        """(module (import "o" "m" (memory i64 1)) (import "o" "f" (func $f (result i32)))
             (func (export "go") (result i32) (i32.add (call $f) (i32.load8_u (i64.const 0)))))"""
    )
    with closing(wasmtime.Store(host.native_engine)) as store:
        first = owner.instantiate(store=store)
        exports: Any = first.native.exports(store)
        for _ in range(2):
            given = {"o": {"m": exports["m"], "f": exports["f"]}}
            with user.instantiate(store=store, imports=given) as instance:
                assert instance.call("go") == 10
        first.close()


def test_guest_in_a_store_of_the_engine_that_cannot_run_it_is_refused_with_the_reason(
    host: WasmtimeHost, guest: memslot.Guest
) -> None:
    owner = host.prepare(LEFT_TO_THE_RUNTIME, name="owner")
    with (
        closing(wasmtime.Store(host.native_engine)) as native,
        closing(wasmtime.Store(host.engine)) as ours,
    ):
        refuses(
            memslot.LinkError,
            "instance of refs must be a .* of host.engine, because its memory is in a slot",
            lambda: guest.instantiate(store=native),
        )
        refuses(
            memslot.LinkError,
            "instance of owner must be a .* of host.native_engine, because .* 64-bit addresses",
            lambda: owner.instantiate(store=ours),
        )


def test_store_closed_at_any_line_of_instantiating_is_refused(host: WasmtimeHost) -> None:
    ours = {"lent", "_link", "start", "_begin", "require_store", "entered"}
    module = '(module (import "wasi_snapshot_preview1" "sched_yield" (func (result i32))) (memory (export "memory") 1))'
    line = last = 0

    def at_line(frame: Any, event: str, _: object) -> Any:
        nonlocal line
        if frame.f_code.co_name not in ours:
            return None
        line += event == "line"
        if event == "line" and line == last:
            with suppress(memslot.InUse):  # it is being instantiated in
                store.close()
        return at_line

    with host.prepare(module) as guest:
        while line >= last:
            line, last = 0, last + 1
            with closing(wasmtime.Store(host.engine)) as store, suppress(memslot.UsedAfterClose):
                sys.settrace(at_line)
                try:
                    instance = guest.instantiate(store=store)
                finally:
                    sys.settrace(None)
                with instance, suppress(memslot.UsedAfterClose):
                    assert len(instance.memory.read(0, 8)) == 8
    assert last > 20
    assert in_use(host) == 0


@pytest.mark.parametrize("kind", ["i32", "externref"])
@pytest.mark.parametrize("end", ["close", "reset", "lease", "host"])
def test_call_through_native_keeps_its_instance_from_ending(
    host: WasmtimeHost, end: str, kind: str
) -> None:
    def ends(_: object) -> None:
        refuses(
            memslot.InUse,
            "while a call of it runs",
            {
                "close": instance.close,
                "reset": instance.reset,
                "lease": lambda: lease.__exit__(None, None, None),
                "host": lambda: host.close(force=True),
            }[end],
        )

    given = "(i32.const 1)" if kind == "i32" else "(ref.null extern)"
    module = f"""(module (import "e" "end" (func $end (param {kind}))) (memory (export "memory") 1)
      (func (export "run") (result i32)
        (i32.store (i32.const 0) (i32.const 7)) (call $end {given}) (i32.load (i32.const 0))))"""
    with host.prepare(module, imports={"e": {"end": ends}}) as guest:
        lease = guest.lease()
        with lease.__enter__() as instance:
            native: Any = instance.native
            assert native.exports(native.store)["run"](native.store) == 7
    assert in_use(host) == 0
