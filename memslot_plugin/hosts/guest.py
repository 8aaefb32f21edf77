"""Guests: modules that a host has prepared, to be instantiated again and again."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

from memslot_hooks.types import Image, MemoryRequest
from memslot_plugin._core import catch_up
from memslot_plugin.errors import (
    ArgumentError,
    ExportNotFound,
    InUse,
    MemoryTooLarge,
    RepeatedRandomness,
    SettingError,
    SnapshotRefused,
    UsedAfterClose,
    printable,
    shown,
)
from memslot_plugin.files import guests as files
from memslot_plugin.files.share import SharedGuest
from memslot_plugin.guest import plan as guests
from memslot_plugin.guest.plan import Plan
from memslot_plugin.guest.reasons import image_too_large
from memslot_plugin.guest.report import GuestReport, report_on
from memslot_plugin.hosts.instance import Instance
from memslot_plugin.hosts.leases import Handle, Leases, Ready
from memslot_plugin.hosts.live import Binding, Imports
from memslot_plugin.hosts.runtime import Compiled, Reuse, Runtime, key_of_code
from memslot_plugin.hosts.snapshot import captured, draws
from memslot_plugin.hosts.wasi import Wasi
from memslot_plugin.memory import image as images

if TYPE_CHECKING:
    from typing_extensions import Self

_log = logging.getLogger("memslot.lease")

_NUMBERS = itertools.count(1)


class Guest:
    """A prepared module: rewritten bytes, compiled code, and one image per memory.

    `in_place` is true if its instances can be reset in place.
    """

    def __init__(
        self, host: Any, runtime: Runtime, compiled: Compiled, built: dict[int, Image]
    ) -> None:
        self.host = host
        """The host that prepared the guest, which lives as long as the guest does."""
        self.runtime = runtime
        self.leases = runtime.leases
        self.name = compiled.guest_name
        self.guest_id = f"{self.name}#{next(_NUMBERS)}"
        self.plan = compiled.plan
        self.binding = compiled.binding
        self.compiled: Compiled | None = compiled
        self.images = built
        self.reseed: str | None = None
        self.loaded: files.Loaded | None = None
        self.closed = False
        self.in_place = self.plan.verdict.in_place
        self.is_snapshot = self.plan.is_snapshot
        self.ready = Ready()
        self.requests = tuple(self._requests())
        self.leases.guests.add(self)

    @classmethod
    def make(
        cls,
        host: Any,
        runtime: Runtime,
        name: str,
        plan: Plan,
        binding: Binding,
        *,
        reuse: Reuse | None = None,
        reseed: str | None = None,
    ) -> Self:
        """Build the images of a plan and compile its module; `reuse` is code that may serve."""
        if not isinstance(name, str):
            raise ArgumentError(f"a guest's name is a string, and not {shown(name)}")
        name = printable(name)
        too_large = guests.reason_too_large(plan)
        if too_large is not None:
            raise MemoryTooLarge(f"{name} {too_large}")
        with ExitStack() as undo:
            built: dict[int, Image] = {}
            undo.callback(_close_images, runtime.leases, built)
            if plan.native is None:
                plan = _build_images(runtime.leases, name, plan, built)
            compiled = runtime.compile(plan, name, binding, reuse or Reuse())
            _require_reseed(runtime, plan, name, reseed)
            guest = cls(host, runtime, compiled, built)
            guest.reseed = reseed
            undo.pop_all()
        return guest

    def announce(self) -> None:
        """Notify the watchers that the guest is prepared."""
        prepared = self.leases.armed.guest_prepared
        if prepared is not None:
            prepared(self.guest_id, self.report)

    def _requests(self) -> Iterator[MemoryRequest]:
        """Return a request per memory that the module defines; the same object serves every instance.

        A native guest has its memories from the runtime.  Each request is for the place of a slot alone, because
        `slots` limits all instances; a module that was not understood may have one memory.
        """
        runtime, settings, plan = self.runtime, self.leases.settings, self.plan
        request = partial(
            MemoryRequest,
            reserved=settings.reserved,
            guard=settings.guard,
            guest_id=self.guest_id,
            host=runtime.name,
            bounds_checks="code" if runtime.checks_bounds_in_code else settings.bounds_checks,
            wait_timeout=settings.wait_timeout,
        )
        own = [memory for memory in plan.memories if memory.imported is None]
        if plan.native is not None:
            for index in [0] if plan.structure is None else [each.index for each in own]:
                yield request(minimum=0, maximum=0, image=None, memory_index=index)
            return
        limit = settings.largest_memory
        for memory in own:
            maximum = limit if memory.maximum_bytes is None else min(memory.maximum_bytes, limit)
            yield request(
                minimum=memory.minimum_bytes,
                maximum=maximum,
                image=self.images.get(memory.index),
                memory_index=memory.index,
                growth=runtime.growth,
                map_host_memory=runtime.map_host_memory(memory, maximum),
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
        """Start a fresh instance in a leased slot; close it, or use it in a with statement.

        `tenant` travels to the plugins in the memory's request.  `imports` replaces those of
        `prepare`.  `store` is a store of the embedder's own, for imports that are bound to one
        (wasmtime); the memories then come back when that store ends, and tables and heaps have the
        limits of that store (`wasmtime.Store.set_limits`).  Raises PoolExhausted,
        PoolTimeout, LinkError, GuestTrap (a start function), UsedAfterClose, WrongThread; the slot
        is back in the pool then.
        """
        leases = self.leases
        if leases.closed or (leases.thread_confined and get_ident() != leases.thread):
            leases.require_usable()
        compiled = self.compiled  # read once: another thread may close the guest, and drop its code
        if compiled is None or self.closed:
            raise self._was_closed()
        if leases.dropped:
            leases.end_dropped()
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
        live = self.runtime.live(compiled, leases.lease(requests), binding)
        instance = Instance(self, leases.start(live))
        leases.instances += 1
        if self.is_snapshot:
            self.restored(instance)
        return instance

    def restored(self, instance: Instance) -> None:
        """Give an instance of a snapshot randomness of its own, because it starts where all others do."""
        notify = self.leases.armed.instance_restored
        try:
            if self.reseed is not None:
                instance.call(self.reseed)
            if notify is not None:
                notify(instance)
        except BaseException:
            instance.close()  # otherwise it repeats the numbers that others drew
            raise

    def open_code(self) -> Compiled:
        """Return the compiled code; raises UsedAfterClose."""
        compiled = self.compiled
        if self.closed or compiled is None:
            raise self._was_closed()
        return compiled

    def _was_closed(self) -> UsedAfterClose:
        return UsedAfterClose(f"the guest {self.name} was closed; prepare it again")

    # -- leases

    def lease(self, *, wait_timeout: float | None = None) -> Lease:
        """Return an instance for one request: `with guest.lease() as instance: instance.call(...)`.

        It is one that waits ready since an earlier lease, or a new one; at the end of the block it
        is reset, however the block ended, and waits for the next.  At most `ready_instances` (a
        setting) wait, and they make room where a slot is needed for something else.  The instance
        is the caller's within the block alone.  Raises SettingError; entering raises what
        `instantiate` raises.
        """
        if wait_timeout is not None:
            wait_timeout = _seconds(wait_timeout)
        return Lease(self, wait_timeout)

    def snapshot_of(self, handle: Handle, name: str | None) -> Guest:
        """Return a guest that starts where an instance of this one is; the caller announces it.

        Raises SnapshotRefused, InUse, UsedAfterClose, MemoryTooLarge.
        """
        live = handle.enter()
        live.require_idle()
        catch_up()
        plan, name = self.plan, name or self.name
        with captured(plan, self.name, live, handle.generation, name) as taken:
            drawn = draws(plan)
            if drawn and self.reseed is None and self.leases.armed.instance_restored is None:
                warnings.warn(
                    f"{self.name} imports {' and '.join(drawn)}, and every instance of its snapshot repeats what it"
                    " has drawn from there; name an export that draws anew, prepare(reseed=...), or have a"
                    " plugin do it (memslot_instance_restored)",
                    RepeatedRandomness,
                    stacklevel=3,
                )
            binding = Binding(live.binding.imports, live.binding.wasi)
            reuse = Reuse(parent=self.compiled)
            return self.make(
                self.host, self.runtime, name, taken, binding, reuse=reuse, reseed=self.reseed
            )

    def warm(self, count: int) -> int:
        """Make up to `count` unused slots ready for this guest, in idle time; return how many are ready.

        Their images are mapped, and the pages that the guest usually writes, learned from the slot
        that it used last, are made resident ahead of their faults.  Raises UsedAfterClose,
        WrongThread, SystemCallError.
        """
        self.leases.require_usable()
        self.open_code()
        if not isinstance(count, int):
            raise ArgumentError(f"a number of slots is an integer, and not {count!r}")
        warm = self.leases.armed.warm_memory
        return min((warm(request, count) for request in self.requests), default=0)

    def save(
        self, path: str | os.PathLike[str], *, key: bytes | None = None, code: bool = True
    ) -> int:
        """Write the guest to a file that `Host.load` reads, on this runtime or another; return its bytes.

        The file is written whole or not at all, and one that is there is replaced at once.  Imports
        and WASI are not part of it.  With `code` it has what the runtime compiled, where that can be
        saved.  With `key`, any bytes that are secret, only those who have it can write such a file,
        or load it.  Raises SystemCallError (the disk is full, the folder missing, ...),
        ArgumentError, UsedAfterClose, WrongThread, and Unsupported for images of another plugin's
        kind.
        """
        return files.save(self._saved(with_code=code), path, key=key)

    def share(self) -> SharedGuest:
        """Return the guest as something that can be handed to another process, whose host attaches it.

        Images that lie in files are passed as descriptors, and both processes have the same pages;
        those of the plugin `anonymous` are copied.  Raises SystemCallError, UsedAfterClose,
        WrongThread, and Unsupported as `save` does.
        """
        return files.share(self._saved(with_code=True))

    def _saved(self, *, with_code: bool) -> files.Saved:
        """Return the record of the guest for a file."""
        self.leases.require_usable()
        compiled = self.open_code()
        key = None
        if with_code:
            circumstances = self.runtime.code_key(self.plan)
            key = key_of_code(self.plan, circumstances, sets_globals=compiled.sets_globals)
        return files.Saved(
            name=self.name,
            writer=f"memslot on {self.runtime.name}",
            plan=self.plan,
            images=dict(self.images),
            code={} if key is None else {key: compiled.serialise()},
            reseed=self.reseed,
        )

    def close(self) -> None:
        """Drop the images and the compiled code; unused slots give the image's memory back.

        Live instances go on.  Idempotent; raises SystemCallError if a slot cannot give an image back.
        """
        if self.closed:
            return
        self.closed = True
        while (live := self.ready.take()) is not None:
            self.leases.end_or_log(live)
        self.compiled = None
        self.leases.guests.discard(self)
        _close_images(self.leases, self.images)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # The images end by themselves, and on any thread.
        ready: Ready | None = getattr(self, "ready", None)  # making the guest may have failed
        if ready is not None:
            self.leases.dropped.extend(ready)
            if self.leases.thread_confined:
                self.leases.dropped_code.append(self.compiled)

    def __repr__(self) -> str:
        return f"<Guest {self.guest_id} on {self.runtime.name}{', closed' * self.closed}>"


class Lease:
    """The block of one request; see `Guest.lease`."""

    __slots__ = ("_guest", "_instance", "_wait_timeout")

    def __init__(self, guest: Guest, wait_timeout: float | None) -> None:
        self._guest = guest
        self._wait_timeout = wait_timeout
        self._instance: Instance | None = None

    def __enter__(self) -> Instance:
        guest = self._guest
        leases = guest.leases
        if self._instance is not None:
            raise InUse(f"a lease of {guest.name} is for one block; ask for another one")
        if leases.closed or (leases.thread_confined and get_ident() != leases.thread):
            leases.require_usable()
        if guest.closed or (live := guest.ready.take()) is None:
            instance = guest.instantiate(wait_timeout=self._wait_timeout)
        else:
            try:
                instance = Instance(guest, live)
                if live.wakes:
                    live.wake()
            except BaseException:
                # Its functions refer to it: without a handle only the garbage collector would find it, and its slot.
                leases.dropped.append(live)
                raise
        self._instance = instance
        return instance

    def __exit__(self, *_: object) -> None:
        """Reset the instance for the next lease, or close it if enough are ready."""
        instance, self._instance = self._instance, None
        if instance is None:
            return
        guest, leases, live = self._guest, instance.leases, instance.live
        if live is None or not live.open or live.generation != instance.generation:
            if not instance.closed:  # a reset makes another one
                raise instance.refusal()
            return
        if leases.thread_confined and get_ident() != leases.thread:
            leases.require_thread()
        ready = guest.ready
        if guest.closed or len(ready) >= leases.settings.ready_instances:
            instance.close()
            return
        try:
            if not instance.reset_in_place(live, live.generation + 1):
                live = instance.restart(live, None)
            instance.live = None
            if guest.is_snapshot:
                following = Instance(guest, live)
                guest.restored(following)
                following.live = None  # no handle outlives the end of a lease
        except Exception:  # the embedder's too: reseeding calls host functions and plugins
            if instance.live is not None:  # the reset was refused before it changed anything
                if not guest.closed:
                    raise
                # Another thread has closed the guest meanwhile, so there is no next lease.
                instance.close()  # type: ignore[unreachable]
                return
            # The request was served, and the pool counts the lost slot.  As text, because a kept record would keep
            # the traceback, and with it the slot's memory.
            _log.error(
                "an instance of %s could not be reset after its lease: %s",
                guest.name,
                traceback.format_exc(),
            )
            return
        except BaseException:
            instance.live = None
            leases.dropped.append(live)  # as in __enter__
            raise
        ready.append(live)
        # Append first, then look for waiters: `_wait_for` enters itself first, then looks here, so one sees the other.
        if (guest.closed or leases.waiting) and (given := ready.take()) is not None:
            leases.end_or_log(given)


def _build_images(leases: Leases, name: str, plan: Plan, built: dict[int, Image]) -> Plan:
    """Put the images of a plan into `built`, and return the plan without their contents."""
    for index, content in plan.contents.items():
        span, limit = images.span_of(content), leases.settings.image_limit
        if plan.has_contents and span > limit:
            raise MemoryTooLarge(f"the image of {name} {image_too_large(span, limit)}")
        image = leases.armed.build_image(replace(content, name=name))
        if image is None:  # no plugin builds images: the runtime copies the data segments
            if plan.has_contents:
                raise SnapshotRefused(
                    "no plugin builds images, and nothing else holds a snapshot or a saved guest; load memfd or"
                    " anonymous (settings plugins and blocked)"
                )
            _close_images(leases, built)
            built.clear()
            return guests.plan(plan.source, replace(plan.target, builds_images=False))
        built[index] = image
    # Drop the contents: they refer to a live memory or a file that others may change or close.
    return replace(plan, contents={})


def _close_images(leases: Leases, built: dict[int, Image]) -> None:
    with ExitStack() as each:  # also after one of them failed
        for image in built.values():
            each.callback(leases.plugins.forget_image, image)
            each.callback(image.close)


def _require_reseed(runtime: Runtime, plan: Plan, guest_name: str, reseed: str | None) -> None:
    """Raise ExportNotFound or ArgumentError if the guest cannot be called by `reseed` after each restore."""
    if reseed is None:
        return
    if not isinstance(reseed, str):
        raise ArgumentError(f"reseed is the name of an export, and not {reseed!r}")
    functions = runtime.function_names(plan)
    if functions is not None and reseed not in functions:
        raise ExportNotFound(
            f"the guest {guest_name} exports no function {reseed!r} to be called after each restore"
            f" (reseed); it exports: {', '.join(sorted(functions)[:20]) or 'none'}"
        )


def _seconds(wait_timeout: float) -> float:
    """Return the seconds to wait, of which an integer can be more than a float holds; raises SettingError."""
    if not isinstance(wait_timeout, (int, float)) or not wait_timeout >= 0:
        raise SettingError(
            f"wait_timeout = {shown(wait_timeout)} is not allowed: it is seconds, at least 0"
        )
    return float(min(wait_timeout, sys.float_info.max))
