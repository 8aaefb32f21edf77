"""wasmer alone: memories that it maps and grows by itself, its errors, its WASI, and the thread of its objects."""

from __future__ import annotations

import gc
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin._core.proc import mappings
from memslot_plugin.tests import hosts, runtimes
from memslot_plugin.tests.hosts import ECHO, PAGE, WASI, calling, elsewhere, in_use
from memslot_plugin.tests.leaks import Footprint

try:
    import wasmer
    from wasmer_compiler_cranelift import Compiler

    from memslot_plugin.hosts.wasmer import errors as wasmer_errors
    from memslot_plugin.hosts.wasmer.host import WasmerHost
    from memslot_plugin.hosts.wasmer.link import BoundImports
    from memslot_plugin.hosts.wasmer.values import Owner, address_of, reserved_bytes
except ImportError:
    if (reason := runtimes.missing("wasmer")) is None:
        raise
    pytest.skip(reason, allow_module_level=True)


PANIC = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


@pytest.fixture
def host(no_leaks: None) -> Iterator[WasmerHost]:
    with hosts.serving("wasmer", slots=8) as opened:
        yield opened


def destroyed(host: WasmerHost) -> int:
    """Count the slots that were retired because their memory grew."""
    return sum(pool.destroyed for pool in host.statistics().pools)


def test_trap_of_an_exhausted_stack_tells_the_innermost_frames() -> None:
    with hosts.started("wasmer") as instance, pytest.raises(memslot.GuestTrap) as raised:
        instance.call("recurse")
    assert str(raised.value).count(" at recurse ") == 64


def test_long_names_are_not_repeated_for_each_frame() -> None:
    for many, said in (256, "n" * 256), (257, "<unnamed>"):
        text = f'(module (memory 1) (func ${"n" * many} (export "f") unreachable))'
        with hosts.started("wasmer", text) as instance, pytest.raises(memslot.GuestTrap) as raised:
            instance.call("f")
        assert f" at {said} (" in str(raised.value)


def test_vector_on_wasmer_is_an_integer_and_a_reference_is_refused(
    host: WasmerHost,
) -> None:
    text = """(module (func (export "f") (param externref) (result externref) (local.get 0))
                      (func (export "g") (result funcref) (ref.null func))
                      (func (export "v") (param v128) (result v128) (local.get 0))
                      (global (export "r") (mut externref) (ref.null extern)))"""
    with host.prepare(text).instantiate() as instance:
        for use in (
            lambda: instance.call("f", None),
            lambda: instance.call("g"),
            lambda: instance.global_value("r"),
        ):
            with pytest.raises(memslot.Unsupported, match="reference"):
                use()
        assert instance.call("v", 2**127 + 5) == 2**127 + 5


def test_import_given_as_an_object_of_wasmer_is_used(host: WasmerHost) -> None:
    text = """(module
        (import "env" "g" (global $g (mut i32)))
        (import "env" "native" (func $native (param f64) (result f64)))
        (func (export "bump") (global.set $g (i32.add (global.get $g) (i32.const 1))))
        (func (export "native") (result f64) (call $native (f64.const 2))))"""
    shared, f64 = wasmer.Global(host.store, wasmer.Value.i32(1), mutable=True), wasmer.Type.F64
    double = wasmer.Function(host.store, lambda x: x * 2, wasmer.FunctionType([f64], [f64]))
    with host.prepare(text, imports={"env": {"g": shared, "native": double}}).instantiate() as one:
        assert isinstance(one.native, wasmer.Instance)
        assert (one.call("bump"), one.call("native"), shared.value) == (None, 4.0, 2)


def test_import_of_another_type_is_named(host: WasmerHost) -> None:
    other = wasmer.FunctionType([wasmer.Type.I64], [wasmer.Type.I32])
    for given, said in (
        (wasmer.Global(host.store, wasmer.Value.i32(1)), r"env\.f.*was given"),
        (wasmer.Function(host.store, int, other), r"\"env\".\"f\".*incompatible"),
    ):
        with pytest.raises(memslot.LinkError, match=said):
            calling(host, given).instantiate()
    with pytest.raises(memslot.Unsupported, match="stores"):
        hosts.prepare(host).instantiate(store=object())


