"""The state that the adversary's threads share: hosts, guests, handles, and what each of them may hold."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import memslot_plugin as memslot
from integration_tests import cells
from integration_tests.cells import Cell

SLOTS = 4


class Wrong(AssertionError):
    """A wrong answer of a call."""


@dataclass(eq=False)
class Origin:
    """A guest and the state that its instances start from. `content` is None if several threads changed it."""

    guest: memslot.Guest
    kind: str
    words: frozenset[int]
    content: bytes | None
    count: int | None
    closing: bool = False
    closed: bool = False


@dataclass(eq=False)
class Tenant:
    """A handle, and the words that its memory may hold."""

    instance: memslot.Instance
    origin: Origin
    thread: int
    word: int
    words: set[int]
    content: bytearray | None
    count: int | None
    lease: Any = None
    shared: bool = False
    over: bool = False
    running: int = 0
    epoch: int = 0
    used_once: bool = False
    printed: bytes = b""
    functions: list[tuple[int, Any]] = field(default_factory=list)
    memories: list[Any] = field(default_factory=list)
    natives: list[tuple[int, Any]] = field(default_factory=list)


class World:
    """The state of all threads: hosts and guests on wasmtime, ended handles alone on wasmer."""

    def __init__(self, name: str, seed: int, threads: int, rounds: int) -> None:
        self.cell = Cell(name, "memfd")
        self.name, self.seed, self.threads, self.rounds = name, seed, threads, rounds
        self.confined = name == "wasmer"
        self.marks = itertools.count(1)
        self.shared: list[Tenant] = []
        self.ended: list[Tenant] = []
        self.done: Counter[str] = Counter()
        self.host: Any = None if self.confined else self.open()
        self.origins: list[Origin] = []

    def open(self) -> Any:
        """Open a host with few slots, so that each is handed on often."""
        return self.cell.open(slots=SLOTS, ready_instances=2, audit=0.05)

    def forget(self) -> None:
        """Drop the handles that threads share."""
        self.shared.clear()
        self.ended.clear()

    def end(self) -> None:
        """End the host that all threads share."""
        if not self.confined:
            host, self.host = self.host, None
            self.forget()
            finish(host, self.origins)


def finish(host: Any, origins: list[Origin]) -> None:
    """Close a host, and raise Wrong if a lease outlived its handles or a slot is not as its state says."""
    for origin in origins:
        origin.guest.close()
    origins.clear()
    gc.collect()
    statistics = host.statistics()
    if statistics.live_instances:
        raise Wrong(f"{statistics.live_instances} instances live on after the last handle")
    cells.check(host, in_use=0)
    failed = sum(pool.failed_resets for pool in statistics.pools)
    if failed:
        raise Wrong(f"{failed} resets failed")
    host.close()
