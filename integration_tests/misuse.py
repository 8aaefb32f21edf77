"""An adversary: draws public calls at random, with handles that are live, ended, of other guests and of other hosts.

    python -m integration_tests.misuse HOST --seed 1 --rounds 500 --threads 1

Every tenant writes one word (32 bits) that no other lease has, and every read may find the guest's own words and the
tenant's alone.  A tenant that one thread has to itself is compared byte by byte with a model.  A call ends with the
right answer or with the error of memslot's that fits; nothing is left at the end.  The same seed draws the same calls.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import importlib
import itertools
import os
import random
import signal
import struct
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import memslot_plugin as memslot
from memslot_plugin.tests import hosts
from memslot_plugin.tests.leaks import Footprint

from . import cells, misuse_mutants
from .cells import Cell

PAGE = 65536
SLOTS = 4
COUNT = 5
"""The global's value at the start."""

CODE = """
  (global $count (export "count") (mut i32) (i32.const 5))
  (func $fill (export "fill") (param $at i32) (param $words i32) (param $word i32)
    (loop $next (if (local.get $words) (then
      (i32.store (local.get $at) (local.get $word))
      (local.set $at (i32.add (local.get $at) (i32.const 4)))
      (local.set $words (i32.sub (local.get $words) (i32.const 1)))
      (br $next)))))
  (func (export "fill_and_trap") (param i32 i32 i32)
    (call $fill (local.get 0) (local.get 1) (local.get 2)) unreachable)
  (func (export "get") (param i32) (result i32) (i32.load (local.get 0)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "bump") (result i32)
    (global.set $count (i32.add (global.get $count) (i32.const 1))) (global.get $count))"""

KINDS = {
    "plain": "",
    "drops": """(data $once "\\00\\00\\00\\00")
      (func (export "once") (memory.init $once (i32.const 0) (i32.const 0) (i32.const 4)) (data.drop $once))""",
    "asks": '(func (export "ask") (result i32) (call $help (i32.const 1)))',
    "prints": """(func (export "print") (param i32)
        (i32.store (i32.const 0) (local.get 0)) (i32.store (i32.const 4) (i32.const 4))
        (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
        (call $fill (i32.const 0) (i32.const 3) (i32.const 0)))""",
}
IMPORTS = {
    "asks": '(import "env" "help" (func $help (param i32) (result i32)))',
    "prints": """(import "wasi_snapshot_preview1" "fd_write"
        (func $write (param i32 i32 i32 i32) (result i32)))""",
}
PLACES = (4096, 12288, PAGE + 8192, 2 * PAGE - 256)
"""Offsets of a guest's own words, 64 of them each."""


def text(kind: str, word: int) -> str:
    """The guest of this kind, whose own word is `word`."""
    escaped = "".join(f"\\{byte:02x}" for byte in struct.pack("<I", word)) * 64
    data = " ".join(f'(data (i32.const {place}) "{escaped}")' for place in PLACES)
    memory = '(memory (export "memory") 2 5)'
    return f"(module {IMPORTS.get(kind, '')} {memory} {data} {CODE} {KINDS[kind]})"


class Wrong(AssertionError):
    """A call that did what it may not do."""


@dataclass(eq=False)
class Origin:
    """A guest, and what its instances start from; `content` is None if several threads changed it."""

    guest: memslot.Guest
    kind: str
    words: frozenset[int]
    content: bytes | None
    count: int | None
    closing: bool = False
    closed: bool = False


