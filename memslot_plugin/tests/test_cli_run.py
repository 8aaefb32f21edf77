"""`memslot run`: the bundled example, functions, output, traps and differences, on each runtime."""

from __future__ import annotations

import importlib

import pytest

from memslot_plugin.bench import baseline
from memslot_plugin.cli.doctor import EXAMPLE_ANSWER
from memslot_plugin.cli.source import EXAMPLE_MODULE
from memslot_plugin.hosts import open_host
from memslot_plugin.tests.command import GUEST, REACTOR, on_each_host, refusal, run_of, shown_by


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
    with open_host(host) as opened, opened.prepare(EXAMPLE_MODULE).instantiate() as instance:
        memory = instance.memory.read(0, instance.memory.byte_size)
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


@on_each_host
def test_run_compares_the_example_with_the_runtime_alone(host):
    found = run_of(host)
    assert (found["guest"], found["host"], found["invoke"]) == ("example", host, "demo")
    assert (found["requests"], found["result"]) == (3, [str(EXAMPLE_ANSWER)])
    assert (found["same_result"], found["differences"]) == (True, [])
    costs = {"median_us", "p99_us", "faults_per_request", "private_bytes_per_instance"}
    for side in ("memslot", "reset", "alone"):
        assert set(found[side]) == {*costs, "live_instances"}
        assert found[side]["live_instances"] == 3  # MOST_INSTANCES
    for ratio in (found["ratio"], found["reset_ratio"]):
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert ratio["count"] == 3
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
    assert found["memslot"]["private_bytes_per_instance"] is None


CALLED = {
    "example --invoke factorise 360360 1": ["6"],  # 2, 3, 5, 7, 11 and 13
    "guest.wat --invoke pair -- -7 0.5": ["-7", "0.5"],
    "guest.wat --invoke pair 1 nan": ["1", "nan"],
    "guest.wat --invoke wide 0xffffffffffffffff": ["-1"],
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
    assert (found["invoke"], found["result"]) == ("answer", ["42"])


@on_each_host
def test_guest_that_traps_or_exits_prints_one_sentence_with_exit_code_1(host, guest):
    words = ("run", guest, "--host", host, "--requests", 3, "--invoke")
    for extra in ((), ("--json",)):
        sentence = refusal(*words, "trap", *extra, exit_code=1)
        assert sentence.startswith("the guest trapped: ")
        assert "unreachable" in sentence
    assert "exit status 3" in refusal(*words, "quit", "3", exit_code=1)


@on_each_host
def test_guest_that_answers_at_random_is_not_called_different(host, guest):
    found = run_of(host, guest, "--invoke", "random")
    assert (found["same_result"], found["differences"]) == (None, [])
    assert "not compared" in found["notes"][0]


@on_each_host
def test_result_or_trap_on_one_side_alone_is_a_difference(host, monkeypatch):
    runtime = baseline.RUNTIMES[host]
    called = runtime.call
    monkeypatch.setattr(runtime, "call", lambda *arguments: called(*arguments) + 1)
    shown = shown_by("run", "--host", host, "--requests", 3, exit_code=1)
    assert "result differ: do not trust these numbers" in shown
    found = run_of(host, exit_code=1)
    assert (found["same_result"], found["differences"]) == (False, ["result"])
    monkeypatch.setattr(runtime, "call", called)
    monkeypatch.setattr(runtime, "call", lambda self, instance, name, arguments: None)
    sentence = refusal("run", "example", "--host", host, "--invoke", "times", 1 << 19, exit_code=1)
    assert sentence.startswith(
        "the results differ: with memslot and memslot, reset the guest trapped: "
    )
    assert sentence.endswith(f"; with {host} alone it did not")
