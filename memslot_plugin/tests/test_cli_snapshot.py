"""`memslot snapshot`, and its files in `memslot run` and `memslot inspect`."""

from __future__ import annotations

import os

import pytest

from memslot_plugin.tests import command
from memslot_plugin.tests.command import json_of, memslot, on_each_host, refusal, run_of, shown_by

GUEST = r"""(module
  (memory (export "memory") 3) (data (i32.const 16) "data") (global $n (mut i32) (i32.const 1))
  (func (export "boot") (global.set $n (i32.const 40)) (i32.store (i32.const 70000) (i32.const 7)))
  (func (export "add") (param i32) (result i32)
    (global.set $n (i32.add (global.get $n) (local.get 0))) (global.get $n))
  (func (export "seen") (result i32) (i32.add (global.get $n) (i32.load (i32.const 70000))))
  (func (export "seed") (i32.store (i32.const 8) (i32.const 9)))
  (func (export "trap") unreachable))"""


@pytest.fixture
def guest(tmp_path):
    path = tmp_path / "guest.wat"
    path.write_text(GUEST)
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "guest.memslot"


@on_each_host
def test_snapshot_command_writes_a_file_where_every_request_starts(host, guest, out):
    words = (guest, "--host", host, "--init", "boot", "--call", "add", "2", "-o", out)
    found = json_of("snapshot", *words)
    assert found["calls"] == [
        {"function": "boot", "arguments": [], "result": []},
        {"function": "add", "arguments": [2], "result": ["42"]},
    ]
    assert (found["host"], found["guest"], found["file"]) == (host, "guest.wat", str(out))
    assert found["byte_size"] == out.stat().st_size
    page = os.sysconf("SC_PAGE_SIZE")
    assert found["images"] == [{"memory": 0, "memory_bytes": 3 * 65536, "stored_bytes": 2 * page}]
    assert found["reset_in_place"]
    ran = run_of(host, out, "--invoke", "seen")
    assert (ran["result"], ran["alone"]) == (["49"], None)
    assert "The images are mapped from the file, whose pages all processes share." in ran["notes"]
    assert any(note.startswith("The module was compiled:") for note in ran["notes"])
    assert any("alone cannot start where a saved guest does" in note for note in ran["notes"])
    shown = shown_by("snapshot", *words)
    assert shown.startswith("called boot() called add(2) -> 42 memory 0: 192 KiB, of which ")
    assert f" are stored wrote {out}: " in shown


@on_each_host
def test_inspect_of_a_snapshot_shows_its_contents(host, guest, out):
    memslot("snapshot", guest, "--host", host, "--init", "boot", "--reseed", "seed", "-o", out)
    found = json_of("inspect", out)
    saved = found["saved"]
    assert (saved["name"], saved["writer"]) == ("guest.wat", f"memslot on {host}")
    assert (saved["snapshot"], saved["reseed"]) == (True, "seed")
    assert (saved["byte_size"], len(saved["source_sha256"])) == (out.stat().st_size, 64)
    assert [key.split(" ")[0] for key in saved["code"]] == [host]
    for verdict in found["hosts"].values():
        report, (image,) = verdict["report"], verdict["images"]
        assert report["verdict"]["in_place"]
        assert any("as they were when the snapshot was taken" in each for each in report["changes"])
        assert len(image["extents"]) == 2
    shown = shown_by("inspect", out)
    for said in ("saved guest guest.wat: a snapshot", "machine code: ", "instance calls seed"):
        assert said in shown
    assert json_of("inspect", guest)["saved"] is None


@on_each_host
def test_snapshot_of_a_snapshot_goes_on_from_it(host, guest, out):
    memslot("snapshot", guest, "--host", host, "--init", "boot", "-o", out)
    for target, added, seen in ((out.with_name("second"), 5, 52), (out, 1, 48)):
        words = ("--host", host, "--call", "add", added, "-o", target)
        (call,) = json_of("snapshot", out, *words)["calls"]
        assert (call["function"], call["result"]) == ("add", [str(40 + added)])
        assert run_of(host, target, "--invoke", "seen")["result"] == [str(seen)]


