"""The one boundary where wasmtime's errors become memslot's.

Each class here inherits from wasmtime-py's too, so that a caller catches what bare wasmtime-py would raise.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from memslot_plugin._core import ffi, lib
from memslot_plugin._core.limits import errno_in_text
from memslot_plugin.errors import (
    ExportNotFound,
    GuestExit,
    GuestTrap,
    InUse,
    LinkError,
    MemoryTooLarge,
    MemslotError,
    PoolExhausted,
    Unsupported,
    UsedAfterClose,
    cause_of,
    printable,
)
from memslot_plugin.hosts.live import ended
from memslot_plugin.hosts.wasmtime.bridge import (
    error_at,
    take_last_exception,
    taken,
    wasmtime,
    wasmtime_ffi,
)
from memslot_plugin.wasm import Offsets

PYTHON_EXCEPTION = "python exception"
"""wasmtime-py's message for an exception in a host function that it runs itself."""


NATIVE_ERRORS = (wasmtime.WasmtimeError, wasmtime.Trap, wasmtime.ExitTrap)
"""The errors of wasmtime-py's own."""


class _Native:
    """The common part of the errors below: `native` is wasmtime's own error, or None in a copy."""

    native: Any = None
    args: tuple[Any, ...]

    def ptr(self) -> Any:
        """Return wasmtime-py's pointer; raises UsedAfterClose for an error of another process."""
        if self.native is None:
            raise UsedAfterClose("wasmtime's own error stayed in the process that raised it")
        return self.native.ptr()

    def __str__(self) -> str:
        return str(self.args[0])


class Frame(NamedTuple):
    """A function that was running, as `wasmtime.Frame` describes it."""

    func_index: int
    func_name: str | None
    module_name: str | None
    module_offset: int
    func_offset: int


class WasmtimeTrap(_Native, GuestTrap, wasmtime.Trap):
    """The guest trapped: a GuestTrap and a wasmtime.Trap with `message`, `frames` and `trap_code`."""

    native: wasmtime.Trap

    def __init__(
        self, message: str, native: wasmtime.Trap | None = None, offsets: Offsets | None = None
    ) -> None:
        GuestTrap.__init__(self, message, native)
        self._offsets = offsets

    @functools.cached_property
    def message(self) -> str:
        """wasmtime's message, with a backtrace at offsets of the module that was given."""  # noqa: D403  # a name
        moved = {
            native.module_offset: frame.module_offset
            for native, frame in zip(self.native.frames, self.frames, strict=True)
        }

        def given(found: re.Match[str]) -> str:
            at = int(found[2], 16)
            return f"{found[1]}{moved.get(at, at):#{len(found[2])}x}"

        text = re.sub(r"(?m)^( *\d+: +)(0x[0-9a-f]+)", given, self.native.message)
        return "\n".join(map(printable, text.split("\n")))

    @functools.cached_property
    def frames(self) -> list[Frame]:  # type: ignore[override]  # these can be pickled
        """The functions that were running, the innermost first, at offsets of the module that was given."""
        frames = [
            Frame(*(getattr(each, name) for name in Frame._fields)) for each in self.native.frames
        ]
        if self._offsets is None:
            return frames
        given = self._offsets.given
        return [
            each._replace(module_offset=given(each.func_index, each.module_offset))
            for each in frames
        ]

    @functools.cached_property
    def trap_code(self) -> wasmtime.TrapCode | None:
        """The kind of the trap."""
        return self.native.trap_code

    def __reduce__(self) -> tuple[Any, ...]:
        # Read from wasmtime's error what a copy needs: the copy has no `native`.
        _ = self.message, self.frames, self.trap_code
        self._offsets = None
        return super().__reduce__()


class WasmtimeFailure(_Native, GuestTrap, wasmtime.WasmtimeError):
    """The guest ended with an error that is no trap: a GuestTrap and a wasmtime.WasmtimeError."""

    def __init__(self, message: str, native: wasmtime.WasmtimeError | None = None) -> None:
        GuestTrap.__init__(self, message, native)


class WasmtimeExit(_Native, GuestExit, wasmtime.ExitTrap):
    """The guest called proc_exit: a GuestExit and a wasmtime.ExitTrap with `code`."""

    def __init__(self, code: int, native: wasmtime.ExitTrap | None = None) -> None:
        GuestExit.__init__(self, code)
        self.native = native


def one_sentence(message: str) -> str:
    """Return an error's message on one line, without its backtrace: what happened, then why."""
    said, *causes = message.split("Caused by:")
    lines = [line.strip() for part in causes for line in part.splitlines()]
    if not said.startswith("error while executing"):
        lines = [line.strip() for line in said.splitlines()] + lines
    # Several causes are numbered.
    lines = [re.sub(r"^\d+: ", "", line).removeprefix("wasm trap: ") for line in lines]
    return "; ".join(line.rstrip(":;") for line in lines if line) or message.strip()


