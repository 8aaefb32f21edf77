"""Handles that are dropped instead of closed give everything back, on every host and whenever a collection comes."""

from __future__ import annotations

import gc
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from memslot_plugin import Guest
from memslot_plugin.tests import hosts

on_hosts = pytest.mark.parametrize("name", hosts.HOSTS)

pytestmark = pytest.mark.usefixtures("no_leaks")


@contextmanager
def collecting_every(objects: int) -> Iterator[None]:
    """Have the garbage collector come after so many allocations."""
    before = gc.get_threshold()
    gc.set_threshold(objects)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Response:
    """A response that streams what a guest makes, and knows itself: only a collection ends it."""

    def __init__(self, guest: Guest, how: str) -> None:
        self.itself = self
        self.body = self.stream(guest, how)
        next(self.body)

    @staticmethod
    def stream(guest: Guest, how: str) -> Generator[bytes, None, None]:
        with getattr(guest, how)() as instance:
            while True:
                yield instance.memory.read(0, 1)


@pytest.mark.parametrize("how", ["instantiate", "lease"])
@on_hosts
def test_stream_that_is_collected_while_its_thread_changes_the_pool_ends(
    name: str, how: str
) -> None:
    with hosts.serving(name, slots=50) as host, hosts.prepare(host) as guest:
        for objects in (5, 7, 700):
            with collecting_every(objects):
                for number in range(100):
                    Response(guest, how)
                    if number % 40 == 39:  # a threshold of its own may be too high for 50 slots
                        gc.collect()
            gc.collect()


@on_hosts
def test_signal_handler_may_ask_for_statistics_at_any_moment(name: str) -> None:
    asked: list[Any] = []
    with hosts.serving(name) as host:
        guest = hosts.prepare(host)
        before = signal.signal(signal.SIGALRM, lambda *_: asked.append(host.statistics()))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
            while len(asked) < 50:
                guest.instantiate().close()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert {each.live_instances for each in asked} <= {0, 1}