@dataclass(eq=False)
class Tenant:
    """A handle, and what may be in its memory."""

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
    """The part that threads share: on wasmtime the hosts and their guests, on wasmer nothing but ended handles."""

    def __init__(self, name: str, seed: int, threads: int, rounds: int) -> None:
        self.cell = Cell(name, "memfd")
        self.name, self.seed, self.threads, self.rounds = name, seed, threads, rounds
        self.marks = itertools.count(1)
        self.shared: list[Tenant] = []
        self.ended: list[Tenant] = []
        self.done: Counter[str] = Counter()
        self.host: Any = None
        self.origins: list[Origin] = []

    def run(self) -> None:
        """Every thread's rounds, and the end of everything."""
        confined = self.name == "wasmer"
        if not confined:
            self.host = self.open()
        wrong: list[BaseException] = []

        def play(number: int) -> None:
            try:
                player = Player(self, number)
                player.play()
                played.wait()
                if confined:
                    with ending:  # a collection does nothing while another thread collects
                        player.end()
            except BaseException as error:  # noqa: BLE001 - raised below
                wrong.append(error)
                played.abort()

        played, ending = threading.Barrier(self.threads), threading.Lock()
        threads = [threading.Thread(target=play, args=(number,)) for number in range(self.threads)]
        for thread in threads if len(threads) > 1 else ():
            thread.start()
        for thread in threads if len(threads) > 1 else ():
            thread.join()
        if len(threads) == 1:
            play(0)
        if wrong:
            raise wrong[0]
        if not confined:
            host, self.host = self.host, None
            self.forget()
            finish(host, self.origins)

    def open(self) -> Any:
        """A host with few slots, so that each is handed on often."""
        return self.cell.open(slots=SLOTS, ready_instances=2, audit=0.05)

    def forget(self) -> None:
        """Drop the handles that are shared."""
        self.shared.clear()
        self.ended.clear()


def finish(host: Any, origins: list[Origin]) -> None:
    """Nothing is leased once every handle is gone, and every slot is what its state says."""
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