def translated(error: BaseException, name: str, offsets: Offsets | None = None) -> BaseException:
    """Return an error of wasmtime-py's, raised while the guest `name` ran, as memslot's; any other as it is."""
    if isinstance(error, MemslotError):
        return error
    if isinstance(error, wasmtime.Trap):
        said = f"the guest {name} trapped: {one_sentence(error.message)}"
        return WasmtimeTrap(said, error, offsets)
    if isinstance(error, wasmtime.ExitTrap):
        return WasmtimeExit(error.code, error)
    if isinstance(error, wasmtime.WasmtimeError):
        return WasmtimeFailure(f"the guest {name} failed: {one_sentence(str(error))}", error)
    return error


_LIMITS = {
    "exceeds memory limits": " (memory_limit)",
    "exceeds table limits": " (table_limit)",
    "table count too high": " (tables_per_instance)",
    "GC heap out of memory": " (heap_limit)",
    "memory count too high": " (a module that memslot does not understand may define a single one)",
}
"""The words of wasmtime's limiter, and the setting that is the limit."""


def at_start(error: wasmtime.WasmtimeError, name: str) -> BaseException:
    """Return the error that kept a guest from being instantiated, and was no trap of its start function."""
    said = one_sentence(str(error))
    ours: MemslotError | None = errno_in_text(said, f"instantiating {name}")
    if ours is None:
        # The text is all that tells a limit from other errors: wasmtime's C API has no error codes.
        setting = next((setting for words, setting in _LIMITS.items() if words in said), "")
        kind: type[MemslotError] = LinkError
        if "as many heaps of the garbage collector" in said:  # reserve_heap (wasmtime_memory.c)
            kind = PoolExhausted
        elif setting or ("memory" in said and re.search("exceeds|limit", said)):
            kind = MemoryTooLarge
        ours = kind(f"the guest {name} cannot be instantiated: {said}{setting}")
    ours.__cause__ = cause_of(error)
    return ours


Refused = Callable[[wasmtime.WasmtimeError], BaseException]
"""Translates an error of wasmtime that is no trap of the guest's."""


class Outcome:
    """The outcome of an entry into wasmtime, which takes over the C half's, and frees it."""

    def __init__(self, address: int) -> None:
        outcome = ffi.cast("ms_wt_outcome *", address)
        self.flags = int(outcome.flags)
        self.raised = taken(outcome.raised) if outcome.raised else None
        if self.raised is not None:
            # wasmtime-py keeps it too if its own code ran the host function, and would raise it from the next call.
            take_last_exception(self.raised)
        self.deferred = taken(outcome.deferred) if outcome.deferred else None
        self.native: wasmtime.Trap | wasmtime.WasmtimeError | None = None
        if outcome.trap:
            # wasmtime-py has no public way to take over a pointer.
            trap = ctypes.cast(outcome.trap, ctypes.POINTER(wasmtime_ffi.wasm_trap_t))
            self.native = wasmtime.Trap._from_ptr(trap)
        elif outcome.error:
            self.native = error_at(outcome.error)
        lib.ms_wt_outcome_free(address)

    def exception(
        self, name: str, offsets: Offsets | None = None, refused: Refused | None = None
    ) -> BaseException | None:
        """Return the exception to raise for the guest `name`, or None.

        Without `refused`, an error that is no trap becomes a WasmtimeFailure.  An exception in deciding about a
        growth comes first: the guest only saw that the growth was refused.
        """
        if self.deferred is not None:
            return self.deferred
        if self.raised is not None:
            return self.raised
        if self.native is not None:
            if isinstance(self.native, wasmtime.Trap):
                return translated(self.native, name, offsets)
            if one_sentence(str(self.native)) == PYTHON_EXCEPTION and (
                last := take_last_exception()
            ):
                return last
            if refused is not None and not isinstance(self.native, wasmtime.ExitTrap):
                return refused(self.native)
            return translated(self.native, name)
        return refusal(self.flags, name)


def refusal(flags: int, name: str) -> MemslotError | None:
    """Return the exception for an entry with these flags, or None if the guest ran to an end."""
    if flags & lib.MS_WT_CLOSED:
        return ended(name)
    if flags & lib.MS_WT_BUSY:
        return InUse(
            f"the instance of {name} cannot be entered, reset or captured while a call of it runs, another thread is"
            " inside, or it is being reset; let that return first"
        )
    if flags & lib.MS_WT_MISSING:
        return ExportNotFound(f"the guest {name} has no such export")
    if flags & lib.MS_WT_UNASKED:
        return Unsupported(
            "the engine made a memory without asking for a slot: its configuration has a pool of wasmtime's own,"
            " which memslot takes the place of"
        )
    if flags & lib.MS_WT_LOST:
        return MemslotError(f"the guest {name} failed, and there was no memory left to say how")
    return None
