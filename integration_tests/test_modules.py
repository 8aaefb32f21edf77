"""Modules of every shape compute under memslot what the runtime alone computes, with an image or with a reason."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

import memslot_plugin as memslot
from memslot_plugin.cli import main

from . import cells, native, toy
from .cells import Cell
from .modules import MODULES


@pytest.mark.parametrize("name", MODULES)
def test_it_computes_what_the_runtime_alone_computes(real_cell: Cell, name: str) -> None:
    module = MODULES[name]
    alone = native.runtime(real_cell.host).run(module.binary, module.imports, module.calls)
    with real_cell.serving(slots=3) as host:
        for life, outcomes in enumerate(
            native.pooled(host, module.binary, module.imports, module.calls)
        ):
            assert outcomes == alone, f"in life {life}"
        cells.check(host, in_use=0)


@pytest.mark.parametrize("name", MODULES)
def test_each_memory_has_an_image_or_a_reason(plain_cell: Cell, name: str) -> None:
    module = MODULES[name]
    with plain_cell.serving() as host:
        if native_refuses(plain_cell.host, module.binary):
            return
        if plain_cell.host == "fake" and "fake" in module.native_on:
            with pytest.raises(memslot.InvalidModule, match="has no runtime"):
                host.prepare(module.binary)
            return
        report = host.prepare(module.binary).report
        if plain_cell.host in module.native_on:
            assert report.native
            assert all(memory.reason and not memory.image for memory in report.memories)
            return
        assert tuple(memory.image for memory in report.memories) == module.image
        assert all(bool(memory.reason) is not memory.image for memory in report.memories)
        if module.reason:
            assert module.reason in " ".join(memory.reason or "" for memory in report.memories)


@pytest.mark.parametrize("name", MODULES)
def test_inspect_says_what_the_host_says(plain_cell: Cell, name: str, tmp_path: Path) -> None:
    """On the kind of host that it is; which functions a fake guest has is the embedder's business."""
    module = MODULES[name]
    kind = "wasmer" if plain_cell.host == "wasmer" else "wasmtime"
    file = tmp_path / "guest.wasm"
    file.write_bytes(module.binary)
    with plain_cell.serving() as host:
        try:
            guest = host.prepare(module.binary)
        except memslot.InvalidModule:
            return  # by the runtime, which inspect does not ask
        shown = CliRunner().invoke(main, ["inspect", str(file), "--json"])
        assert shown.exit_code == 0, shown.output
        said = json.loads(shown.output)["hosts"][kind]
        assert said["report"] == json.loads(json.dumps(asdict(guest.report)))
        assert said["refused"] is None


def test_inspect_says_what_the_settings_refuse(plain_cell: Cell, tmp_path: Path) -> None:
    kind = "wasmer" if plain_cell.host == "wasmer" else "wasmtime"
    file = tmp_path / "guest.wasm"
    file.write_bytes(toy.A)
    limit = ["--set", "memory_limit=64KiB"]
    shown = CliRunner().invoke(main, ["inspect", str(file), "--json", *limit])
    refused = json.loads(shown.output)["hosts"][kind]["refused"]
    assert "(memory_limit and reserved)" in refused
    with plain_cell.serving(memory_limit="64KiB") as host:
        with pytest.raises(memslot.MemoryTooLarge) as caught:
            host.prepare(toy.A, name="It")
        assert refused == f"{caught.value}."
    assert "cannot be prepared: It needs" in (
        CliRunner().invoke(main, ["inspect", str(file), *limit]).output
    )


def native_refuses(host: str, module: bytes) -> bool:
    """Whether the runtime alone does not even compile the module (wasmer knows no 64-bit addresses)."""
    return host != "fake" and native.runtime(host).run(module, None, ()) == [("refused",)]


def test_the_fake_host_sees_the_bytes_that_a_runtime_lays(plain_cell: Cell) -> None:
    """Contents alone: images are laid without any runtime."""
    if plain_cell.host != "fake":
        pytest.skip("impossible: this is about the host that has no runtime")
    wasmtime = pytest.importorskip("wasmtime", reason="wasmtime is not installed")
    assert wasmtime
    with plain_cell.serving() as host:
        for module in MODULES.values():
            if True not in module.image or module.imports is not None:
                continue
            started, *memories = native.runtime("wasmtime").run(module.binary, None, ())
            if started != ("started",) or "start $start" in module.text:
                continue
            with host.prepare(module.binary) as guest, guest.instantiate() as instance:
                exported = {n: m.index for m in guest.report.memories for n in m.exported_as}
                for _, name, content in memories:
                    assert instance.memories[exported[name]].read(0, len(content)) == content
