"""The command line: each command, its JSON, its refusals and its end."""

from __future__ import annotations

import importlib
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
from click.testing import CliRunner

import memslot_plugin
from memslot_plugin.bench import baseline
from memslot_plugin.cli import compare, main
from memslot_plugin.cli.doctor import EXAMPLE_ANSWER
from memslot_plugin.cli.output import Output, byte_size, duration
from memslot_plugin.cli.source import EXAMPLE_MODULE, parse_arguments
from memslot_plugin.errors import ArgumentError
from memslot_plugin.tests import hosts, installed
from memslot_plugin.wasm import FunctionType

MIB = 1 << 20
on_each_host = pytest.mark.parametrize("host", hosts.RUNTIMES)

GUEST = r"""(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $sizes (param i32 i32) (result i32)))
  (memory (export "memory") 2)
  (data (i32.const 0) "\10\00\00\00\0e\00\00\00") (data (i32.const 16) "hello [world]\n")
  (func (export "_start") (export "say") (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))
  (func (export "quit") (param i32) (call $exit (local.get 0)))
  (func (export "trap") unreachable)
  (func (export "random") (result i32)
    (drop (call $random (i32.const 64) (i32.const 4))) (i32.load (i32.const 64)))
  (func (export "pair") (param i32 f64) (result i32 f64) local.get 0 local.get 1)
  (func (export "wide") (param i64) (result i64) local.get 0))"""

REACTOR = """(module (memory (export "memory") 1)
  (func (export "_initialize") (i32.store (i32.const 0) (i32.const 42)))
  (func (export "answer") (result i32) (i32.load (i32.const 0))))"""