def test_size_of_a_slot_while_other_threads_map_memories_is_unchanged() -> None:
    found: set[int] = set()
    measure = reserved_bytes.__wrapped__
    threads = [
        threading.Thread(target=lambda: found.update(measure() for _ in range(20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {6 << 30}


def test_slot_of_a_wasmer_memory_is_as_large_as_wasmer_makes_it(host: WasmerHost) -> None:
    assert reserved_bytes() == 6 << 30
    with hosts.prepare(host).instantiate() as instance:
        base, size = instance.enter().locate(0)
        inside = list(mappings(base, base + reserved_bytes()))
        assert [each.permissions for each in inside].count("---p") == 1
        assert inside[-1].start - base == size


def test_growth_of_a_wasmer_memory_is_reported_and_its_slot_retired(host: WasmerHost) -> None:
    grown, asked = hosts.Grown(), hosts.Growth(False)
    host.plugins.register(grown)
    host.plugins.register(asked)
    guest = hosts.prepare(host)
    with guest.instantiate() as instance:
        base = instance.enter().locate(0)[0]
        assert (instance.call("grow", 1), instance.memory.byte_size) == (2, 3 * PAGE)
        instance.memory.write(3 * PAGE - 1, b"\xff")
        assert instance.memory.grow(1) == 3
        assert (grown.sizes, asked.asked) == ([3 * PAGE, 4 * PAGE], [])
        assert instance.enter().locate(0)[0] == base == address_of(instance.native.exports.memory)
        hosts.check(host)
    with guest.instantiate() as instance:
        assert (instance.call("size"), instance.call("grow", 2)) == (2, 2)
        assert instance.memory.read(2 * PAGE, 2 * PAGE) == bytes(2 * PAGE)
    assert destroyed(host) == 2


def test_memory_of_a_destroyed_slot_is_unmapped_while_its_guest_lives(host: WasmerHost) -> None:
    guest = hosts.prepare(host)
    with guest.instantiate() as instance:
        base = instance.enter().locate(0)[0]
        instance.call("grow", 1)
    assert (destroyed(host), list(mappings(base, base + PAGE))) == (1, [])
    with guest.instantiate() as instance:
        assert instance.memory.read(8, 5) == b"hello"


def test_growth_by_the_guest_is_seen_within_the_same_call(host: WasmerHost) -> None:
    instance: Any
    with calling(host, lambda _: instance.memory.byte_size).instantiate() as instance:
        assert instance.call("grow_then_run", 0) == 2 * PAGE


def test_growth_by_the_native_handle_is_found_at_the_release(host: WasmerHost) -> None:
    guest = host.prepare('(module (memory (export "memory") 1 4))')
    with guest.instantiate() as instance:
        instance.native.exports.memory.grow(1)
        instance.memory.write(PAGE, b"secret")
    assert destroyed(host) == 1


def test_errors_and_calls_keep_neither_instance_nor_host_alive() -> None:
    """Otherwise a collection would end a host and its code together, on any thread."""
    host = hosts.opened("wasmer")
    guest = calling(host, {}.__getitem__)
    gc.collect()
    gc.disable()
    try:
        instance = guest.instantiate()
        alive = weakref.ref(instance.enter())
        with pytest.raises(memslot.ArgumentError):
            instance.call("run", "x")
        with pytest.raises(KeyError):
            instance.call("run", 1)
        instance.close()
        del instance
        assert alive() is None
        kept = weakref.ref(host), weakref.ref(guest.compiled)
        del guest, host
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "source",
    [
        "(module (memory 1) (memory 1))",
        "(module (memory 1 2 shared))",
        "(module (memory i64 1))",
        "(module (func (i32.foo)))",
        b"\0asm\1\0\0\0" + b"\1\4\1\x60\0\0" + b"\x0d\3\1\0\0",  # a tag: the compiler panics
    ],
    ids=["two-memories", "shared", "64-bits", "unknown", "tag"],
)
def test_module_that_wasmer_refuses_leaves_a_host_that_still_compiles(
    host: WasmerHost, source: str | bytes
) -> None:
    guest = hosts.prepare(host)
    for _ in range(2):
        with pytest.raises(memslot.InvalidModule, match=r"wasmer refuses (module|the text): "):
            host.prepare(source)
    assert host.statistics().guests == 1
    for each in (guest, hosts.prepare(host)):
        each.instantiate().close()


def test_every_error_of_wasmer_is_mapped() -> None:
    listed = inspect.getdoc(wasmer_errors)
    assert listed is not None
    for error, at_call in (
        (RuntimeError("RuntimeError: unreachable"), memslot.GuestTrap),
        (RuntimeError("RuntimeError: WASI exited with code: 7"), memslot.GuestExit),
        (
            RuntimeError("RuntimeError: Dynamic function returned wrong signature"),
            memslot.LinkError,
        ),
        (TypeError("'str' object cannot be converted to 'PyLong'"), memslot.ArgumentError),
        (OverflowError("out of range integral type conversion attempted"), memslot.ArgumentError),
        (PANIC("wasmer::instance::Instance is unsendable, but sent"), memslot.WrongThread),
        (PANIC("not implemented"), memslot.Unsupported),
    ):
        assert type(error).__name__ in listed
        assert wasmer_errors.made_by_wasmer(error)
        mapped = wasmer_errors.at_call(error, "f", host_function_is_wrong=False)
        assert type(mapped) is at_call
        assert getattr(mapped, "native", error) is error
        assert isinstance(wasmer_errors.at_compile(error, "m"), memslot.InvalidModule)
    mapped = wasmer_errors.at_instantiate(PANIC(f"{wasmer_errors._LOST}: Error"), "m")
    assert "dropped the exception of a signal handler that came while it linked m" in str(mapped)
    for text, at_instantiate in (
        ('Error while importing "a"."b": unknown import.', memslot.LinkError),
        ("Host env initialization error: Missing export memory", memslot.LinkError),
        ("Insufficient resources: no memory", memslot.SystemCallError),
        ("RuntimeError: unreachable", memslot.GuestTrap),
    ):
        mapped = wasmer_errors.at_instantiate(RuntimeError(text), "m")
        assert type(mapped) is at_instantiate


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("no code section"), memslot.InvalidModule),
        (PANIC("no tags"), memslot.InvalidModule),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ValueError(), ValueError),
    ],
    ids=lambda each: "" if isinstance(each, type) else type(each).__name__,
)
def test_boundary_maps_the_errors_of_wasmer_alone(
    error: BaseException, raised: type[BaseException]
) -> None:
    with pytest.raises(raised), wasmer_errors.Boundary(wasmer_errors.at_compile, "m"):
        raise error