@on_each_host
def test_reactor_in_a_snapshot_is_initialised_once(host, out, tmp_path):
    text = command.REACTOR.replace(
        "(i32.const 42)", "(i32.add (i32.load (i32.const 0)) (i32.const 42))"
    )
    (tmp_path / "reactor.wat").write_text(text)
    found = json_of("snapshot", tmp_path / "reactor.wat", "--host", host, "-o", out)
    assert [each["function"] for each in found["calls"]] == ["_initialize"]
    assert run_of(host, out, "--invoke", "answer")["result"] == ["42"]


@on_each_host
def test_snapshot_command_shows_output_and_notes_repeated_randomness(host, out, tmp_path):
    printer = tmp_path / "printer.wat"
    printer.write_text(command.GUEST)
    words = (printer, "--host", host, "--init", "say", "-o", out)
    found = json_of("snapshot", *words)
    assert found["output"] == "hello [world]\n"
    assert any("random_get" in note for note in found["notes"])
    assert "The guest printed: hello [world]" in shown_by("snapshot", *words)
    assert run_of(host, out, "--invoke", "say")["output"] == "hello [world]\n"
    sentence = refusal("snapshot", printer, "--init", "_start", "-o", out)
    assert "_start runs a program to its end" in sentence


@on_each_host
def test_machine_code_in_a_snapshot_is_run_with_a_key_and_can_be_left_out(
    host, guest, out, tmp_path
):
    key = tmp_path / "key"
    key.write_bytes(b"0123456789abcdef")
    words = ("snapshot", guest, "--host", host, "--init", "boot", "-o", out)
    json_of(*words, "--key-file", key)
    ran = run_of(host, out, "--invoke", "seen", "--key-file", key)
    assert ran["result"] == ["47"]
    assert not any("was compiled" in note for note in ran["notes"])
    assert "was saved with a key" in refusal("run", out, "--host", host, "--invoke", "seen")
    assert "was saved with a key" in refusal("inspect", out)
    assert json_of("inspect", out, "--key-file", key)["saved"]["name"]
    json_of(*words, "--no-code")
    assert json_of("inspect", out)["saved"]["code"] == {}
    assert "without a key" in refusal("inspect", out, "--key-file", key)
    key.write_bytes(b"short")
    assert "a key is at least 16 secret bytes" in refusal(*words, "--key-file", key)
    missing = memslot("inspect", out, "--key-file", tmp_path / "none")
    assert missing.exit_code == 2
    assert "No such file or directory" in missing.stderr


REFUSED = {
    "guest.wat -o out --init nothing": "exports no function 'nothing'",
    "guest.wat -o out --init trap": "unreachable",
    "guest.wat -o out --init add": "takes 1 arguments and 0 are given",
    "guest.wat 1 -o out": "1: arguments are for --call, which is not given",
    "guest.wat -o .": "is there and is no file",
    "guest.wat -o none/x": "No such file or directory",
    "none.wasm -o out": "there is no guest at",
    "guest.wat -o out --host fake": "the host fake runs Python functions",
}


@pytest.mark.parametrize("words", REFUSED)
def test_snapshot_that_cannot_work_writes_nothing(words, guest, monkeypatch):
    monkeypatch.chdir(guest.parent)
    exit_code = 1 if "trap" in words else 2
    assert REFUSED[words] in refusal("snapshot", *words.split(), exit_code=exit_code)
    assert not guest.with_name("out").exists()


@pytest.mark.parametrize("command", ["run", "inspect", "snapshot"])
def test_snapshot_file_that_is_damaged_is_refused_by_name(command, guest, out):
    memslot("snapshot", guest, "-o", out)
    data = out.read_bytes()
    rest = ("-o", out.with_name("other")) if command == "snapshot" else ()
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
