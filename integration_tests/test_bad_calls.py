"""Wrong names, arguments, imports and host functions: a clear error, nothing leaked, and the host goes on serving."""

from __future__ import annotations

from typing import Any

import pytest

import memslot_plugin as memslot

from . import cells, toy
from .cells import Cell
from .expect import raises, still_serves_with_one_slot
from .toy import PAGE


def test_exports_that_do_not_exist(host: memslot.Host) -> None:
    with host.prepare(toy.A, name="toy").instantiate() as instance:
        for name in ("lod", "", "__class__", "keys", "load\0"):
            with raises(memslot.ExportNotFound, ".+", LookupError) as caught:
                instance.call(name)
            assert repr(name) in str(caught.value)
        with raises(memslot.ExportNotFound, "lod", LookupError):
            instance.function("lod")
        with raises(memslot.ExportNotFound, "nothing", LookupError):
            instance.global_value("nothing")
        with raises(memslot.ExportNotFound, "nothing", LookupError):
            instance.set_global("nothing", 1)
        if host.name != "fake":
            with raises(memslot.ExportNotFound, "memory", LookupError):
                instance.call("memory")
            with raises(memslot.ExportNotFound, "load", LookupError):
                instance.global_value("load")
        assert instance.call("load", 16) == ord("t")


WRONG_ARGUMENTS = [
    ("load", (), "(i32.*: )?1 (values|arguments).*0 were given"),
    ("load", (1, 2), "1 (values|arguments).*2 were given"),
    ("store", (1,), "2 (values|arguments).*1 were given"),
    ("load", ("16",), "value 1 is an i32, and '16' is no integer"),
    ("load", (1.5,), "value 1 is an i32, and 1.5 is no integer"),
    ("store", (1, None), "value 2 is an i32, and None is no integer"),
    ("load", (b"1",), "value 1 is an i32, and b'1' is no integer"),
    ("load", ([1],), r"value 1 is an i32, and \[1\] is no integer"),
    ("load", (2**32,), "value 1 is an i32, and 4294967296 is not in -2"),
    ("load", (-(2**31) - 1,), "value 1 is an i32, and -2147483649 is not in -2"),
    ("store64", (0, 2**64), "value 2 is an i64, and 18446744073709551616 is not in -"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"), WRONG_ARGUMENTS, ids=range(len(WRONG_ARGUMENTS))
)
def test_arguments_of_the_wrong_number_or_type(
    real_cell: Cell, name: str, arguments: tuple[Any, ...], sentence: str
) -> None:
    with real_cell.serving() as host, host.prepare(toy.A, name="toy").instantiate() as instance:
        with raises(memslot.ArgumentError, f"{name} of .*toy.*{sentence}", TypeError):
            instance.call(name, *arguments)
        assert instance.call("load", 16) == ord("t")
        assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)


def test_what_is_no_place_in_a_memory(host: memslot.Host) -> None:
    with host.prepare(toy.A).instantiate() as instance:
        memory = instance.memory
        for offset, length in (("0", 1), (0, "1"), (0.0, 1), (None, 1)):
            with raises(
                memslot.ArgumentError,
                "offset and length are integers, in bytes, and not",
                TypeError,
            ):
                memory.read(offset, length)
        with raises(memslot.ArgumentError, "offset and length are integers", TypeError):
            memory.write("0", b"x")
        for data in ("text", 3, None):
            with raises(memslot.ArgumentError, "what is written are bytes", TypeError):
                memory.write(0, data)


def test_a_host_function_that_raises_is_heard(real_cell: Cell) -> None:
    class OfTheEmbedder(Exception):
        """Nothing that memslot knows."""

    def fail(value: int) -> int:
        raise OfTheEmbedder(f"no {value}")

    module = toy.assemble(
        '(module (import "env" "f" (func $f (param i32) (result i32))) (memory (export "memory") 1)'
        ' (func (export "g") (param i32) (result i32) (i32.store (i32.const 0) (i32.const 9)) (call $f (local.get 0))))'
    )
    with real_cell.serving(slots=1) as host:
        guest = host.prepare(module, imports={"env": {"f": fail}})
        for _ in range(2):
            with guest.instantiate() as instance:
                with pytest.raises(OfTheEmbedder, match="no 7"):
                    instance.call("g", 7)
                assert instance.memory.read(0, 1) == b"\x09"
        with guest.instantiate() as instance:
            assert instance.memory.read(0, 1) == b"\0"
            with pytest.raises(OfTheEmbedder):
                instance.call("g", 7)
            instance.reset()
            assert instance.memory.read(0, 1) == b"\0"


@pytest.mark.parametrize(
    "wrong", [None, "text", 2**40, [1], object()], ids=lambda value: type(value).__name__
)
def test_a_host_function_that_returns_nonsense(real_cell: Cell, wrong: object) -> None:
    module = toy.assemble(
        '(module (import "env" "f" (func $f (result i32))) (memory 1) (func (export "g") (result i32) (call $f)))'
    )
    with real_cell.serving(slots=1) as host:
        guest = host.prepare(module, imports={"env": {"f": lambda: wrong}})
        with guest.instantiate() as instance, pytest.raises(memslot.MemslotError):
            instance.call("g")


def test_imports_that_are_missing_or_wrong(real_cell: Cell) -> None:
    module = toy.assemble(
        '(module (import "env" "f" (func (param i32))) (import "env" "g" (global i32))'
        ' (memory 1) (data (i32.const 0) "x"))'
    )
    with real_cell.serving(slots=1) as host:
        guest = host.prepare(module, name="needy")
        for imports in (
            {},
            {"env": {}},
            {"env": {"f": lambda _: None}},
            {"env": {"f": 3, "g": 4}},
            {"other": {"f": lambda _: None, "g": 4}},
        ):
            with raises(memslot.LinkError, "env.*[fg]", RuntimeError):
                guest.instantiate(imports=imports)
            cells.check(host, in_use=0)
        still_serves_with_one_slot(host)


def test_a_start_function_that_traps_gives_the_slot_back(real_cell: Cell) -> None:
    module = toy.assemble(
        '(module (memory 2 8) (data (i32.const 0) "x")'
        " (func $s (i32.store (i32.const 9) (i32.const 9)) (unreachable)) (start $s))"
    )
    with real_cell.serving(slots=1) as host:
        guest = host.prepare(module)
        for _ in range(5):
            with raises(memslot.GuestTrap, "unreachable", RuntimeError):
                guest.instantiate()
            cells.check(host, in_use=0)
        still_serves_with_one_slot(host)