def test_boundary_leaves_a_runtime_error_of_a_host_function_as_it_is() -> None:
    def host_function() -> None:
        raise RuntimeError("of the embedder")

    with (
        pytest.raises(RuntimeError, match="of the embedder"),
        wasmer_errors.Boundary(wasmer_errors.at_compile, "m"),
    ):
        host_function()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupt_while_globals_are_compiled_is_raised_as_it_is(
    host: WasmerHost, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupted(*_: object) -> None:
        raise error

    with host.prepare(ECHO).instantiate() as instance:
        for module, name in ((wasmer, "Module"), (wasmer, "Instance")):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, interrupted)
                with pytest.raises(error):
                    instance.snapshot()


def test_guest_that_imports_a_table_is_left_to_wasmer(host: WasmerHost) -> None:
    text = '(module (import "env" "t" (table 1 funcref)) (memory (export "m") 1) (data (i32.const 3) "x"))'
    giving = wasmer.Module(host.store, '(module (table (export "t") 1 funcref))')
    table = wasmer.Instance(giving).exports.t
    guest = host.prepare(text, imports={"env": {"t": table}})
    assert "table env.t" in (guest.report.native or "")
    with guest.instantiate() as instance:
        assert (instance.memory.read(3, 1), instance.memory.grow(1)) == (b"x", 1)
        with pytest.raises(memslot.GrowthRefused):
            instance.memory.grow(65536)
        assert in_use(host) == 1


