"""What is no module, or too large a one: a clear error, nothing leaked, and the host goes on serving."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import memslot_plugin as memslot

from . import toy
from .cells import Cell
from .expect import raises, still_serves
from .toy import PAGE

COMPONENT = b"\0asm\x0d\0\1\0"
HEADER = b"\0asm\1\0\0\0"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the module is empty (0 bytes); allowed is"),
        (
            b"\x7fELF\2\1\1\0" * 4,
            "the module starts with 7f 45 4c 46 and not with 00 61 73 6d; allowed is",
        ),
        (
            b"{'not': 'wasm'}",
            "the module starts with 7b 27 6e 6f and not with 00 61 73 6d; allowed is",
        ),
        (COMPONENT, "a WebAssembly component was given; allowed is"),
        (COMPONENT + b"\0" * 64, "a WebAssembly component was given; allowed is"),
        (
            HEADER[:6],
            "the module is truncated: 6 bytes are given, its header alone has 8; allowed is",
        ),
        (b"\0asm\2\0\0\0", "the module is of WebAssembly version 2, layer 0; allowed is"),
        (toy.A[:-1], "the module is truncated: its custom section needs"),
    ],
    ids=[
        "empty",
        "elf",
        "text",
        "component",
        "component-with-content",
        "half-a-header",
        "version-2",
        "one-byte-short",
    ],
)
def test_bytes_that_are_no_module(host: memslot.Host, content: bytes, sentence: str) -> None:
    with raises(memslot.InvalidModule, re.escape(sentence), ValueError) as caught:
        host.prepare(content)
    assert "core WebAssembly module in the binary format" in str(caught.value)


def test_a_component_that_a_runtime_assembled(host: memslot.Host) -> None:
    wasmtime = pytest.importorskip("wasmtime", reason="wasmtime is not installed")
    component = bytes(wasmtime.wat2wasm('(component (core module (memory (export "m") 1)))'))
    assert component.startswith(COMPONENT)
    with raises(memslot.InvalidModule, "component", ValueError):
        host.prepare(component)


def test_a_module_cut_off_anywhere(host: memslot.Host) -> None:
    refused = 0
    for length in range(0, len(toy.B), 3):
        try:
            host.prepare(toy.B[:length]).close()
        except memslot.InvalidModule:
            refused += 1
    # What ends between two sections may still be a module.
    assert refused > len(toy.B) // 3 * 0.9


def test_a_module_that_does_not_validate(real_cell: Cell) -> None:
    body = toy.assemble('(module (memory 1) (func (export "f") (result i32) (i32.const 1)))')
    with real_cell.serving(slots=2) as host:
        with raises(
            memslot.InvalidModule,
            f"{host.name} refuses wrong: .*expected i32 but nothing",
            ValueError,
        ):
            host.prepare(body.replace(b"\x41\x01\x0b", b"\x01\x01\x0b"), name="wrong")  # two nops
        still_serves(host)


def test_text_that_is_no_module(host: memslot.Host) -> None:
    if host.name == "fake":
        with raises(
            memslot.InvalidModule, "no assembler; give it the bytes of a module", ValueError
        ):
            host.prepare("(module)")
        return
    with raises(memslot.InvalidModule, "the text.*: .*unexpected token", ValueError):
        host.prepare("(module (memory 1) (func (export")
    with raises(memslot.InvalidModule, "unknown memory 0", ValueError):
        host.prepare('(module (data (i32.const 0) "no memory"))')
    with host.prepare("(module)") as guest, guest.instantiate():
        pass


@pytest.mark.parametrize(
    "nonsense", [None, 12, 1.5, ["a.wasm"], object()], ids=lambda value: type(value).__name__
)
def test_what_is_not_even_a_path(host: memslot.Host, nonsense: object) -> None:
    with raises(
        memslot.ArgumentError,
        "a guest is a path, the bytes of a module, or WebAssembly text, and not",
        TypeError,
    ):
        host.prepare(nonsense)


def test_paths(host: memslot.Host, tmp_path: Path) -> None:
    missing = tmp_path / "missing.wasm"
    with raises(memslot.GuestNotFound, f"there is no guest at {missing}", FileNotFoundError):
        host.prepare(missing)
    with raises(memslot.GuestNotFound, "there is no guest at .*inside.wasm", FileNotFoundError):
        (tmp_path / "file").write_bytes(b"")
        host.prepare(str(tmp_path / "file" / "inside.wasm"))
    with raises(
        memslot.InvalidModule,
        "cannot be read: Is a directory; a guest is a .wasm or .wat file",
        ValueError,
    ):
        host.prepare(tmp_path)
    for name, content in (("a.wasm", b"hello"), ("b.wat", b"(module"), ("c.wat", b"\xff\xfe\0")):
        (tmp_path / name).write_bytes(content)
        with raises(memslot.InvalidModule, ".+", ValueError):
            host.prepare(tmp_path / name)
    (tmp_path / "good.wasm").write_bytes(toy.B)
    with host.prepare(tmp_path / "good.wasm") as guest, guest.instantiate() as instance:
        assert guest.name == "good"
        assert instance.memory.read(40000, 4) == b"only"


def test_a_memory_larger_than_a_slot(plain_cell: Cell) -> None:
    with plain_cell.serving(slots=2, reserved=PAGE) as host:
        with raises(
            memslot.MemoryTooLarge,
            r"big needs 131072 bytes for memory 0, and the settings allow 65536",
            ValueError,
        ):
            host.prepare(toy.A, name="big")
        assert host.statistics().guests == 0
    with plain_cell.serving(slots=2, memory_limit=PAGE) as host:
        with raises(
            memslot.MemoryTooLarge,
            "the settings allow 65536 .memory_limit and reserved.",
            ValueError,
        ):
            host.prepare(toy.A)
        with host.prepare(
            toy.assemble('(module (memory (export "m") 1))')
        ).instantiate() as instance:
            assert instance.memory.byte_size == PAGE


def test_a_guest_that_grows_past_its_limit_sees_minus_one(plain_cell: Cell) -> None:
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
