"""The hook specifications: one typed method per hook, in the order in which a host calls them.

A plugin is a module, an object or a class (instantiated once per host, without arguments) whose
functions bear the names below and the `hookimpl` marker; it may leave out arguments that it does
not need.  *Lifecycle* hooks are called on every plugin.  *Deciding* hooks (`firstresult`) are asked
in pluggy's order until one plugin answers something other than None.  *Watching* hooks tell
everybody, and cost nothing while nobody implements them; what they raise is logged, but for
`memslot_instance_restored`.

The examples share these lines:

>>> from memslot_hooks import (
...     Answer, InitialContent, LinearMemory, MemoryRequest, PoolStatistics,
...     ResetResult, Segment, hookimpl,
... )
>>> from memslot_plugin.plugins import Plugins
>>> plugins = Plugins(entry_points=False)  # what a host holds; no installed plugin, for clarity
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
"""The one name of the markers, of the plugin manager and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class MemslotSpecs:
    """What hosts call and plugins implement."""

    @hookspec
    def memslot_register_hosts(self) -> Mapping[str, Callable[..., Any]]:
        """Name the hosts that this plugin adds, each with the factory that opens it.

        Every plugin is asked and the answers are merged.  The factory is called with what
        `open_host` was called with.  A name that two plugins register is a `PluginError` that
        names both.

        >>> class Runtime:
        ...     @hookimpl
        ...     def memslot_register_hosts(self):
        ...         return {"tiny": lambda **settings: "a host object"}
        >>> plugins.register(Runtime())
        'Runtime'
        >>> sorted(plugins.hosts())
        ['tiny']
        """
        raise NotImplementedError

    @hookspec
    def memslot_describe(self) -> Answer:
        """Say whether this plugin will answer requests on this machine, and why.

        Asked by `memslot doctor`, also before any host was opened, so it probes rather than
        remembers.  An exception becomes an `Answer` that does not answer, with the exception as its
        reason.

        >>> class Broken:
        ...     @hookimpl
        ...     def memslot_describe(self):
        ...         return Answer("broken", answers=False, reason="memfd_create: EPERM")
        >>> plugins.register(Broken(), name="broken")
        'broken'
        >>> plugins.answers()
        [Answer(plugin='broken', answers=False, reason='memfd_create: EPERM')]
        """
        raise NotImplementedError

    @hookspec
    def memslot_open_host(self, host: str, settings: Any) -> None:
        """Get ready for the host of that name, before its first memory.

        `settings` is the host's `memslot_plugin.settings.Settings` (sizes in bytes, durations in
        seconds).  An exception keeps the host from opening: every plugin then hears
        `memslot_close_host`, and the caller of `open_host` sees the exception as it is.  A plugin
        that is registered while a host is open hears this at once.

        >>> class Greeter:
        ...     @hookimpl
        ...     def memslot_open_host(self, host, settings):
        ...         print("opening", host)
        >>> plugins.register(Greeter())
        'Greeter'
        >>> plugins.open_host("fake", settings=None)
        opening fake
        """

    @hookspec(firstresult=True)
    def memslot_build_image(self, content: InitialContent) -> Image | None:
        """Turn the initial contents of one memory into this plugin's kind of image.

        Sizes and offsets of `content` are bytes.  Called once per guest and memory.  A segment's
        `backing` is a file that may be mapped instead of copying its bytes, and the content's `memory`
        the live memory of a snapshot, of which a plugin may keep only what differs.  None means
        "not mine"; when nobody answers, the guest has no image and its memory is initialised the
        ordinary way.  An answer that lacks part of the `Image` protocol is a `PluginError`.

        >>> class AllZeros:
        ...     kind, byte_size, extents = "zeros", 0, ()
        ...     def close(self): ...
        >>> class Zeros:
        ...     @hookimpl
        ...     def memslot_build_image(self, content):
        ...         return None if content.segments else AllZeros()
        >>> plugins.register(Zeros())
        'Zeros'
        >>> plugins.armed.build_image(InitialContent(65536)).kind
        'zeros'
        >>> plugins.armed.build_image(InitialContent(65536, (Segment(8, b"data"),))) is None
        True
        """

    @hookspec
    def memslot_guest_prepared(self, guest_id: str, report: Any) -> None:
        """Hear that a guest is ready, and what was rewritten or left alone and why.

        `report` is the record that `memslot inspect` prints.  Told once per `prepare`, after the
        images were built.  An exception is logged and changes nothing for the guest.

        >>> class Journal:
        ...     @hookimpl
        ...     def memslot_guest_prepared(self, guest_id, report):
        ...         print(guest_id, report)
        >>> plugins.register(Journal())
        'Journal'
        >>> plugins.armed.guest_prepared("echo", "1 memory, 1 image")
        echo 1 memory, 1 image
        """

    @hookspec(firstresult=True)
    def memslot_create_memory(self, request: MemoryRequest) -> LinearMemory | None:
        """Hand out a linear memory that holds the request's image over zeros.

        All sizes are bytes, `base` is an address.  `[base, base + minimum)` must be accessible, and
        an access to the rest of `reserved + guard` must fault.  A request whose `minimum` and
        `maximum` are 0 is for a memory that the runtime makes itself: no byte of the answer is
        used, but it counts until it is released, so that a limit holds for that guest as well.
        None means "not mine".  Raise `PoolExhausted` when every slot is in use: the host tells
        `memslot_pool_exhausted` and then its caller.  When nobody answers, or an answer is no
        `LinearMemory`, the host raises a `PluginError` that names the plugins which were asked.

        >>> class Shelf:
        ...     @hookimpl
        ...     def memslot_create_memory(self, request):
        ...         if request.image is None:  # a real one maps `request.reserved` bytes here
        ...             return LinearMemory(request, 0x7F00_0000_0000, request.minimum, owner=self)
        >>> plugins.register(Shelf())
        'Shelf'
        >>> plugins.armed.create_memory(request)
        <LinearMemory 65536 bytes at 0x7f0000000000 for echo[0]>
        """

    @hookspec(firstresult=True)
    def memslot_warm_memory(self, request: MemoryRequest, count: int) -> int | None:
        """Make up to `count` unused memories ready for this request before it comes; how many are.

        Nothing is handed out and no byte changes: images are laid and the pages that the guest
        usually writes are made resident.  None means "not mine", and when nobody answers it is 0.
        Raise `SystemCallError` when the kernel refuses.

        >>> class Stove:
        ...     @hookimpl
        ...     def memslot_warm_memory(self, request, count):
        ...         return min(count, 2)
        >>> plugins.register(Stove())
        'Stove'
        >>> plugins.armed.warm_memory(request, 8)
        2
        """

    @hookspec
    def memslot_memory_created(self, memory: LinearMemory) -> None:
        """Hear that a memory was handed out, before the guest's first instruction.

        Sizes of `memory` are bytes.  An exception is logged and the memory stays handed out.

        >>> class Census:
        ...     @hookimpl
        ...     def memslot_memory_created(self, memory):
        ...         print(memory.request.tenant, memory.byte_size)
        >>> plugins.armed.memory_created is None  # while nobody watches
        True
        >>> plugins.register(Census())
        'Census'
        >>> plugins.armed.memory_created(memory)
        ann 65536
        """

    @hookspec
    def memslot_pool_exhausted(self, request: MemoryRequest, limit: int, in_use: int) -> None:
        """Hear that a request found every slot leased: `in_use` of `limit` slots.

        Told by the host once per refused request, after `request.wait_timeout` seconds have passed
        and before the caller sees `PoolExhausted`.  An exception is logged.

        >>> class Pager:
        ...     @hookimpl
        ...     def memslot_pool_exhausted(self, limit, in_use):
        ...         print(f"{in_use} of {limit} slots")
        >>> plugins.register(Pager())
        'Pager'
        >>> plugins.armed.pool_exhausted(request, 64, 64)
        64 of 64 slots
        """

    @hookspec(firstresult=True)
    def memslot_grow_memory(self, memory: LinearMemory, byte_size: int) -> bool | None:
        """Make `[0, byte_size)` accessible and answer True, or refuse with False.

        `byte_size` is the new size of the whole memory in bytes; `memory.byte_size` still is the
        old one, and the host updates it after True.  None means "not mine"; no answer is a refusal,
        which the guest sees as a `memory.grow` of -1.  A plugin that limits without owning memories
        is `tryfirst` and answers False or None.

        Where `memory.request.growth` is "report" the runtime has grown the memory already: a False
        cannot undo that.

        >>> class Limit:
        ...     @hookimpl(tryfirst=True)
        ...     def memslot_grow_memory(self, memory, byte_size):
        ...         return False if byte_size > 2**20 else None
        >>> class Owner:
        ...     @hookimpl
        ...     def memslot_grow_memory(self, memory, byte_size):
        ...         return True  # a real one calls mprotect first
        >>> plugins.register(Limit()), plugins.register(Owner())
        ('Limit', 'Owner')
        >>> plugins.armed.grow_memory(memory, 2**17), plugins.armed.grow_memory(memory, 2**21)
        (True, False)
        """

    @hookspec(firstresult=True)
    def memslot_reset_memory(self, memory: LinearMemory) -> ResetResult | None:
        """Make a leased memory pristine again: its image over zeros, at its minimum size.

        The result counts bytes and nanoseconds.  The memory stays leased.  None means "not mine".
        Raise when the memory may not be pristine: the host then retires the instance.  When nobody
        answers, the host raises `PluginError`.

        >>> class Owner:
        ...     @hookimpl
        ...     def memslot_reset_memory(self, memory):
        ...         return ResetResult(dirty_bytes=4096, nanoseconds=1500, strategy="pagemap")
        >>> plugins.register(Owner())
        'Owner'
        >>> plugins.armed.reset_memory(memory)
        ResetResult(dirty_bytes=4096, nanoseconds=1500, strategy='pagemap', reason='')
        """

    @hookspec
    def memslot_memory_reset(self, memory: LinearMemory, result: ResetResult) -> None:
        """Hear that a memory was made pristine: how many bytes were dirty, how long it took, how.

        `result.dirty_bytes` is bytes, or None where the strategy cannot know; `result.nanoseconds`
        is the duration of the reset alone.  Told after a reset in place and after the reset of a
        release, but not where the release destroyed the memory instead (`RETIRED`).  An exception is
        logged.

        >>> class Meter:
        ...     @hookimpl
        ...     def memslot_memory_reset(self, result):
        ...         print(result.strategy, result.dirty_bytes)
        >>> plugins.register(Meter())
        'Meter'
        >>> plugins.armed.memory_reset(memory, ResetResult(8192, 2100, "pagemap"))
        pagemap 8192
        """

    @hookspec
    def memslot_instance_restored(self, instance: Any) -> None:
        """Hear that an instance of a snapshot starts, or is back, where the snapshot was taken.

        Everything in it is as in every other instance of that snapshot, also the state of its random
        numbers: this is the place to give it some of its own.  `instance` is the host's `Instance`,
        ready to be called.  Told after each instantiation and each reset, after the export that
        `prepare(reseed=...)` names.  Other than with the rest of the watching hooks, an exception closes
        the instance and is raised: nobody gets one that repeats what others drew.

        >>> class Reseed:
        ...     @hookimpl
        ...     def memslot_instance_restored(self, instance):
        ...         print("a new seed for", instance)
        >>> plugins.register(Reseed())
        'Reseed'
        >>> plugins.armed.instance_restored("an instance")
        a new seed for an instance
        """

    @hookspec(firstresult=True)
    def memslot_release_memory(self, memory: LinearMemory) -> ResetResult | None:
        """Take a leased memory back: pristine and ready for the next lease, or destroyed.

        The result counts bytes and nanoseconds.  After the answer the host never touches the memory
        again.  None means "not mine".  A memory that cannot be made pristine is destroyed instead
        of being kept.  If `exposed` is true, objects of the runtime's own may still reach the
        memory, and its `mapping` must not be handed out again.  When nobody answers, the
        host raises `PluginError`.

        >>> class Owner:
        ...     @hookimpl
        ...     def memslot_release_memory(self, memory):
        ...         return ResetResult(dirty_bytes=None, nanoseconds=900, strategy="madvise")
        >>> plugins.register(Owner())
        'Owner'
        >>> plugins.armed.release_memory(memory).strategy
        'madvise'
        """

    @hookspec
    def memslot_statistics(self) -> PoolStatistics | None:
        """Read the counters of this plugin's pool at once; None from a plugin that has no pool.

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
        >>> plugins.register(Pool())
        'Pool'
        >>> [(pool.plugin, pool.in_use, pool.limit) for pool in plugins.statistics()]
        [('shelf', 1, 64)]
        """

    @hookspec
    def memslot_forget_image(self, image: Image) -> None:
        """Purge an image from every unused slot, because its guest was closed.

        A slot that is leased at this moment is purged when it comes back.  Every plugin is told,
        also about images that it did not build, and also when another one raises; the first
        exception then reaches the caller.

        >>> class Shelf:
        ...     @hookimpl
        ...     def memslot_forget_image(self, image):
        ...         print("purging", image)
        >>> plugins.register(Shelf())
        'Shelf'
        >>> plugins.forget_image("an image")
        purging an image
        """

    @hookspec
    def memslot_close_host(self, host: str) -> None:
        """Give back what was held for the host of that name; no memory of it is in use any more.

        Also called on a plugin whose `memslot_open_host` never ran or raised.  Every plugin is
        told, also when another one raises; the first exception then reaches the caller.

        >>> class Greeter:
        ...     @hookimpl
        ...     def memslot_close_host(self, host):
        ...         print("closing", host)
        >>> plugins.register(Greeter())
        'Greeter'
        >>> plugins.open_host("fake", settings=None)
        >>> plugins.close_host("fake")
        closing fake
        """


HOOKS: tuple[str, ...] = tuple(name for name in vars(MemslotSpecs) if name.startswith("memslot_"))
"""Every hook, in the order in which a host calls them."""

DECIDING: tuple[str, ...] = tuple(
    name for name in HOOKS if getattr(MemslotSpecs, name).memslot_spec["firstresult"]
)
"""Asked in turn until one plugin answers."""

WATCHING: tuple[str, ...] = (
    "memslot_guest_prepared",
    "memslot_memory_created",
    "memslot_pool_exhausted",
    "memslot_memory_reset",
    "memslot_instance_restored",
)
"""Told to everybody; armed, so that nobody watching costs a comparison with None."""

HEEDED: tuple[str, ...] = ("memslot_instance_restored",)
"""Watching hooks whose exceptions are raised instead of logged: nobody goes on as if they had succeeded."""

LIFECYCLE: tuple[str, ...] = tuple(
    name for name in HOOKS if name not in DECIDING and name not in WATCHING
)
"""Called on every plugin, outside of the hot path."""