def memslot(*words):
    """Run the command in this process, at a wide terminal and with few instances, each of which reads all of smaps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "MOST_INSTANCES", 2)
        return CliRunner(env={"COLUMNS": "200"}).invoke(main, [str(word) for word in words])


def shown_by(*arguments, exit_code=0):
    """Return the readable standard output as one line."""
    result = memslot(*arguments)
    assert (result.exit_code, result.stderr) == (exit_code, ""), result.output
    return " ".join(result.stdout.split())


def json_of(command, *arguments, exit_code=0):
    return json.loads(shown_by(command, "--json", *arguments, exit_code=exit_code))


def refusal(*arguments, exit_code=2):
    """Return the sentence on standard error of a command that writes nothing else."""
    result = memslot(*arguments)
    assert (result.exit_code, result.stdout) == (exit_code, ""), result.output
    assert result.stderr.startswith("memslot: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("memslot: ").rstrip()


def done(*words, program=("-m", "memslot_plugin"), **options):
    """Run the command in a child; return its exit code, standard output and standard error."""
    command = [sys.executable, *program, *map(str, words)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    found = subprocess.run(command, text=True, timeout=120, check=False, **streams)
    return found.returncode, found.stdout, found.stderr


@pytest.fixture
def guest(tmp_path):
    path = tmp_path / "guest.wat"
    path.write_text(GUEST)
    return path


def smallest_factors(limit):
    found = list(range(limit))
    for factor in reversed(range(2, 725)):
        found[factor * factor :: factor] = [factor] * len(found[factor * factor :: factor])
    return found


@on_each_host
def test_bundled_example_equals_its_assembled_text_and_its_table_is_right(host):
    text = EXAMPLE_MODULE.with_suffix(".wat").read_text()
    assert importlib.import_module(host).wat2wasm(text) == EXAMPLE_MODULE.read_bytes()
    runtime = baseline.RUNTIMES[host](EXAMPLE_MODULE.read_bytes())
    memory = runtime.read_memory(runtime.instantiate(), "memory", 1 << 23) or b""
    primes = memoryview(memory)[0x80000:0x80100].cast("H")
    table = [n if each == 35 else primes[each - 36] for n, each in enumerate(memory[:0x80000])]
    assert table[2:] == smallest_factors(1 << 19)[2:]


@on_each_host
def test_example_answers_less_where_an_earlier_request_left_its_traces(host):
    runtime = baseline.RUNTIMES[host](EXAMPLE_MODULE.read_bytes())
    instance = runtime.instantiate()
    assert runtime.call(instance, "demo", ()) == EXAMPLE_ANSWER
    twos = sum((n & -n).bit_length() - 1 for n in range(360360, 360380))
    assert runtime.call(instance, "times", (2,)) == twos
    assert runtime.call(instance, "demo", ()) == 0


def test_output_of_numbers_is_readable_and_of_percentiles_exact(monkeypatch):
    sizes = [byte_size(n) for n in (None, 0, 1023, 1024, 1536, 3 << 20, 4 << 30, 9 << 40)]
    assert sizes == ["-", "0 B", "1023 B", "1 KiB", "1.5 KiB", "3 MiB", "4 GiB", "9 TiB"]
    durations = [duration(n) for n in (0.07, 53.14, 1771, 2.4e6)]
    assert durations == ["0.07 us", "53.1 us", "1.77 ms", "2.4 s"]
    monkeypatch.delenv("COLUMNS", raising=False)
    assert Output(io.StringIO()).width == 120

    assert compare.percentile(list(range(1, 101)), 99) == 99
    assert compare.percentile([7], 99) == 7
    assert all(
        sum(compare.blocks_of(requests)) == requests for requests in (1, 9, 10, 19, 199, 1001)
    )


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
def test_wrong_option_is_exit_code_2_with_the_usage(words):
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


def test_broken_plugin_is_a_line_and_not_a_traceback(tmp_path):
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
        assert (image["stored_bytes"], image["start"], image["end"]) == (size, 0, size)
        assert image["extents"] == [{"offset": 0, "length": size, "file_offset": 0}]
        assert name == ("memslot.memory" if kind == "wasmer" else None)


PAGE = os.sysconf("SC_PAGESIZE")
SEGMENTS = "1e" + "".join(f"0041{n:02x}0b0178" for n in range(30))
INSPECTED = {
    # Two segments of one byte, a MiB apart.
    "0503010020 0b1002 0041000b0161 00418080c0000b0162": [
        f"{byte_size(2 * PAGE)} stored, which span {byte_size(MIB + PAGE)}"
    ],
    "05040103 0101": ["On a host like wasmtime or wasmer", "Memory 0 is shared between threads"],
    f"0503010001 0bb501 {SEGMENTS}": ["... and 10 more"],
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
    at = path.read_bytes().find(b"\xfc\x09")
    dropped = {"instruction": "data.drop", "function": 0, "offset": at}
    assert json_of("inspect", path)["irreversible"] == ([] if at < 0 else [dropped])


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
def test_command_that_cannot_work_is_one_sentence_and_exit_code_2(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    assert REFUSED[words] in refusal(*words.split())


def test_file_called_example_comes_before_the_bundled_guest(tmp_path, monkeypatch):
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
    assert set(tried) >= {"wasmtime", "wasmer", "fake"}
    for host in hosts.INSTALLED:
        assert (tried[host]["works"], tried[host]["reason"]) == (True, "ran a guest")
        assert tried[host]["version"]


def test_doctor_says_what_answers_and_fails_if_nothing_does_or_a_limit_is_passed():
    off = ("--set", "memfd=off")
    found = json_of("doctor", *off)
    refused = {"plugin": "memfd", "answers": False, "reason": "the setting memfd is off"}
    assert (found["answering"], found["plugins"][0]) == ("anonymous", refused)
    shown = shown_by("doctor", *off)
    assert "the setting memfd is off" in shown
    assert "anonymous answers: a memory was handed out" in shown
    found = json_of("doctor", "--set", "plugins=memfd", *off, exit_code=1)
    assert (found["works"], found["allocation"]["works"]) == (False, False)
    found = json_of("doctor", "--set", "slots=1000000", exit_code=1)
    (mappings,) = [limit for limit in found["limits"] if limit["name"] == "memory mappings"]
    assert (mappings["enough"], mappings["knob"]) == (False, "sysctl vm.max_map_count")


def run_of(host, *words, exit_code=0):
    """Return the JSON of a run of three requests."""
    return json_of("run", "--host", host, "--requests", 3, *words, exit_code=exit_code)


@on_each_host
def test_run_compares_the_example_with_the_runtime_alone(host):
    found = run_of(host)
    assert (found["guest"], found["host"], found["invoke"]) == ("example", host, "demo")
    assert (found["requests"], found["result"]) == (3, [EXAMPLE_ANSWER])
    assert (found["same_result"], found["differences"]) == (True, [])
    costs = {"median_us", "p99_us", "faults_per_request", "private_bytes_per_instance"}
    for side in ("memslot", "reset", "alone"):
        assert set(found[side]) == {*costs, "live_instances"}
        assert found[side]["live_instances"] == 3  # MOST_INSTANCES, and the one before
    assert set(found["ratio"]) == set(found["reset_ratio"]) == costs
    assert (found["plugin"], found["notes"]) == ("memfd", [])
    assert found["conclusion"].startswith("A request with a fresh, isolated instance takes ")
    assert found["conclusion"].endswith("every answer was the same.")
    shown = shown_by("run", "--host", host, "--requests", 3)
    assert "time per request, median" in shown


@on_each_host
def test_run_takes_settings_and_options_before_them(host):
    words = ("--set", "plugins=anonymous", "--set", "slots=7", "--concurrency-of-slots", 1)
    found = run_of(host, *words)
    assert (found["plugin"], found["same_result"], found["slots"]) == ("anonymous", True, 1)
    assert found["memslot"]["live_instances"] == 1
    assert found["ratio"]["private_bytes_per_instance"] is None


CALLED = {
    "example --invoke factorise 360360 1": [6],  # 2, 3, 5, 7, 11 and 13
    "guest.wat --invoke pair -- -7 0.5": [-7, 0.5],
    "guest.wat --invoke pair 1 nan": [1, "nan"],
    "guest.wat --invoke wide 0xffffffffffffffff": [-1],
    "guest.wat --invoke quit 0": [],
}


@on_each_host
@pytest.mark.parametrize("words", CALLED)
def test_run_calls_a_function_with_arguments(host, words, guest, monkeypatch):
    monkeypatch.chdir(guest.parent)
    found = run_of(host, *words.split())
    assert (found["result"], found["same_result"]) == (CALLED[words], True)


@on_each_host
def test_run_shows_the_output_of_a_wasi_guest_once(host, guest, capfd):
    words = (guest, "some", "arguments")
    shown = shown_by("run", *words, "--host", host, "--requests", 3)
    assert shown.count("hello [world]") == 1
    assert "\x1b" not in shown
    found = run_of(host, *words)
    assert (found["output"], found["arguments"]) == ("hello [world]\n", ["some", "arguments"])
    assert (found["invoke"], found["same_result"]) == ("_start", True)
    assert capfd.readouterr() == ("", "")


@on_each_host
def test_run_initialises_a_reactor_and_leaves_no_descriptor(host, tmp_path, no_leaks):
    path = tmp_path / "reactor.wat"
    path.write_text(REACTOR)
    found = run_of(host, path)
    assert (found["invoke"], found["result"]) == ("answer", [42])


@on_each_host
def test_trap_and_exit_status_are_one_sentence_and_exit_code_1(host, guest):
    words = ("run", guest, "--host", host, "--requests", 3, "--invoke")
    for extra in ((), ("--json",)):
        sentence = refusal(*words, "trap", *extra, exit_code=1)
        assert sentence.startswith(f"the guest, through memslot as on {host} alone, trapped: ")
        assert "unreachable" in sentence
    assert "exit status 3" in refusal(*words, "quit", "3", exit_code=1)


@on_each_host
def test_guest_that_answers_at_random_is_not_called_different(host, guest):
    found = run_of(host, guest, "--invoke", "random")
    assert (found["same_result"], found["differences"]) == (None, [])
    assert "not compared" in found["notes"][0]


@on_each_host
def test_result_memory_or_trap_on_one_side_only_is_a_difference(host, monkeypatch):
    runtime = baseline.RUNTIMES[host]
    called = runtime.call
    monkeypatch.setattr(runtime, "call", lambda *arguments: called(*arguments) + 1)
    shown = shown_by("run", "--host", host, "--requests", 3, exit_code=1)
    assert "result differ: do not trust these numbers" in shown
    found = run_of(host, exit_code=1)
    assert (found["same_result"], found["differences"]) == (False, ["result"])
    monkeypatch.setattr(runtime, "call", called)
    monkeypatch.setattr(runtime, "read_memory", lambda *_: b"something else")
    assert run_of(host, exit_code=1)["differences"] == ["memory"]
    monkeypatch.setattr(runtime, "call", lambda self, instance, name, arguments: None)
    sentence = refusal("run", "example", "--host", host, "--invoke", "times", 1 << 19, exit_code=1)
    assert sentence.startswith("the results differ: through memslot the guest trapped: ")


NO_RUNTIME = """
import json, sys
sys.modules.update(wasmtime=None, wasmer=None)
from click.testing import CliRunner
from memslot_plugin.cli import main
for words in json.loads(sys.argv[1]):
    found = CliRunner().invoke(main, words.split())
    print(json.dumps((found.exit_code, found.stdout, found.stderr)))
