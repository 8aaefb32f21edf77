"""A host without a runtime: guests are real modules, and their functions are Python.

For tests of plugins and of code that uses memslot: memories are leased, grown and reset through the
same hooks as anywhere, and every access from a function goes through the bounds-checked
`instance.memory`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from threading import get_ident
from typing import Any, Literal

from memslot_hooks.types import LinearMemory
from memslot_plugin._core import ffi
from memslot_plugin.errors import ExportNotFound, GrowthRefused, GuestTrap, InvalidModule
from memslot_plugin.hosts.guest import Guest
from memslot_plugin.hosts.host import Host
from memslot_plugin.hosts.live import Binding, Live
from memslot_plugin.hosts.memory import WASM_PAGE


class FakeHost(Host):
    """Runs `functions` (name -> callable) instead of code; each is called with a `FakeLive` before
    its own arguments.
    """

    name = "fake"
    checks_bounds_in_code = True

    def __init__(
        self, *args: Any, functions: Mapping[str, Callable[..., Any]] | None = None, **kwargs: Any
    ) -> None:
        self.functions = dict(functions or {})
        super().__init__(*args, **kwargs)

    def _open_runtime(self) -> None:
        """There is none."""

    def _close_runtime(self) -> None:
        """There is none."""

    def _leave_behind(self) -> None:
        """In a child of a fork: what another thread held is let go by none, and no thread waits for it."""
        for live in self._listed():
            assert isinstance(live, FakeLive)
            if (live.held or live.running) and live.thread != get_ident():
                self._unlist(live)
                live.held, live.ended = 0, True
                live.entries.clear()

    def _assemble(self, text: str) -> bytes:
        raise InvalidModule("the fake host has no assembler; give it the bytes of a module")

    def _compile(self, guest: Guest) -> Any:
        if guest.plan.native is not None:
            raise InvalidModule(
                f"the fake host has no runtime for {guest.name}: {guest.plan.native}"
            )
        return guest.plan

    def _function_names(self, guest: Guest) -> Collection[str]:
        return self.functions

    def _start(self, guest: Guest, memories: tuple[LinearMemory, ...], binding: Binding) -> Live:
        return FakeLive(self, guest, memories)


class _Entry:
    """One call that runs: gone with its frame, also if an exception comes before the call's last line."""


class FakeLive(Live):
    """A live fake instance, and what its functions get: `read`, `write` and `grow` on its own
    memories.
    """

    def __init__(self, host: FakeHost, guest: Guest, memories: tuple[LinearMemory, ...]) -> None:
        self._host = host
        self._guest = guest
        self.memories = memories
        self.thread = 0
        """The thread that was inside last."""
        self.entries: weakref.WeakSet[_Entry] = weakref.WeakSet()

    @property
    def running(self) -> int:  # type: ignore[override]
        """The number of calls that run."""
        return len(self.entries)

    def hold(self, generation: int, key: int, *, alone: bool = False) -> None:
        self.thread = get_ident()
        super().hold(generation, key, alone=alone)

    @property
    def guest_name(self) -> str:
        return self._guest.name

    def read(self, index: int, offset: int, length: int) -> bytes:
        """`length` bytes at `offset` of memory `index`; traps outside of it."""
        return bytes(ffi.buffer(self._at(index, offset, length), length))

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Put `data` at `offset` of memory `index`; traps outside of it."""
        ffi.memmove(self._at(index, offset, len(data)), data, len(data))

    def _at(self, index: int, offset: int, length: int) -> Any:
        base, byte_size = self.locate(index)
        if offset < 0 or offset + length > byte_size:
            raise GuestTrap(
                f"out of bounds memory access: [{offset}, {offset + length}) of {byte_size} bytes"
            )
        return ffi.cast("uint8_t *", base + offset)

    def function(self, name: str) -> Callable[..., Any]:
        try:
            implementation = self._host.functions[name]
        except KeyError:
            raise ExportNotFound(
                f"the fake host has no function {name!r}; it has {', '.join(sorted(self._host.functions)) or 'none'}"
            ) from None

        def call(generation: int, *arguments: Any) -> Any:
            entry = _Entry()
            self.entries.add(entry)
            self.thread = get_ident()
            try:
                if generation != self.admits or self.ended:
                    self.refuse(generation)
                return implementation(self, *arguments)
            finally:
                self.entries.discard(entry)

        return call

    def exports(self) -> Mapping[str, str]:
        return dict.fromkeys(self._host.functions, "func")

    def global_value(self, name: str, generation: int) -> Any:
        if generation != self.admits or self.ended:
            self.refuse(generation)
        raise ExportNotFound(f"a fake guest has no globals, so none is called {name!r}")

    def set_global(self, name: str, value: Any, generation: int) -> None:
        self.global_value(name, generation)

    def locate(self, index: int) -> tuple[int, int]:
        for memory in self.memories:
            if memory.request.memory_index == index:
                return memory.base, memory.byte_size
        raise ExportNotFound(f"memory {index} of {self._guest.name} is not one of its own")

    def grow(self, index: int, pages: int, generation: int | None = None) -> int:
        """Grow memory `index` by `pages` of 64 KiB; returns the pages before, raises
        GrowthRefused.
        """
        if generation is not None and (generation != self.admits or self.ended):
            self.refuse(generation)
        for memory in self.memories:
            if memory.request.memory_index == index:
                before = memory.byte_size
                if pages < 0 or not self._host._grow(memory, before + pages * WASM_PAGE):
                    raise GrowthRefused(
                        f"memory {index} of {self._guest.name} may not grow by {pages} pages"
                    )
                return before // WASM_PAGE
        raise ExportNotFound(f"memory {index} of {self._guest.name} is not one of its own")

    def output(self, stream: Literal["stdout", "stderr"]) -> bytes:
        return b""

    def restore(self, generation: int) -> None:
        """Its memories are all that it has."""
        self.held = 0
        self.generation = self.admits = generation

    def saved_values(self) -> dict[int, int | None]:
        return {each.index: each.initial for each in self._guest.plan.saved_globals}

    def dispose(self, generation: int | None = None) -> bool | None:
        if generation not in (None, self.generation):
            return None
        if self.running:  # a call began just now: the host's next call after it ends the instance
            self._host._drop(self)
            return None
        self.admits = -1  # no lease: no call begins from here on
        return True

    @property
    def native(self) -> Any:
        return self
