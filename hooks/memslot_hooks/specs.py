"""The hook specifications: one typed method per hook, in the order in which a host calls them.

A plugin is a module, an object or a class (instantiated once per host, without arguments).  Its
functions have the names below and the `hookimpl` marker, and may leave out arguments.  *Lifecycle*
hooks are called on every plugin.  *Deciding* hooks (`firstresult`) are asked in pluggy's order until
a plugin answers something other than None; the body of the specification is the answer when all
plugins are silent.  *Watching* hooks notify every plugin and cost nothing without an implementation;
their exceptions are logged and change nothing, except those of `memslot_instance_restored`.

The examples share these lines:

>>> from memslot_hooks import (
...     Answer, InitialContent, LinearMemory, MemoryRequest, PoolStatistics,
...     ResetResult, Segment, hookimpl,
... )
>>> from memslot_plugin.plugins import Plugins
>>> plugins = Plugins(entry_points=False)  # the plugins of a host, here without installed ones
>>> request = MemoryRequest(
...     minimum=65536, maximum=None, reserved=2**32, guard=2**25, image=None,
...     guest_id="echo", memory_index=0, host="fake", tenant="ann",
... )
>>> memory = LinearMemory(request, base=0x7F00_0000_0000, byte_size=65536, owner=None)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from memslot_hooks.types import (
        Answer,
        Image,
        InitialContent,
        LinearMemory,
        MemoryRequest,
        PoolStatistics,
        ResetResult,
    )

PROJECT = "memslot"
"""The name of the markers, of the plugin manager and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class MemslotSpecs:
    """Hooks that hosts call and plugins implement."""

    @hookspec
    def memslot_register_hosts(self) -> Mapping[str, Callable[..., Any]]:
        """Return the hosts that this plugin adds: each name with the factory that opens the host.

        Every plugin is asked and the answers are merged; memslot registers its own hosts by this
        hook.  The factory is called with the settings, with `plugins=` for `Host`, and with the other
        keyword arguments of `open_host`.  It may have a method `unavailable()` that returns the
        reason why the host cannot be opened here, or None.  A name that two plugins register is a
        `PluginError` that names both.

        >>> class Runtime:
        ...     @hookimpl
        ...     def memslot_register_hosts(self):
        ...         return {"tiny": lambda **settings: "a host object"}
        >>> _ = plugins.register(Runtime())
        >>> sorted(plugins.hosts())
        ['tiny']
        """
        raise NotImplementedError

    @hookspec
    def memslot_describe(self) -> Answer:
        """Return an `Answer`: true if this plugin will answer requests on this machine, and why.

        `memslot doctor` asks, also before a host is open; so probe, and do not rely on earlier calls.
        An exception becomes an `Answer` that is false, with the exception as its reason.

        >>> class Broken:
        ...     @hookimpl
        ...     def memslot_describe(self):
        ...         return Answer("broken", answers=False, reason="memfd_create: EPERM")
        >>> _ = plugins.register(Broken(), name="broken")
        >>> plugins.answers()
        [Answer(plugin='broken', answers=False, reason='memfd_create: EPERM')]
        """
        raise NotImplementedError

    @hookspec
    def memslot_open_host(self, host: str, settings: Any) -> None:
        """Prepare for the host of that name, before its first memory.

        `settings` is the host's `memslot_plugin.settings.Settings` (sizes in bytes, durations in
        seconds).  An exception keeps the host from opening: `memslot_close_host` is called on every
        plugin, and the exception reaches the caller of `open_host` unchanged.  On a plugin that is
        registered later this is called at once for each open host.

        >>> class Greeter:
        ...     @hookimpl
        ...     def memslot_open_host(self, host, settings):
        ...         print("opening", host)
        >>> _ = plugins.register(Greeter())
        >>> plugins.open_host("fake", settings=None)
        opening fake
        """

    @hookspec(firstresult=True)
    def memslot_build_image(self, content: InitialContent) -> Image | None:
        """Build this plugin's kind of image from the initial contents of one memory.

        Called once per guest and memory; sizes and offsets of `content` are bytes.  A segment's
        `backing` is a file that may be mapped instead of copying its bytes.  The content's `memory`
        is the live memory of a snapshot, of which an image may store only what differs.  None means
        "not mine".  If all plugins are silent, the guest has no image and the runtime initialises its
        memory.  An answer that lacks part of the `Image` protocol is a `PluginError`.

        >>> class AllZeros:
        ...     kind, byte_size, extents = "zeros", 0, ()
        ...     def close(self): ...
        >>> class Zeros:
        ...     @hookimpl
        ...     def memslot_build_image(self, content):
        ...         return None if content.segments else AllZeros()
        >>> _ = plugins.register(Zeros())
        >>> plugins.armed.build_image(InitialContent(65536)).kind
        'zeros'
        >>> plugins.armed.build_image(InitialContent(65536, (Segment(8, b"data"),))) is None
        True
        """

    @hookspec
    def memslot_guest_prepared(self, guest_id: str, report: Any) -> None:
        """Note that a guest is ready; `report` says what was rewritten or left alone, and why.

        Called once per `prepare`, after the images are built.  `report` is the record that
        `memslot inspect` prints.

        >>> class Journal:
        ...     @hookimpl
        ...     def memslot_guest_prepared(self, guest_id, report):
        ...         print(guest_id, report)
        >>> _ = plugins.register(Journal())
        >>> plugins.armed.guest_prepared("echo", "1 memory, 1 image")
        echo 1 memory, 1 image
        """

    @hookspec(firstresult=True)
    def memslot_create_memory(self, request: MemoryRequest) -> LinearMemory | None:
        """Lease a linear memory that holds the request's image over zeros.

        All sizes are bytes, `base` is an address.  `[base, base + minimum)` must be accessible, and
        an access to the rest of `reserved + guard` must fault.  A request whose `minimum` and
        `maximum` are 0 is for a memory that the runtime makes itself.  No byte of the answer is used
        then, but it counts until it is released, so that limits hold for that guest as well.  None
        means "not mine".  Raise `PoolExhausted` if every slot is in use: the host then calls
        `memslot_pool_exhausted` and raises it to its caller.  If all plugins are silent, or the
        answer is no `LinearMemory`, the host raises a `PluginError` that names the plugins.

        >>> class Shelf:
        ...     @hookimpl
        ...     def memslot_create_memory(self, request):
        ...         if request.image is None:  # a real one maps `request.reserved` bytes here
        ...             return LinearMemory(request, 0x7F00_0000_0000, request.minimum, owner=self)
        >>> _ = plugins.register(Shelf())
        >>> plugins.armed.create_memory(request)
        <LinearMemory 65536 bytes at 0x7f0000000000 for echo[0]>
        """
        raise NotImplementedError

    @hookspec(firstresult=True)
    def memslot_warm_memory(self, request: MemoryRequest, count: int) -> int | None:
        """Prepare up to `count` unused memories for this request and return how many are ready.

        Nothing is leased and no byte changes: images are mapped, and pages that the guest usually
        writes become resident.  None means "not mine"; if all plugins are silent, the answer is 0.
        Raise `SystemCallError` if the kernel refuses.

        >>> class Stove:
        ...     @hookimpl
        ...     def memslot_warm_memory(self, request, count):
        ...         return min(count, 2)
        >>> _ = plugins.register(Stove())
        >>> plugins.armed.warm_memory(request, 8)
        2
        """
        return 0

    @hookspec
    def memslot_memory_created(self, memory: LinearMemory) -> None:
        """Note that a memory was leased, before the guest's first instruction.

        >>> class Census:
        ...     @hookimpl
        ...     def memslot_memory_created(self, memory):
        ...         print(memory.request.tenant, memory.byte_size)
        >>> plugins.armed.memory_created is None  # without a watcher
        True
        >>> _ = plugins.register(Census())
        >>> plugins.armed.memory_created(memory)
        ann 65536
        """

    @hookspec
    def memslot_pool_exhausted(self, request: MemoryRequest, limit: int, in_use: int) -> None:
        """Note that a request found every slot leased: `in_use` of `limit` slots.

        Called once per refused request, after `request.wait_timeout` seconds and before the caller
        gets `PoolExhausted`.

        >>> class Pager:
        ...     @hookimpl
        ...     def memslot_pool_exhausted(self, limit, in_use):
        ...         print(f"{in_use} of {limit} slots")
        >>> _ = plugins.register(Pager())
        >>> plugins.armed.pool_exhausted(request, 64, 64)
        64 of 64 slots
        """

    @hookspec(firstresult=True)
    def memslot_grow_memory(self, memory: LinearMemory, byte_size: int) -> bool | None:
        """Make `[0, byte_size)` accessible and return True, or return False to refuse the growth.

        Called before the growth.  `byte_size` is the new size of the whole memory in bytes;
        `memory.byte_size` is the old one, and the host updates it after True.  None means "not mine".
        If all plugins are silent, the growth is refused.  The guest gets -1 from a refused
        `memory.grow`.  A plugin that limits memories without owning them is `tryfirst` and answers
        False or None.

        A host whose runtime grows memories by itself (`memory.request.growth` is "report") does not
        call this hook.  The request's `maximum` is the only limit there, `memory.record_growth` tells
        the owner, and `memslot_memory_grown` the watchers.

        >>> class Limit:
        ...     @hookimpl(tryfirst=True)
        ...     def memslot_grow_memory(self, memory, byte_size):
        ...         return False if byte_size > 2**20 else None
        >>> class Owner:
        ...     @hookimpl
        ...     def memslot_grow_memory(self, memory, byte_size):
        ...         return True  # a real one calls mprotect first
        >>> _ = plugins.register(Limit()), plugins.register(Owner())
        >>> plugins.armed.grow_memory(memory, 2**17), plugins.armed.grow_memory(memory, 2**21)
        (True, False)
        """
        return False

    @hookspec
    def memslot_memory_grown(self, memory: LinearMemory, byte_size: int) -> None:
        """Note that a memory has grown to `byte_size` bytes, which `memory.byte_size` already says.

        Called on every host, after `memslot_grow_memory` granted the growth, or once the host sees
        that the runtime grew the memory by itself, at the latest when the call into the guest returns.

        >>> class Ledger:
        ...     @hookimpl
        ...     def memslot_memory_grown(self, memory, byte_size):
        ...         print(memory.request.tenant, "has", byte_size)
        >>> _ = plugins.register(Ledger())
        >>> plugins.armed.memory_grown(memory, 2**17)
        ann has 131072
        """

    @hookspec(firstresult=True)
    def memslot_reset_memory(self, memory: LinearMemory) -> ResetResult | None:
        """Reset a leased memory from dirty to pristine: its image over zeros, at its minimum size.

        The result counts bytes and nanoseconds.  The memory stays leased.  None means "not mine".
        Raise if the memory may not be pristine: the host then retires the instance.  If all plugins
        are silent, the host raises `PluginError`.

        >>> class Owner:
        ...     @hookimpl
        ...     def memslot_reset_memory(self, memory):
        ...         return ResetResult(dirty_bytes=4096, nanoseconds=1500, strategy="pagemap")
        >>> _ = plugins.register(Owner())
        >>> plugins.armed.reset_memory(memory)
        ResetResult(dirty_bytes=4096, nanoseconds=1500, strategy='pagemap', reason='')
        """
        raise NotImplementedError

    @hookspec
    def memslot_memory_reset(self, memory: LinearMemory, result: ResetResult) -> None:
        """Note that a memory was reset; `result` has the dirty bytes, the duration and the strategy.

        `result.dirty_bytes` is bytes, or None if the strategy cannot know; `result.nanoseconds` is
        the duration of the reset alone.  Called after a reset in place and after the reset of a
        release, but not if the release destroyed the memory (`RETIRED`).

        >>> class Meter:
        ...     @hookimpl
        ...     def memslot_memory_reset(self, result):
        ...         print(result.strategy, result.dirty_bytes)
        >>> _ = plugins.register(Meter())
        >>> plugins.armed.memory_reset(memory, ResetResult(8192, 2100, "pagemap"))
        pagemap 8192
        """

    @hookspec
    def memslot_instance_restored(self, instance: Any) -> None:
        """Give an instance of a snapshot randomness of its own, after its start or reset.

        Its state equals that of every other instance of the snapshot, random numbers included.
        `instance` is the host's `Instance`, ready to be called.  Called after each instantiation and
        each reset, after the export that `prepare(reseed=...)` names.  Unlike in other watching hooks,
        an exception closes the instance and is raised, because an instance that was not reseeded
        would repeat the random numbers of others.

        >>> class Reseed:
        ...     @hookimpl
        ...     def memslot_instance_restored(self, instance):
        ...         print("a new seed for", instance)
        >>> _ = plugins.register(Reseed())
        >>> plugins.armed.instance_restored("an instance")
        a new seed for an instance
        """

    @hookspec(firstresult=True)
    def memslot_release_memory(self, memory: LinearMemory) -> ResetResult | None:
        """Take a leased memory back: reset it for the next lease, or destroy it.

        The result counts bytes and nanoseconds.  After the answer the host never touches the memory
        again.  None means "not mine".  Destroy a memory that cannot be made pristine.  If
        `memory.exposed` is true, objects of the runtime's own may still reach the memory, and its
        `mapping` must not be leased again.  If all plugins are silent, the host raises `PluginError`.

        >>> class Owner:
        ...     @hookimpl
        ...     def memslot_release_memory(self, memory):
        ...         return ResetResult(dirty_bytes=None, nanoseconds=900, strategy="madvise")
        >>> _ = plugins.register(Owner())
        >>> plugins.armed.release_memory(memory).strategy
        'madvise'
        """
        raise NotImplementedError

    @hookspec
    def memslot_statistics(self) -> PoolStatistics | None:
        """Return the counters of this plugin's pool, read at once; None if the plugin has no pool.

        Counts are slots and events since the pool was made.  Every plugin is asked.  An answer of
        another type is a `PluginError`.

        >>> class Pool:
        ...     @hookimpl
        ...     def memslot_statistics(self):
        ...         return PoolStatistics(
        ...             plugin="shelf", limit=64, in_use=1, idle=63, warm=0, created=1, destroyed=0,
        ...             leases=1, affinity_hits=0, remaps=0, resets=0, failed_resets=0,
        ...             exhausted=0, purged=0,
        ...         )
        >>> _ = plugins.register(Pool())
        >>> [(pool.plugin, pool.in_use, pool.limit) for pool in plugins.statistics()]
        [('shelf', 1, 64)]
        """

    @hookspec
    def memslot_forget_image(self, image: Image) -> None:
        """Purge an image from every unused slot, because its guest was closed.

        A slot that is leased at this moment is purged when it is released.  Called on every plugin,
        also for images that another plugin built, and also after a plugin raised.  The first
        exception then reaches the caller; the others are logged.

        >>> class Shelf:
        ...     @hookimpl
        ...     def memslot_forget_image(self, image):
        ...         print("purging", image)
        >>> _ = plugins.register(Shelf())
        >>> plugins.forget_image("an image")
        purging an image
        """

    @hookspec
    def memslot_close_host(self, host: str) -> None:
        """Free what was made for the host of that name; none of its memories is leased any more.

        Called once on every plugin, also on one whose `memslot_open_host` never ran or raised, and
        also after a plugin raised.  The first exception then reaches the caller; the others are
        logged.

        >>> class Greeter:
        ...     @hookimpl
        ...     def memslot_close_host(self, host):
        ...         print("closing", host)
        >>> _ = plugins.register(Greeter())
        >>> plugins.open_host("fake", settings=None)
        >>> plugins.close_host("fake")
        closing fake
        """


HOOKS: tuple[str, ...] = tuple(name for name in vars(MemslotSpecs) if name.startswith("memslot_"))
"""Every hook, in the order in which a host calls them."""

DECIDING: tuple[str, ...] = tuple(
    name for name in HOOKS if getattr(MemslotSpecs, name).memslot_spec["firstresult"]
)
"""Hooks that are asked in turn until a plugin answers."""

WATCHING: tuple[str, ...] = (
    "memslot_guest_prepared",
    "memslot_memory_created",
    "memslot_pool_exhausted",
    "memslot_memory_grown",
    "memslot_memory_reset",
    "memslot_instance_restored",
)
"""Hooks that notify every plugin; armed, so that without a watcher they cost a comparison with None."""

RAISING: tuple[str, ...] = ("memslot_instance_restored",)
"""Watching hooks whose exceptions are raised instead of logged."""

LIFECYCLE: tuple[str, ...] = tuple(
    name for name in HOOKS if name not in DECIDING and name not in WATCHING
)
"""Hooks that are called on every plugin, outside of the hot path."""