"""


def test_commands_without_a_runtime_are_exit_code_3_if_they_need_one(guest):
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
def test_command_without_its_libraries_is_exit_code_3_and_says_what_to_install(missing):
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
import os, signal, sys, threading
from memslot_plugin.cli import compare, interrupt, main
interrupt.GRACE_SECONDS = 0.1
observe = compare.Side.observe
def interrupted(side):
    compare.Side.observe = observe
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    return observe(side)
compare.Side.observe = interrupted
main(["run", *sys.argv[1:]], prog_name="memslot")
"""

# wasmer keeps the GIL while guest code runs: Ctrl-C cannot end an endless call there.
ENDLESS = [(host, "example") for host in hosts.INSTALLED]
ENDLESS += [(host, "forever.wat") for host in hosts.INSTALLED if host != "wasmer"]


@pytest.mark.parametrize(("host", "file"), ENDLESS)
def test_ctrl_c_ends_endless_requests_and_an_endless_call(host, file, tmp_path):
    text = '(module (memory 1) (func (export "spin") (loop br 0)))'
    (tmp_path / "forever.wat").write_text(text)
    words = (file, "--host", host, "--requests", 100_000_000, "--json")
    said = done(*words, program=("-c", INTERRUPT), cwd=tmp_path)
    assert said == (130, "", "memslot: interrupted\n")


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
    assert (running.returncode, *said) == (130, "", "memslot: interrupted\n")


@pytest.mark.parametrize(
    "words", [["plugins"], pytest.param(["inspect", "--json"], marks=pytest.mark.gate)]
)
def test_reader_that_goes_away_is_no_traceback(words):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert done(*words, stdout=writer) == (141, None, "")
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
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")  # the cursor is back
