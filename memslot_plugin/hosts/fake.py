"""A host without a runtime: guests are real modules, and their functions are Python.

For tests of plugins and of code that uses memslot: memories are leased, grown and reset through the
same hooks as anywhere, and every access from a function goes through the bounds-checked
`instance.memory`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from memslot_hooks.types import LinearMemory
from memslot_plugin._core import ffi
from memslot_plugin.errors import ExportNotFound, GrowthRefused, GuestTrap, InvalidModule
from memslot_plugin.guest.plan import Plan
from memslot_plugin.hosts.host import Host
from memslot_plugin.hosts.leases import Leases
from memslot_plugin.hosts.live import Binding, Live
from memslot_plugin.hosts.runtime import Compiled, Reuse, Runtime
from memslot_plugin.wasm import WASM_PAGE


class FakeHost(Host):
    """Runs `functions` (name -> callable) instead of code; each is called with a `FakeLive` before
    its own arguments.
    """

    def __init__(
        self, *args: Any, functions: Mapping[str, Callable[..., Any]] | None = None, **kwargs: Any
    ) -> None:
        self.functions = dict(functions or {})
        super().__init__(FakeRuntime(self.functions), *args, **kwargs)


class FakeRuntime(Runtime):
    """Python functions in the place of a runtime."""

    name = "fake"
    checks_bounds_in_code = True

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        self.functions = functions

    def open(self, leases: Leases) -> None:
        self.leases = leases

    def close(self) -> None:
        """Do nothing."""

    def assemble(self, text: str) -> bytes:
        raise InvalidModule("the fake host has no assembler; give it the bytes of a module")

    def compile(self, plan: Plan, name: str, binding: Binding, reuse: Reuse) -> Compiled:
        if plan.native is not None:
            raise InvalidModule(f"the fake host has no runtime for {name}: {plan.native}")
        return Compiled(plan, name, binding)

    def function_names(self, plan: Plan) -> Collection[str]:
        return self.functions

    def live(
        self, compiled: Compiled, memories: tuple[LinearMemory, ...], binding: Binding
    ) -> Live:
        return FakeLive(self, compiled, memories, binding)


class FakeLive(Live):
    """A live fake instance, and the first argument of its functions: `read`, `write` and `grow` on its own
    memories.
    """

    def __init__(
        self,
        runtime: FakeRuntime,
        compiled: Compiled,
        memories: tuple[LinearMemory, ...],
        binding: Binding,
    ) -> None:
        super().__init__(compiled.guest_name, memories, binding)
        self._runtime = runtime
        self._compiled = compiled
        self._calls: weakref.WeakSet[Any] = weakref.WeakSet()
        """A lock per call, locked while the call runs."""

    @property
    def running(self) -> int:  # type: ignore[override]
        """The number of calls that run."""
        return sum(each.locked() for each in list(self._calls))

    def start(self) -> None:
        """Do nothing: no code runs."""

    def read(self, index: int, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset` of memory `index`; traps outside of it."""
        return bytes(ffi.buffer(self._at(index, offset, length), length))

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Write `data` at `offset` of memory `index`; traps outside of it."""
        ffi.memmove(self._at(index, offset, len(data)), data, len(data))

    def _at(self, index: int, offset: int, length: int) -> Any:
        base, byte_size = self.locate(index)
        if offset < 0 or offset + length > byte_size:
            raise GuestTrap(
                f"out of bounds memory access: [{offset}, {offset + length}) of {byte_size} bytes"
            )
        return ffi.cast("uint8_t *", base + offset)

    def function(self, name: str) -> Callable[..., Any]:
        functions = self._runtime.functions
        try:
            implementation = functions[name]
        except KeyError:
            raise ExportNotFound(
                f"the fake host has no function {name!r}; it has {', '.join(sorted(functions)) or 'none'}"
            ) from None

        def call(generation: int, *arguments: Any) -> Any:
            running = threading.Lock()
            self._calls.add(running)
            # A lock ends in C, where no signal comes: a call that went on running would keep the lease from its end.
            with running:
                self._admit(generation)
                return implementation(self, *arguments)

        return call

    def _admit(self, generation: int) -> None:
        if generation != self.admits or self.ended:
            self.refuse(generation)

    def exports(self) -> Mapping[str, str]:
        return dict.fromkeys(self._runtime.functions, "func")

    def global_value(self, name: str, generation: int) -> Any:
        self._admit(generation)
        raise ExportNotFound(f"a fake guest has no globals, so none is called {name!r}")

    def set_global(self, name: str, value: Any, generation: int) -> None:
        self.global_value(name, generation)

    def _own(self, index: int) -> LinearMemory:
        for memory in self.memories:
            if memory.request.memory_index == index:
                return memory
        raise ExportNotFound(f"memory {index} of {self.guest_name} is not one of its own")

    def locate(self, index: int) -> tuple[int, int]:
        memory = self._own(index)
        return memory.base, memory.byte_size

    def grow(self, index: int, pages: int, generation: int | None = None) -> int:
        """Grow memory `index` by `pages` of 64 KiB; return the pages before.  Raises GrowthRefused."""
        if generation is not None:
            self._admit(generation)
        memory = self._own(index)
        before = memory.byte_size
        if pages < 0 or not self._runtime.leases.grow(memory, before + pages * WASM_PAGE):
            raise GrowthRefused(
                f"memory {index} of {self.guest_name} may not grow by {pages} pages"
            )
        return before // WASM_PAGE

    def output(self, stream: Literal["stdout", "stderr"]) -> bytes:
        return b""

    def restore(self, generation: int) -> None:
        self.held = 0
        self.generation = self.admits = generation

    def saved_values(self) -> dict[int, int | None]:
        return {each.index: each.initial for each in self._compiled.plan.saved_globals}

    def close(self, generation: int | None = None) -> bool | None:
        if generation not in (None, self.generation):
            return None
        self.require_idle()
        self.admits = -1  # no lease
        return True

    @property
    def native(self) -> Any:
        return self
