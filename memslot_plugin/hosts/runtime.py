"""The protocol that an adapter to one runtime implements; a `Host` has one.

    assemble  WebAssembly text -> module
    compile   a plan, and code that may serve again -> Compiled
    live      Compiled, leased memories, imports -> Live, which `Leases.start` starts

An adapter never maps memory.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from memslot_hooks.types import HostMapping, LinearMemory
from memslot_plugin.guest.plan import MemoryReport, Plan, module_but_for_globals, runs_same_code
from memslot_plugin.hosts.leases import Leases
from memslot_plugin.hosts.live import Binding, Live
from memslot_plugin.wasm import ExternKind


class Compiled:
    """The code of one guest, made by `Runtime.compile`."""

    reused = False
    """True if the code came with the guest, from a file or another process."""
    sets_globals = False
    """True if the code is its parent's, so that an instance gets the values of its globals when it starts."""

    def __init__(self, plan: Plan, guest_name: str, binding: Binding) -> None:
        self.plan = plan
        self.guest_name = guest_name
        self.binding = binding
        self.reads_globals = plan.verdict.in_place and any(
            each.initial is None for each in plan.saved_globals
        )
        """True if only a started instance knows the first values of its globals, for the resets."""

    def serialise(self) -> bytes:
        """Return the code for `Reuse.code` of another process; called if `Runtime.code_key` is not None."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Reuse:
    """Code that may serve a guest: that of the guest it is a snapshot of, and what came with it."""

    parent: Any = None
    code: Mapping[str, bytes] = field(default_factory=dict)

    def of_parent(self, plan: Plan) -> Any:
        """Return the parent's `Compiled` if it serves the plan too, or None."""
        if self.parent is None or not runs_same_code(plan, self.parent.plan):
            return None
        return self.parent

    def saved(self, plan: Plan, circumstances: str | None) -> tuple[bytes, bool] | None:
        """Return code that came with the guest and fits, and True if it needs `sets_globals`; None if none does."""
        for sets_globals in (False, True) if self.code else ():
            key = key_of_code(plan, circumstances, sets_globals=sets_globals)
            if key is not None and key in self.code:
                return self.code[key], sets_globals
        return None


def key_of_code(plan: Plan, circumstances: str | None, *, sets_globals: bool) -> str | None:
    """Return the key of a plan's compiled code: the circumstances of its runtime, and the digest of the module.

    With `sets_globals` it is the module whatever its saved globals begin with.  None if there is no such code.
    """
    module = module_but_for_globals(plan) if sets_globals else plan.module
    if circumstances is None or module is None:
        return None
    which = "module but for its globals" if sets_globals else "module"
    return f"{circumstances}, {which} {hashlib.sha256(module).hexdigest()}"


class Runtime(abc.ABC):
    """The engine of one host."""

    name: ClassVar[str]
    imports_memory: ClassVar[bool] = False
    """True if a module gets a memory of ours only as an import."""
    limits_growth: ClassVar[bool] = False
    """True if the runtime limits its own memories and tables to the settings; else declared maximums do."""
    most_globals: ClassVar[int | None] = None
    """The number of globals above which a new instance is faster than restoring them; None for no such number."""
    growth: ClassVar[Literal["decide", "report"]] = "decide"
    thread_confined: ClassVar[bool] = False
    checks_bounds_in_code: bool = False
    leases: Leases

    @abc.abstractmethod
    def open(self, leases: Leases) -> None:
        """Make the engine or store; called once, before plugins are opened.  If it raises, nothing stays open."""

    @abc.abstractmethod
    def close(self) -> None:
        """Drop the engine or store."""

    @abc.abstractmethod
    def assemble(self, text: str) -> bytes:
        """Return WebAssembly text as a binary module; raises InvalidModule."""

    @abc.abstractmethod
    def compile(self, plan: Plan, name: str, binding: Binding, reuse: Reuse) -> Compiled:
        """Compile `plan.module`, exactly as the runtime alone would if `plan.native` is set; raises InvalidModule.

        `name` is the guest's for errors, and `binding` connects most of its instances.
        """

    @abc.abstractmethod
    def live(self, compiled: Any, memories: tuple[LinearMemory, ...], binding: Binding) -> Live:
        """Return an instance over these memories that has not started; runs nothing and keeps nothing."""

    def code_key(self, plan: Plan) -> str | None:
        """Return the circumstances that compiled code depends on: runtime, version, machine, settings.

        None if the runtime cannot serialise code.
        """
        return None

    def function_names(self, plan: Plan) -> Collection[str] | None:
        """Return the names of the exported functions; None if only the runtime knows."""
        if plan.structure is None:
            return None
        return {each.name for each in plan.structure.exports if each.kind is ExternKind.FUNCTION}

    def map_host_memory(
        self, memory: MemoryReport, maximum: int
    ) -> Callable[[], HostMapping] | None:
        """Return the call that makes an address range of the runtime's own, or None if plugins provide it.

        `maximum` is the memory's maximum under the settings, in bytes.
        """
        return None

    def settle(self) -> None:  # noqa: B027  # most runtimes keep nothing beyond their instances
        """Release what the runtime has needed longer than its instances; called before statistics are read."""

    def require_unused(self) -> None:  # noqa: B027  # most runtimes use no memory without an instance of ours
        """Raise InUse if the runtime still uses memories of instances that have ended."""