def test_wasi_write_outside_of_the_memory_or_around_a_captured_stream_fails(
    host: WasmerHost, capfd: Any
) -> None:
    with host.prepare(WASI, wasi=memslot.Wasi(stdout="capture")).instantiate() as instance:
        for wrong in ((1, 65535, 1, 100), (1, 0, 1, 65535), (1, 0, 2**30, 100), (1, -1, 1, 1)):
            assert instance.call("write", *wrong) == 21
        instance.memory.write(0, b"\xf0\xff\0\0\xff\0\0\0")
        assert instance.call("write", 1, 0, 1, 100) == 21
        assert instance.call("pwrite", 1) == 70
        assert instance.call("renumber", 1, 9) == 58
        assert instance.call("renumber", 2, 1) == 58
        assert instance.stdout == b""
    assert capfd.readouterr().out == ""


def test_wasi_guest_on_wasmer_reads_nothing_of_the_process_standard_input(child: Any) -> None:
    source = f"""
from memslot_plugin import Wasi
from memslot_plugin.hosts.wasmer.host import WasmerHost
with WasmerHost() as host, host.prepare({WASI!r}, wasi=Wasi()).instantiate() as instance:
    assert instance.call("read", 0) == 0
    assert instance.memory.read(100, 4) == bytes(4)
    assert instance.call("pread", 0) == 70
    assert instance.call("renumber", 0, 9) == 58
    assert instance.call("read", 9) == 8
    assert instance.memory.read(16, 6) == b"hello\\n"
assert input() == "secret"
"""
    child(source, input="secret\n")


def test_wasi_without_all_imports_or_an_exported_memory_is_refused(host: WasmerHost) -> None:
    with pytest.raises(memslot.LinkError, match=r"wasi_snapshot_preview1\..*wasi=Wasi"):
        host.prepare(WASI, imports={"wasi_snapshot_preview1": {}}).instantiate()
    with pytest.raises(memslot.LinkError, match="'memory'"):
        host.prepare(WASI.replace('(export "memory")', ""), wasi=memslot.Wasi()).instantiate()


def test_wasi_works_on_a_memory_of_the_embedder_and_in_the_older_snapshot(host: WasmerHost) -> None:
    imported = '(import "env" "m" (memory 1)) (export "memory" (memory 0))'
    imports = {"env": {"m": wasmer.Memory(host.store, wasmer.MemoryType(1, None, False))}}
    for text in (
        WASI.replace('(memory (export "memory") 1)', imported),
        WASI.replace("wasi_snapshot_preview1", "wasi_unstable"),
    ):
        guest = host.prepare(text, wasi=memslot.Wasi(stdout="capture"), imports=imports)
        with guest.instantiate() as instance:
            instance.call("_start")
            assert instance.stdout == b"hello\n"


def test_wasmer_host_on_another_thread_refuses_every_use(host: WasmerHost, capfd: Any) -> None:
    guest = hosts.prepare(host)
    instance = guest.instantiate()
    function, memory, live = instance.function("get"), instance.memory, instance.enter()
    for attempt in (
        lambda: host.prepare(ECHO),
        guest.instantiate,
        lambda: instance.call("get", 0),
        lambda: live.function("next"),
        lambda: function(0),
        lambda: memory.read(0, 1),
        lambda: memory.grow(0),
        lambda: instance.global_value("count"),
        instance.reset,
        instance.close,
        host.statistics,
        host.close,
    ):
        assert isinstance(elsewhere(attempt), memslot.WrongThread)
    assert instance.call("get", 8) == ord("h")
    instance.close()
    assert "panicked" not in capfd.readouterr().err


