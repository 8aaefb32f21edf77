"""The command line: each command, its JSON, its refusals and its end."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import memslot_plugin
from memslot_plugin.cli import main
from memslot_plugin.cli.output import Output, byte_size, duration
from memslot_plugin.cli.source import parse_arguments
from memslot_plugin.errors import ArgumentError
from memslot_plugin.tests import hosts, installed
from memslot_plugin.tests.command import GUEST, done, json_of, memslot, refusal, shown_by
from memslot_plugin.wasm import FunctionType

MIB = 1 << 20


def test_output_of_numbers_is_readable(monkeypatch):
    sizes = [byte_size(n) for n in (None, 0, 1023, 1024, 1536, 3 << 20, 4 << 30, 9 << 40)]
    assert sizes == ["-", "0 B", "1023 B", "1 KiB", "1.5 KiB", "3 MiB", "4 GiB", "9 TiB"]
    durations = [duration(n) for n in (0.07, 53.14, 1771, 2.4e6)]
    assert durations == ["0.07 us", "53.1 us", "1.77 ms", "2.4 s"]
    monkeypatch.delenv("COLUMNS", raising=False)
    assert Output(io.StringIO()).width == 120


def test_words_become_arguments_of_their_type_or_are_refused():
    for kind, word, value in (
        ("i32", "-5", -5),
        ("i32", "0xffffffff", -1),
        ("i32", "-2147483648", -(1 << 31)),
        ("i64", "18446744073709551615", -1),
        ("i64", "9223372036854775807", (1 << 63) - 1),
        ("f32", "1.5", 1.5),
        ("f64", "inf", float("inf")),
    ):
        assert parse_arguments("f", FunctionType((kind,), ()), [word]) == (value,), word
    refused = "i32 4294967296, i32 -2147483649, i32 1.5, i64 x, f64 one, v128 1, (ref null func) 0"
    for text in refused.split(", "):
        kind, _, word = text.rpartition(" ")
        with pytest.raises(ArgumentError, match="argument 1 of f is"):
            parse_arguments("f", FunctionType((kind,), ()), [word])


def test_function_of_unknown_type_is_refused():
    with pytest.raises(ArgumentError, match="not understood"):
        parse_arguments("f", None, ["1"])


def test_help_names_every_command_with_examples_and_exit_codes():
    shown = shown_by("--help")
    for word in (*main.commands, "Examples:", "Exit codes:", "130", "guest.memslot"):
        assert word in shown
    assert shown_by("--version") == f"memslot, version {memslot_plugin.__version__}"


@pytest.mark.parametrize("command", main.commands)
def test_every_command_has_help_and_json(command):
    shown = memslot(command, "--help").stdout
    assert "--json" in shown
    assert ("--settings" in shown) is (
        command != "bench"
    )  # without options: the defaults are measured
    assert "\\b" not in shown
    examples = [line for line in shown.splitlines() if line.startswith("  memslot ")]
    assert all(line.count("memslot ") == 1 for line in examples)  # each on a line of its own
    assert examples or command not in ("run", "bench", "snapshot")


@pytest.mark.parametrize("words", ["nothing", "run --bogus", "run --requests 0", "doctor extra"])
def test_wrong_option_of_a_command_ends_with_exit_code_2_and_the_usage(words):
    result = memslot(*words.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr


def test_plugins_are_listed_in_the_order_in_which_they_are_asked():
    *_, memfd, anonymous = json_of("plugins")["plugins"]
    assert (memfd["name"], anonymous["name"]) == ("memfd", "anonymous")
    assert (memfd["state"], memfd["reason"]) == ("loaded", None)
    assert (memfd["distribution"], memfd["version"]) == ("memslot", memslot_plugin.__version__)
    assert memfd["hooks"]["memslot_create_memory"] < anonymous["hooks"]["memslot_create_memory"]
    shown = shown_by("plugins")
    assert "memslot_plugin.allocators:MemfdAllocator" in shown
    assert "create_memory 1" in shown
    listed = json_of("plugins", "--set", "plugins=anonymous")["plugins"]
    assert [each["state"] for each in listed if each["name"] == "memfd"] == ["not selected"]


def test_broken_plugin_when_listed_is_a_line_and_not_a_traceback(tmp_path):
    installed.install(tmp_path, "broken", "mine", "raise OSError('it [bold] burns')", broken="")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code, stdout, stderr = done("plugins", "--json", env=environment)
    assert code == 0
    (found,) = [each for each in json.loads(stdout)["plugins"] if each["name"] == "broken"]
    assert (found["state"], found["reason"]) == ("failed", "OSError: it [bold] burns")
    said = "plugin 'broken' (broken 1.5) is skipped: OSError: it [bold] burns"
    assert stderr == f"memslot: warning: {said}\n"


def test_inspect_shows_memories_segments_and_images_as_on_each_host():
    found = json_of("inspect")
    assert found["guest"] == "example"
    assert found["functions"]["factorise"] == {"parameters": ["i32", "i32"], "results": ["i32"]}
    assert set(found["hosts"]) == {"wasmtime", "wasmer"}
    for kind, verdict in found["hosts"].items():
        (image,), name = verdict["images"], verdict["report"]["import_name"]
        size = -(-0x80100 // PAGE) * PAGE  # the table and the primes
        assert image["extents"] == [{"offset": 0, "length": size, "file_offset": 0}]
        assert name == ("memslot.memory" if kind == "wasmer" else None)


PAGE = os.sysconf("SC_PAGESIZE")
INSPECTED = {
    # Two segments of one byte, a MiB apart.
    "0503010020 0b1002 0041000b0161 00418080c0000b0162": [
        f"{byte_size(2 * PAGE)} stored, which span {byte_size(MIB + PAGE)}"
    ],
    "05040103 0101": ["On a host like wasmtime or wasmer", "Memory 0 is shared between threads"],
}
# The way of a reset, by the code of a function.
RESETS = {
    "41001a": "reset in place: memories and globals are put back",
    "410040001a": "to watch: The code has memory.grow in function 0, at byte 0x",
    "fc0900": "because: The code has data.drop in function 0, at byte 0x",
    "ff": "because: What the code does cannot be proven: the opcode 0xff is not known",
}
for code, sentence in RESETS.items():
    size = len(bytes.fromhex(code)) + 2
    body = f"0a {size + 2:02x} 01 {size:02x} 00 {code} 0b"
    INSPECTED[f"010401600000 03020100 0503010001 0c0101 {body} 0b03010100"] = [sentence]


@pytest.mark.parametrize("sections", INSPECTED, ids=[said[0] for said in INSPECTED.values()])
def test_inspect_says_what_is_stored_and_how_an_instance_is_reset(tmp_path, sections):
    path = tmp_path / "guest.wasm"
    path.write_bytes(b"\0asm\1\0\0\0" + bytes.fromhex(sections))
    shown = shown_by("inspect", path)
    assert [sentence for sentence in INSPECTED[sections] if sentence not in shown] == []


FILES = {
    "foreign.wasm": b"MZ\x90\0 and so on",
    "text.wat": b"(module (func",
    "encoding.wat": b"\xff\xfe",
    "guest.wat": GUEST.encode(),
    "narrow.wat": b'(module (func (export "add") (param i32)) (func (export "_private")))',
    "command.wat": b'(module (func (export "_start")))',
    "needy.wat": b'(module (import "env" "log" (func)) (func (export "f")))',
}
REFUSED = {
    "inspect foreign.wasm": "foreign.wasm: the module starts with 4d 5a 90 00",
    "inspect text.wat": "cannot assemble",
    "inspect encoding.wat": "encoding.wat is not text in UTF-8",
    "inspect none.wasm": "there is no guest at none.wasm",
    "inspect .": ". cannot be read: Is a directory",
    "run guest.wat --invoke pair 1": "takes 2 arguments and 1 are given",
    "run guest.wat --invoke nothing": "exports no function 'nothing'; it exports _start(); say(); quit",
    "run example 1": "takes 0 arguments and 1 are given",
    "run narrow.wat": "choose one with --invoke: it exports add(i32)",
    "run command.wat argument": "does not use WASI",
    "run needy.wat": "needy.wat imports env.log, and the command line gives a guest nothing but WASI",
    "run --set slots=0": "slots: expected a whole number from 1 to 1000000, got '0'",
    "run --set slots": "--set slots is not allowed: it must be NAME=VALUE",
    "run --host fake": "the host fake runs Python functions",
    "run --settings none.toml": "cannot be read",
}


@pytest.mark.parametrize("words", REFUSED)
def test_command_that_cannot_work_prints_one_sentence_with_exit_code_2(
    words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    assert REFUSED[words] in refusal(*words.split())


def test_file_called_example_is_run_instead_of_the_bundled_guest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("example").write_bytes(b"mine")
    assert refusal("inspect", "example").startswith("example: the module starts with 6d 69 6e 65")


def test_doctor_tries_kernel_limits_plugins_and_hosts():
    found = json_of("doctor")
    assert (found["works"], found["allocation"]["works"]) == (True, True)
    assert found["versions"]["memslot"] == memslot_plugin.__version__
    assert set(found["probe"]) >= {"memfd", "seals", "dontneed", "pagemap", "page_size"}
    limits = [limit["name"] for limit in found["limits"]]
    assert limits == ["memory mappings", "address space", "file descriptors"]
    assert [answer["plugin"] for answer in found["plugins"]] == ["memfd", "anonymous"]
    tried = {host["name"]: host for host in found["hosts"]}
    assert set(tried) >= {"wasmtime", "wasmer"}
    for host in hosts.INSTALLED:
        assert (tried[host]["works"], tried[host]["reason"]) == (True, "ran a guest")
        assert tried[host]["version"]


def test_doctor_says_what_answers_and_fails_if_nothing_does_or_a_limit_is_passed():
    off = ("--set", "memfd=off")
    found = json_of("doctor", *off)
    refused = {"plugin": "memfd", "answers": False, "reason": "the setting memfd is off"}
    assert found["plugins"][0] == refused
    shown = shown_by("doctor", *off)
    assert "the setting memfd is off" in shown
    assert "Tried: anonymous handed out a memory" in shown
    found = json_of("doctor", "--set", "plugins=memfd", *off, exit_code=1)
    assert (found["works"], found["allocation"]["works"]) == (False, False)
    found = json_of("doctor", "--set", "slots=1000000", exit_code=1)
    (mappings,) = [limit for limit in found["limits"] if limit["name"] == "memory mappings"]
    assert (mappings["enough"], mappings["knob"]) == (False, "sysctl vm.max_map_count")


NO_RUNTIME = """
import json, sys
sys.modules.update(wasmtime=None, wasmer=None)
from click.testing import CliRunner
from memslot_plugin.cli import main
for words in json.loads(sys.argv[1]):
    found = CliRunner().invoke(main, words.split())
    print(json.dumps((found.exit_code, found.stdout, found.stderr)))
