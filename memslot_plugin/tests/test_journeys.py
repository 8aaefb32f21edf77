"""Every error of the tree comes back equal from a copy, a pickle and another process, on every host."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin.tests import hosts
from memslot_plugin.tests.journeys import travels, tree
from memslot_plugin.tests.runtimes import missing

on_every_host = pytest.mark.parametrize("name", hosts.HOSTS)
on_runtimes = pytest.mark.parametrize("name", hosts.RUNTIMES)


def raised(call: Callable[[], object]) -> memslot.MemslotError:
    with pytest.raises(memslot.MemslotError) as caught:
        call()
    return caught.value


@on_runtimes
def test_trap_or_exit_copied_or_pickled_comes_back_equal(name: str) -> None:
    with hosts.serving(name) as host:
        with hosts.prepare(host).instantiate() as instance:
            calls: list[tuple[Any, ...]] = [("trap",), ("divide", 1, 0), ("get", -1)]
            for call in calls:
                error = raised(functools.partial(instance.call, *call))
                assert isinstance(error, memslot.GuestTrap)
                travels(error)
        with host.prepare(hosts.WASI, wasi=memslot.Wasi()).instantiate() as instance:
            error = raised(lambda: instance.call("exit", 3))
        assert isinstance(error, memslot.GuestExit)
        error.args, error.code = ("other words",), 300
        travels(error)
        if name == "wasmtime":
            text = '(module (tag $t) (memory 1) (func (export "f") (throw $t)))'
            with host.prepare(text).instantiate() as instance:
                travels(raised(lambda: instance.call("f")))


def test_native_error_of_wasmtime_is_none_in_another_process() -> None:
    pytest.importorskip("wasmtime")
    with hosts.serving("wasmtime") as host, hosts.prepare(host).instantiate() as instance:
        error: Any = raised(lambda: instance.call("trap"))
    arrived: Any = pickle.loads(pickle.dumps(error))
    assert error.ptr() is not None
    assert arrived.native is None
    assert (arrived.trap_code, arrived.frames) == (error.trap_code, error.frames)
    with pytest.raises(memslot.UsedAfterClose, match="stayed in the process that raised it"):
        arrived.ptr()


@on_every_host
def test_refusal_or_record_of_a_host_copied_or_pickled_comes_back_equal(name: str) -> None:
    with hosts.serving(name, slots=1) as host:
        guest = hosts.prepare(host)
        with guest.instantiate() as instance:
            for call in (
                guest.instantiate,
                lambda: guest.instantiate(wait_timeout=0.001),
                lambda: instance.call("missing"),
                lambda: instance.memory.read(-1, 1),
                lambda: instance.memory.grow(1 << 20),
                lambda: host.prepare(b"\0asm\2\0\0\0"),
                lambda: host.prepare("/nowhere.wasm"),
                lambda: host.load("/nowhere"),
                host.close,
                lambda: memslot.Settings(slots=-1),
                lambda: memslot.open_host("nothing"),
            ):
                travels(raised(call))
        travels(raised(lambda: instance.call("next")))
        for record in (host.statistics(), guest.report, host.settings):
            assert pickle.loads(pickle.dumps(record)) == record
        assert dataclasses.is_dataclass(host.statistics())


def test_error_of_any_class_copied_or_pickled_comes_back_equal() -> None:
    for name in ("wasmtime", "wasmer"):
        if missing(name) is None:
            hosts.opened(name).close()
    classes = set(tree())
    assert len(classes) > 25
    # A runtime's trap cannot exist without the runtime's own error: it is tested above.
    for each in classes - {*tree(memslot.GuestTrap)}:
        error = each("what happened")
        error.attribute = ["of the embedder's"]  # type: ignore[attr-defined]
        travels(error)
