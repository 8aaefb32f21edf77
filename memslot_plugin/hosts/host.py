"""What every host shares: the lives of guests and instances, and who calls which hook when.

    Host.prepare -> Guest.instantiate -> Instance.call, reset, close
    (base)           (prepared)           (instance)
                                             |
                                           Live: what one runtime holds for one instance (live)

An adapter subclasses `Host` (how to assemble, compile and start) and `Live` (how to call, grow and
end).  Everything that leases, resets and releases memories is here, once; an adapter never maps
memory.
"""

from __future__ import annotations

import abc
import collections
import logging
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from memslot_hooks.types import (
    RETIRED,
    HostMapping,
    LinearMemory,
    MemoryRequest,
    PoolStatistics,
)
from memslot_plugin._core import after_fork, catch_up
from memslot_plugin.errors import (
    ArgumentError,
    ExportNotFound,
    InUse,
    InvalidModule,
    MemslotError,
    PoolExhausted,
    UsedAfterClose,
    WrongThread,
    shown,
)
from memslot_plugin.guest import plan as guests
from memslot_plugin.guest.target import Target
from memslot_plugin.hosts import saved
from memslot_plugin.hosts.builtin import load_plugins
from memslot_plugin.hosts.guest import Guest
from memslot_plugin.hosts.live import Binding, Imports, Live
from memslot_plugin.hosts.living import Living
from memslot_plugin.hosts.wasi import Wasi
from memslot_plugin.settings import Settings
from memslot_plugin.wasm import ExternKind

if TYPE_CHECKING:
    from typing_extensions import Self

    from memslot_plugin.files.share import SharedGuest
    from memslot_plugin.hosts.instance import Instance

_log = logging.getLogger("memslot.hosts")

Source = str | bytes | bytearray | memoryview | os.PathLike[str]
"""A path to a .wasm or .wat file, the bytes of a module, or WebAssembly text (a str that starts
with a parenthesis).
"""


@dataclass(frozen=True, slots=True)
class HostStatistics:
    """The counters of one host, read at once; totals count since it was opened.

    `ready_instances` are those of the live ones that wait for a lease.
    """

    host: str
    guests: int
    live_instances: int
    ready_instances: int
    instances: int
    resets: int
    resets_in_place: int
    resets_by_instantiation: int
    pools: tuple[PoolStatistics, ...]


