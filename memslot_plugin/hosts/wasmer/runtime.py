"""The host on wasmer-python 1.1.0 (CPython up to 3.10), whose objects are confined to their thread.

wasmer has no place for an allocator.  So it maps every memory itself, a slot is made over that mapping, and the
rewritten guest imports the memory.  wasmer also grows memories by itself, and the growth is reported afterwards.

wasmer can call functions of an instance that is gone through a table that it shares, so a guest that imports a table is
left to wasmer alone.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import wasmer

from memslot_hooks.types import HostMapping, LinearMemory
from memslot_plugin._core.limits import system_call_error
from memslot_plugin.errors import MemslotError, Unsupported
from memslot_plugin.guest.plan import MemoryReport, Plan
from memslot_plugin.hosts.leases import Leases
from memslot_plugin.hosts.live import Binding
from memslot_plugin.hosts.runtime import Reuse, Runtime
from memslot_plugin.hosts.versions import installed_version
from memslot_plugin.hosts.wasmer.errors import Boundary, at_compile
from memslot_plugin.hosts.wasmer.link import Code, Compiled
from memslot_plugin.hosts.wasmer.live import WasmerLive
from memslot_plugin.hosts.wasmer.values import (
    WASM32_BYTES,
    Owner,
    address_of,
    new_store,
    reserved_bytes,
)
from memslot_plugin.wasm import WASM_PAGE

_log = logging.getLogger("memslot.wasmer")


class WasmerRuntime(Runtime):
    """The store of a `WasmerHost`."""

    name = "wasmer"
    imports_memory = True
    growth: ClassVar[Literal["decide", "report"]] = "report"
    thread_confined = True

    def open(self, leases: Leases) -> None:
        """Make the store."""
        self.leases = leases
        self.store = new_store()
        self._reserved = reserved_bytes()

    def close(self) -> None:
        """Drop the store."""
        self.store = None

    def assemble(self, text: str) -> bytes:
        """Return WebAssembly text as a binary module; raises InvalidModule."""
        with Boundary(at_compile, "the text"):
            return bytes(wasmer.wat2wasm(text))

    def compile(self, plan: Plan, name: str, binding: Binding, reuse: Reuse) -> Compiled:
        """Compile a guest's module, or take code that serves again; raises InvalidModule, Unsupported."""
        parent: Compiled | None = reuse.of_parent(plan)
        saved = None if parent is not None else self._saved(plan, name, reuse)
        if parent is not None:
            code, sets_globals = parent.code, bool(plan.saved_globals)
        else:
            code, sets_globals = saved or (Code.compile(self.store, plan, name), False)
        compiled = Compiled(code, plan, name, binding)
        compiled.sets_globals, compiled.reused = sets_globals, saved is not None
        if plan.structure is None:
            raise Unsupported(
                f"{name} cannot be bounded by the settings, because wasmer has no limits of its own."
                f" {plan.native}"
            )
        return compiled

    def _saved(self, plan: Plan, name: str, reuse: Reuse) -> tuple[Code, bool] | None:
        """Return code that came with the guest, and true if globals are to be set; None if none fits."""
        found = reuse.saved(plan, self.code_key(plan))
        if found is None:
            return None
        try:
            return Code.load(self.store, plan, name, found[0]), found[1]
        except MemslotError as error:
            _log.info("the code of %s is compiled again: %s", name, error)
            return None

    def code_key(self, plan: Plan) -> str:  # all code is for this machine
        """Return the version, and the machine with the features of its processor."""
        # wasmer compiles for the processor that it runs on, and does not check it when it loads code.
        return f"wasmer {installed_version(self.name)}, {_machine()}"

    def live(
        self, compiled: Compiled, memories: tuple[LinearMemory, ...], binding: Binding
    ) -> WasmerLive:
        """Return an instance that has not started."""
        return WasmerLive(self.leases, compiled, memories, binding)

    def map_host_memory(self, memory: MemoryReport, maximum: int) -> Callable[[], HostMapping]:
        """Return the call that makes a memory of wasmer's, which reserves its address range."""
        largest = min(maximum, WASM32_BYTES) // WASM_PAGE
        kind = wasmer.MemoryType(memory.minimum_bytes // WASM_PAGE, largest, False)
        shape = (memory.minimum_bytes, maximum)

        def create() -> HostMapping:
            try:
                made = wasmer.Memory(self.store, kind)
            except RuntimeError as error:
                raise system_call_error(
                    errno.ENOMEM, f"mapping {self._reserved} bytes of address space in wasmer"
                ) from error
            owner = Owner(made)
            return HostMapping(
                address_of(made), made.data_size, self._reserved, owner, owner.forget, shape
            )

        return create


@functools.cache
def _machine() -> str:
    """Return the kind of this machine, with a digest of the features of its processor."""
    try:
        described = Path("/proc/cpuinfo").read_bytes()
    except OSError:
        described = b""
    features = sorted(
        {line for line in described.splitlines() if line.startswith((b"flags", b"Features"))}
    )
    return f"{os.uname().machine} {hashlib.sha256(b''.join(features)).hexdigest()[:16]}"
