"""Guests: modules that a host has prepared, to be instantiated again and again."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from memslot_hooks.types import Image, InitialContent, LinearMemory, MemoryRequest, Segment
from memslot_plugin._core import catch_up, ffi
from memslot_plugin.errors import (
    ArgumentError,
    InUse,
    MemoryTooLarge,
    RepeatedRandomness,
    SettingError,
    SnapshotRefused,
    UsedAfterClose,
    printable,
    shown,
)
from memslot_plugin.guest import plan as guests
from memslot_plugin.guest.reasons import image_too_large
from memslot_plugin.guest.report import GuestReport, report_on
from memslot_plugin.hosts import saved
from memslot_plugin.hosts.instance import Instance
from memslot_plugin.hosts.live import HOLDS, Binding, Imports
from memslot_plugin.hosts.living import Living
from memslot_plugin.hosts.wasi import MODULES
from memslot_plugin.memory import image as images

if TYPE_CHECKING:
    from typing_extensions import Self

    from memslot_plugin.files.share import SharedGuest
    from memslot_plugin.hosts.host import Host
    from memslot_plugin.hosts.live import Live
    from memslot_plugin.hosts.saved import Loaded
    from memslot_plugin.hosts.wasi import Wasi

_log = logging.getLogger("memslot.lease")

_NUMBERS = itertools.count(1)


class Guest:
    """A prepared module: rewritten bytes, compiled code, and one image per memory.

    `in_place` is whether its instances can be reset in place.
    """

    in_place = False
    captures = False
    """Whether what globals begin with is known only when an instance has begun."""

    def __init__(
        self,
        host: Host,
        name: str,
        plan: guests.Plan,
        binding: Binding,
        *,
        code: Mapping[str, bytes] | None = None,
        parent: Guest | None = None,
    ) -> None:
        """`code` is what a runtime may already have compiled of the module, by its key; `parent` the
        guest whose snapshot this is.
        """
        if not isinstance(name, str):
            raise ArgumentError(f"a guest's name is a string, and not {shown(name)}")
        self.host = host
        self.name = name = printable(name)
        self.guest_id = f"{name}#{next(_NUMBERS)}"
        self.binding = binding
        self.closed = False
        self._gave_back = False
        self.reseed: str | None = None
        self._ready: list[Instance] = []
        """A handle for each instance that waits, which nobody else has: with it goes the instance."""
        self.images: dict[int, Image] = {}
        self.plan = plan
        self.loaded: Loaded | None = None
        self._saved_code = {} if code is None else code
        self.reused_code = False
        """Whether its code came with it, from a file or another process."""
        self._parent = parent
        self._forks: Living[Live] = Living()
        """Live instances of the guest of a fork, which ends with the last one."""
        self.sets_globals = False
        """Whether its code is its parent's, so that globals get their values when an instance begins."""
        too_large = guests.reason_too_large(plan)
        if too_large is not None:
            raise MemoryTooLarge(f"{name} {too_large}")
        try:
            if self.plan.native is None:
                self._build_images()
            self.compiled = host._compile(self)
            self._saved_code, self._parent = {}, None
            self.in_place = self.plan.verdict.in_place
            self.captures = self.in_place and any(
                each.initial is None for each in self.plan.saved_globals
            )
            self.requests = tuple(self._places() if self.plan.native else self._requests())
        except BaseException:
            self._close_images()
            raise

    @classmethod
    def of_module(cls, host: Host, name: str, source: bytes, binding: Binding) -> Self:
        """A guest that starts as the module says."""
        return cls(host, name, guests.plan(source, host.target), binding)

    def _build_images(self) -> None:
        for index, content in self.plan.contents.items():
            if self.plan.has_contents:
                self._require_small(content)
            image = self.host._armed.build_image(replace(content, name=self.name))
            if (
                image is None
            ):  # no plugin builds images: the runtime copies its data segments as it always did
                self._close_images()
                self.images = {}
                if self.plan.has_contents:
                    raise SnapshotRefused(
                        "no plugin builds images, and nothing else holds a snapshot or a saved guest; load memfd or"
                        " anonymous (settings plugins and blocked)"
                    )
                target = replace(self.plan.target, builds_images=False)
                self.plan = guests.plan(self.plan.source, target)
                return
            self.images[index] = image
        # Drop the contents: they refer to a live memory or a file that others may change or close.
        self.plan = replace(self.plan, contents={})

    def _require_small(self, content: InitialContent) -> None:
        span, limit = images.span_of(content), self.host.settings.image_limit
        if span > limit:
            raise MemoryTooLarge(f"the image of {self.name} {image_too_large(span, limit)}")

    def _places(self) -> Iterator[MemoryRequest]:
        """One request per memory that the runtime makes itself, of which it takes the place only: `slots`
        bounds them all.  What was not understood may have one memory.
        """
        host, settings = self.host, self.host.settings
        defined = [each.index for each in self.plan.memories if each.imported is None]
        for index in [0] if self.plan.structure is None else defined:
            yield MemoryRequest(
                minimum=0,
                maximum=0,
                reserved=settings.reserved,
                guard=settings.guard,
                image=None,
                guest_id=self.guest_id,
                memory_index=index,
                host=host.name,
                bounds_checks="code" if host.checks_bounds_in_code else settings.bounds_checks,
                wait_timeout=settings.wait_timeout,
            )

    def _requests(self) -> Iterator[MemoryRequest]:
        """One request per memory that the module defines; the same object serves every instance."""
        host, settings = self.host, self.host.settings
        limit = settings.largest_memory
        for memory in self.plan.memories:
            if memory.imported is not None:
                continue
            maximum = limit if memory.maximum_bytes is None else min(memory.maximum_bytes, limit)
            yield MemoryRequest(
                minimum=memory.minimum_bytes,
                maximum=maximum,
                reserved=settings.reserved,
                guard=settings.guard,
                image=self.images.get(memory.index),
                guest_id=self.guest_id,
                memory_index=memory.index,
                host=host.name,
                growth=host.growth,
                bounds_checks="code" if host.checks_bounds_in_code else settings.bounds_checks,
                wait_timeout=settings.wait_timeout,
                map_host_memory=host._map_host_memory(memory, maximum),
                host_shape=(memory.minimum_bytes, maximum),
            )

    @property
    def report(self) -> GuestReport:
        """The changes to the module, its memories with or without images, and the kind of its reset."""
        return report_on(self.plan)

    def instantiate(
        self,
        *,
        imports: Imports | None = None,
        wasi: Wasi | None = None,
        tenant: str | None = None,
        store: Any = None,
        wait_timeout: float | None = None,
    ) -> Instance:
        """A fresh instance in a leased slot; close it, or use it in a with statement.

        `tenant` travels to the plugins in the memory's request.  `imports` replaces those of
        `prepare`.  `store` is a store of the embedder's own, for imports that are bound to one
        (wasmtime); the memories then come back when that store ends, and tables and heaps have the
        limits of that store (`wasmtime.Store.set_limits`).  Raises PoolExhausted,
        PoolTimeout, LinkError, GuestTrap (a start function), UsedAfterClose, WrongThread; the slot
        is back in the pool then.
        """
        host = self.host
        if host._closed or (host.thread_confined and threading.get_ident() != host._thread):
            host._require_usable()
        if self.closed:
            raise UsedAfterClose(f"the guest {self.name} was closed; prepare it again")
        if host._dropped:
            host._end_dropped()
        requests = self.requests
        if tenant is not None or wait_timeout is not None:
            changes: dict[str, Any] = {"tenant": tenant}
            if wait_timeout is not None:
                changes["wait_timeout"] = _seconds(wait_timeout)
            requests = tuple(replace(request, **changes) for request in requests)
        binding = self.binding
        if imports is not None or wasi is not None or store is not None:
            binding = Binding(
                binding.imports if imports is None else imports,
                binding.wasi if wasi is None else wasi,
                store,
            )
        memories = host._lease(requests)
        live = None
        try:
            live = host._start(self, memories, binding)
            instance = Instance(self, live, binding)
            host._list(live)
            host._instances += 1
        except BaseException:
            if live is None:
                host._cut_short(memories)
                host._release(memories)
            else:
                host._end(live)
            raise
        if self.plan.is_snapshot:
            self._restored(instance)
        return instance

    def _restored(self, instance: Instance) -> None:
        """An instance of a snapshot is where the snapshot was taken: give it randomness of its own."""
        told = self.host._armed.instance_restored
        try:
            if self.reseed is not None:
                instance.call(self.reseed)
            if told is not None:
                told(instance)
        except BaseException:
            instance.close()  # nobody shall have one that repeats what others drew
            raise

    # -- leases

    def lease(self, *, wait_timeout: float | None = None) -> Lease:
        """An instance for one request: `with guest.lease() as instance: instance.call(...)`.

        It is one that waits ready since an earlier lease, or a new one; at the end of the block it
        is reset, however the block ended, and waits for the next.  At most `ready_instances` (a
        setting) wait, and they make room where a slot is needed for something else.  The instance
        is the caller's within the block alone.  Raises SettingError; entering raises what
        `instantiate` raises.
        """
        if wait_timeout is not None:
            wait_timeout = _seconds(wait_timeout)
        return Lease(self, wait_timeout)

    def _take_ready(self) -> Instance | None:
        """One of the instances that wait for a lease; None if there is none."""
        while True:
            try:
                ready = self._ready.pop()
            except IndexError:  # also if another thread took the last one
                return None
            # What `closed` says, without the call, as in _end_lease: this is in the path of every request.
            live = ready._now
            if live is not None and live.open and live.generation == ready._generation:
                return ready

    def _begin_lease(self, wait_timeout: float | None) -> Instance:
        host = self.host
        if host._closed or (host.thread_confined and threading.get_ident() != host._thread):
            host._require_usable()
        if not self.closed and (ready := self._take_ready()) is not None:
            try:
                live = ready._now
                assert live is not None
                live.wake()
            except BaseException:
                host._end_ready(ready)
                raise
            return ready
        return self.instantiate(wait_timeout=wait_timeout)

    def _end_lease(self, instance: Instance) -> None:
        host, live = self.host, instance._now
        if live is None or not live.open or live.generation != instance._generation:
            if not instance.closed:
                raise instance._refusal(live)
            return
        if host.thread_confined and threading.get_ident() != host._thread:
            host._require_thread()
        if self.closed or len(self._ready) >= host.settings.ready_instances:
            instance.close()
            return
        try:
            ready = instance._pass_on(live)
        except Exception:  # the embedder's too: reseeding calls host functions and plugins
            if instance._now is not None:
                raise
            # The request itself was served, and the pool counts the slot that was lost.
            # As text, as in the pool.
            _log.error(
                "an instance of %s could not be reset after its lease: %s",
                self.name,
                traceback.format_exc(),
            )
            return
        self._ready.append(ready)
        # Looked at after the instance can be found there, so that nobody waits for what is ready.
        if self.closed or host._waiting:
            given = self._take_ready()
            if given is not None:
                host._end_ready(given)

    def _end_ready(self) -> None:
        """End every instance that waits for a lease."""
        while (ready := self._take_ready()) is not None:
            self.host._end_ready(ready)

    def _snapshot_of(
        self, live: Live, name: str | None, binding: Binding, *, generation: int, depth: int
    ) -> Guest:
        """A guest that starts where a live instance of this one is; raises SnapshotRefused."""
        catch_up()
        plan, what = self.plan, f"the instance of {self.name} cannot be captured"
        reason = guests.reason_against_snapshots(plan, native_exposed=live.given_away)
        if reason is not None:
            raise SnapshotRefused(f"{what}: {reason}")
        drawn = _draws(plan)
        if drawn and self.reseed is None and self.host._armed.instance_restored is None:
            warnings.warn(
                f"{self.name} imports {' and '.join(drawn)}, and every instance of its snapshot repeats what it"
                " has drawn from there; name an export that draws anew, prepare(reseed=...), or have a"
                " plugin do it (memslot_instance_restored)",
                RepeatedRandomness,
                stacklevel=depth,
            )
        key = next(HOLDS)
        try:
            live.hold(generation, key)
            descriptors = live.descriptors_changed()
            if descriptors is not None:
                raise SnapshotRefused(
                    f"{what}: {descriptors}; initialise it without, or take the snapshot before"
                )
            contents = {}
            leased = _by_index(live.memories)
            for memory in plan.memories:
                if memory.imported is None:
                    base, byte_size = live.locate(memory.index)
                    now = memoryview(ffi.buffer(ffi.cast("uint8_t *", base), byte_size))
                    contents[memory.index] = InitialContent(
                        byte_size,
                        (Segment(0, now),) if byte_size else (),
                        name or self.name,
                        leased.get(memory.index),
                    )
            taken = guests.snapshot(plan, contents=contents, values=live.saved_values())
            guest = type(self)(
                self.host,
                name or self.name,
                taken,
                Binding(binding.imports, binding.wasi),
                parent=self,
            )
            guest.reseed = self.reseed
            live.let_go(key)
        except BaseException:
            live.let_go(key)
            raise
        return guest

    def warm(self, count: int) -> int:
        """Make up to `count` unused slots ready for this guest, in idle time; how many are ready
        now.

        Their images are laid, and the pages that the guest usually writes, learned from the slot
        that it used last, are made resident ahead of their faults.  Raises UsedAfterClose,
        WrongThread, SystemCallError.
        """
        self.host._require_usable()
        if self.closed:
            raise UsedAfterClose(f"the guest {self.name} was closed; prepare it again")
        if not isinstance(count, int):
            raise ArgumentError(f"a number of slots is an integer, and not {count!r}")
        warm = self.host._armed.warm_memory
        return min((warm(request, count) for request in self.requests), default=0)

    def save(
        self, path: str | os.PathLike[str], *, key: bytes | None = None, code: bool = True
    ) -> int:
        """Write the guest to a file that `Host.load` reads, on this runtime or another; its bytes.

        The file is written whole or not at all, and one that is there is replaced at once.  Imports
        and WASI are not part of it.  With `code` it has what the runtime compiled, where that can be
        saved.  With `key`, any bytes that are secret, only those who have it can write such a file,
        or load it.  Raises SystemCallError (the disk is full, the folder missing, ...),
        ArgumentError, UsedAfterClose, WrongThread, and Unsupported for images of another plugin's
        kind.
        """
        return saved.save(self, path, key=key, with_code=code)

    def share(self) -> SharedGuest:
        """The guest as something that can be handed to another process, whose host attaches it.

        Images that lie in files are passed as descriptors, and both processes have the same pages;
        those of the plugin `anonymous` are copied.  Raises SystemCallError, UsedAfterClose,
        WrongThread, and Unsupported as `save` does.
        """
        return saved.share(self)

    def close(self) -> None:
        """Drop the images and the compiled code; unused slots give the image's memory back.  Live
        instances go on.

        Twice is a no-op, unless an image could not be given back (SystemCallError): that is tried
        again.
        """
        if self._gave_back:
            return
        self.closed = True
        self._end_ready()
        self.compiled = None
        self._close_images()
        self.host._guests.discard(self)
        self._gave_back = True

    def _close_images(self) -> None:
        with ExitStack() as each:  # also after one of them failed
            for image in self.images.values():
                each.callback(self.host.plugins.forget_image, image)
                each.callback(image.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # The images end by themselves, and on any thread.
        host = getattr(self, "host", None)
        if host is not None and host.thread_confined:
            host._relics.append(getattr(self, "compiled", None))

    def __repr__(self) -> str:
        return f"<Guest {self.guest_id} on {self.host.name}{', closed' * self.closed}>"


class Lease:
    """The block of one request; see `Guest.lease`."""

    __slots__ = ("_guest", "_instance", "_wait_timeout")

    def __init__(self, guest: Guest, wait_timeout: float | None) -> None:
        self._guest = guest
        self._wait_timeout = wait_timeout
        self._instance: Instance | None = None

    def __enter__(self) -> Instance:
        if self._instance is not None:
            raise InUse(f"a lease of {self._guest.name} is for one block; ask for another one")
        self._instance = self._guest._begin_lease(self._wait_timeout)
        return self._instance

    def __exit__(self, *_: object) -> None:
        instance, self._instance = self._instance, None
        if instance is not None:
            self._guest._end_lease(instance)


def _by_index(memories: Iterable[LinearMemory]) -> dict[int, LinearMemory]:
    """Leased memories by their index; a comprehension in a function of its own, as in the pool."""
    return {memory.request.memory_index: memory for memory in memories}


def _seconds(wait_timeout: float) -> float:
    """Return the seconds to wait, of which an integer can be more than a float holds; raises SettingError."""
    if not isinstance(wait_timeout, (int, float)) or not wait_timeout >= 0:
        raise SettingError(
            f"wait_timeout = {shown(wait_timeout)} is not allowed: it is seconds, at least 0"
        )
    return float(min(wait_timeout, sys.float_info.max))


def _draws(plan: guests.Plan) -> tuple[str, ...]:
    """What the module imports of WASI that differs from one moment to the next."""
    imports = () if plan.structure is None else plan.structure.imports
    return tuple(
        each.name.name
        for each in imports
        if each.name.module in MODULES and each.name.name in ("random_get", "clock_time_get")
    )
