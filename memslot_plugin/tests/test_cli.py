"""The command line: every command, its JSON, its refusals, and how it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

import memslot_plugin
from memslot_plugin import wasm
from memslot_plugin.cli import example, main, measure
from memslot_plugin.cli.compare import _blocks
from memslot_plugin.cli.options import read_settings
from memslot_plugin.cli.output import byte_size, duration, times
from memslot_plugin.cli.signatures import Signature, exported_functions, parse_arguments
from memslot_plugin.errors import ArgumentError, SettingError
from memslot_plugin.hosts import alone
from memslot_plugin.tests.patience import attempts

HOSTS = ["wasmtime"] if importlib.util.find_spec("wasmtime") else []
if sys.version_info < (3, 11) and importlib.util.find_spec("wasmer"):
    HOSTS.append("wasmer")

GUEST = r"""
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $sizes (param i32 i32) (result i32)))
  (memory (export "memory") 2)
  (data (i32.const 0) "\10\00\00\00\0e\00\00\00")
  (data (i32.const 16) "hello [world]\n")
  (func (export "_start") (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))
  (func (export "quit") (param i32) (call $exit (local.get 0)))
  (func (export "trap") unreachable)
  (func (export "random") (result i32)
    (drop (call $random (i32.const 64) (i32.const 4))) (i32.load (i32.const 64)))
  (func (export "pair") (param i32 f64) (result i32 f64) local.get 0 local.get 1)
  (func (export "wide") (param i64) (result i64) local.get 0)
)
"""

REACTOR = """
(module
  (memory (export "memory") 1)
  (func (export "_initialize") (i32.store (i32.const 0) (i32.const 42)))
  (func (export "answer") (result i32) (i32.load (i32.const 0)))
)
"""

FOREVER = '(module (memory 1) (func (export "spin") (loop br 0)))'


def memslot(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def json_of(command, *arguments, exit_code=0):
    result = memslot(command, "--json", *arguments)
    assert result.exit_code == exit_code, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def refusal(*arguments, exit_code=2):
    """The one sentence on standard error of a command that writes nothing else."""
    result = memslot(*arguments)
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("memslot: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("memslot: ").rstrip()


@contextmanager
def child(*arguments, **options):
    """The command in a process of its own, which is gone at the end of the block."""
    command = [sys.executable, "-m", "memslot_plugin.cli", *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with subprocess.Popen(command, text=True, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def done(*arguments, **options):
    """Exit code, standard output and standard error of the command in a process of its own."""
    with child(*arguments, **options) as process:
        stdout, stderr = process.communicate(timeout=120)
        return process.returncode, stdout, stderr


@pytest.fixture
def guest(tmp_path):
    path = tmp_path / "guest.wat"
    path.write_text(GUEST)
    return path


# -- the bundled example -------------------------------------------------------------------------------------------


def test_the_example_table_holds_smallest_prime_factors():
    table = example.smallest_factors()
    assert len(table) == 1 << 20

    def smallest(number):
        return next((d for d in range(2, int(number**0.5) + 1) if number % d == 0), 0)

    for number in [*range(2, 2000), 360361, 524286, 524287]:
        assert struct.unpack_from("<H", table, 2 * number) == (smallest(number),)


def test_the_example_can_be_read_without_a_runtime():
    functions = exported_functions(wasm.parse(example.module()))
    assert {name: str(signature) for name, signature in functions.items()} == {
        "factorise": "(i32, i32) -> i32",
        "times": "(i32) -> i32",
        "demo": "() -> i32",
    }


@pytest.mark.parametrize("host", HOSTS)
def test_the_example_answers_less_where_an_earlier_request_left_its_traces(host):
    runtime = alone.KNOWN[host](example.module(), None)
    instance = runtime.instantiate()
    assert runtime.call(instance, "demo", ()) == example.DEMO_ANSWER
    assert runtime.call(instance, "times", (2,)) == sum(
        (n & -n).bit_length() - 1 for n in range(360360, 360380)
    )
    assert runtime.call(instance, "demo", ()) == 0
    assert runtime.call(runtime.instantiate(), "demo", ()) == example.DEMO_ANSWER


# -- small parts ---------------------------------------------------------------------------------------------------


def test_numbers_are_written_for_people():
    assert [byte_size(n) for n in (None, 0, 1023, 1024, 1536, 3 << 20, 4 << 30, 9 << 40)] == [
        "-", "0 B", "1023 B", "1 KiB", "1.5 KiB", "3 MiB", "4 GiB", "9 TiB",
    ]  # fmt: skip
    assert [duration(n) for n in (0.07, 53.14, 1771, 2.4e6)] == [
        "0.07 us",
        "53.1 us",
        "1.77 ms",
        "2.4 s",
    ]
    assert [times(n) for n in (None, 0.342, 6.13, 15.14, 1234.5)] == [
        "-",
        "0.34x",
        "6.1x",
        "15.1x",
        "1,234x",
    ]


def test_the_99th_percentile_is_a_time_that_was_measured():
    assert measure.Samples([1000 * n for n in range(1, 101)]).p99_us() == 99
    assert measure.Samples([7000]).p99_us() == 7


def test_every_request_is_in_one_block():
    for requests in (1, 9, 10, 19, 20, 199, 1000, 1001):
        blocks = list(_blocks(requests))
        assert sum(blocks) == requests
        assert max(blocks) - min(blocks) <= 1


@pytest.mark.parametrize(
    ("kind", "word", "value"),
    [
        ("i32", "-5", -5),
        ("i32", "0xffffffff", -1),
        ("i32", "-2147483648", -(1 << 31)),
        ("i64", "18446744073709551615", -1),
        ("i64", "9223372036854775807", (1 << 63) - 1),
        ("f32", "1.5", 1.5),
        ("f64", "inf", float("inf")),
    ],
)
def test_words_become_arguments(kind, word, value):
    assert parse_arguments("f", Signature((kind,), ()), [word]) == [value]


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("i32", "4294967296"),
        ("i32", "-2147483649"),
        ("i32", "1.5"),
        ("i64", "x"),
        ("f64", "one"),
        ("v128", "1"),
        ("(ref null func)", "0"),
    ],
)
def test_words_that_are_no_such_arguments_are_refused(kind, word):
    with pytest.raises(ArgumentError, match="argument 1 of f is"):
        parse_arguments("f", Signature((kind,), ()), [word])


def test_a_type_that_is_not_understood_leaves_the_signature_unknown():
    # A type section with a struct type (0x5f), one function of type 0, exported as f.
    data = b"\0asm\1\0\0\0" + bytes.fromhex(
        "01030 15f00 0302 0100 0705 0101 6600 00 0a04 0102 000b".replace(" ", "")
    )
    assert exported_functions(wasm.parse(data)) == {"f": None}
    with pytest.raises(ArgumentError, match="not understood"):
        parse_arguments("f", None, ["1"])


def test_options_come_before_set_and_both_before_environment_and_file(tmp_path, monkeypatch):
    file = tmp_path / "service.toml"
    file.write_text('[memslot]\nslots = 1\nreset = "madvise"\nguard = "1MiB"\nkeep_resident = 5\n')
    monkeypatch.setenv("MEMSLOT_SLOTS", "2")
    monkeypatch.setenv("MEMSLOT_RESET", "copy")
    monkeypatch.setenv("MEMSLOT_GUARD", "2MiB")
    settings = read_settings(str(file), ["slots=3", "guard=3MiB"], slots=4)
    assert (settings.slots, settings.guard, settings.reset, settings.keep_resident) == (
        4,
        3 << 20,
        "copy",
        5,
    )
    assert read_settings(None, (), slots=None).slots == 2
    with pytest.raises(SettingError, match="NAME=VALUE"):
        read_settings(None, ["slots"])


# -- help ----------------------------------------------------------------------------------------------------------


def test_help_names_every_command_with_examples_and_exit_codes():
    result = memslot("--help")
    assert result.exit_code == 0
    for word in (*main.commands, "Examples:", "Exit codes:", "130"):
        assert word in result.stdout


@pytest.mark.parametrize("command", main.commands)
def test_every_command_has_help_and_json(command):
    result = memslot(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert ("--settings" in result.stdout) is (command != "bench")  # which measures the defaults


def test_version():
    assert memslot("--version").stdout == f"memslot, version {memslot_plugin.__version__}\n"


@pytest.mark.parametrize(
    "words", [["nothing"], ["run", "--bogus"], ["run", "--requests", "0"], ["doctor", "extra"]]
)
def test_a_wrong_option_is_exit_code_2_with_the_usage(words):
    result = memslot(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr


# -- plugins -------------------------------------------------------------------------------------------------------


def test_plugins_as_json():
    by_name = {info["name"]: info for info in json_of("plugins")["plugins"]}
    memfd, anonymous = by_name["memfd"], by_name["anonymous"]
    assert memfd["state"] == "loaded"
    assert memfd["distribution"] == "memslot"
    assert memfd["version"] == memslot_plugin.__version__
    assert memfd["hooks"]["memslot_create_memory"] < anonymous["hooks"]["memslot_create_memory"]
    assert memfd["reason"] is None


def test_plugins_says_what_is_not_asked():
    states = {
        info["name"]: info["state"]
        for info in json_of("plugins", "--set", "plugins=anonymous")["plugins"]
    }
    assert states["memfd"] == "not selected"
    states = {
        info["name"]: info["state"]
        for info in json_of("plugins", "--set", "blocked=memfd")["plugins"]
    }
    assert states["memfd"] == "blocked"


def test_plugins_for_people():
    result = memslot("plugins")
    assert result.exit_code == 0
    assert "memslot_plugin.allocators:MemfdAllocator" in result.stdout
    assert "create_memory 1" in result.stdout


def test_a_plugin_that_is_not_installed_is_refused_by_name():
    assert "no plugin 'memdf' is installed" in refusal("plugins", "--set", "plugins=memdf")


def test_a_broken_plugin_is_a_line_and_not_a_traceback(tmp_path):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[memslot]\nbroken = broken_memslot_plugin\n")
    (tmp_path / "broken_memslot_plugin.py").write_text("raise OSError('it [bold] burns')\n")
    code, stdout, stderr = done(
        "plugins", "--json", env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert code == 0
    (found,) = [each for each in json.loads(stdout)["plugins"] if each["name"] == "broken"]
    assert (found["state"], found["reason"]) == ("failed", "OSError: it [bold] burns")
    said = "plugin 'broken' (broken 1.0) is skipped: OSError: it [bold] burns"
    assert stderr == f"memslot: warning: {said}\n"


# -- inspect -------------------------------------------------------------------------------------------------------


def test_inspect_as_json():
    found = json_of("inspect")
    assert found["guest"] == "example"
    assert found["functions"]["factorise"] == {"parameters": ["i32", "i32"], "results": ["i32"]}
    assert set(found["hosts"]) == {"wasmtime", "wasmer"}
    for kind, verdict in found["hosts"].items():
        (memory,), (segment,), (image,) = (
            verdict["report"]["memories"],
            verdict["report"]["segments"],
            verdict["images"],
        )
        assert memory["image"]
        assert memory["reason"] is None
        assert segment == {
            "index": 0,
            "mode": "active",
            "memory": 0,
            "offset": 0,
            "byte_size": 1 << 20,
            "in_image": True,
        }
        assert (image["stored_bytes"], image["start"], image["end"]) == (1 << 20, 0, 1 << 20)
        assert image["extents"] == [{"offset": 0, "length": 1 << 20, "file_offset": 0}]
        assert verdict["report"]["import_name"] == ("memslot.memory" if kind == "wasmer" else None)
        assert verdict["report"]["module_bytes"] < 1000


def test_inspect_shows_stored_bytes_against_the_span(tmp_path):
    # Two segments of one byte, a MiB apart: two pages are stored.
    memory = bytes.fromhex("0503010020")
    data = b"\0\x41\x00\x0b\1a" + b"\0\x41\x80\x80\xc0\x00\x0b\1b"
    path = tmp_path / "apart.wasm"
    path.write_bytes(b"\0asm\1\0\0\0" + memory + b"\x0b" + bytes([len(data) + 1, 2]) + data)
    (image,) = json_of("inspect", path)["hosts"]["wasmtime"]["images"]
    page = os.sysconf("SC_PAGESIZE")
    assert image["stored_bytes"] == 2 * page
    assert [extent["offset"] for extent in image["extents"]] == [0, 1 << 20]
    shown = memslot("inspect", path).stdout
    assert f"{byte_size(2 * page)} stored, which span {byte_size((1 << 20) + page)}" in " ".join(
        shown.split()
    )


def test_inspect_says_why_there_is_no_image(tmp_path):
    path = tmp_path / "shared.wasm"
    path.write_bytes(b"\0asm\1\0\0\0" + bytes.fromhex("05040103 0101"))
    shown = memslot("inspect", path)
    assert shown.exit_code == 0
    assert "On a host like wasmtime or wasmer" in shown.stdout
    assert "Memory 0 is shared between threads" in " ".join(shown.stdout.split())
    report = json_of("inspect", path)["hosts"]["wasmer"]["report"]
    assert report["native"].startswith("Memory 0 is shared")


@pytest.mark.parametrize(
    ("code", "in_place", "said"),
    [
        ("41001a", True, "reset in place: memories and globals are put back"),
        ("410040001a", True, "to watch: The code has memory.grow in function 0, at byte 0x"),
        ("fc0900", False, "because: The code has data.drop in function 0, at byte 0x"),
        ("ff", False, "because: What the code does cannot be proven: the opcode 0xff is not known"),
    ],
)
def test_inspect_says_how_an_instance_is_reset(tmp_path, code, in_place, said):
    body = b"\0" + bytes.fromhex(code) + b"\x0b"
    path = tmp_path / "resets.wasm"
    path.write_bytes(
        b"\0asm\1\0\0\0"
        + bytes.fromhex("010401600000 03020100 0503010001 0c0101 0a")
        + bytes([len(body) + 2, 1, len(body)])
        + body
        + bytes.fromhex("0b03010100")
    )
    assert said in " ".join(memslot("inspect", path).stdout.split())
    found = json_of("inspect", path)
    verdict = found["hosts"]["wasmtime"]["report"]["verdict"]
    assert verdict["in_place"] is in_place
    assert bool(verdict["reasons"]) is not in_place
    dropped = (
        []
        if code != "fc0900"
        else [
            {
                "instruction": "data.drop",
                "function": 0,
                "offset": path.read_bytes().index(b"\xfc\x09"),
            }
        ]
    )
    assert found["irreversible"] == dropped


def test_inspect_leaves_rows_out_for_people_only(tmp_path):
    segments = b"\x1e" + b"".join(b"\0\x41" + bytes([n]) + b"\x0b\1x" for n in range(30))
    memory = bytes.fromhex("0503010001")
    data = b"\x0b" + bytes([len(segments) & 0x7F | 0x80, len(segments) >> 7]) + segments
    path = tmp_path / "many.wasm"
    path.write_bytes(b"\0asm\1\0\0\0" + memory + data)
    assert "... and 10 more" in memslot("inspect", path).stdout
    assert len(json_of("inspect", path)["hosts"]["wasmtime"]["report"]["segments"]) == 30


@pytest.mark.parametrize("command", ["inspect", "run"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"MZ\x90\0 and so on", "starts with 4d 5a 90 00"),
        (b"\0asm", "truncated"),
        (b"\0asm\1\0\0\0\1\x7f", "truncated"),
        (b"\0asm\x0d\0\1\0", "component"),
    ],
    ids=["empty", "foreign", "header", "section", "component"],
)
def test_what_is_no_module_is_refused_by_name(command, content, said, tmp_path):
    path = tmp_path / "bad.wasm"
    path.write_bytes(content)
    sentence = refusal(command, path)
    assert sentence.startswith("bad.wasm: ")
    assert said in sentence


@pytest.mark.parametrize("command", ["inspect", "run"])
def test_a_missing_file_is_refused(command, tmp_path):
    assert (
        refusal(command, tmp_path / "none.wasm") == f"there is no guest at {tmp_path / 'none.wasm'}"
    )
    assert "Is a directory" in refusal(command, tmp_path)


@pytest.mark.parametrize("command", ["inspect", "run"])
def test_text_that_is_no_webassembly_is_refused(command, tmp_path):
    path = tmp_path / "bad.wat"
    path.write_text("(module (func")
    assert "cannot assemble" in refusal(command, path)
    path.write_bytes(b"\xff\xfe")
    assert "UTF-8" in refusal(command, path)


# -- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_as_json():
    found = json_of("doctor")
    assert found["works"] is True
    assert found["versions"]["memslot"] == memslot_plugin.__version__
    assert set(found["probe"]) >= {"memfd", "seals", "dontneed", "pagemap", "page_size"}
    assert {limit["name"] for limit in found["limits"]} == {
        "memory mappings",
        "address space",
        "file descriptors",
    }
    assert found["settings"]["slots"] == 128
    assert [answer["plugin"] for answer in found["plugins"]] == ["memfd", "anonymous"]
    assert found["answering"] in ("memfd", "anonymous")
    assert found["allocation"]["works"]
    hosts = {host["name"]: host for host in found["hosts"]}
    assert set(hosts) >= {"wasmtime", "wasmer", "fake"}
    for host in HOSTS:
        assert hosts[host]["works"]
        assert hosts[host]["version"]
        assert hosts[host]["reason"] == "ran a guest"


def test_doctor_says_which_plugin_answers_and_why():
    found = json_of("doctor", "--set", "memfd=off")
    assert found["answering"] == "anonymous"
    assert found["plugins"][0] == {
        "plugin": "memfd",
        "answers": False,
        "reason": "the setting memfd is off",
    }
    shown = memslot("doctor", "--set", "memfd=off")
    assert "the setting memfd is off" in shown.stdout
    assert "anonymous answers: a memory was handed out" in shown.stdout


def test_doctor_fails_where_no_plugin_answers():
    found = json_of("doctor", "--set", "plugins=memfd", "--set", "memfd=off", exit_code=1)
    assert found["works"] is False
    assert found["allocation"]["works"] is False


def test_doctor_says_which_limit_the_settings_pass():
    found = json_of("doctor", "--set", "slots=1000000", exit_code=1)
    (mappings,) = [limit for limit in found["limits"] if limit["name"] == "memory mappings"]
    assert not mappings["enough"]
    assert mappings["knob"] == "sysctl vm.max_map_count"


# -- run -----------------------------------------------------------------------------------------------------------


@pytest.mark.timing
@pytest.mark.parametrize("host", HOSTS)
def test_a_reset_costs_less_than_a_new_instance(host):
    for _ in attempts(5):
        found = json_of("run", "--host", host, "--requests", 30)
        if found["reset"]["median_us"] < found["memslot"]["median_us"]:
            return
    raise AssertionError(found)


COSTS = {"median_us", "p99_us", "faults_per_request", "private_bytes_per_instance"}


@pytest.mark.parametrize("host", HOSTS)
def test_run_compares_the_example_on(host):
    found = json_of("run", "--host", host, "--requests", 30)
    assert found["guest"] == "example"
    assert (found["host"], found["invoke"], found["requests"]) == (host, "demo", 30)
    assert found["result"] == [example.DEMO_ANSWER]
    assert found["same_result"] is True
    assert found["differences"] == []
    for side in ("memslot", "reset", "alone"):
        assert set(found[side]) == {*COSTS, "live_instances"}
    assert set(found["ratio"]) == set(found["reset_ratio"]) == COSTS
    assert found["plugin"] == "memfd"
    assert found["notes"] == []
    assert found["memslot"]["median_us"] > 0
    assert found["memslot"]["live_instances"] == measure.MOST_INSTANCES + 1
    assert found["conclusion"].startswith("A request with a fresh, isolated instance takes ")
    assert found["conclusion"].endswith("every answer was the same.")


@pytest.mark.parametrize("host", HOSTS)
def test_run_through_the_fallback(host):
    found = json_of("run", "--host", host, "--requests", 5, "--set", "plugins=anonymous")
    assert found["plugin"] == "anonymous"
    assert found["same_result"] is True


@pytest.mark.parametrize("host", HOSTS)
def test_run_for_people(host):
    result = memslot("run", "--host", host, "--requests", 5)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert f"{host} alone" in result.stdout
    assert "time per request, median" in result.stdout
    assert "private memory per live instance" in result.stdout


@pytest.mark.parametrize("host", HOSTS)
def test_run_takes_slots_as_the_setting(host):
    found = json_of("run", "--host", host, "--requests", 5, "--concurrency-of-slots", 1)
    assert found["slots"] == 1
    assert found["memslot"]["live_instances"] == 1
    assert found["memslot"]["private_bytes_per_instance"] is None
    assert found["ratio"]["private_bytes_per_instance"] is None


@pytest.mark.parametrize("host", HOSTS)
def test_run_calls_a_function_with_arguments(host, guest):
    found = json_of(
        "run", "example", "--host", host, "--requests", 3, "--invoke", "factorise", 360360, 1
    )
    assert found["result"] == [6]  # 2, 3, 5, 7, 11 and 13
    assert found["arguments"] == [360360, 1]
    found = json_of(
        "run", guest, "--host", host, "--requests", 3, "--invoke", "pair", "--", "-7", "0.5"
    )
    assert found["result"] == [-7, 0.5]
    found = json_of("run", guest, "--host", host, "--requests", 3, "--invoke", "pair", "1", "nan")
    assert found["result"] == [1, "nan"]
    assert found["same_result"] is True
    found = json_of(
        "run", guest, "--host", host, "--requests", 3, "--invoke", "wide", "0xffffffffffffffff"
    )
    assert found["result"] == [-1]


@pytest.mark.parametrize("host", HOSTS)
def test_run_shows_what_a_wasi_guest_prints_once(host, guest):
    words = ("run", guest, "some", "arguments", "--host", host, "--requests", 20)
    code, stdout, stderr = done(*words)
    assert (code, stderr) == (0, "")
    assert stdout.count("hello [world]") == 1
    code, stdout, stderr = done(*words, "--json")
    assert (code, stderr) == (0, "")
    found = json.loads(stdout)
    assert found["output"] == "hello [world]\n"
    assert found["arguments"] == ["some", "arguments"]
    assert found["invoke"] == "_start"
    assert found["same_result"] is True


@pytest.mark.parametrize("host", HOSTS)
def test_run_initialises_a_reactor(host, tmp_path):
    path = tmp_path / "reactor.wat"
    path.write_text(REACTOR)
    found = json_of("run", path, "--host", host, "--requests", 3)
    assert (found["invoke"], found["result"]) == ("answer", [42])


@pytest.mark.parametrize("host", HOSTS)
def test_a_trap_is_one_sentence_and_exit_code_1(host, guest):
    for extra in ((), ("--json",)):
        sentence = refusal("run", guest, "--host", host, "--invoke", "trap", *extra, exit_code=1)
        assert sentence.startswith(f"the guest, through memslot as on {host} alone, trapped: ")
        assert "unreachable" in sentence


@pytest.mark.parametrize("host", HOSTS)
def test_the_exit_status_of_a_wasi_guest_is_told(host, guest):
    sentence = refusal("run", guest, "--host", host, "--invoke", "quit", "3", exit_code=1)
    assert "exit status 3" in sentence
    assert (
        json_of("run", guest, "--host", host, "--requests", 3, "--invoke", "quit", "0")[
            "same_result"
        ]
        is True
    )


@pytest.mark.parametrize("host", HOSTS)
def test_a_guest_that_answers_at_random_is_not_called_different(host, guest):
    found = json_of("run", guest, "--host", host, "--requests", 5, "--invoke", "random")
    assert found["same_result"] is None
    assert found["differences"] == []
    assert "not compared" in found["notes"][0]


@pytest.mark.parametrize("host", HOSTS)
def test_results_that_differ_are_exit_code_1(host, monkeypatch):
    runtime = alone.KNOWN[host]
    called = runtime.call
    monkeypatch.setattr(runtime, "call", lambda *arguments: called(*arguments) + 1)
    result = memslot("run", "--host", host, "--requests", 5)
    assert result.exit_code == 1
    assert "result differ: do not trust these numbers" in " ".join(result.stdout.split())
    found = json_of("run", "--host", host, "--requests", 5, exit_code=1)
    assert found["same_result"] is False
    assert found["differences"] == ["result"]


@pytest.mark.parametrize("host", HOSTS)
def test_memory_that_differs_is_noticed_where_the_result_is_the_same(host, monkeypatch):
    runtime = alone.KNOWN[host]
    monkeypatch.setattr(runtime, "read_memory", lambda *_: b"something else")
    assert json_of("run", "--host", host, "--requests", 5, exit_code=1)["differences"] == ["memory"]


@pytest.mark.parametrize("host", HOSTS)
def test_a_trap_on_one_side_only_is_a_difference(host, monkeypatch):
    runtime = alone.KNOWN[host]
    monkeypatch.setattr(runtime, "call", lambda self, instance, name, arguments: None)
    sentence = refusal("run", "example", "--host", host, "--invoke", "times", 1 << 19, exit_code=1)
    assert sentence.startswith("the results differ: through memslot the guest trapped: ")


def test_run_refuses_what_cannot_be_called(guest, tmp_path):
    assert "takes 2 arguments and 1 are given" in refusal("run", guest, "--invoke", "pair", "1")
    assert "argument 2 of pair is an f64" in refusal("run", guest, "--invoke", "pair", "1", "x")
    sentence = refusal("run", guest, "--invoke", "nothing")
    assert "exports no function 'nothing'" in sentence
    assert "pair(i32, f64) -> i32, f64" in sentence
    assert "takes 0 arguments and 1 are given" in refusal("run", "example", "1")
    path = tmp_path / "narrow.wat"
    path.write_text('(module (func (export "add") (param i32)) (func (export "_private")))')
    sentence = refusal("run", path)
    assert "choose one with --invoke" in sentence
    assert "add(i32)" in sentence
    path.write_text('(module (func (export "_start")))')
    assert "does not use WASI" in refusal("run", path, "argument")


@pytest.mark.parametrize("host", HOSTS)
def test_run_refuses_imports_that_nobody_gives(host, tmp_path):
    path = tmp_path / "needy.wat"
    path.write_text('(module (import "env" "log" (func)) (func (export "f")))')
    sentence = refusal("run", path, "--host", host)
    assert sentence.startswith(
        "needy.wat imports env.log, and the command line gives a guest nothing but WASI"
    )


def test_run_refuses_wrong_settings_and_hosts(tmp_path):
    assert "slots = '0' is not allowed" in refusal("run", "--set", "slots=0")
    assert "slots = 0 is not allowed" in refusal("run", "--concurrency-of-slots", "0")
    assert "unknown setting slot" in refusal("run", "--set", "slot=1")
    assert (
        "setting host = 'v8' is not allowed: it is one of auto, wasmtime, wasmer, fake"
        in refusal("run", "--host", "v8")
    )
    assert "the host fake runs Python functions" in refusal("run", "--host", "fake")
    assert "cannot be read" in refusal("run", "--settings", tmp_path / "none.toml")
    file = tmp_path / "wrong.toml"
    file.write_text('[memslot]\nreset = "magic"\n')
    assert "setting reset = 'magic' is not allowed" in refusal("run", "--settings", file)


def test_a_file_called_example_comes_before_the_bundled_guest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("example").write_bytes(b"mine")
    assert refusal("inspect", "example").startswith("example: the module starts with 6d 69 6e 65")


# -- how it ends ---------------------------------------------------------------------------------------------------

NO_RUNTIME = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("wasmtime", "wasmer"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from memslot_plugin.cli import main
main(prog_name="memslot")
"""


