"""Bytes that are no module, and modules that are too large: a clear error, no leak, and the host goes on serving."""

from __future__ import annotations

from pathlib import Path

import memslot_plugin as memslot

from . import toy
from .cells import Cell
from .expect import raises, still_serves
from .toy import PAGE


def test_bytes_that_are_no_module_are_refused(host: memslot.Host) -> None:
    for content, sentence in (
        (b"", "the module starts with nothing and not with .*; allowed is"),
        (toy.A[:-1], f"{host.name} .*module: "),
    ):
        with raises(memslot.InvalidModule, sentence, ValueError):
            host.prepare(content)


def test_module_that_does_not_validate_is_refused_by_the_runtime(real_cell: Cell) -> None:
    body = toy.assemble('(module (memory 1) (func (export "f") (result i32) (i32.const 1)))')
    with real_cell.serving(slots=2) as host:
        sentence = f"{host.name} refuses wrong: .*expected i32 but nothing"
        with raises(memslot.InvalidModule, sentence, ValueError):
            host.prepare(body.replace(b"\x41\x01\x0b", b"\x01\x01\x0b"), name="wrong")  # two nops
        with raises(memslot.InvalidModule, "the text.*: .*unexpected token", ValueError):
            host.prepare("(module (memory 1) (func (export")
        with raises(memslot.InvalidModule, "unknown memory 0", ValueError):
            host.prepare('(module (data (i32.const 0) "no memory"))')
        host.prepare("(module)").close()
        still_serves(host)


def test_guest_of_a_type_that_is_no_path_raises_type_error(host: memslot.Host) -> None:
    sentence = "a guest is a path, the bytes of a module, or WebAssembly text, and not"
    for nonsense in (None, 12, 1.5, ["a.wasm"], object()):
        with raises(memslot.ArgumentError, sentence, TypeError):
            host.prepare(nonsense)


def test_path_without_a_module_is_refused_with_the_reason(
    host: memslot.Host, tmp_path: Path
) -> None:
    missing = tmp_path / "missing.wasm"
    with raises(memslot.GuestNotFound, f"there is no guest at {missing}", FileNotFoundError):
        host.prepare(missing)
    with raises(memslot.GuestNotFound, "there is no guest at .*inside.wasm", FileNotFoundError):
        (tmp_path / "file").write_bytes(b"")
        host.prepare(str(tmp_path / "file" / "inside.wasm"))
    sentence = "cannot be read: Is a directory; a guest is a .wasm or .wat file"
    with raises(memslot.InvalidModule, sentence, ValueError):
        host.prepare(tmp_path)
    for name, content in (("a.wasm", b"hello"), ("b.wat", b"(module"), ("c.wat", b"\xff\xfe\0")):
        (tmp_path / name).write_bytes(content)
        with raises(memslot.InvalidModule, ".+", ValueError):
            host.prepare(tmp_path / name)
    (tmp_path / "good.wasm").write_bytes(toy.B)
    with host.prepare(tmp_path / "good.wasm") as guest, guest.instantiate() as instance:
        assert guest.name == "good"
        assert instance.memory.read(40000, 4) == b"only"


def test_memory_larger_than_a_slot_is_refused_with_the_settings(plain_cell: Cell) -> None:
    with plain_cell.serving(slots=2, reserved=PAGE) as host:
        sentence = "big needs 131072 bytes for memory 0, and the settings allow 65536"
        with raises(memslot.MemoryTooLarge, sentence, ValueError):
            host.prepare(toy.A, name="big")
        assert host.statistics().guests == 0


def test_guest_that_grows_past_its_limit_sees_minus_one(plain_cell: Cell) -> None:
    with plain_cell.serving(slots=2, memory_limit=3 * PAGE) as host:
        guest = host.prepare(toy.A)
        with guest.instantiate() as instance:
            assert instance.call("grow", 2) == -1
            assert instance.call("grow", 1) == 2
            assert instance.call("grow", 1) == -1
            with raises(memslot.GrowthRefused, ".+", MemoryError):
                instance.memory.grow(1)
            assert instance.call("size") == 3
            instance.reset()
            assert instance.call("size") == 2
        still_serves(host)