"""


def test_command_without_a_runtime_ends_with_exit_code_3_if_it_needs_one(tmp_path):
    guest = tmp_path / "guest.wat"
    guest.write_text(GUEST)
    commands = ["run", "run --host wasmtime --json", f"inspect {guest}"]
    commands += ["doctor --json", "doctor", "inspect", "plugins"]
    code, answers, stderr = done(json.dumps(commands), program=("-c", NO_RUNTIME))
    assert (code, stderr) == (0, "")
    run, on_wasmtime, text, doctor, shown, *others = map(json.loads, answers.splitlines())
    assert run[:2] == on_wasmtime[:2] == text[:2] == [3, ""]
    assert run[2].startswith("memslot: no runtime can be imported here: ")
    assert run[2].count("\n") == 1
    assert "assembles text" in text[2]
    found = json.loads(doctor[1])
    assert (doctor[0], found["works"], found["allocation"]["works"]) == (3, False, True)
    (wasmtime,) = [host for host in found["hosts"] if host["name"] == "wasmtime"]
    assert not wasmtime["installed"]
    assert "install" in wasmtime["reason"]
    assert "memslot has no runtime here" in shown[1]
    assert [code for code, *_ in others] == [0, 0]


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_command_without_its_libraries_names_them_with_exit_code_3(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
from memslot_plugin.__main__ import main
main()
"""
    said = f"memslot: the command needs {missing}, which is not installed; "
    said += "install it with: pip install 'memslot[cli]'\n"
    assert done("-c", code, program=("-W", "error")) == (3, "", said)


