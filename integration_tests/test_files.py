"""Guests as files: saved by one process and host, loaded by others, mapped by all of them from the same pages."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin import MemfdImage, container
from memslot_plugin._core import PAGE_SIZE

from . import cells, toy
from .cells import Cell
from .test_instance_reset import (
    EVERYTHING,
    RESTORABLE,
    done,
    generated,
    seen,
)
from .test_snapshots import INIT

PAGE = toy.PAGE


def started_once(cell: Cell, path: Path, **options: Any) -> None:
    """A file with a snapshot of the toy guest whose instance had written to it."""
    with cell.serving(slots=2, image_limit="64MiB") as host:
        guest = host.prepare(toy.A, name="toy")
        with guest.instantiate() as instance:
            instance.call("store", 7, 77)
            if cell.host != "fake":
                instance.call("bump")
            taken = instance.snapshot()
        taken.save(path, **options)


def bytes_of(instance: memslot.Instance) -> bytes:
    return instance.memory.read(0, instance.memory.byte_size)


def verdict_of(guest: memslot.Guest) -> str:
    """The verdict without the places in the code, which move when a module is rewritten."""
    return re.sub(r"byte 0x[0-9a-f]+", "byte", str(guest.report.verdict))


def test_a_snapshot_goes_on_where_it_was_saved(plain_cell: Cell, tmp_path: Path) -> None:
    path = tmp_path / "toy.memslot"
    started_once(plain_cell, path)
    expected = bytearray(toy.pristine(toy.A))
    expected[7] = 77
    with plain_cell.serving(slots=3, image_limit="64MiB") as host:
        guest = host.load(path)
        for _ in range(2):
            with guest.instantiate() as instance:
                for _ in range(3):
                    assert bytes_of(instance) == expected
                    assert instance.call("load", 7) == 77
                    if plain_cell.host != "fake":
                        assert [instance.call("bump"), instance.call("bump")] == [9, 10]
                    instance.call("fill", 0, 2 * PAGE, 0xEE)
                    cells.check(host)
                    instance.reset()
                cells.check(host)
        assert guest.loaded is not None
        assert guest.loaded.shares_file == (plain_cell.backend == "memfd")
        guest.close()


def test_every_kind_of_global_comes_back(real_cell: Cell, tmp_path: Path) -> None:
    with real_cell.serving(slots=3) as host:
        with host.prepare(toy.assemble(RESTORABLE)).instantiate() as instance:
            instance.call("spoil", -5)
            now = seen(instance)
            taken = instance.snapshot()
        taken.save(tmp_path / "guest")
        taken.close()
        loaded = host.load(tmp_path / "guest")
        with loaded.instantiate() as instance:
            assert seen(instance) == now
            instance.call("spoil", 99)
            instance.reset()
            assert seen(instance) == now
            again = instance.snapshot()
        with again.instantiate() as instance:
            assert seen(instance) == now
    assert {each.type for each in loaded.plan.saved_globals} >= {"i32", "i64", "f32", "f64", "v128"}


def test_an_initialised_guest_comes_back_grown_and_without_its_start(
    real_cell: Cell, tmp_path: Path
) -> None:
    imports = {"env": {"f": lambda: None}}
    with real_cell.serving(slots=2, image_limit="64MiB") as host:
        guest = host.prepare(toy.assemble(INIT), imports=imports, init="_initialize")
        guest.save(tmp_path / "guest")
        loaded = host.load(tmp_path / "guest", imports=imports)
        assert loaded.report.memories[0].minimum_bytes == 10 * PAGE
        assert verdict_of(loaded) == verdict_of(guest)
        assert loaded.report.changes == guest.report.changes
        with loaded.instantiate() as instance:
            for _ in range(2):
                assert (instance.call("size"), instance.call("load", 600_000)) == (10, 7)
                assert (instance.call("next"), instance.call("hidden")) == (41, -1)
                assert instance.call("started") == 1
                instance.reset()
        with pytest.raises(memslot.LinkError):
            host.load(tmp_path / "guest").instantiate()


def test_a_prepared_guest_still_runs_its_start(real_cell: Cell, tmp_path: Path) -> None:
    imports = {"env": {"f": lambda: None}}
    with real_cell.serving(slots=2, image_limit="64MiB") as host:
        host.prepare(toy.assemble(INIT), imports=imports).save(tmp_path / "guest")
        with host.load(tmp_path / "guest", imports=imports).instantiate() as instance:
            for _ in range(2):
                assert (instance.call("size"), instance.call("next")) == (1, 2)
                assert instance.call("started") == 1
                assert instance.memory.read(0, 8) == b"at first"
                instance.reset()


def test_a_guest_that_is_left_to_the_runtime_comes_back(real_cell: Cell, tmp_path: Path) -> None:
    text = f'(module (import "env" "memory" (memory 1 1)) (memory $own 1) {toy.CODE})'
    if real_cell.host == "wasmer":
        text = '(module (import "env" "t" (table 1 funcref)) (memory (export "memory") 1) (data (i32.const 5) "x"))'
    with real_cell.serving(slots=1) as host:
        guest = host.prepare(toy.assemble(text))
        size = guest.save(tmp_path / "guest")
        loaded = host.load(tmp_path / "guest", trust_code=True)
        assert size == (tmp_path / "guest").stat().st_size
        assert loaded.report.native == guest.report.native
        assert loaded.loaded is not None
        assert loaded.loaded.compiled_because is None


def test_what_may_be_reset_in_place_is_the_same_afterwards(real_cell: Cell, tmp_path: Path) -> None:
    with real_cell.serving(slots=2) as host:
        guest = host.prepare(toy.assemble(EVERYTHING))
        guest.save(tmp_path / "guest")
        loaded = host.load(tmp_path / "guest")
        assert verdict_of(loaded) == verdict_of(guest)
        assert not loaded.in_place


@pytest.mark.parametrize("trusted", [True, False])
def test_compiled_code_is_used_where_it_is_trusted(
    real_cell: Cell, tmp_path: Path, trusted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "guest"
    started_once(real_cell, path)
    runtime: Any = importlib.import_module(real_cell.host)
    compiled = []
    real = runtime.Module

    class Counting(real if real_cell.host == "wasmtime" else object):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            compiled.append(arguments)
            super().__init__(*arguments)

    with real_cell.serving(slots=2, image_limit="64MiB") as host:
        if real_cell.host == "wasmtime":
            monkeypatch.setattr(runtime, "Module", Counting)
        guest = host.load(path, trust_code=trusted)
        monkeypatch.undo()
        assert guest.reused_code == trusted
        assert guest.loaded is not None
        because = None if trusted else "the file's code is not trusted (trust_code, or a key)"
        assert guest.loaded.compiled_because == because
        if real_cell.host == "wasmtime":
            assert bool(compiled) == (not trusted)
        with guest.instantiate() as instance:
            assert instance.call("load", 7) == 77
            assert instance.call("bump") == 9
            with pytest.raises(memslot.GuestTrap):
                instance.call("fill_and_trap", 0, 10, 1)


def test_a_key_makes_code_trusted(real_cell: Cell, tmp_path: Path) -> None:
    started_once(real_cell, tmp_path / "guest", key=b"k" * 32)
    with real_cell.serving(slots=2, image_limit="64MiB") as host:
        guest = host.load(tmp_path / "guest", key=b"k" * 32)
        assert guest.reused_code
        assert guest.loaded is not None
        assert guest.loaded.authentic


def test_code_that_does_not_fit_is_compiled_again(real_cell: Cell, tmp_path: Path) -> None:
    path = tmp_path / "guest"
    started_once(real_cell, path)
    fd = os.open(path, os.O_RDONLY)
    found = container.read(fd, "guest", keep=True)
    os.close(fd)
    assert found.extents is not None
    (key,) = found.code
    rest = [found.about, found.source_sha256, found.module]
    tail = [found.images, [found.extents]]
    for code, said in (
        ({"another runtime 1.0": b"code"}, "the file's code is for another runtime"),
        ({key: b"not code at all"}, "the file's code is for another runtime"),
        ({}, "the file has no code"),
    ):
        container.write(path, container.Contents(*rest, code, *tail))
        with real_cell.serving(slots=2, image_limit="64MiB") as host:
            guest = host.load(path, trust_code=True)
            assert guest.loaded is not None
            assert (guest.loaded.compiled_because or "").startswith(said)
            with guest.instantiate() as instance:
                assert instance.call("load", 7) == 77


def test_code_of_other_settings_is_compiled_again(real_cell: Cell, tmp_path: Path) -> None:
    if real_cell.host == "wasmer":
        pytest.skip("impossible: no setting of ours changes what wasmer compiles")
    started_once(real_cell, tmp_path / "guest")
    for changes in ({"bounds_checks": "code"}, {"guard": "64MiB"}):
        with real_cell.serving(slots=2, image_limit="64MiB", **changes) as host:
            guest = host.load(tmp_path / "guest", trust_code=True)
            assert not guest.reused_code
            with guest.instantiate() as instance:
                assert instance.call("load", 7) == 77
                with pytest.raises(memslot.GuestTrap):
                    instance.call("load", -1)


def test_what_a_snapshot_has_of_its_parents_code_is_saved_and_used(
    real_cell: Cell, tmp_path: Path
) -> None:
    with real_cell.serving(slots=3, image_limit="64MiB") as host:
        guest = host.prepare(toy.A)
        with guest.instantiate() as instance:
            instance.call("bump")
            taken = instance.snapshot()
        assert taken.compiled.module is guest.compiled.module
        taken.save(tmp_path / "taken")
        guest.save(tmp_path / "prepared")
    for name, kind, first in (
        ("taken", "module but for its globals", 9),
        ("prepared", "module", 8),
    ):
        fd = os.open(tmp_path / name, os.O_RDONLY)
        (key,) = container.read(fd, name).code
        os.close(fd)
        assert key.split(", ")[-1].rpartition(" ")[0] == kind
        with real_cell.serving(slots=3, image_limit="64MiB") as host:
            loaded = host.load(tmp_path / name, trust_code=True)
            assert loaded.reused_code
            assert loaded.sets_globals == (name == "taken")
            with loaded.instantiate() as instance:
                for _ in range(2):
                    assert instance.call("bump") == first
                    instance.reset()
                instance.call("bump")
                again = instance.snapshot()
            with again.instantiate() as instance:
                assert instance.call("bump") == first + 1
            again.close()
            loaded.close()


def test_the_key_of_code_names_runtime_version_and_module(real_cell: Cell, tmp_path: Path) -> None:
    started_once(real_cell, tmp_path / "guest")
    fd = os.open(tmp_path / "guest", os.O_RDONLY)
    (key,) = container.read(fd, "guest").code
    os.close(fd)
    version = importlib.metadata.version(real_cell.host)
    assert key.startswith(f"{real_cell.host} {version}, ")
    assert os.uname().machine in key


HOSTS = [host for host in cells.REAL_HOSTS if Cell(host, "memfd").missing is None]


@pytest.mark.parametrize("writer", [*HOSTS, "fake"])
@pytest.mark.parametrize("reader", [*HOSTS, "fake"])
def test_any_host_loads_what_any_host_saved(writer: str, reader: str, tmp_path: Path) -> None:
    backend = cells.backends()[0]
    started_once(Cell(writer, backend), tmp_path / "guest")
    with Cell(reader, backend).serving(slots=2, image_limit="64MiB") as host:
        guest = host.load(tmp_path / "guest", trust_code=True)
        assert guest.reused_code == (writer == reader != "fake")
        with guest.instantiate() as instance:
            assert instance.call("load", 7) == 77
            if "fake" not in (writer, reader):
                assert instance.call("bump") == 9
            before = bytes_of(instance)
            instance.call("fill", 0, PAGE, 1)
            instance.reset()
            assert bytes_of(instance) == before


def test_what_this_host_leaves_to_its_runtime_is_refused(tmp_path: Path) -> None:
    if len(HOSTS) < 2:
        pytest.skip(
            "impossible: it takes wasmtime and wasmer, and wasmer has no build for this Python"
        )
    text = """(module (import "env" "t" (table 1 funcref)) (memory (export "memory") 1)
      (func (export "put") (i32.store (i32.const 9) (i32.const 5))))"""
    backend = cells.backends()[0]
    with Cell("wasmtime", backend).serving(slots=2) as host:
        host.prepare(toy.assemble(text)).save(tmp_path / "guest")
    with (
        Cell("wasmer", backend).serving(slots=2) as host,
        pytest.raises(memslot.Unsupported, match=r"It imports the table env\.t"),
    ):
        host.load(tmp_path / "guest")


def test_a_snapshot_of_a_loaded_guest_layers_on_the_file(real_cell: Cell, tmp_path: Path) -> None:
    started_once(real_cell, tmp_path / "guest")
    with real_cell.serving(slots=3, image_limit="64MiB") as host:
        loaded = host.load(tmp_path / "guest")
        with loaded.instantiate() as instance:
            instance.call("store", PAGE + 9000, 3)
            expected = bytes_of(instance)
            child = instance.snapshot()
        image = child.images[0]
        assert isinstance(image, memslot.Image)
        assert image.stored_bytes == PAGE_SIZE
        assert image.inherited_bytes
        loaded.close()
        (tmp_path / "guest").unlink()
        with child.instantiate() as instance:
            assert bytes_of(instance) == expected
            instance.call("fill", 0, PAGE, 9)
            instance.reset()
            assert bytes_of(instance) == expected
            cells.check(host)
        child.save(tmp_path / "flat")
        child.close()
        with host.load(tmp_path / "flat").instantiate() as instance:
            assert bytes_of(instance) == expected


def test_wasi_is_given_anew(real_cell: Cell, tmp_path: Path) -> None:
    text = r"""(module
      (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 1) (data (i32.const 0) "\10\00\00\00\05\00\00\00") (data (i32.const 16) "hello")
      (func (export "say") (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"""
    with real_cell.serving(slots=2) as host:
        wasi = memslot.Wasi(stdout="discard")
        host.prepare(toy.assemble(text), wasi=wasi, init="say").save(tmp_path / "guest")
        loaded = host.load(tmp_path / "guest", wasi=memslot.Wasi(stdout="capture"))
        with loaded.instantiate() as instance:
            instance.call("say")
            assert instance.stdout == b"hello"
        with loaded.lease() as instance:
            assert instance.stdout == b""
        loaded.close()


# Processes


LOADER = """
import json, sys
import memslot_plugin as memslot
from memslot_plugin.smaps import mappings
name, path, backend, written = sys.argv[1:]
with memslot.open_host(name, settings=memslot.Settings(plugins=(backend,), slots=4, image_limit="64MiB")) as host:
    guest = host.load(path)
    instance = guest.instantiate()
    bytes_seen = sum(instance.memory.read(0, instance.memory.byte_size))
    base = instance._live().memories[0].base
    def facts():
        found, inside = {"Rss": 0, "Pss": 0, "Shared_Clean": 0, "Private_Dirty": 0}, False
        for line in open("/proc/self/smaps"):
            word = line.split()[0]
            if "-" in word and not word.endswith(":"):
                start = int(word.split("-")[0], 16)
                inside = base <= start < base + instance.memory.byte_size and line.split()[4] != "0"
            elif inside and word[:-1] in found:
                found[word[:-1]] += int(line.split()[1])
        inodes = {m.inode for m in mappings(base, base + instance.memory.byte_size)} - {0}
        return {"sum": bytes_seen, "inodes": sorted(inodes), "shares": guest.loaded.shares_file, **found}
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(facts()), flush=True)
    sys.stdin.readline()
    if written == "write":
        instance.memory.write(0, b"!" * 4096)
    print(json.dumps(facts()), flush=True)
    sys.stdin.readline()
"""


def test_processes_that_load_a_file_share_its_pages(plain_cell: Cell, tmp_path: Path) -> None:
    """By the kernel's own account: the same inode in each, and a proportional share (Pss) of a third of the pages."""
    path = tmp_path / "big"
    data = os.urandom(8 << 20)
    with plain_cell.serving(slots=2, image_limit="64MiB") as host:
        text = f'(module (memory (export "memory") 128 128) {toy.CODE})'
        with host.prepare(toy.assemble(text)).instantiate() as instance:
            instance.memory.write(0, data)
            instance.snapshot().save(path)
    command = [sys.executable, "-c", LOADER, plain_cell.host, str(path), plain_cell.backend]
    started = [
        subprocess.Popen(
            [*command, "write" if number == 0 else "read"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    try:
        facts = []
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for _ in range(2):
            facts = []
            for process in started:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                facts.append(json.loads(process.stdout.readline()))
    finally:
        for process in started:
            process.communicate("\n", timeout=60)
    assert {each["sum"] for each in facts} == {sum(data)}
    if plain_cell.backend == "anonymous":
        assert not any(each["shares"] or each["inodes"] for each in facts)
        return
    inode = path.stat().st_ino
    for each in facts:
        assert each["shares"]
        assert each["Rss"] >= 8 << 10
    # On a file system that lies over another one the number may be the other one's; it is the same in all.
    assert len({tuple(each["inodes"]) for each in facts}) == 1
    assert facts[0]["inodes"] == [inode] or len(facts[0]["inodes"]) == 1
    # Each page is mapped twice by each of three processes: in the slot, and where resets look.
    for each in facts[1:]:
        assert each["Pss"] < each["Rss"] * 0.4, each
        assert each["Private_Dirty"] == 0
    assert facts[0]["Private_Dirty"] == 4, "KiB, the page that it wrote"


def test_loading_takes_no_memory_of_its_own(tmp_path: Path, real_cell: Cell) -> None:
    if real_cell.backend == "anonymous":
        pytest.skip("impossible: images of the plugin anonymous are copied")
    with real_cell.serving(slots=2, image_limit="128MiB") as host:
        text = f'(module (memory (export "memory") 512 512) {toy.CODE})'
        with host.prepare(toy.assemble(text)).instantiate() as instance:
            instance.memory.write(0, os.urandom(32 << 20))
            taken = instance.snapshot()
        taken.save(tmp_path / "big")
        taken.close()
        before = _status("RssAnon") + _status("RssShmem")
        guest = host.load(tmp_path / "big")
        assert _status("RssAnon") + _status("RssShmem") - before < 4 << 10, "KiB"
        image = guest.images[0]
        assert isinstance(image, MemfdImage)
        assert image.stored_bytes >= 32 << 20
        guest.close()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise LookupError(field)


def test_generated_modules_go_on_from_their_files(real_cell: Cell, tmp_path: Path) -> None:
    rng, captured = random.Random(77), 0
    with real_cell.serving(slots=3) as host:
        for _ in range(12):
            text, changes, look = generated(rng)
            after = look + tuple(rng.choices(changes, k=3)) + look
            with host.prepare(toy.assemble(text)).instantiate() as instance:
                for call in rng.choices((*changes, *look), k=6):
                    done(instance, *call)
                try:
                    taken = instance.snapshot()
                except memslot.SnapshotRefused:
                    continue
                captured += 1
                taken.save(tmp_path / "guest")
                loaded = host.load(tmp_path / "guest", trust_code=bool(captured % 2))
                expected = [done(instance, *call) for call in after]
                with loaded.instantiate() as copy:
                    for _ in range(2):
                        assert [done(copy, *call) for call in after] == expected, text
                        copy.reset()
                loaded.close()
    assert captured >= 3
