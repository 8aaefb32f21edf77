"""Modules of many shapes under memslot: results as natively, with an image or a reason for none."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

import memslot_plugin as memslot
from memslot_plugin.cli import main

from . import differential, native, toy
from .cells import Cell
from .modules import MODULES, Module


@pytest.mark.scales
def test_module_of_any_shape_computes_what_it_computes_natively(runtime_cell: Cell) -> None:
    tally = differential.Tally()
    with runtime_cell.serving(**differential.SETTINGS) as host:
        for module in MODULES.values():
            differential.compare(host, module, tally)
    assert not tally.differences, "\n".join(tally.differences)
    assert tally.counts["after two resets"] >= len(MODULES) // 3


def test_report_of_a_module_of_any_shape_is_what_inspect_prints(
    plain_cell: Cell, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    with plain_cell.serving() as host:
        for name, module in MODULES.items():
            with subtests.test(name):
                check_report(host, module, tmp_path / "guest.wasm")


def check_report(host: memslot.Host, module: Module, file: Path) -> None:
    if host.name == "fake" and "fake" in module.native_on:
        with pytest.raises(memslot.InvalidModule, match="has no runtime"):
            host.prepare(module.binary)
        return
    if host.name != "fake" and native.runtime(host.name).compiled(module.binary) is None:
        return  # wasmer knows no 64-bit addresses
    report = host.prepare(module.binary).report
    images = tuple(memory.image for memory in report.memories)
    reasons = [memory.reason or "" for memory in report.memories]
    assert [bool(reason) for reason in reasons] == [not image for image in images]
    if host.name in module.native_on:
        assert report.native
        assert not any(images)
    else:
        assert images == (module.images if module.images is not None else (not module.reason,))
        assert module.reason in " ".join(reasons)
    file.write_bytes(module.binary)
    shown = CliRunner().invoke(main, ["inspect", str(file), "--json"])
    assert shown.exit_code == 0, shown.output
    said = json.loads(shown.output)["hosts"]["wasmer" if host.name == "wasmer" else "wasmtime"]
    # The embedder chooses the functions of a fake guest.
    assert said["report"] == json.loads(json.dumps(asdict(report)))
    assert said["refused"] is None


def test_inspect_of_a_module_that_the_settings_refuse_prints_the_reason(
    plain_cell: Cell, tmp_path: Path
) -> None:
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
