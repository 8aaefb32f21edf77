"""`memslot snapshot`, and what `memslot run` and `memslot inspect` make of what it writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memslot_plugin.tests.test_cli import HOSTS, REACTOR, done, json_of, memslot, refusal

GUEST = r"""(module
  (memory (export "memory") 3) (data (i32.const 16) "data") (global $n (mut i32) (i32.const 1))
  (func (export "boot") (global.set $n (i32.const 40)) (i32.store (i32.const 70000) (i32.const 7)))
  (func (export "add") (param i32) (result i32)
    (global.set $n (i32.add (global.get $n) (local.get 0))) (global.get $n))
  (func (export "seen") (result i32) (i32.add (global.get $n) (i32.load (i32.const 70000))))
  (func (export "seed") (i32.store (i32.const 8) (i32.const 9)))
  (func (export "trap") unreachable))"""

PRINTER = r"""(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (memory (export "memory") 1) (data (i32.const 0) "\10\00\00\00\06\00\00\00") (data (i32.const 16) "hello\n")
  (func (export "_start"))
  (func (export "say") (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"""

KEY = b"0123456789abcdef0123456789abcdef"


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    path = tmp_path / "guest.wat"
    path.write_text(GUEST)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "guest.memslot"


@pytest.mark.parametrize("host", HOSTS)
def test_a_snapshot_is_written_and_every_request_starts_there(
    host: str, guest: Path, out: Path
) -> None:
    words = ("--host", host, "--init", "boot", "--call", "add", "2", "-o", out)
    found = json_of("snapshot", guest, *words)
    assert found["calls"] == [
        {"function": "boot", "arguments": [], "result": []},
        {"function": "add", "arguments": [2], "result": ["42"]},
    ]
    assert (found["host"], found["guest"], found["file"]) == (host, "guest.wat", str(out))
    assert found["byte_size"] == out.stat().st_size
    page = os.sysconf("SC_PAGE_SIZE")
    assert found["images"] == [{"memory": 0, "memory_bytes": 3 * 65536, "stored_bytes": 2 * page}]
    assert found["reset_in_place"]
    ran = json_of("run", out, "--host", host, "--invoke", "seen", "--requests", "20")
    assert ran["result"] == [49]
    assert ran["alone"] is None
    assert "The images are mapped from the file, whose pages all processes share." in ran["notes"]
    assert any(note.startswith("The module was compiled:") for note in ran["notes"])
    assert any("alone cannot start where a saved guest does" in note for note in ran["notes"])


@pytest.mark.parametrize("host", HOSTS)
def test_people_read_what_was_called_and_written(host: str, guest: Path, out: Path) -> None:
    result = memslot(
        "snapshot", guest, "--host", host, "--init", "boot", "--call", "add", "2", "-o", out
    )
    assert result.exit_code == 0
    said = result.stdout.splitlines()
    assert said[:2] == ["called boot()", "called add(2) -> 42"]
    assert said[2].startswith("memory 0: 192 KiB, of which ")
    assert said[3].replace("\n", "").startswith("wrote ")


@pytest.mark.parametrize("host", HOSTS)
def test_inspect_says_what_stands_in_the_file(host: str, guest: Path, out: Path) -> None:
    memslot("snapshot", guest, "--host", host, "--init", "boot", "--reseed", "seed", "-o", out)
    found = json_of("inspect", out)
    saved = found["saved"]
    assert (saved["name"], saved["writer"]) == ("guest.wat", f"memslot on {host}")
    assert (saved["snapshot"], saved["reseed"], saved["authentic"]) == (True, "seed", False)
    assert saved["byte_size"] == out.stat().st_size
    assert len(saved["source_sha256"]) == 64
    assert [key.split(" ")[0] for key in saved["code"]] == [host]
    for kind in ("wasmtime", "wasmer"):
        report = found["hosts"][kind]["report"]
        assert report["verdict"]["in_place"]
        assert report["segments"][0]["byte_size"] == 4
        assert any("as they were when the snapshot was taken" in each for each in report["changes"])
        (image,) = found["hosts"][kind]["images"]
        assert len(image["extents"]) == 2
    shown = memslot("inspect", out).stdout
    for word in (
        "saved guest guest.wat: a snapshot",
        "machine code: ",
        "each instance calls seed",
        host,
    ):
        assert word in shown
    assert json_of("inspect", guest)["saved"] is None


@pytest.mark.parametrize("host", HOSTS)
def test_a_snapshot_of_a_snapshot_goes_on_from_it(
    host: str, guest: Path, out: Path, tmp_path: Path
) -> None:
    memslot("snapshot", guest, "--host", host, "--init", "boot", "-o", out)
    second = tmp_path / "second"
    assert json_of("snapshot", out, "--host", host, "--call", "add", "5", "-o", second)[
        "calls"
    ] == [{"function": "add", "arguments": [5], "result": ["45"]}]
    assert json_of("run", second, "--host", host, "--invoke", "seen", "--requests", "5")[
        "result"
    ] == [52]
    memslot("snapshot", out, "--host", host, "--call", "add", "1", "-o", out)
    assert json_of("run", out, "--host", host, "--invoke", "seen", "--requests", "5")["result"] == [
        48
    ]


@pytest.mark.parametrize("host", HOSTS)
def test_a_reactor_is_initialised_once(host: str, out: Path, tmp_path: Path) -> None:
    text = REACTOR.replace("(i32.const 42)", "(i32.add (i32.load (i32.const 0)) (i32.const 42))")
    (tmp_path / "reactor.wat").write_text(text)
    found = json_of("snapshot", tmp_path / "reactor.wat", "--host", host, "-o", out)
    assert [each["function"] for each in found["calls"]] == ["_initialize"]
    ran = json_of("run", out, "--host", host, "--invoke", "answer", "--requests", "5")
    assert ran["result"] == [42]


@pytest.mark.parametrize("host", HOSTS)
def test_what_the_guest_prints_is_shown_and_repeated_randomness_noted(
    host: str, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "printer.wat").write_text(PRINTER)
    found = json_of(
        "snapshot", tmp_path / "printer.wat", "--host", host, "--init", "say", "-o", out
    )
    assert found["output"] == "hello\n"
    assert any("random_get" in note for note in found["notes"])
    assert (
        "The guest printed:\nhello"
        in memslot(
            "snapshot", tmp_path / "printer.wat", "--host", host, "--init", "say", "-o", out
        ).stdout
    )
    ran = json_of("run", out, "--host", host, "--invoke", "say", "--requests", "5")
    assert ran["output"] == "hello\n"
    sentence = refusal("snapshot", tmp_path / "printer.wat", "--init", "_start", "-o", out)
    assert "_start runs a program to its end" in sentence


@pytest.mark.parametrize("host", HOSTS)
def test_machine_code_is_run_with_a_key_and_can_be_left_out(
    host: str, guest: Path, out: Path, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_bytes(KEY)
    words = ("--host", host, "--init", "boot", "-o", out)
    with_code = json_of("snapshot", guest, *words, "--key-file", key)["byte_size"]
    ran = json_of(
        "run", out, "--host", host, "--invoke", "seen", "--requests", "5", "--key-file", key
    )
    assert ran["result"] == [47]
    assert not any("was compiled" in note for note in ran["notes"])
    assert "was saved with a key" in refusal("run", out, "--host", host, "--invoke", "seen")
    assert "was saved with a key" in refusal("inspect", out)
    assert json_of("inspect", out, "--key-file", key)["saved"]["authentic"]
    assert json_of("snapshot", guest, *words, "--no-code")["byte_size"] <= with_code
    assert json_of("inspect", out)["saved"]["code"] == {}
    assert "without a key" in refusal("inspect", out, "--key-file", key)
    key.write_bytes(b"short")
    assert "a key is at least 16 secret bytes" in refusal(
        "snapshot", guest, *words, "--key-file", key
    )
    assert "cannot be read" in refusal("inspect", out, "--key-file", tmp_path / "none")


def test_wrong_words_are_refused(guest: Path, out: Path, tmp_path: Path) -> None:
    for words, said in (
        ((guest, "-o", out, "--init", "nothing"), "exports no function 'nothing'"),
        ((guest, "-o", out, "--init", "add"), "takes 1 arguments and 0 are given"),
        ((guest, "1", "-o", out), "1: arguments are for --call, which is not given"),
        ((guest, "-o", tmp_path), "is there and is no file"),
        ((guest, "-o", tmp_path / "none" / "x"), "No such file or directory"),
        ((tmp_path / "none.wasm", "-o", out), "there is no guest at"),
        ((guest, "-o", out, "--host", "fake"), "the host fake runs Python functions"),
    ):
        assert said in refusal("snapshot", *words)
    assert memslot("snapshot", guest).exit_code == 2
    assert not out.exists()


@pytest.mark.parametrize("host", HOSTS)
def test_a_trap_while_initialising_writes_nothing(host: str, guest: Path, out: Path) -> None:
    result = memslot("snapshot", guest, "--host", host, "--init", "trap", "-o", out)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert not out.exists()


@pytest.mark.parametrize("command", ["run", "inspect", "snapshot"])
def test_a_damaged_file_is_refused_by_name(
    command: str, guest: Path, out: Path, tmp_path: Path
) -> None:
    memslot("snapshot", guest, "-o", out)
    data = out.read_bytes()
    rest = ("-o", tmp_path / "other") if command == "snapshot" else ()
    for bad, said in (
        (data[:-1], "is cut off"),
        (data[:-1] + b"\1", "its digest is wrong"),
        (data[:8] + b"\2" + data[9:], "has version 2 of the format"),
    ):
        out.unlink()
        out.write_bytes(bad)
        sentence = refusal(command, out, *rest)
        assert sentence.startswith(str(out))
        assert said in sentence


def test_help_shows_it() -> None:
    assert "memslot snapshot guest.wasm --init boot -o guest.memslot" in memslot("--help").stdout
    shown = memslot("snapshot", "--help").stdout
    for word in ("--init", "--call", "--reseed", "--key-file", "--json", "--settings", "--no-code"):
        assert word in shown


def test_it_works_as_a_program(guest: Path, out: Path) -> None:
    code, stdout, stderr = done("snapshot", guest, "--init", "boot", "-o", out)
    assert (code, stderr) == (0, "")
    assert "wrote" in stdout
