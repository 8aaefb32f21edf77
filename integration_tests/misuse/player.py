"""One thread of the adversary: draws an act, uses a handle, and judges the answer by a model of the memory."""

from __future__ import annotations

import gc
import random
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

import memslot_plugin as memslot

from .guests import PAGE
from .world import SLOTS, Origin, Tenant, World, Wrong, finish

Act: TypeAlias = "Callable[[Player], None]"


class Player:
    """One thread that draws calls."""

    def __init__(self, world: World, number: int, weights: Mapping[Act, float]) -> None:
        self.world, self.number, self.weights = world, number, dict(weights)
        self.choice = random.Random(world.seed * 1000 + number)
        self.confined = world.confined
        self.host = world.open() if self.confined else world.host
        self.origins: list[Origin] = [] if self.confined else world.origins
        self.own: list[Tenant] = []
        self.depth = 0
        self.forked = False
        self.trail: list[str] = []

    def play(self) -> None:
        """Draw all rounds, and leave all tenants."""
        for _ in range(self.world.rounds):
            self.act()
        while self.own:
            self.leave(self.own[-1])

    def end(self) -> None:
        """End the host of this thread."""
        self.world.forget()
        self.own.clear()
        finish(self.host, self.origins)

    def act(self) -> None:
        """Draw one act and run it."""
        (act,) = self.choice.choices(tuple(self.weights), tuple(self.weights.values()))
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

    def any_of(self) -> Tenant | None:
        """Return a handle: mostly one of this thread, sometimes a shared or an ended one."""
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
        """Return the result of an action on a handle in a tuple, or None if the right error was raised.

        `ends` is true if the action ends the handle. Such an action does nothing on an ended handle.
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
        """Raise Wrong if the bytes hold a word of another tenant, or differ from the model."""
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
        """Return an offset in bytes and a number of words, within two pages."""
        words = self.choice.choice((1, 2, 64, 1024, 4096))
        return self.choice.randrange(2 * PAGE // 4 - words + 1) * 4, words

    def admit(self, origin: Origin, instance: memslot.Instance, lease: Any = None) -> Tenant:
        """Record a new instance, and raise Wrong unless it is pristine."""
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
        """Compare all of a memory with the model."""
        memory = tenant.instance.memory
        read = self.use(tenant, what, lambda: memory.read(0, memory.byte_size))
        if read is not None:
            size = len(tenant.content) if tenant.content is not None else len(read[0])
            if not tenant.shared and len(read[0]) != size:
                raise Wrong(f"{what} has {len(read[0])} bytes and not {size}")
            self.check(tenant, what, 0, read[0])

    def make_room(self) -> None:
        for _ in range(2 * SLOTS):  # running tenants stay
            if len(self.own) >= (SLOTS if self.confined else 2):
                self.leave(self.choice.choice(self.own))

    def leave(self, tenant: Tenant) -> None:
        """Close a tenant, end its lease, or drop its handle, in a cycle too."""
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
        """Record that every handle of a tenant has to refuse from now on, unless its end was refused."""
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
        """True if a forked child may refuse this guest.

        wasmer needs an instance from before the fork for WASI. wasmtime captures output with threads of the parent.
        """
        return self.forked and (self.confined or origin.kind == "prints")

    def started(self, origin: Origin, start: Callable[[], Any]) -> Any:
        """Return a new instance, or None if the host may refuse one now."""
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

    def write_of(self, tenant: Tenant, at: int, words: int) -> None:
        """Apply a write to the model."""
        if tenant.content is not None:
            tenant.content[at : at + 4 * words] = struct.pack("<I", tenant.word) * words


class _Playing(threading.local):
    player: Any = None


PLAYING = _Playing()
"""The player on whose behalf a host function draws. Another thread may have prepared its guest."""
