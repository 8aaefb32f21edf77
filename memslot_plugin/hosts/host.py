"""Hosts: prepare, load and attach guests on one runtime, count what they do, and close everything.

Host.prepare -> Guest.instantiate -> Instance.call, reset, close
|                   |
Leases              Live: the runtime's part of one instance
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from memslot_hooks.types import PoolStatistics
from memslot_plugin._core import catch_up
from memslot_plugin.errors import ArgumentError, InUse, InvalidModule, shown
from memslot_plugin.files import guests as files
from memslot_plugin.files.share import SharedGuest
from memslot_plugin.guest import plan as guests
from memslot_plugin.guest.target import Target
from memslot_plugin.hosts.builtin import load_plugins
from memslot_plugin.hosts.guest import Guest
from memslot_plugin.hosts.instance import Instance
from memslot_plugin.hosts.leases import Leases
from memslot_plugin.hosts.live import Binding, Imports
from memslot_plugin.hosts.runtime import Reuse, Runtime
from memslot_plugin.hosts.wasi import Wasi
from memslot_plugin.settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Self

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


class Host:
    """Guests on one runtime, in slots.

    `settings` are frozen; `plugins` are the embedder's own, registered after those of the entry
    points.  Use it in a with statement: leaving the block ends every instance and closes
    everything.
    """

    def __init__(
        self,
        runtime: Runtime,
        settings: Settings | None = None,
        *,
        plugins: Iterable[object] = (),
    ) -> None:
        catch_up()
        self.name = runtime.name
        self.settings = Settings() if settings is None else settings
        self.target = Target(
            self.settings,
            import_memory=runtime.imports_memory,
            most_globals=runtime.most_globals,
            limits_growth=runtime.limits_growth,
        )
        self.plugins = load_plugins(self.settings, plugins)
        self.runtime = runtime
        self.leases = Leases(
            self.name, self.settings, self.plugins, thread_confined=runtime.thread_confined
        )
        runtime.open(self.leases)
        try:
            self.plugins.open_host(self.name, self.settings)
        except Exception:
            runtime.close()
            raise

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
        numbers; a RepeatedRandomness warning says where that may be so and nothing prevents it.

        Raises GuestNotFound, InvalidModule, MemoryTooLarge, SystemCallError, UsedAfterClose,
        WrongThread, ArgumentError, ExportNotFound (`reseed`); with `init` also SnapshotRefused and
        whatever an instance raises.
        """
        self.leases.require_usable()
        if init is not None and not isinstance(init, str) and not callable(init):
            raise ArgumentError(
                f"init is the name of an export, or is called with an instance, and not {init!r}"
            )
        self.leases.dropped_code.clear()
        data, label = self._read(source)
        guest = Guest.make(
            self,
            self.runtime,
            name or label,
            guests.plan(data, self.target),
            Binding.given(imports, wasi),
            reseed=reseed,
        )
        if init is not None:
            with guest, guest.instantiate() as instance:
                if callable(init):
                    init(instance)
                else:
                    instance.call(init)
                guest = guest.snapshot_of(instance, None)
        guest.announce()
        return guest

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
        """Return a guest from a file that `Guest.save` wrote, verified from its first byte to its last.

        `share_file`: the images are mapped from the file ("on"), so that all processes which load it
        share its pages; or they are copied into a sealed memfd ("off"), because a change of a
        mapped file changes the guests, and shortening it ends the process (SIGBUS).
        "auto" maps a file that only this user and root can write to, and copies any other.

        `trust_code`: run the machine code that the file may have.  The file's digest tells damage and
        not the writer, and machine code is not confined as a guest is: say yes only of files that
        no other user can have written.  Otherwise, and where the code is for another runtime or machine,
        the module is compiled again.  With `key`, which `Guest.save` was given too, the file is
        authentic, and its code is trusted.

        `imports` and `wasi` are as in `prepare`; `reseed` replaces what the guest was saved with.
        `Guest.loaded` says what was done.  Raises GuestNotFound, InvalidContainer with what is wrong
        with the file, Unsupported, and what `prepare` raises; nothing stays open or mapped then.
        """
        self.leases.require_usable()
        binding = Binding.given(imports, wasi)
        loading = files.load(
            path, self.target, share_file=share_file, trust_code=trust_code, key=key
        )
        with loading as found:
            return self._restored(found, binding, name, reseed)

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
        """Return a guest that another process shares, or another host of this one: `Guest.share`.

        Its images are mapped from the descriptors that came, if no process can change their files,
        and else copied.  `trust_code` runs the machine code that came along instead of compiling the
        module again: say yes where you know the process that shared it.  Everything else is as in `load`.
        """
        self.leases.require_usable()
        binding = Binding.given(imports, wasi)
        with files.attach(shared, self.target, trust_code=trust_code) as found:
            return self._restored(found, binding, name, reseed)

    def _restored(
        self, found: files.Found, binding: Binding, name: str | None, reseed: str | None
    ) -> Guest:
        """Make a guest of what was found in a file."""
        guest = Guest.make(
            self,
            self.runtime,
            name or found.name,
            found.plan,
            binding,
            reuse=Reuse(code=found.code),
            reseed=found.reseed if reseed is None else reseed,
        )
        reused = guest.compiled is not None and guest.compiled.reused
        guest.loaded = found.loaded(guest.images.values(), code_reused=reused)
        guest.announce()
        return guest

    def _read(self, source: Source) -> tuple[bytes, str]:
        """Return the bytes of a module, and a name for the guest."""
        if isinstance(source, (bytes, bytearray, memoryview)):
            return bytes(source), "module"
        if isinstance(source, str) and source.lstrip().startswith(("(", ";;")):
            return self.runtime.assemble(source), "module"
        if not isinstance(source, (str, os.PathLike)):
            raise ArgumentError(
                f"a guest is a path, the bytes of a module, or WebAssembly text, and not {shown(source)}"
            )
        path = Path(source)
        data = files.read_module(path)
        if path.suffix == ".wat":
            try:
                return self.runtime.assemble(data.decode()), path.stem
            except UnicodeDecodeError:
                raise InvalidModule(
                    f"{path} is not text in UTF-8, which a .wat file must be"
                ) from None
        return data, path.stem

    # -- the host's own life

    def statistics(self) -> HostStatistics:
        """Return the counters of this host and of its plugins' pools, read at once."""
        leases = self.leases
        leases.require_usable()
        self.runtime.settle()
        leases.end_dropped()
        return HostStatistics(
            host=self.name,
            guests=len(leases.guests),
            live_instances=len(leases),
            ready_instances=sum(map(len, leases.ready())),
            instances=leases.instances,
            resets=leases.resets_in_place + leases.resets_by_instantiation,
            resets_in_place=leases.resets_in_place,
            resets_by_instantiation=leases.resets_by_instantiation,
            pools=tuple(self.plugins.statistics()),
        )

    def close(self, *, force: bool = False) -> None:
        """Close guests, pools and the runtime; idempotent.

        Raises InUse while instances are live, and goes on serving; with `force` they are ended
        first, and what fails then is logged.  Instances that live in stores of the embedder's own,
        and those that bare wasmtime-py made on the engine, cannot be ended here: InUse, also with
        `force`.  Raises SystemCallError after giving back everything else.
        """
        leases = self.leases
        if leases.closed:
            return
        catch_up()
        leases.require_thread()
        leases.end_dropped()
        while leases.end_a_ready_one():
            pass
        if leases and not force:
            raise InUse(
                f"the {self.name} host has {len(leases)} live instances; close them first, or use close(force=True)"
            )
        leases.end_all()
        self.runtime.require_unused()
        for guest in leases.guests.listed():
            guest.close()
        leases.closed = True
        try:
            self.plugins.close_host(self.name)
        finally:
            self.runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(force=True)

    def __repr__(self) -> str:
        closed = ", closed" * self.leases.closed
        return f"<{type(self).__name__} {self.name}: {len(self.leases)} live instances{closed}>"