def test_unexpected_error_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("memslot_plugin.cli.inspect.read_source", broken)
    assert isinstance(memslot("inspect").exception, ZeroDivisionError)


INTERRUPT = """
import os, subprocess, sys
from memslot_plugin.cli import compare, main
observe = compare.Side.observe
def interrupted(side):
    compare.Side.observe = observe
    subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -INT {os.getpid()}"])
    return observe(side)
compare.Side.observe = interrupted
main(["run", *sys.argv[1:]], prog_name="memslot")
"""


@pytest.mark.parametrize("host", hosts.INSTALLED)
@pytest.mark.parametrize("file", ["example", "forever.wat"])
def test_ctrl_c_ends_endless_requests_and_an_endless_call(host, file, tmp_path):
    text = '(module (memory 1) (func (export "spin") (loop br 0)))'
    (tmp_path / "forever.wat").write_text(text)
    words = (file, "--host", host, "--requests", 100_000_000, "--json")
    said = done(*words, program=("-c", INTERRUPT), cwd=tmp_path)
    assert said == (-signal.SIGINT, "", "")


@pytest.mark.skipif(not hosts.INSTALLED, reason="no runtime is installed")
@pytest.mark.parametrize("family", ["density", pytest.param("scaling", marks=pytest.mark.gate)])
def test_ctrl_c_ends_a_benchmark_that_waits_for_processes_of_its_own(family):
    command = [sys.executable, "-m", "memslot_plugin", "bench", "--quick", "--only", family]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True
    ) as running:
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
        while running.poll() is None and not children.read_text():
            time.sleep(0.01)
        time.sleep(0.1)  # the child imports memslot
        os.killpg(running.pid, signal.SIGINT)
        said = running.communicate(timeout=60)
    assert (running.returncode, *said) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(
    "words", [["plugins"], pytest.param(["inspect", "--json"], marks=pytest.mark.gate)]
)
def test_reader_that_goes_away_causes_no_traceback(words):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert done(*words, stdout=writer) == (-signal.SIGPIPE, None, "")
    finally:
        os.close(writer)


def test_progress_goes_to_a_terminal_on_standard_error_and_nowhere_else():
    terminal, side = pty.openpty()
    words = ("run", "--requests", 5, "--json")
    try:
        code, stdout, _ = done(*words, stderr=side, env={**os.environ, "TERM": "xterm"})
        seen = os.read(terminal, 65536)
    finally:
        os.close(side)
        os.close(terminal)
    assert (code, json.loads(stdout)["requests"]) == (0, 5)
    assert b"5 requests on each side" in seen
    assert seen.endswith(b"\r\x1b[2K")
    assert b"\x1b[?25l" not in seen  # the cursor is never hidden