def test_handle_dropped_on_another_thread_ends_on_the_hosts(host: WasmerHost, capfd: Any) -> None:
    held: list[Any] = [hosts.prepare(host).instantiate()]
    function = held[0].function("get")
    elsewhere(held.clear)
    assert host.leases.dropped
    assert in_use(host) == 0
    held.append(function)
    del function
    elsewhere(held.clear)
    assert "panicked" not in capfd.readouterr().err


def test_import_made_on_another_thread_is_refused(host: WasmerHost, capfd: Any) -> None:
    def make() -> Any:
        store = wasmer.Store(wasmer.engine.Universal(Compiler))
        return wasmer.Global(store, wasmer.Value.i32(1))

    text = '(module (import "env" "g" (global i32)) (memory 1))'
    with pytest.raises(memslot.WrongThread):
        host.prepare(text, imports={"env": {"g": elsewhere(make)}}).instantiate()
    capfd.readouterr()


def test_guests_that_come_and_go_leave_no_code_mapped(
    host: WasmerHost, resources: Callable[[], Footprint]
) -> None:
    parent = host.prepare(ECHO)

    def come_and_go(pages: int) -> None:
        with host.prepare(ECHO) as guest, guest.instantiate() as instance:
            instance.call("next")
        with parent.instantiate() as instance:
            instance.call("next")
            instance.call("grow", pages)
            with instance.snapshot() as taken, taken.instantiate() as again:
                assert again.call("next") == 7
            for fork in instance.fork(2):
                fork.call("next")
                fork.close()

    for _ in range(4):
        come_and_go(0)
        come_and_go(1)
    before = resources().mappings
    for _ in range(20):
        come_and_go(0)
        come_and_go(1)
    assert resources().mappings - before < 20


def test_guests_that_share_a_table_compare_types_as_one_store_does(host: WasmerHost) -> None:
    gives = """(module (func (param f64 f64)) (func (param f64)) (func $one (result i32) (i32.const 1))
      (memory 1) (table (export "t") 1 funcref) (elem (i32.const 0) $one))"""
    takes = """(module (import "e" "t" (table 1 funcref)) (type $one (func (result i32)))
      (type $other (func (result i64)))
      (func (export "right") (result i32) (call_indirect (type $one) (i32.const 0)))
      (func (export "wrong") (result i64) (call_indirect (type $other) (i32.const 0))))"""
    with host.prepare(gives).instantiate() as giving:
        imports = {"e": {"t": giving.native.exports.t}}
        with host.prepare(takes, imports=imports).instantiate() as taking:
            assert taking.call("right") == 1
            with pytest.raises(memslot.GuestTrap, match="indirect call type mismatch"):
                taking.call("wrong")


def test_instance_that_begins_while_another_one_is_linked_has_a_memory_of_its_own(
    host: WasmerHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal's handler, or a finalizer, instantiates the guest as its imports were given a memory."""
    guest, others = hosts.prepare(host), list[memslot.Instance]()
    use = BoundImports.use

    def interrupted(bound: BoundImports, owner: Owner) -> None:
        use(bound, owner)
        monkeypatch.undo()
        others.append(guest.instantiate())

    with guest.instantiate():
        monkeypatch.setattr(BoundImports, "use", interrupted)
        instance = guest.instantiate()
    with instance, others[0] as other:
        other.call("set", 0, 7)
        assert (instance.call("get", 0), instance.memory.read(0, 1)) == (0, b"\0")
        instance.call("set", 0, 8)
        assert (instance.memory.read(0, 1), other.memory.read(0, 1)) == (b"\x08", b"\x07")
