"""The memory creator of an engine: the owner of every memory that wasmtime may use, until its slot is free again.

The memories of one instance are a *group* under one token.  A group is kept from before wasmtime hears of its memories
until their last finalizer has run.  Released earlier, a slot would show the next tenant's bytes to an old store.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from memslot_hooks.types import LinearMemory, MemoryRequest
from memslot_plugin._core import ffi, lib
from memslot_plugin.errors import InUse, MemoryTooLarge, MemslotError
from memslot_plugin.hosts.leases import Leases
from memslot_plugin.hosts.live import in_use
from memslot_plugin.settings import Settings

_log = logging.getLogger("memslot.wasmtime")

_identities = itertools.count(1)
_tokens = itertools.count(1)

_UNUSED, _LINGERING, _INSIDE, _ENDED_BEFORE = range(4)
"""The answers of ms_wt_close."""

_BATCH = 64
"""Tokens that one call drains."""


class MemoryUser(Protocol):
    """An instance as its creator sees it."""

    guest_name: str
    token: int
    cell: Any
    memories: tuple[LinearMemory, ...]
    generation: int

    def forget_views(self) -> None:
        """Close the objects of wasmtime-py's that refer to the store."""


class Cells(dict[int, Any]):
    """The open cells of an engine, by token.

    If a host is dropped without being closed, the garbage collector takes it together with its instances, and nothing
    else deletes their stores.
    """

    def __del__(
        self,
        close: Callable[[Any, int], int] = lib.ms_wt_close,
        ending: Callable[[], bool] = sys.is_finalizing,
    ) -> None:
        # Not while the interpreter ends: deleting a store calls wasmtime-py's finalizers of externrefs, which are gone.
        for cell in () if ending() else list(self.values()):
            close(cell, 0)


class Creator:
    """The memory creator of one engine.  Any thread may call any method, also within a garbage collection."""

    def __init__(self, settings: Settings, leases: Leases) -> None:
        self.identity = next(_identities)
        """The creator's name in callbacks of the C half."""
        self.raw = ffi.gc(
            lib.ms_wt_creator_new(
                self.identity, settings.largest_heap, settings.keep_resident, settings.slots
            ),
            lib.ms_wt_creator_release,
        )
        if self.raw == ffi.NULL:
            raise MemoryError("no memory is left for a host")
        self._leases = leases
        self._foreign = MemoryRequest(
            minimum=0,
            maximum=settings.largest_memory,
            reserved=settings.reserved,
            guard=settings.guard,
            image=None,
            guest_id="wasmtime#engine",
            memory_index=0,
            host=leases.name,
            bounds_checks=settings.bounds_checks,
            wait_timeout=settings.wait_timeout,
        )
        self._cells = Cells()
        self._groups: dict[int, tuple[LinearMemory, ...]] = {}
        """Memories that wasmtime may use, by token."""
        self.retained: set[int] = set()
        """Tokens of groups without an open cell of ours.  `drain` releases them once their finalizers have run."""
        self._drained: deque[Any] = deque()
        """Buffers for tokens from the C half."""

    # -- what the C half asks

    def granted(self, token: int, index: int, byte_size: int) -> bool:
        """Grow the index-th memory of a group to `byte_size`; false if that is refused."""
        return self._leases.grow(self._groups[token][index], byte_size)

    def leased(self, token: Any, minimum: int, maximum: int) -> LinearMemory:
        """Lease a memory for an instance that bare wasmtime-py makes, and put its token into `token[0]`."""
        request = self._foreign
        limit = request.maximum or 0
        if minimum > limit:
            raise MemoryTooLarge(
                f"a memory of {minimum} bytes is wanted, and the settings allow {limit}"
            )
        number = token[0] = next(_tokens)  # first: after an exception `unlease` finds it there
        memories = self._leases.lease(
            [replace(request, minimum=minimum, maximum=min(maximum, limit))]
        )
        self._groups[number] = memories
        self.retained.add(number)
        return memories[0]

    def unlease(self, token: int) -> None:
        """Drop a memory of which wasmtime has not heard; its slot is free once the memory is collected."""
        self._groups.pop(token, None)
        self.retained.discard(token)

    # -- an instance of ours: begin and finish

    def begin(self, live: MemoryUser) -> None:
        """Keep the memories of an instance that is about to begin, and give it its token."""
        token = live.token = next(_tokens)  # first: `finish` needs it after an exception
        self._cells[token] = live.cell
        if live.memories:
            self._groups[token] = live.memories

    def finish(self, live: MemoryUser, generation: int | None = None) -> bool | None:
        """Delete an instance's store.  Idempotent, also after it was cut short.

        True: wasmtime no longer uses the memories, which the caller takes out of `live` and releases.  False: wasmtime
        goes on using them, because the store is the embedder's; they are released when that ends.  None: the lease
        `generation` has ended and the instance goes on, or another thread finishes it.  Raises InUse while an entry
        runs; the instance goes on.
        """
        if generation is not None and generation != live.generation:
            return None
        if live.cell.depth:
            raise in_use(live.guest_name)
        live.forget_views()
        answer = lib.ms_wt_close(live.cell, generation or 0)
        if answer == _INSIDE:
            raise in_use(live.guest_name)
        if answer == _ENDED_BEFORE:
            return None
        token = live.token
        if answer == _LINGERING:
            self.retained.add(token)
            if token not in self._groups:  # another thread has drained it already
                self.retained.discard(token)
        else:
            self._groups.pop(token, None)
        self._cells.pop(token, None)
        return bool(answer == _UNUSED)

    # -- memories on their way back

    def drain(self) -> None:
        """Release the memories that wasmtime no longer uses."""
        count = _BATCH
        while count == _BATCH:
            # Keep the buffer before the C half fills it: an exception in between would lose tokens, and their slots.
            self._drained.append(tokens := ffi.new("uint64_t[]", _BATCH))
            count = lib.ms_wt_drain(self.raw, tokens, _BATCH)
            for buffer in list(self._drained):
                for token in itertools.takewhile(bool, buffer):
                    self._give_back(token)
                with suppress(ValueError):  # another thread has done the same
                    self._drained.remove(buffer)

    def _give_back(self, token: int) -> None:
        memories = self._groups.pop(token, ())
        self.retained.discard(token)
        self.release(memories)

    def release(self, memories: tuple[LinearMemory, ...]) -> None:
        """Release memories whose instance is gone, and log what fails: no caller has anything to do with it."""
        try:
            self._leases.release(memories)
        except MemslotError as error:
            _log.error("memories that wasmtime had let go of could not be released: %s", str(error))

    def require_unused(self) -> None:
        """Raise InUse if wasmtime uses memories for stores that the host cannot delete now."""
        self.drain()
        if self.retained:
            raise InUse(
                f"{len(self.retained)} instances that this host does not own still use its memories: close their stores"
            )
