"""Arguments of a wrong kind or size, at each place where an embedder gives one: a sentence, and no effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_plugin import Wasi
from memslot_plugin.tests import hosts

HUGE = 10**5000
"""An integer whose digits Python refuses to print."""

USES: dict[str, tuple[Callable[[memslot.Instance, Any], object], tuple[Any, ...]]] = {
    "i32": (lambda it, given: it.call("same32", given), ("x", None, 1.5, [], 2**32, HUGE)),
    "i64": (lambda it, given: it.call("same64", given), ("x", None, 1.5, 2**64, -HUGE)),
    "f32": (lambda it, given: it.call("samef", given), ("x", None, [], HUGE)),
    "global": (lambda it, given: it.set_global("count", given), ("x", None, 1.5, HUGE)),
    "name": (lambda it, given: it.call(given), (3, None, [], b"next", 1.5, "\ud800")),
    "function": (lambda it, given: it.function(given), (3, [], {})),
    "global's name": (lambda it, given: it.global_value(given), (3, [], {})),
    "set global's name": (lambda it, given: it.set_global(given, 1), (3, [], {})),
    "offset": (lambda it, given: it.memory.read(given, 1), ("x", None, 1.5, -1, HUGE, -HUGE)),
    "length": (lambda it, given: it.memory.read(0, given), ("x", None, 1.5, -1, HUGE)),
    "place": (lambda it, given: it.memory.write(given, b"x"), ("x", None, 1.5, -1, HUGE)),
    "bytes": (lambda it, given: it.memory.write(0, given), ("x", None, 3, [1])),
    "pages": (lambda it, given: it.memory.grow(given), ("x", None, 1.5, [], -1, HUGE, -HUGE)),
    "forks": (lambda it, given: it.fork(given), ("x", None, 1.5, -1)),
    "warm": (lambda it, given: it.guest.warm(given), ("x", None, 1.5)),
    "guest's name": (
        lambda it, given: it.guest.host.prepare(hosts.ECHO, name=given),
        (3, b"x", [1]),
    ),
    "snapshot's name": (lambda it, given: it.snapshot(given), (3, b"x", [1])),
    "init": (lambda it, given: it.guest.host.prepare(hosts.ECHO, init=given), (3, [], b"x")),
    "wait": (
        lambda it, given: it.guest.instantiate(wait_timeout=given),
        ("x", float("nan"), -1, -HUGE),
    ),
    "imports": (lambda it, given: it.guest.instantiate(imports=given), (3, [1], {"env": None})),
    "wasi": (lambda it, given: it.guest.instantiate(wasi=given), (3, {})),
    "arguments": (lambda _, given: Wasi(arguments=given), (3, None, "ab", b"ab", {"a"}, [3])),
    "environment": (lambda _, given: Wasi(environment=given), (3, None, ["a"], {"a": 3})),
    "folders": (lambda _, given: Wasi(preopened=given), (3, None, ["/"], {"/": 3}, {3: "/"})),
    "writable": (
        lambda _, given: Wasi(preopened={"/": memslot.Folder("/", writable=given)}),
        ("no", None, 1),
    ),
    "capture limit": (lambda _, given: Wasi(capture_limit=given), ("x", None, 1.5, -1, HUGE)),
    "source": (lambda it, given: it.guest.host.prepare(given), (3, None, [], HUGE, "a\0b")),
    "file": (lambda it, given: it.guest.host.load(given), (3, None, [], "a\0b")),
    "saved": (lambda it, given: it.guest.save(given), (3, None, [])),
    "shared": (lambda it, given: it.guest.host.attach(given), (3, None, "x")),
}


@pytest.fixture(scope="module", params=hosts.RUNTIMES)
def instance(request: pytest.FixtureRequest) -> Iterator[memslot.Instance]:
    with hosts.started(request.param) as started:
        yield started


@pytest.mark.parametrize("use", USES)
def test_argument_of_the_wrong_kind_is_refused_in_a_sentence(
    instance: memslot.Instance, use: str
) -> None:
    act, given = USES[use]
    before = hosts.in_use(instance.guest.host)
    for each in given:
        with pytest.raises(memslot.MemslotError) as caught:
            act(instance, each)
        assert 10 < len(str(caught.value)) < 500
        assert "\n" not in str(caught.value)
    assert hosts.in_use(instance.guest.host) == before
    assert instance.call("get", 8) == ord("h")


def test_wait_timeout_beyond_any_float_is_the_longest(instance: memslot.Instance) -> None:
    for forever in (10**400, float("inf"), True):
        instance.guest.instantiate(wait_timeout=forever).close()
