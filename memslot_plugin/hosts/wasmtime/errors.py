"""The one boundary where errors of wasmtime become ours.

What a caller of bare wasmtime-py would catch is still caught: each class here inherits ours and the package's.
"""

from __future__ import annotations

import ctypes
import re
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
from memslot_plugin.hosts.lazy import Lazy
from memslot_plugin.hosts.live import ended
from memslot_plugin.hosts.wasmtime.bridge import take_last_exception, taken, wasmtime, wasmtime_ffi
from memslot_plugin.wasm import Offsets

PYTHON_EXCEPTION = "python exception"
"""The message of an error that stands for an exception in a host function of wasmtime-py's own."""


NATIVE_ERRORS = (wasmtime.WasmtimeError, wasmtime.Trap, wasmtime.ExitTrap)
"""The errors of wasmtime-py's own."""


class _Native:
    """The common part of the errors below: `native` is wasmtime's, or None in a copy."""

    native: Any = None
    args: tuple[Any, ...]

    def ptr(self) -> Any:
        """The pointer of wasmtime-py; raises UsedAfterClose for an error of another process."""
        if self.native is None:
            raise UsedAfterClose("wasmtime's own error stayed in the process that raised it")
        return self.native.ptr()

    def __str__(self) -> str:
        return str(self.args[0])


class Frame(NamedTuple):
    """A function that was running: what `wasmtime.Frame` says of it."""

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

    @Lazy
    def message(self) -> str:
        """The words of wasmtime, with a backtrace."""
        moved = {
            native.module_offset: frame.module_offset
            for native, frame in zip(self.native.frames, self.frames, strict=True)
        }

        def given(found: re.Match[str]) -> str:
            at = int(found[2], 16)
            return f"{found[1]}{moved.get(at, at):#{len(found[2])}x}"

        text = re.sub(r"(?m)^( *\d+: +)(0x[0-9a-f]+)", given, self.native.message)
        return "\n".join(map(printable, text.split("\n")))

    @Lazy
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

    @Lazy
    def trap_code(self) -> wasmtime.TrapCode | None:
        """Which of wasmtime's kinds of trap it is."""
        return self.native.trap_code

    def __reduce__(self) -> tuple[Any, ...]:
        """As for each error, and what only wasmtime knows."""
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
    """An error of wasmtime's without its backtrace and on one line: what happened, then why."""
    said, *causes = message.split("Caused by:")
    lines = [line.strip() for part in causes for line in part.splitlines()]
    if not said.startswith("error while executing"):
        lines = [line.strip() for line in said.splitlines()] + lines
    # Several causes are numbered.
    lines = [re.sub(r"^\d+: ", "", line).removeprefix("wasm trap: ") for line in lines]
    return "; ".join(line.rstrip(":;") for line in lines if line) or message.strip()


def translated(error: BaseException, name: str, offsets: Offsets | None = None) -> BaseException:
    """What wasmtime-py raised while the guest `name` ran, as ours; anything else is a host function's own."""
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
    "exceeds memory limits": "memory_limit",
    "exceeds table limits": "table_limit",
    "table count too high": "tables_per_instance",
    "GC heap out of memory": "heap_limit",
    "memory count too high": "a module that memslot does not understand may define a single one",
}
"""The words of wasmtime's limiter, and the setting that it was given."""


HEAPS = "as many heaps of the garbage collector"
"""What the bridge says where `slots` are used up by heaps."""


def _at_start(error: wasmtime.WasmtimeError, name: str) -> BaseException:
    """What kept a guest from being instantiated, and was no trap of its start function."""
    said = one_sentence(str(error))
    refused = errno_in_text(said, f"instantiating {name}")
    if refused is not None:
        refused.__cause__ = cause_of(error)
        return refused
    # Nothing but its text tells a limit from anything else.
    if HEAPS in said:
        exhausted = PoolExhausted(f"the guest {name} cannot be instantiated: {said}")
        exhausted.__cause__ = cause_of(error)
        return exhausted
    setting = next((each for text, each in _LIMITS.items() if text in said), None)
    if setting is not None:
        said = f"{said} ({setting})"
    limited = setting is not None or ("memory" in said and ("exceeds" in said or "limit" in said))
    ours = (MemoryTooLarge if limited else LinkError)(
        f"the guest {name} cannot be instantiated: {said}"
    )
    ours.__cause__ = cause_of(error)
    return ours


class Outcome:
    """What an entry into wasmtime came to; taking it frees what the C half holds."""

    def __init__(self, address: int) -> None:
        outcome = ffi.cast("ms_wt_outcome *", address)
        self.flags = int(outcome.flags)
        self.raised = taken(outcome.raised) if outcome.raised else None
        if self.raised is not None:
            take_last_exception(
                self.raised
            )  # wasmtime-py keeps it too, where its own code ran the host function
        self.deferred = taken(outcome.deferred) if outcome.deferred else None
        self.native: wasmtime.Trap | wasmtime.WasmtimeError | None = None
        # The package has no public way to take such a pointer over.
        if outcome.trap:
            trap = ctypes.cast(outcome.trap, ctypes.POINTER(wasmtime_ffi.wasm_trap_t))
            self.native = wasmtime.Trap._from_ptr(trap)
        elif outcome.error:
            error = ctypes.cast(outcome.error, ctypes.POINTER(wasmtime_ffi.wasmtime_error_t))
            self.native = wasmtime.WasmtimeError._from_ptr(error)
        lib.ms_wt_outcome_free(address)

    def exception(
        self, name: str, offsets: Offsets | None = None, *, starting: bool = False
    ) -> BaseException | None:
        """What to raise, for a guest of that name; None if the entry came to its end.

        `starting` says that the entry was an instantiation.  An exception in deciding about a growth
        comes first: the guest only saw that the growth was refused.
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
            if starting and not isinstance(self.native, wasmtime.ExitTrap):
                return _at_start(self.native, name)
            return translated(self.native, name)
        if self.flags & (lib.MS_WT_BUSY | lib.MS_WT_CLOSED):
            return refusal(self.flags, name)
        if self.flags & lib.MS_WT_MISSING:
            return ExportNotFound(f"the guest {name} has no such export")
        if self.flags & lib.MS_WT_UNASKED:
            return Unsupported(
                "the engine made a memory without asking for a slot: its configuration has a pool of wasmtime's own,"
                " which memslot takes the place of"
            )
        if self.flags & lib.MS_WT_LOST:
            return MemslotError(f"the guest {name} failed, and there was no memory left to say how")
        return None


def refusal(flags: int, name: str) -> MemslotError:
    """The exception for an entry that was refused."""
    if flags & lib.MS_WT_BUSY:
        return InUse(
            f"another thread is inside this instance of {name}, or it is being reset; an instance serves one thread"
            " at a time"
        )
    return ended(name)