def without_runtime(*arguments):
    """The same where neither runtime can be imported."""
    process = subprocess.run(
        [sys.executable, "-c", NO_RUNTIME, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return process.returncode, process.stdout, process.stderr


def test_run_without_a_runtime_is_exit_code_3(guest):
    code, stdout, stderr = without_runtime("run")
    assert (code, stdout) == (3, "")
    assert stderr.startswith("memslot: no runtime can be imported here: ")
    assert stderr.count("\n") == 1
    assert without_runtime("run", "--host", "wasmtime", "--json")[:2] == (3, "")
    code, stdout, stderr = without_runtime("inspect", guest)
    assert (code, stdout) == (3, "")
    assert "assembles text" in stderr


def test_doctor_without_a_runtime_is_exit_code_3():
    code, stdout, _ = without_runtime("doctor", "--json")
    assert code == 3
    found = json.loads(stdout)
    assert found["works"] is False
    assert found["allocation"]["works"] is True
    hosts = {host["name"]: host for host in found["hosts"]}
    assert not hosts["wasmtime"]["installed"]
    assert "install" in hosts["wasmtime"]["reason"]
    assert "memslot has no runtime here" in without_runtime("doctor")[1]


def test_inspect_and_plugins_need_no_runtime():
    assert without_runtime("inspect")[0] == 0
    assert without_runtime("plugins")[0] == 0


def test_an_error_that_nobody_expects_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("memslot_plugin.cli.inspect.read_source", broken)
    result = memslot("inspect")
    assert isinstance(result.exception, ZeroDivisionError)


def interrupted(process):
    """Ctrl-C: exit code, standard output and standard error."""
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("delay", [0.0, 0.3, 1.5])
def test_ctrl_c_ends_a_run_cleanly(host, delay, tmp_path):
    pipe = tmp_path / "guest.wasm"
    os.mkfifo(pipe)
    with child("run", pipe, "--host", host, "--requests", 100_000_000, "--json") as process:
        pipe.write_bytes(example.module())  # opening waits until the command reads
        time.sleep(delay)
        assert interrupted(process) == (130, "", "memslot: interrupted\n")


@pytest.mark.parametrize("host", [host for host in HOSTS if host != "wasmer"])
def test_ctrl_c_ends_a_guest_that_never_returns(host, tmp_path):
    """wasmer has no such test: it holds the interpreter's lock while guest code runs."""
    path = tmp_path / "forever.wat"
    path.write_text(FOREVER)
    with child("run", path, "--host", host) as process:
        while cpu_seconds(process.pid) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        assert interrupted(process) == (130, "", "memslot: interrupted\n")


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("words", [["plugins"], ["inspect", "--json"], ["doctor"]])
def test_a_reader_that_goes_away_is_no_traceback(words):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert done(*words, stdout=writer) == (141, None, "")
    finally:
        os.close(writer)


def test_piped_output_has_no_colours_and_no_progress():
    code, stdout, stderr = done("run", "--requests", "5")
    assert (code, stderr) == (0, "")
    assert "\x1b" not in stdout


def read_more(descriptor):
    """What a terminal shows next; a terminal hands out a page at a time."""
    try:
        return os.read(descriptor, 65536)
    except BlockingIOError:
        return b""


def test_progress_goes_to_a_terminal_on_standard_error_and_nowhere_else():
    terminal, side = pty.openpty()
    try:
        code, stdout, _ = done(
            "run", "--requests", 200, "--json", stderr=side, env={**os.environ, "TERM": "xterm"}
        )
        os.set_blocking(terminal, False)
        seen = b"".join(iter(lambda: read_more(terminal), b""))
    finally:
        os.close(side)
        os.close(terminal)
    assert code == 0
    assert json.loads(stdout)["requests"] == 200
    assert b"200 requests on each side" in seen
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")  # the cursor is back


def test_descriptors_are_as_they_were_after_a_run(guest):
    script = textwrap.dedent("""
        import os, sys
        from memslot_plugin.cli import main
        def run():
            try:
                main(sys.argv[1:], prog_name="memslot")
            except SystemExit as error:
                assert error.code == 0
            return os.listdir("/proc/self/fd")
        first, second = run(), run()
        assert first == second, (first, second)
    """)
    subprocess.run(
        [sys.executable, "-c", script, "run", str(guest), "--requests", "5", "--json"],
        stdout=subprocess.DEVNULL,
        timeout=120,
        check=True,
    )


@pytest.mark.parametrize("command", ["run", "bench", "doctor", "plugins", "inspect"])
def test_help_keeps_its_examples_on_lines_of_their_own(command):
    shown = CliRunner().invoke(main, [command, "--help"])
    assert shown.exit_code == 0
    assert "\\b" not in shown.output
    examples = [line for line in shown.output.splitlines() if line.startswith("  memslot ")]
    assert all(line.count("memslot ") == 1 for line in examples)
    assert examples or command not in ("run", "bench")
