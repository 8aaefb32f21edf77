"""Exported functions on wasmtime, in C: arguments that are no plain numbers, calls within calls, what is kept alive."""

from __future__ import annotations

import gc
import itertools
import signal
import sys
import weakref
from decimal import Decimal
from typing import Any, NoReturn

import pytest

import memslot_plugin as memslot
from memslot_plugin._core import Export
from memslot_plugin.tests import hosts

TEXT = """(module (memory (export "memory") 1)
  (func (export "same32") (param i32) (result i32) (local.get 0))
  (func (export "same64") (param i64) (result i64) (local.get 0))
  (func (export "float") (param f32) (result f32) (local.get 0))
  (func (export "double") (param f64) (result f64) (local.get 0))
  (func (export "sum") (param i32 f64) (result i32 f64)
    (i32.add (local.get 0) (i32.const 1)) (f64.add (local.get 1) (f64.const 1))))"""


class Number:
    """A number that runs `action` when it is asked for its value."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def __index__(self) -> int:
        self.action()
        return 7

    __float__ = None


class Real(Number):
    """One that gives a float."""

    __index__ = None  # type: ignore[assignment]

    def __float__(self) -> float:  # type: ignore[override]
        self.action()
        return 7.5


@pytest.fixture(params=[hosts.RUNTIMES[0]])
def instance(request: pytest.FixtureRequest) -> Any:
    with hosts.started(request.param, TEXT) as instance:
        yield instance


def test_numbers_of_other_types_are_taken_as_python_converts_them(instance: Any) -> None:
    class Integer(int):
        pass

    nothing = Number(lambda: None)
    assert instance.call("same32", nothing) == instance.call("same64", nothing) == 7
    assert instance.call("same32", Integer(2**32 - 1)) == -1
    assert instance.call("double", 3) == instance.call("float", 3) == 3.0
    assert instance.call("double", Real(lambda: None)) == 7.5
    assert instance.call("double", Decimal("0.5")) == 0.5
    assert instance.call("sum", nothing, 1) == [8, 2.0]


def test_numbers_of_other_types_are_taken_side_by_side(instance: Any) -> None:
    nothing = Number(lambda: None)
    assert instance.call("sum", nothing, Real(lambda: None)) == [8, 8.5]
    assert instance.call("sum", nothing, Decimal("0.5")) == [8, 1.5]


def test_call_within_the_conversion_of_an_argument_has_values_of_its_own(instance: Any) -> None:
    inner = list[object]()
    for number in Real, Number:
        first = [1, number(lambda: inner.append(instance.call("sum", 40, 1.5)))]
        if number is Number:
            first.reverse()
            assert instance.call("sum", first[0], 2.0) == [8, 3.0]
        else:
            assert instance.call("sum", *first) == [2, 8.5]
    assert inner == [[41, 2.5], [41, 2.5]]


def test_exception_of_a_conversion_is_raised_and_the_instance_goes_on(instance: Any) -> None:
    def fails() -> None:
        raise ZeroDivisionError

    for name, number in ("same64", Number(fails)), ("double", Real(fails)):
        with pytest.raises(ZeroDivisionError):
            instance.call(name, number)
    assert instance.call("same64", 5) == 5


def test_instance_that_the_conversion_of_an_argument_closes_is_not_entered(instance: Any) -> None:
    with pytest.raises(memslot.UsedAfterClose):
        instance.call("double", Real(instance.close))


def test_function_takes_no_keywords(instance: Any) -> None:
    with pytest.raises(TypeError, match="no keywords"):
        instance.function("same32")(number=1)
    with pytest.raises(TypeError, match="takes the lease"):
        instance.live.function("same32")()


def test_function_is_made_by_its_instance_alone(instance: Any) -> None:
    made = type(instance.live.function("same32"))
    for make in made, lambda: object.__new__(made):
        with pytest.raises(TypeError):
            make()


def test_function_whose_arguments_stay_unfit_is_an_error_and_not_a_call(instance: Any) -> None:
    export = Export(b"same32", bytes([0]), bytes([0]), lambda _: ["still no number"], {})
    with pytest.raises(SystemError, match="do not fit"):
        export.bind(instance.live)(instance.generation, "x")


@pytest.mark.parametrize("name", hosts.RUNTIMES[:1])
def test_function_that_is_kept_keeps_no_more_than_its_instance(name: str) -> None:
    with hosts.serving(name) as host, hosts.prepare(host, TEXT) as guest:
        instance = guest.instantiate()
        kept: Any = instance.function("same32")
        live = weakref.ref(instance.live)
        instance.close()
        with pytest.raises(memslot.UsedAfterClose):
            kept(1)
        assert live() is not None
        del instance, kept
        gc.collect()
        assert live() is None


@pytest.mark.parametrize("name", hosts.RUNTIMES[:1])
def test_exception_of_a_call_is_not_kept_if_a_signal_handler_raises_at_its_end(name: str) -> None:
    from memslot_plugin.hosts.wasmtime import bridge as wasmtime_bridge

    def handler(*_: object) -> NoReturn:
        raise TimeoutError

    text = """(module (memory (export "memory") 1 4)
      (func (export "grow_then_turn") (param $turns i64) (drop (memory.grow (i32.const 1)))
        (loop (local.set $turns (i64.sub (local.get $turns) (i64.const 1)))
          (br_if 0 (i64.ne (local.get $turns) (i64.const 0))))))"""
    growth = hosts.Growth(ValueError("no growth"))
    before = signal.signal(signal.SIGALRM, handler)
    try:
        with hosts.started(name, text, plugins=(growth,)) as instance:
            function = instance.function("grow_then_turn")
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            with pytest.raises(TimeoutError):
                function(400_000_000)
            kept = dict(wasmtime_bridge.KEPT)
            with pytest.raises(ValueError, match="no growth"):
                function(1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (len(growth.asked), kept) == (2, {})


@pytest.mark.parametrize("name", hosts.RUNTIMES[:1])
def test_exception_of_a_host_function_is_not_kept_if_another_one_follows_at_its_end(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memslot_plugin.hosts.wasmtime import bridge as wasmtime_bridge

    raised = wasmtime_bridge.raised

    def interrupted(error: BaseException) -> NoReturn:
        raised(error)
        monkeypatch.undo()
        raise TimeoutError  # as a signal's handler may

    def function(_: int) -> NoReturn:
        raise ZeroDivisionError

    imports = {"env": {"f": function}}
    with (
        hosts.serving(name) as host,
        hosts.prepare(host, hosts.CALLS_OUT).instantiate(imports=imports) as instance,
    ):
        monkeypatch.setattr(wasmtime_bridge, "raised", interrupted)
        with pytest.raises(TimeoutError):
            instance.call("run", 1)
        assert wasmtime_bridge.KEPT == {}
        with pytest.raises(ZeroDivisionError):
            instance.call("run", 1)


def test_calls_of_every_kind_leave_no_reference(instance: Any) -> None:
    def calls() -> None:
        instance.call("sum", 2**20, 1e6)
        instance.call("same64", 2**64 - 1)
        for wrong in ("x", None, 2**70):
            with pytest.raises(memslot.ArgumentError):
                instance.call("same32", wrong)

    calls()
    gc.collect()
    counts = []
    for _ in range(4):
        for _ in range(50):
            calls()
        gc.collect()
        counts.append(sys.getallocatedblocks())
    assert min(abs(a - b) for a, b in itertools.pairwise(counts)) < 30