class Player:
    """One thread that draws calls."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.choice = random.Random(world.seed * 1000 + number)
        self.confined = world.name == "wasmer"
        self.host = world.open() if self.confined else world.host
        self.origins: list[Origin] = [] if self.confined else world.origins
        self.own: list[Tenant] = []
        self.depth = 0
        self.forked = False
        self.trail: list[str] = []

    def play(self) -> None:
        """Draw the rounds."""
        for _ in range(self.world.rounds):
            self.act()
        while self.own:
            self.leave(self.own[-1])

    def end(self) -> None:
        """End a host that only this thread has."""
        self.world.forget()
        self.own.clear()
        finish(self.host, self.origins)

    def act(self) -> None:
        """One call."""
        acts = ACTS if not self.forked else FORKED_ACTS
        act = self.choice.choices(acts, [WEIGHTS[each] for each in acts])[0]
        self.trail = [*self.trail[-11:], act.__name__]
        self.world.done[act.__name__] += 1
        try:
            act(self)
        except Wrong as wrong:
            if wrong.args[0].startswith("seed "):
                raise
            raise Wrong(
                f"seed {self.world.seed}, thread {self.number}: {wrong}; after {', '.join(self.trail)}"
            ) from wrong

    # -- using handles

    def any_of(self) -> Tenant | None:
        """A handle: mostly one of this thread's, now and then one that others have, or that has ended."""
        draw = self.choice.random()
        world = self.world
        for pool, below in (
            (world.ended, 0.15),
            (world.shared, 0.3 if self.world.threads > 1 else 0),
        ):
            if draw < below:
                with suppress(IndexError):  # another thread may shorten it meanwhile
                    return pool[int(self.choice.random() * len(pool))]
        return self.choice.choice(self.own) if self.own else None

    def use(
        self,
        tenant: Tenant,
        what: str,
        action: Callable[[], Any],
        *may: type[BaseException],
        ends: bool = False,
    ) -> tuple[Any] | None:
        """Return what an action on a handle returns, in a tuple; None if it was refused as it should be.

        `ends` says that the action ends the handle, and does nothing where it has ended.
        """
        over, running = tenant.over, tenant.running
        theirs = self.confined and tenant.thread != threading.get_ident()
        try:
            result = action()
        except memslot.MemslotError as error:
            fits: tuple[type[BaseException], ...] = may
            if over:
                fits += (memslot.UsedAfterClose,)
            if theirs:
                fits += (memslot.WrongThread,)
            if running:
                fits += (memslot.InUse,)
            if self.may_be_unsupported(tenant.origin):
                fits += (memslot.Unsupported,)
            if what == "reset" and tenant.origin.closing:
                fits += (memslot.UsedAfterClose,)
            if tenant.shared:
                fits += (memslot.UsedAfterClose, memslot.InUse)
            if isinstance(error, fits):
                return None
            raise Wrong(
                f"{what} of {tenant.instance!r}: {type(error).__name__}: {error}"
            ) from error
        if (over or theirs) and not ends:
            raise Wrong(
                f"{what}: a handle that {'ended' if over else 'is of another thread'} answered {result!r:.60}"
            )
        return (result,)

    def check(self, tenant: Tenant, what: str, at: int, data: bytes) -> None:
        """Nothing but the guest's words and the tenant's, and if one thread has it all to itself exactly those."""
        foreign = set(memoryview(data).cast("I")) - tenant.words
        if foreign:
            raise Wrong(
                f"{what} found words of others: {sorted(map(hex, foreign))[:4]}, own is {tenant.word:#x}"
            )
        if (
            tenant.content is not None
            and not tenant.shared
            and data != tenant.content[at : at + len(data)]
        ):
            raise Wrong(f"{what} found other bytes of its own than it should")

    def range_of(self) -> tuple[int, int]:
        """An offset in bytes and a number of words, mostly within two pages."""
        words = self.choice.choice((1, 2, 64, 1024, 4096))
        return self.choice.randrange(2 * PAGE // 4 - words + 1) * 4, words

    # -- lives

    def admit(self, origin: Origin, instance: memslot.Instance, lease: Any = None) -> Tenant:
        """Note a new instance, which has to be pristine."""
        word = next(self.world.marks) << 8 | 0x77
        tenant = Tenant(
            instance,
            origin,
            threading.get_ident(),
            word,
            {*origin.words, word},
            None if origin.content is None else bytearray(origin.content),
            origin.count,
            lease,
        )
        self.own.append(tenant)
        self.whole(tenant, "a new instance")
        return tenant

    def whole(self, tenant: Tenant, what: str) -> None:
        """All of a memory is as the model has it."""
        memory = tenant.instance.memory
        read = self.use(tenant, what, lambda: memory.read(0, memory.byte_size))
        if read is not None:
            size = len(tenant.content) if tenant.content is not None else len(read[0])
            if not tenant.shared and len(read[0]) != size:
                raise Wrong(f"{what} has {len(read[0])} bytes and not {size}")
            self.check(tenant, what, 0, read[0])

    def make_room(self) -> None:
        for _ in range(2 * SLOTS):  # those that run stay
            if len(self.own) >= (SLOTS if self.confined else 2):
                self.leave(self.choice.choice(self.own))

    def leave(self, tenant: Tenant) -> None:
        """End a tenant in one of the ways, or drop its handle."""
        self.own.remove(tenant)
        how = self.choice.random()
        if tenant.running:
            self.own.append(tenant)
            if how < 0.5:
                self.must_be_busy(tenant)
            return
        if tenant.lease is not None:
            self.end_lease(tenant)
        elif how < 0.7:
            self.ended(tenant, self.use(tenant, "close", tenant.instance.close, ends=True))
        elif how < 0.85:
            cycle: list[Any] = [tenant]
            cycle.append(cycle)
            if how < 0.75:
                del tenant, cycle
                gc.collect()

    def must_be_busy(self, tenant: Tenant) -> None:
        closed = self.use(tenant, "close within a call", tenant.instance.close, ends=True)
        if closed is not None and not (tenant.over or tenant.shared):
            raise Wrong("an instance was closed within a call of it")

    def ended(self, tenant: Tenant, done: tuple[Any] | None = (None,)) -> None:
        """Every handle of it has to refuse from now on, unless the end was refused."""
        if done is None:
            return
        tenant.over = True
        if not self.forked:
            self.world.ended.append(tenant)
            del self.world.ended[:-30]

    def end_lease(self, tenant: Tenant) -> None:
        lease, tenant.lease = tenant.lease, None

        def leave() -> None:
            return lease.__exit__(None, None, None)

        self.ended(tenant, self.use(tenant, "the end of a lease", leave, ends=True))

    def origin(self) -> Origin | None:
        with suppress(IndexError):
            return self.origins[int(self.choice.random() * len(self.origins))]
        return None

    def may_be_unsupported(self, origin: Origin) -> bool:
        """True in a child, for WASI of a guest that had no instance before the fork (wasmer), and for captured
        output, which wasmtime writes with threads that the child has not.
        """
        return self.forked and (self.confined or origin.kind == "prints")

    def started(self, origin: Origin, start: Callable[[], Any]) -> Any:
        """A new instance, or None where there is a reason."""
        closed = origin.closed
        try:
            instance = start()
        except memslot.PoolExhausted:
            return None
        except memslot.UsedAfterClose:
            if origin.closing:
                return None
            raise
        except memslot.Unsupported:
            if self.may_be_unsupported(origin):
                return None
            raise
        if closed:
            raise Wrong("a closed guest made an instance")
        return instance

    # -- acts

    def prepare(self) -> None:
        """A guest; its imports reach this player, and so its handles."""
        if len(self.origins) >= 5:
            self.close_guest()
            return
        kind = self.choice.choice(tuple(KINDS))
        word = next(self.world.marks) << 8 | 0x11
        wasi = memslot.Wasi(stdout="capture") if kind == "prints" else None
        imports = {"env": {"help": self.helper()}} if kind == "asks" else None
        guest = self.host.prepare(text(kind, word), imports=imports, wasi=wasi)
        content = bytearray(2 * PAGE)
        for place in PLACES:
            content[place : place + 256] = struct.pack("<I", word) * 64
        words = frozenset((0, word))
        self.origins.append(Origin(guest, kind, words, bytes(content), COUNT))
        return

    def helper(self) -> Callable[[int], int]:
        """A host function that calls anything, on whichever player's behalf."""
        playing = PLAYING

        def help_out(number: int) -> int:
            player = playing.player
            if player.depth < 2:
                player.depth += 1
                try:
                    player.act()
                finally:
                    player.depth -= 1
            return number

        return help_out

    def close_guest(self) -> None:
        if self.origins and (self.confined or self.choice.random() < 0.5):
            origin = self.origin()
            if origin is not None and self.depth == 0:
                origin.closing = True
                with suppress(ValueError):  # another thread has done it
                    self.origins.remove(origin)
                origin.guest.close()
                origin.closed = True

    def instantiate(self) -> None:
        self.make_room()
        origin = self.origin()
        if origin is None:
            if not self.forked:
                self.prepare()
            return
        instance = self.started(origin, origin.guest.instantiate)
        if instance is not None:
            self.admit(origin, instance)
        return

    def lease(self) -> None:
        self.make_room()
        origin = self.origin()
        if origin is not None:
            lease = origin.guest.lease()
            instance = self.started(origin, lease.__enter__)
            if instance is not None:
                self.admit(origin, instance, lease)

    def leave_one(self) -> None:
        if self.own:
            self.leave(self.choice.choice(self.own))

    def share(self) -> None:
        """Let other threads have a handle too."""
        if self.own and not self.confined and self.world.threads > 1:
            tenant = self.own[0]
            # What prints has addresses in its memory while it does so.
            if not tenant.running and tenant.origin.kind != "prints":
                tenant.shared, tenant.content, tenant.count = True, None, None
                self.world.shared.append(tenant)
                del self.world.shared[:-3]

    def end_of_another(self) -> None:
        """Close a handle that may be anybody's."""
        tenant = self.any_of()
        if tenant is None or tenant.running or not (tenant.over or tenant.shared):
            return
        try:
            tenant.instance.close()
        except (memslot.InUse, memslot.WrongThread):
            return
        tenant.over = True

    def reset(self) -> None:
        tenant = self.any_of()
        if tenant is None:
            return
        if self.use(tenant, "reset", tenant.instance.reset) is None:
            # Its guest was closed meanwhile, or needs a compiler whose threads a child has not.
            if (self.world.threads > 1 or self.forked) and tenant.instance.closed:
                tenant.over = True
            return
        if tenant.running and not tenant.shared:  # by the clock of another thread
            raise Wrong("an instance was reset within a call of it")
        tenant.epoch += 1
        tenant.printed = b""
        if not tenant.shared:
            tenant.words.discard(tenant.word)
            tenant.word = next(self.world.marks) << 8 | 0x77
            tenant.words.add(tenant.word)
            if tenant.origin.content is not None:
                tenant.content = bytearray(tenant.origin.content)
            tenant.count = tenant.origin.count
            tenant.used_once = False
        self.whole(tenant, "an instance after its reset")

    def copy(self) -> None:
        """A snapshot, or forks."""
        tenant = self.any_of()
        if tenant is None or self.depth:
            return
        fork = self.choice.random() < 0.5
        action = (lambda: tenant.instance.fork(1)) if fork else tenant.instance.snapshot
        may = (memslot.SnapshotRefused, memslot.PoolExhausted)
        content = None if tenant.content is None else bytes(tenant.content)
        made = self.use(tenant, "fork" if fork else "snapshot", action, *may)
        if made is None:
            return
        result = made[0]
        origin = Origin(
            result[0].guest if fork else result,
            tenant.origin.kind,
            frozenset(tenant.words),
            None if tenant.shared else content,
            None if tenant.shared else tenant.count,
        )
        if fork:
            self.admit(origin, result[0])
        else:
            self.origins.append(origin)

    # -- calls and bytes

    def write_of(self, tenant: Tenant, at: int, words: int) -> None:
        """The model of a write that happened."""
        if tenant.content is not None:
            tenant.content[at : at + 4 * words] = struct.pack("<I", tenant.word) * words

    def fill(self) -> None:
        tenant = self.any_of()
        if tenant is None:
            return
        at, words = self.range_of()
        word = tenant.word
        if self.choice.random() < 0.2:

            def call() -> Any:
                return tenant.instance.call("fill_and_trap", at, words, word)

            if self.use(tenant, "fill_and_trap", call, memslot.GuestTrap) is not None:
                raise Wrong("a trap did not come")
            if not tenant.over:
                self.write_of(tenant, at, words)
            return
        if (
            self.use(tenant, "fill", lambda: tenant.instance.call("fill", at, words, word))
            is not None
        ):
            self.write_of(tenant, at, words)

    def get(self) -> None:
        tenant = self.any_of()
        if tenant is not None:
            at, _ = self.range_of()
            found = self.use(tenant, "get", lambda: tenant.instance.call("get", at))
            if found is not None:
                self.check(tenant, "get", at, struct.pack("<i", found[0]))

    def keep(self) -> None:
        """Keep what hangs on a handle: a function, a memory, the runtime's own objects."""
        if not self.own:
            return
        tenant = self.choice.choice(self.own)
        draw = self.choice.random()
        if draw < 0.4:
            made = self.use(tenant, "function", lambda: tenant.instance.function("fill"))
            if made is not None:
                tenant.functions.append((tenant.epoch, made[0]))
        elif draw < 0.7:
            tenant.memories.append(tenant.instance.memory)
        elif draw < 0.8 and not tenant.shared and not (self.confined and self.world.threads > 1):
            # wasmer ends the process if another thread drops its objects: those are the embedder's to keep together.
            made = self.use(tenant, "native", lambda: exposed(self.world.name, tenant.instance))
            if made is not None:
                tenant.natives.append((tenant.epoch, made[0]))

    def call_kept(self) -> None:
        kept = [each for each in (*self.own, *self.world.ended) if each.functions]
        if not kept:
            return
        tenant = self.choice.choice(kept)
        epoch, function = self.choice.choice(tenant.functions)
        at, words = self.range_of()
        word = tenant.word
        may = (memslot.UsedAfterClose,) if epoch != tenant.epoch else ()
        if self.use(tenant, "a kept function", lambda: function(at, words, word), *may) is not None:
            self.write_of(tenant, at, words)

    def read(self) -> None:
        tenant = self.any_of()
        if tenant is not None:
            memory = self.choice.choice([tenant.instance, *tenant.memories])
            if memory is tenant.instance:
                memory = memory.memory
            at, words = self.range_of()
            found = self.use(tenant, "read", lambda: memory.read(at, 4 * words))
            if found is not None:
                self.check(tenant, "read", at, found[0])

    def write(self) -> None:
        tenant = self.any_of()
        if tenant is not None:
            at, words = self.range_of()
            data = struct.pack("<I", tenant.word) * words
            memory = self.choice.choice([tenant.instance.memory, *tenant.memories])
            if self.use(tenant, "write", lambda: memory.write(at, data)) is not None:
                self.write_of(tenant, at, words)

    def use_native(self) -> None:
        """Read and write past memslot, also after the end: on wasmer that is the same memory for ever."""
        kept = [each for each in (*self.own, *self.world.ended) if each.natives and not each.shared]
        if not kept:
            return
        tenant = self.choice.choice(kept)
        epoch, native = self.choice.choice(tenant.natives)
        at, words = self.range_of()
        current = epoch == tenant.epoch and not tenant.over
        try:
            found = native(at, struct.pack("<I", tenant.word) * words)
        except Exception as error:
            if current:
                raise Wrong(f"the runtime's own memory: {error}") from error
            return
        if current:
            self.check(tenant, "the runtime's own memory", at, found)
            self.write_of(tenant, at, words)

    def grow(self) -> None:
        tenant = self.any_of()
        if tenant is None:
            return
        pages = self.choice.choice((0, 1, 1, 2, 9))
        if self.choice.random() < 0.5:
            grown = self.use(tenant, "grow", lambda: tenant.instance.call("grow", pages))
        else:
            grown = self.use(
                tenant, "grow", lambda: tenant.instance.memory.grow(pages), memslot.GrowthRefused
            )
        if grown is not None and grown[0] >= 0 and tenant.content is not None:
            tenant.content.extend(bytes(pages * PAGE))

    def globals(self) -> None:
        tenant = self.any_of()
        if tenant is None:
            return
        draw = self.choice.random()
        if draw < 0.4:
            found = self.use(tenant, "bump", lambda: tenant.instance.call("bump"))
            if tenant.count is None:
                return
            if found is not None:
                tenant.count += 1
        elif draw < 0.7:
            found = self.use(tenant, "global_value", lambda: tenant.instance.global_value("count"))
        else:
            value = self.choice.randrange(1000)
            if self.use(tenant, "set_global", lambda: tenant.instance.set_global("count", value)):
                tenant.count = None if tenant.shared else value
            return
        if found is not None and tenant.count is not None and found[0] != tenant.count:
            raise Wrong(f"the global is {found[0]} and not {tenant.count}")

    def ask(self) -> None:
        """A call into a host function that calls anything; and the calls that only some guests have."""
        tenant = self.any_of()
        if tenant is None:
            return
        kind, instance = tenant.origin.kind, tenant.instance
        if kind == "asks":
            PLAYING.player = self
            tenant.running += 1
            try:
                answer = self.use(tenant, "ask", lambda: instance.call("ask"))
            finally:
                tenant.running -= 1
            if answer is not None and answer[0] != 1:
                raise Wrong(f"ask answered {answer[0]}")
        elif kind == "drops":
            self.once(tenant)
        elif (
            kind == "prints" and not self.forked
        ):  # wasmtime writes with threads that a child has not
            at, _ = self.range_of()
            at = max(at, 12)
            there = None if tenant.content is None else bytes(tenant.content[at : at + 4])
            done = self.use(tenant, "print", lambda: instance.call("print", at))
            if done is not None and there is not None and tenant.content is not None:
                tenant.printed += there
                tenant.content[0:12] = bytes(12)
            found = self.use(tenant, "stdout", lambda: instance.stdout)
            if found is not None:
                self.check_output(tenant, found[0])

    def once(self, tenant: Tenant) -> None:
        """A segment can be used once, and again after a reset."""
        may = (memslot.GuestTrap,) if tenant.used_once or tenant.shared else ()
        before = tenant.used_once
        done = self.use(tenant, "once", lambda: tenant.instance.call("once"), *may)
        if done is not None:
            if before and not tenant.shared:
                raise Wrong("a dropped segment was there again")
            tenant.used_once = True
            if tenant.content is not None:
                tenant.content[0:4] = bytes(4)

    def check_output(self, tenant: Tenant, printed: bytes) -> None:
        if tenant.shared:
            return  # two threads may write where the output begins
        foreign = set(memoryview(printed).cast("I")) - tenant.words
        if foreign or (tenant.content is not None and printed != tenant.printed):
            raise Wrong(f"stdout is {printed!r:.60} and not {tenant.printed!r:.60}")

    def mistake(self) -> None:
        """Calls with what they do not take."""
        tenant = self.any_of()
        if tenant is None:
            return
        instance, wrong = (
            tenant.instance,
            self.choice.choice((None, "x", [], 2**70, tenant.instance)),
        )
        action: Callable[[], Any] = self.choice.choice(
            (
                lambda: instance.call("get", wrong),
                lambda: instance.call("get"),
                lambda: instance.call("none"),
                lambda: instance.set_global("count", wrong),
                lambda: instance.memory.read(-4, 4),
                lambda: instance.memory.read(5 * PAGE, 4),
                lambda: instance.memory.write(5 * PAGE - 2, b"1234"),
                lambda: instance.memory.read(wrong, 4),  # type: ignore[arg-type]
            )
        )
        if self.use(tenant, "a mistake", action, memslot.MemslotError) is not None:
            raise Wrong("a mistake was not refused")

    def spare_host(self) -> None:
        """Another host with a tenant, closed or dropped; its handles are as good as any ended one's."""
        if self.depth:
            return
        host = self.world.open()
        guest = host.prepare(text("plain", 0x99))
        instance = guest.instantiate()
        origin = Origin(guest, "plain", frozenset((0, 0x99)), None, None)
        tenant = Tenant(instance, origin, threading.get_ident(), 0, {0, 0x99}, None, None)
        tenant.functions.append((0, instance.function("fill")))
        tenant.memories.append(instance.memory)
        if self.choice.random() < 0.7:
            host.close(force=True)
            self.ended(tenant)

    def statistics(self) -> None:
        pools = self.host.statistics().pools
        if sum(pool.failed_resets for pool in pools):
            raise Wrong("a reset failed")

    def child(self) -> None:
        """A fork that Python is or is not told of; both processes go on."""
        if self.depth or self.forked or self.world.threads > 1:
            return
        told = self.choice.random() < 0.5
        seed = self.choice.random()
        process = os.fork() if told else ctypes.PyDLL(None).fork()
        if process == 0:
            status = 1
            try:
                signal.alarm(15)  # faulthandler's own thread is not in a child
                self.forked, self.choice = True, random.Random(seed)
                for _ in range(60):
                    self.act()
                status = 0
            except BaseException:  # noqa: BLE001 - the parent reports it
                traceback.print_exc()
            finally:
                os._exit(status)
        _, status = os.waitpid(process, 0)
        if status:
            raise Wrong(f"a child of {'os.fork' if told else 'fork(2)'} ended with status {status}")


class _Playing(threading.local):
    player: Any = None


PLAYING = _Playing()
"""On whose behalf a host function draws: it may belong to a guest that another thread prepared."""


def exposed(name: str, instance: memslot.Instance) -> Callable[[int, bytes], bytes]:
    """Reads and then writes a range of a memory through the runtime's own objects."""
    native = instance.native
    if name == "wasmer":
        buffer = memoryview(native.exports.memory.buffer)

        def by_buffer(at: int, data: bytes) -> bytes:
            found = bytes(buffer[at : at + len(data)])
            native.exports.memory.uint8_view(at)[0 : len(data)] = data
            return found

        return by_buffer
    store = native.store
    memory = native.exports(store)["memory"]

    def by_store(at: int, data: bytes) -> bytes:
        found = bytes(memory.read(store, at, at + len(data)))
        memory.write(store, data, at)
        return found

    return by_store


WEIGHTS = {
    Player.prepare: 2,
    Player.close_guest: 1,
    Player.instantiate: 10,
    Player.lease: 12,
    Player.leave_one: 10,
    Player.share: 3,
    Player.end_of_another: 3,
    Player.reset: 10,
    Player.copy: 3,
    Player.fill: 20,
    Player.get: 6,
    Player.keep: 10,
    Player.call_kept: 10,
    Player.read: 16,
    Player.write: 12,
    Player.use_native: 8,
    Player.grow: 4,
    Player.globals: 8,
    Player.ask: 10,
    Player.mistake: 5,
    Player.spare_host: 0.3,
    Player.statistics: 2,
    Player.child: 0.5,
}
"""The weight with which each act is drawn."""
ACTS = tuple(WEIGHTS)
COMPILING = (Player.prepare, Player.copy, Player.spare_host, Player.child)
FORKED_ACTS = tuple(act for act in ACTS if act not in COMPILING)
"""Without those that compile, for which a child has no threads."""


def misuse(name: str, seed: int, rounds: int, threads: int) -> str:
    """A world from its first call to its end; what was done in it."""
    unraisable: list[str] = []

    def noticed(raised: Any) -> None:
        unraisable.append(f"{raised.exc_value!r} in {raised.object!r}")

    sys.unraisablehook = noticed
    # What a process makes once and keeps is there before what is counted.
    hosts.start_wasi()
    World(name, seed + 1_000_000, threads, min(rounds, 100)).run()
    before = Footprint.now()
    world = World(name, seed, threads, rounds)
    world.run()
    lost = Footprint.now().lost_since(before, mappings=64)
    if lost:
        raise Wrong(f"seed {seed}: left behind: {', '.join(lost)}")
    if unraisable:
        raise Wrong(f"seed {seed}: exceptions that nobody could catch: {unraisable[:3]}")
    acts = ", ".join(f"{count} {name}" for name, count in sorted(world.done.items()))
    return f"{name}, seed {seed}: {acts}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m integration_tests.misuse")
    parser.add_argument("host", choices=cells.REAL_HOSTS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=120, help="after which a hang is reported")
    parser.add_argument(
        "--mutant", choices=sorted(misuse_mutants.MUTANTS), help="a fault to put back"
    )
    told = parser.parse_args()
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, chain=True)
    faulthandler.dump_traceback_later(told.seconds, exit=True)
    importlib.import_module(f"memslot_plugin.hosts.{told.host}.runtime")  # before it is patched
    if told.mutant is not None:
        misuse_mutants.MUTANTS[told.mutant].put_back()
    print(misuse(told.host, told.seed, told.rounds, told.threads))


if __name__ == "__main__":
    main()