class Host(abc.ABC):
    """The adapter to one runtime: prepares guests and instantiates them in slots.

    `settings` are frozen; `plugins` are the embedder's own, registered after those of the entry
    points.  Use it in a with statement: leaving the block ends every instance and closes
    everything.
    """

    name: ClassVar[str]
    imports_memory: ClassVar[bool] = False
    """Whether a memory of ours reaches a module only as an import."""
    limits_what_grows: ClassVar[bool] = False
    """True if the runtime limits memories of its own, and tables, to the settings; else declared maximums do."""
    most_globals: ClassVar[int | None] = None
    """More globals than these are restored faster by a new instance; None: there is no such number."""
    growth: ClassVar[Literal["decide", "report"]] = "decide"
    checks_bounds_in_code: bool = False
    thread_confined: ClassVar[bool] = False

    def __init__(self, settings: Settings | None = None, *, plugins: Iterable[object] = ()) -> None:
        catch_up()
        self.settings = Settings() if settings is None else settings
        self.target = Target(
            self.settings,
            import_memory=self.imports_memory,
            most_globals=self.most_globals,
            limits_growth=self.limits_what_grows,
        )
        self.plugins = load_plugins(self.settings, plugins)
        self._armed = self.plugins.armed
        self._thread = threading.get_ident()
        # What is live belongs to its handle: what it imports may know the handle, and a collection has to see that.
        # Its memories do not go with it, because it has to end first.
        self._live: dict[int, tuple[weakref.ref[Live], tuple[LinearMemory, ...]]] = {}
        self._begun: dict[int, Live] = {}
        """Instances that have begun and have no handle yet, by id, where a runtime has to be told of their end."""
        self._dropped: collections.deque[Live] = collections.deque()
        self._guests: Living[Guest] = Living()
        self._relics: collections.deque[object] = collections.deque()
        """Compiled code of guests that nobody could reach any more, which has to end on the host's thread."""
        self._waiting: set[object] = set()
        """An object for each request that waits for a slot."""
        self._closed = False
        self._gave_back = False
        """Whether closing, which may be cut short, has come to its end."""
        self._instances = self._resets_in_place = self._resets_by_instantiation = 0
        _OPEN.add(self)
        self._open_runtime()
        try:
            self.plugins.open_host(self.name, self.settings)
        except BaseException:
            self._close_runtime()
            raise

    # -- what an adapter provides

    @abc.abstractmethod
    def _open_runtime(self) -> None:
        """Make the runtime's engine or store; called once, before plugins are opened."""

    @abc.abstractmethod
    def _close_runtime(self) -> None:
        """Let go of them."""

    @abc.abstractmethod
    def _assemble(self, text: str) -> bytes:
        """WebAssembly text as a binary module; raises InvalidModule."""

    @abc.abstractmethod
    def _compile(self, guest: Guest) -> Any:
        """`guest.plan.module` compiled (with `guest.plan.native` set: exactly as the runtime alone
        would); raises InvalidModule.
        """

    @abc.abstractmethod
    def _start(self, guest: Guest, memories: tuple[LinearMemory, ...], binding: Binding) -> Live:
        """Instantiate over these memories.  If it raises, the runtime no longer uses them."""

    def _code_key(self, guest: Guest) -> str | None:
        """What has to be the same, beside the module, for compiled code of this guest to be used again: the
        runtime and its version, the machine, and settings that the code depends on.  None where the
        runtime cannot serialise code.
        """
        return None

    def _parents_code(self, guest: Guest) -> Any:
        """What `_compile` made for the guest whose snapshot this is, if that serves this one as well; None
        otherwise.  Who uses it sets `guest.sets_globals`, and gives globals their values in `_start`.
        """
        parent = guest._parent
        if parent is None or not guests.runs_same_code(guest.plan, parent.plan):
            return None
        return parent.compiled

    def _saved_code(self, guest: Guest) -> tuple[bytes, bool] | None:
        """Code that came with the guest and fits, for `_compile`, and whether globals have to be given their
        values in `_start` then.
        """
        for sets_globals in (False, True) if guest._saved_code else ():
            key = saved.key_of_code(guest, sets_globals=sets_globals)
            if key is not None and key in guest._saved_code:
                return guest._saved_code[key], sets_globals
        return None

    def _serialise(self, guest: Guest) -> bytes:
        """What `_compile` made, to be found by `_saved_code` of another process; called where `_code_key` is not
        None.
        """
        raise NotImplementedError

    def _map_host_memory(
        self, memory: guests.MemoryReport, maximum: int
    ) -> Callable[[], HostMapping] | None:
        """How the runtime makes an address range of its own for this memory, or None if plugins
        provide it.

        `maximum` is what the settings leave of the memory's own, in bytes.
        """
        return None

    def _leave_behind(self) -> None:  # noqa: B027 - where one thread serves, none stays behind
        """In a child of a fork: end what threads that are not here were in the middle of."""

    # -- preparing

    def prepare(
        self,
        source: Source,
        *,
        imports: Imports | None = None,
        wasi: Wasi | None = None,
        name: str | None = None,
        init: str | Callable[[Instance], object] | None = None,
        reseed: str | None = None,
    ) -> Guest:
        """Read, rewrite and compile a module, and build the images of its memories: once per guest,
        not per instance.

        `imports` and `wasi` are what every instance gets unless `instantiate` is told otherwise.
        With `init`, the name of an export or a callable that gets an instance, the module is
        initialised once, and every instance of the guest starts from the snapshot taken then.
        `reseed` names an export without parameters that every instance of a snapshot of this guest
        calls when it starts and after each reset, because otherwise all of them draw the same random
        numbers; a RepeatedRandomness warning says where that may be so and nobody cares for it.

        Raises GuestNotFound, InvalidModule, MemoryTooLarge, SystemCallError, UsedAfterClose,
        WrongThread, ArgumentError, ExportNotFound (`reseed`); with `init` also SnapshotRefused and
        whatever an instance raises.
        """
        self._require_usable()
        if init is not None and not isinstance(init, str) and not callable(init):
            raise ArgumentError(
                f"init is the name of an export, or is called with an instance, and not {init!r}"
            )
        if self._relics:
            self._end_dropped()
        data, label = self._read(source)
        guest = Guest.of_module(self, name or label, data, Binding.given(imports, wasi))
        guest.reseed = reseed
        if init is None:
            return self._prepared(guest)
        try:
            self._require_reseed(guest)
            with guest.instantiate() as instance:
                if callable(init):
                    init(instance)
                else:
                    instance.call(init)
                return instance._snapshot(None, depth=4)
        finally:
            guest.close()

    def load(
        self,
        path: str | os.PathLike[str],
        *,
        imports: Imports | None = None,
        wasi: Wasi | None = None,
        name: str | None = None,
        reseed: str | None = None,
        share_file: Literal["auto", "on", "off"] = "auto",
        trust_code: bool = False,
        key: bytes | None = None,
    ) -> Guest:
        """A guest from a file that `Guest.save` wrote, verified from its first byte to its last.

        `share_file`: the images are mapped from the file ("on"), so that all processes which load it
        share its pages; or they are copied into a sealed memfd ("off"), because whoever changes a
        mapped file changes it under the guests, and whoever shortens it ends the process (SIGBUS).
        "auto" maps a file that only this user and root can write to, and copies any other.

        `trust_code`: run the machine code that the file may have.  The file's digest tells damage and
        not who wrote it, and machine code is not confined as a guest is: say yes only of files that
        nobody else can have written.  Otherwise, and where the code is for another runtime or machine,
        the module is compiled again.  With `key`, which `Guest.save` was given too, the file is
        authentic, and its code is trusted.

        `imports` and `wasi` are as in `prepare`; `reseed` replaces what the guest was saved with.
        `Guest.loaded` says what was done.  Raises GuestNotFound, InvalidContainer with what is wrong
        with the file, Unsupported, and what `prepare` raises; nothing stays open or mapped then.
        """
        self._require_usable()
        return self._prepared(
            saved.load(
                self,
                path,
                binding=Binding.given(imports, wasi),
                name=name,
                reseed=reseed,
                share_file=share_file,
                trust_code=trust_code,
                key=key,
            )
        )

    def attach(
        self,
        shared: SharedGuest,
        *,
        imports: Imports | None = None,
        wasi: Wasi | None = None,
        name: str | None = None,
        reseed: str | None = None,
        trust_code: bool = False,
    ) -> Guest:
        """A guest that another process shares, or another host of this one: `Guest.share`.

        Its images are mapped from the descriptors that came, if nobody can change what is behind them,
        and else copied.  `trust_code` runs the machine code that came along instead of compiling the
        module again: say yes where you know who shared it.  Everything else is as in `load`.
        """
        self._require_usable()
        binding = Binding.given(imports, wasi)
        return self._prepared(
            saved.attach(
                self, shared, binding=binding, name=name, reseed=reseed, trust_code=trust_code
            )
        )

    def _prepared(self, guest: Guest) -> Guest:
        """A guest is ready: it is the host's to close, and watchers hear of it."""
        try:
            self._require_reseed(guest)
        except BaseException:
            guest.close()
            raise
        self._guests.add(guest)
        if self._armed.guest_prepared is not None:
            self._armed.guest_prepared(guest.guest_id, guest.report)
        return guest

    def _require_reseed(self, guest: Guest) -> None:
        """Whatever shall be called after each restore is there; raises ExportNotFound, ArgumentError."""
        name = guest.reseed
        if name is None:
            return
        if not isinstance(name, str):
            raise ArgumentError(f"reseed is the name of an export, and not {name!r}")
        functions = self._function_names(guest)
        if functions is not None and name not in functions:
            raise ExportNotFound(
                f"the guest {guest.name} exports no function {name!r} to be called after each restore"
                f" (reseed); it exports: {', '.join(sorted(functions)[:20]) or 'none'}"
            )

    def _function_names(self, guest: Guest) -> Collection[str] | None:
        """The functions that instances of this guest can be called by; None if only the runtime knows."""
        structure = guest.plan.structure
        if structure is None:
            return None
        return {each.name for each in structure.exports if each.kind is ExternKind.FUNCTION}

    def _read(self, source: Source) -> tuple[bytes, str]:
        if isinstance(source, (bytes, bytearray, memoryview)):
            return bytes(source), "module"
        if isinstance(source, str) and source.lstrip().startswith(("(", ";;")):
            return self._assemble(source), "module"
        if not isinstance(source, (str, os.PathLike)):
            raise ArgumentError(
                f"a guest is a path, the bytes of a module, or WebAssembly text, and not {shown(source)}"
            )
        path = Path(source)
        data = saved.read_module(path)
        if path.suffix == ".wat":
            try:
                return self._assemble(data.decode()), path.stem
            except UnicodeDecodeError:
                raise InvalidModule(
                    f"{path} is not text in UTF-8, which a .wat file must be"
                ) from None
        return data, path.stem

    # -- leasing and releasing

    def _lease(self, requests: Sequence[MemoryRequest]) -> tuple[LinearMemory, ...]:
        """Ask the plugins for every memory; all or none.  Instances that only wait for a lease make room."""
        leased: list[LinearMemory] = []
        armed = self._armed
        try:
            for request in requests:
                memory = None
                while memory is None:
                    try:
                        create = (
                            self._wait_for_memory if request.wait_timeout else armed.create_memory
                        )
                        leased.append(memory := create(request))
                    except PoolExhausted:
                        if request.wait_timeout or not self._end_a_ready_one():
                            raise
                if armed.memory_created is not None:
                    armed.memory_created(memory)
        except BaseException as error:
            with suppress(MemslotError):  # what is being raised already came first
                self._release(leased)
            if isinstance(error, PoolExhausted) and armed.pool_exhausted is not None:
                armed.pool_exhausted(request, error.limit, error.in_use)
            raise
        return tuple(leased)

    def _wait_for_memory(self, request: MemoryRequest) -> LinearMemory:
        """Ask the plugins; instances that only wait for a lease make room before anybody has to wait."""
        armed = self._armed
        if any(guest._ready for guest in self._guests.listed()):
            with suppress(PoolExhausted):
                memory = armed.create_memory(replace(request, wait_timeout=0.0))
                memory.request = request
                return memory
        waiter = object()
        try:
            self._waiting.add(waiter)  # whoever gives a lease back from now on gives the slot back
            self._end_a_ready_one()
            return armed.create_memory(request)
        finally:
            self._waiting.discard(waiter)

    def _end_a_ready_one(self) -> bool:
        """End an instance that waits for a lease, of the guest that has the most; False if there is
        none.
        """
        for guest in sorted(
            self._guests.listed(), key=lambda guest: len(guest._ready), reverse=True
        ):
            ready = guest._take_ready()
            if ready is not None:
                self._end_ready(ready)
                return True
        return False

    def _end_ready(self, ready: Instance) -> None:
        """End an instance that waited for a lease, of whose handle nobody else knows."""
        live = ready._now
        if live is not None:
            self._end_or_log(live)
        ready._now = None

    def _cut_short(self, memories: tuple[LinearMemory, ...]) -> None:  # noqa: B027 - where nothing can be left over
        """Whatever began over these memories, in a `_start` of which nothing came back, ends."""

    def _release(self, memories: Sequence[LinearMemory]) -> None:
        """Give every memory back, also when one of them fails; raises the first failure."""
        failure: BaseException | None = None
        armed = self._armed
        for memory in memories:
            try:
                result = armed.release_memory(memory)
                if armed.memory_reset is not None and result.strategy != RETIRED:
                    armed.memory_reset(memory, result)
            except MemslotError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _renew(self, memory: LinearMemory) -> LinearMemory:
        """A leased memory, pristine again; another one where the runtime grew this one and cannot
        shrink it.

        If it raises, the memory is released.
        """
        armed = self._armed
        if memory.mapping is not None and (
            memory.exposed or memory.byte_size != memory.request.minimum
        ):
            self._release([memory])
            return self._lease([memory.request])[0]
        try:
            armed.reset_and_notify(memory)
        except BaseException:
            with suppress(MemslotError):  # the plugin says once more what is being raised already
                self._release([memory])
            raise
        return memory

    def _grow(self, memory: LinearMemory, byte_size: int) -> bool:
        """Grow a memory to `byte_size` bytes; false if its maximum or a plugin refuses that."""
        before, maximum = memory.byte_size, memory.request.maximum
        if maximum is not None and byte_size > maximum:
            return False
        if not self._armed.grow_memory(memory, byte_size):
            return False
        memory.byte_size = byte_size
        if self._armed.memory_grown is not None and byte_size != before:
            self._armed.memory_grown(memory, byte_size)
        return True

    def _report_growth(self, memory: LinearMemory, byte_size: int) -> None:
        """Record that a runtime has grown a memory by itself, and notify the watchers."""
        if byte_size != memory.byte_size:
            memory.record_growth(byte_size)
            if self._armed.memory_grown is not None:
                self._armed.memory_grown(memory, byte_size)

    def _end(self, live: Live, generation: int | None = None) -> None:
        """Dispose of what is live and release its memories; once.  Raises InUse while it runs.

        Nothing happens if it does not serve the lease `generation` any more, where one is given.
        Whatever else it raises, what is left to do is done at the host's next call.
        """
        if generation is not None and generation != live.generation:
            return
        if live.running or live.held:
            self._require_idle(live)
        try:
            disposed = live.dispose(generation)
            if disposed is None:
                return
            self._unlist(live)
            try:
                if disposed:
                    memories, live.memories = live.memories, ()
                    if live.given_away:
                        for memory in memories:
                            memory.exposed = True
                    self._release(memories)
            finally:
                if live.fork is not None:
                    live.fork._forks.discard(live)
                    if not live.fork._forks:
                        live.fork.close()
            live.ended = True
        except BaseException:
            self._drop_lease(live, generation)
            raise

    def _drop_lease(self, live: Live, generation: int | None) -> None:
        """As `_drop`, unless that lease has ended: what is live serves another one then."""
        if generation in (None, live.generation):
            self._drop(live)

    def _require_idle(self, live: Live) -> None:
        if live.running or live.held:
            raise InUse(
                f"an instance on {self.name} cannot be closed or reset while a call of it runs, by its host functions"
                " or another thread; let the call return first"
            )

    def _list(self, live: Live) -> None:
        """A live instance has its handle."""
        self._live[id(live)] = weakref.ref(live), live.memories
        live.dropped, live.open = self._dropped, True
        self._begun.pop(id(live), None)

    def _unlist(self, live: Live) -> None:
        """Its end has begun; `live` itself has its memories from now on."""
        live.open = False
        self._live.pop(id(live), None)

    def _listed(self) -> list[Live]:
        """The live instances; other threads may begin and end some meanwhile."""
        found = (reference() for reference, _ in list(self._live.values()))  # as in Living.listed
        return [live for live in found if live is not None]

    def _drop(self, live: Live) -> None:
        """The handle of a live instance became unreachable.  Runs in a finalizer, on any thread:
        only notes it.
        """
        self._dropped.append(live)

    def _end_dropped(self) -> None:
        """End the instances whose handles were dropped without being closed."""
        self._relics.clear()
        for _ in range(len(self._dropped)):
            try:
                live = self._dropped[0]  # which stays there until it has ended
            except IndexError:  # another thread has ended the last one
                break
            self._dropped.rotate(-1)
            if not live.ended and not live.running and not live.held:
                self._end_or_log(live)
                live.ended = True
            if live.ended:
                with suppress(ValueError):  # as above
                    self._dropped.remove(live)

    def _end_or_log(self, live: Live) -> None:
        """End an instance whose owner is not the caller: a reset that fails destroys its slot, and is logged."""
        try:
            self._end(live)
        except InUse:
            raise
        except MemslotError as error:
            # As text, as in the pool: a kept record would keep the traceback, and with it the slot's memory.
            _log.error(
                "an instance on %s could not be reset, its slot is destroyed: %s",
                self.name,
                str(error),
            )

    # -- the host's own life

    def statistics(self) -> HostStatistics:
        """The counters of this host and of its plugins' pools, read at once."""
        self._require_usable()
        self._end_dropped()
        return HostStatistics(
            host=self.name,
            guests=len(self._guests),
            live_instances=len(self._live),
            ready_instances=sum(len(guest._ready) for guest in self._guests.listed()),
            instances=self._instances,
            resets=self._resets_in_place + self._resets_by_instantiation,
            resets_in_place=self._resets_in_place,
            resets_by_instantiation=self._resets_by_instantiation,
            pools=tuple(self.plugins.statistics()),
        )

    def close(self, *, force: bool = False) -> None:
        """Close guests, pools and the runtime; twice is a no-op.

        Raises InUse while instances are live, and goes on serving; with `force` they are ended
        first, and what fails then is logged.  Raises SystemCallError after giving back everything
        else; closing again then tries again.
        """
        if self._gave_back:
            return
        catch_up()
        self._require_thread()
        self._end_dropped()
        for guest in self._guests.listed():
            guest._end_ready()
        if self._live and not force:
            raise InUse(
                f"the {self.name} host has {len(self._live)} live instances; close them first, or use close(force=True)"
            )
        for live in self._listed():
            self._end_or_log(live)
        self._end_dropped()  # a collection since may have cleared the references that were listed
        for guest in self._guests.listed():
            guest.close()
        self._closed = True
        try:
            self.plugins.close_host(self.name)
        finally:
            self._close_runtime()
        self._gave_back = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(force=True)

    def _require_usable(self) -> None:
        catch_up()
        if self._closed:
            raise UsedAfterClose(f"the {self.name} host was closed; open a new one")
        if self.thread_confined and threading.get_ident() != self._thread:
            self._require_thread()

    def _require_thread(self) -> None:
        if self.thread_confined and threading.get_ident() != self._thread:
            raise WrongThread(
                f"the {self.name} host was opened on thread {self._thread} and used on {threading.get_ident()};"
                f" {self.name} confines its objects to their thread: open one host per thread"
            )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {len(self._live)} live instances{', closed' * self._closed}>"


_OPEN: Living[Host] = Living()


def _after_fork() -> None:
    for host in _OPEN.listed():
        host._leave_behind()


after_fork(_after_fork)
