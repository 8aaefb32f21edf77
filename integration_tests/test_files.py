"""Guests as files: saved by one host, loaded by another, with compiled code that is used if trusted.

Processes that load one file share its pages: test_sharing.py.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import os
import re
from pathlib import Path
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin._core.proc import status_bytes
from memslot_plugin.files import container
from memslot_plugin.tests.profiles import examples
from memslot_plugin.tests.test_container import read

from . import cells, children, differential, native, toy
from .cells import Cell
from .differential import outcomes, plain
from .generated import FEATURES, generate
from .test_instance_reset import WASI
from .test_snapshots import INIT

PAGE = toy.PAGE


def save_started(cell: Cell, path: Path, **options: Any) -> None:
    """Save a snapshot of the toy guest whose instance has written to its memory and global."""
    with cell.serving(slots=2, image_limit="64MiB") as host:
        with host.prepare(toy.A, name="toy").instantiate() as instance:
            instance.call("store", 7, 77)
            if cell.host != "fake":
                instance.call("bump")
            taken = instance.snapshot()
        taken.save(path, **options)


def loaded(guest: memslot.Guest) -> Any:
    assert guest.loaded is not None
    return guest.loaded


def test_initialised_guest_loads_grown_and_prepared_guest_runs_its_start(
    real_cell: Cell, tmp_path: Path
) -> None:
    imports, path = {"env": {"f": lambda: None}}, tmp_path / "guest"
    with real_cell.serving(slots=2, image_limit="64MiB") as host:
        guest = host.prepare(toy.assemble(INIT), imports=imports, init="_initialize")
        guest.save(path)
        again = host.load(path, imports=imports)
        assert again.report.memories[0].minimum_bytes == 10 * PAGE
        # Places in the code move in a rewritten module.
        verdicts = [str(each.report.verdict) for each in (guest, again)]
        assert len({re.sub("byte 0x[0-9a-f]+", "byte", verdict) for verdict in verdicts}) == 1
        assert set(again.report.changes) <= set(guest.report.changes)
        with again.instantiate() as instance:
            assert (instance.call("size"), instance.call("load", 600_000)) == (10, 7)
            assert (instance.call("next"), instance.call("hidden")) == (41, -1)
            assert instance.call("started") == 1
        with pytest.raises(memslot.LinkError):
            host.load(path).instantiate()
        host.prepare(toy.assemble(INIT), imports=imports).save(path)
        with host.load(path, imports=imports).instantiate() as instance:
            for _ in range(2):
                assert (instance.call("size"), instance.call("next")) == (1, 2)
                assert instance.call("started") == 1
                assert instance.memory.read(0, 8) == b"at first"
                instance.reset()


def test_guest_without_a_snapshot_loads_with_its_code(real_cell: Cell, tmp_path: Path) -> None:
    text = f'(module (import "env" "memory" (memory 1 1)) (memory $own 1) {toy.CODE})'
    if real_cell.host == "wasmer":
        text = """(module (import "env" "t" (table 1 funcref)) (memory (export "memory") 1)
          (data (i32.const 5) "x"))"""
    with real_cell.serving(slots=1) as host:
        for module in (toy.assemble(text), toy.A):  # the first guest is left to the runtime
            guest = host.prepare(module)
            guest.save(tmp_path / "guest")
            again = host.load(tmp_path / "guest", trust_code=True)
            assert again.report.native == guest.report.native
            assert loaded(again).compiled_because is None
            assert not again.compiled.sets_globals
        with again.instantiate() as instance:
            assert instance.call("bump") == 8


@pytest.mark.parametrize("trust", ["no", "trust_code", "key"])
def test_saved_code_is_used_if_it_is_trusted(
    real_cell: Cell, tmp_path: Path, trust: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = b"k" * 32 if trust == "key" else None
    save_started(real_cell, tmp_path / "guest", key=key)
    compiled = []
    with real_cell.serving(slots=2, image_limit="64MiB") as host:
        if real_cell.host == "wasmtime":
            runtime: Any = importlib.import_module("wasmtime")

            class Counting(runtime.Module):  # type: ignore[misc]
                def __init__(self, *arguments: Any) -> None:
                    compiled.append(arguments)
                    super().__init__(*arguments)

            monkeypatch.setattr(runtime, "Module", Counting)
        guest = host.load(tmp_path / "guest", trust_code=trust == "trust_code", key=key)
        monkeypatch.undo()
        assert guest.compiled.reused == (trust != "no")
        because = "the file's code is not trusted (trust_code, or a key)" if trust == "no" else None
        assert loaded(guest).compiled_because == because
        assert bool(compiled) == (trust == "no" and real_cell.host == "wasmtime")
        assert guest.compiled.sets_globals == (trust != "no"), "the code is its parent's"
        assert loaded(guest).shares_file == (real_cell.backend == "memfd")
        expected = bytearray(toy.pristine(toy.A))
        expected[7] = 77
        with guest.instantiate() as instance:
            for _ in range(2):
                assert instance.memory.read(0, instance.memory.byte_size) == expected
                assert [instance.call("bump"), instance.call("bump")] == [9, 10]
                with pytest.raises(memslot.GuestTrap):
                    instance.call("fill_and_trap", 0, 2 * PAGE, 0xEE)
                instance.reset()


def test_saved_code_that_does_not_fit_is_compiled_again(real_cell: Cell, tmp_path: Path) -> None:
    path = tmp_path / "guest"
    save_started(real_cell, path)
    found = read(path, keep=True)
    assert found.extents is not None
    (key,) = found.code
    assert key.split(", ")[-1].startswith("module but for its globals ")
    assert key.startswith(f"{real_cell.host} {importlib.metadata.version(real_cell.host)}, ")
    assert os.uname().machine in key
    rest, tail = (found.about, found.module), (found.images, [found.extents])
    changes: list[tuple[dict[str, bytes], dict[str, Any], str]] = [
        ({"another runtime 1.0": b"code"}, {}, "the file's code is for another runtime"),
        ({key: b"not code at all"}, {}, "the file's code is for another runtime"),
        ({}, {}, "the file has no code"),
    ]
    if real_cell.host == "wasmtime":  # no setting of memslot changes the code of wasmer
        changes += [
            (dict(found.code), {"bounds_checks": "code"}, "the file's code is for another runtime"),
            (dict(found.code), {"guard": "64MiB"}, "the file's code is for another runtime"),
        ]
    for code, settings, said in changes:
        container.write(path, container.Contents(*rest, code, *tail))
        with real_cell.serving(slots=2, image_limit="64MiB", **settings) as host:
            guest = host.load(path, trust_code=True)
            assert not guest.compiled.reused
            assert loaded(guest).compiled_because.startswith(said)
            with guest.instantiate() as instance:
                assert instance.call("load", 7) == 77
                with pytest.raises(memslot.GuestTrap):
                    instance.call("load", -1)


HOSTS = [host for host in cells.REAL_HOSTS if Cell(host, "memfd").missing is None]


@pytest.mark.parametrize(("writer", "reader"), [*itertools.permutations([*HOSTS, "fake"], 2)])
def test_guest_saved_by_one_host_loads_on_another(writer: str, reader: str, tmp_path: Path) -> None:
    save_started(Cell(writer, "memfd"), tmp_path / "guest")
    with Cell(reader, "memfd").serving(slots=2, image_limit="64MiB") as host:
        guest = host.load(tmp_path / "guest", trust_code=True)
        assert not guest.compiled.reused
        with guest.instantiate() as instance:
            assert instance.call("load", 7) == 77
            if "fake" not in (writer, reader):
                assert instance.call("bump") == 9


def test_wasi_of_a_loaded_guest_is_given_anew(real_cell: Cell, tmp_path: Path) -> None:
    with real_cell.serving(slots=2) as host:
        wasi = memslot.Wasi(stdout="discard")
        host.prepare(toy.assemble(WASI), wasi=wasi, init="write").save(tmp_path / "guest")
        guest = host.load(tmp_path / "guest", wasi=memslot.Wasi(stdout="capture"))
        with guest.instantiate() as instance:
            instance.call("write")
            assert instance.stdout == b"hello\n"
        with guest.lease() as instance:
            assert instance.stdout == b""
        guest.close()


def test_loaded_guest_that_maps_its_file_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    size = 8 << 20
    with Cell("fake", "memfd").serving(slots=2, image_limit="128MiB") as host:
        text = f'(module (memory (export "memory") {size // PAGE} {size // PAGE}) {toy.CODE})'
        with host.prepare(toy.assemble(text)).instantiate() as instance:
            instance.memory.write(0, b"x" * size)
            taken = instance.snapshot()
        taken.save(tmp_path / "big")
        taken.close()
        before = status_bytes("RssAnon") + status_bytes("RssShmem")
        guest = host.load(tmp_path / "big")
        assert status_bytes("RssAnon") + status_bytes("RssShmem") - before < 4 << 20
        assert loaded(guest).shares_file


@pytest.mark.scales
def test_generated_module_loaded_from_its_file_goes_on_as_natively(
    real_cell: Cell, tmp_path: Path
) -> None:
    """test_differential.py proves it for snapshots without files."""
    runtime, compared = native.runtime(real_cell.host), 0
    with real_cell.serving(**differential.SETTINGS) as host:
        for seed in range(examples(16)):
            module = generate(seed, FEATURES[host.name])
            at, probes = module.snapshot_at, module.probes
            rest = [*probes, *module.calls[at:], *probes]
            with (
                host.prepare(module.binary) as guest,
                differential.imports_for(guest, module, objects=False) as given,
            ):
                try:
                    with guest.instantiate(**given) as instance:
                        outcomes(instance, module.calls[:at], runtime)
                        instance.snapshot().save(tmp_path / "guest")
                        expected = plain(outcomes(instance, rest, runtime))
                except (memslot.GuestTrap, memslot.LinkError, memslot.SnapshotRefused):
                    continue
                compared += 1
                again = host.load(tmp_path / "guest", trust_code=bool(compared % 2))
                with again, again.instantiate(**given) as copy:
                    for _ in range(2):
                        assert plain(outcomes(copy, rest, runtime)) == expected, seed
                        copy.reset()
    assert compared >= 3


READ_ONLY_MOUNT = """
import os, subprocess, sys
import memslot_plugin as memslot

folder = sys.argv[1]
for name in ("rw", "ro"):
    os.mkdir(f"{folder}/{name}")
with memslot.FakeHost() as host:
    host.prepare(b"\\0asm\\1\\0\\0\\0\\5\\3\\1\\0\\1\\x0b\\7\\1\\0A\\0\\x0b\\1x").save(f"{folder}/rw/guest")
    os.chmod(f"{folder}/rw/guest", 0o666)
    for options in (["--bind", f"{folder}/rw"], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *options, f"{folder}/ro"], check=True)
    assert os.statvfs(f"{folder}/ro/guest").f_flag & os.ST_RDONLY
    print(host.load(f"{folder}/ro/guest").loaded.copied_because)
"""


def test_file_that_others_may_write_is_copied_through_a_read_only_mount_too(
    tmp_path: Path,
) -> None:
    children.require("unshare", "-m")
    said = children.output("-c", READ_ONLY_MOUNT, str(tmp_path), inside=("unshare", "-m"))
    assert said == "others than its owner may write to it (mode 0666)\n"
