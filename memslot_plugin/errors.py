"""The errors that memslot raises.

`except MemslotError` catches all of them; every leaf also inherits the builtin that a caller would already
catch.
"""

from __future__ import annotations

import re
from typing import Any, cast


def shown(value: object) -> str:
    """Return any value as a message can show it; Python refuses to print the digits of a huge integer."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def printable(text: str) -> str:
    """Return text as one line without control characters, which a guest or a file may have put into it.

    Such characters are escaped as by repr, because a terminal or a log would act on them.
    """
    if text.isprintable():
        return text
    # No pattern with spaces around the end of a line: it takes quadratic time for many spaces.
    line = " ".join(filter(None, map(str.strip, re.split(r"[\r\n]", text))))
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in line
    )


def cause_of(error: BaseException) -> BaseException | None:
    """Return a runtime's error as the cause of ours, or None if its text has control characters.

    A traceback prints a cause's text as it is.
    """
    return error if str(error).replace("\n", "").isprintable() else None


class MemslotError(Exception):
    """The base of memslot's errors, with a message of one line of printable characters.

    An error can be copied and pickled, and comes back with its class, arguments and attributes; only
    `native` becomes None if it is the runtime's own object, which belongs to its process.
    """

    def __init__(self, *args: object, **named: Any) -> None:
        super().__init__(*(printable(a) if isinstance(a, str) else a for a in args), **named)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the class, its arguments (the message, or errno and strerror), and its attributes."""
        _, arguments, *state = cast("tuple[Any, ...]", super().__reduce__())
        attributes = {**(state[0] if state else {}), "args": self.args}
        if type(attributes.get("native")).__module__ != "builtins":
            attributes["native"] = None
        return type(self), arguments, attributes


class RepeatedRandomness(UserWarning):
    """A snapshot was taken of a guest that may have drawn random numbers or read the clock before."""


class SettingError(MemslotError, ValueError):
    """A setting has a wrong value; the message names the setting, what is expected and what was given."""


class HostUnavailable(MemslotError, ImportError):
    """The runtime that was asked for cannot be imported, or none can."""


class PluginError(MemslotError, RuntimeError):
    """No plugin answered a deciding hook, or a plugin broke the contract of one."""


class InvalidModule(MemslotError, ValueError):
    """The bytes are not a core WebAssembly module that can be compiled here."""


class InvalidContainer(MemslotError, ValueError):
    """A file is no saved guest, is damaged, or cannot be loaded on this machine."""


class GuestNotFound(MemslotError, FileNotFoundError):
    """The path of a guest does not exist."""


class LinkError(MemslotError, RuntimeError):
    """An import of the guest is missing, or has the wrong type."""


class ExportNotFound(MemslotError, LookupError):
    """The guest has no export of that name and kind."""


class ArgumentError(MemslotError, TypeError):
    """A function was called with arguments of a wrong number or type."""


class GuestTrap(MemslotError, RuntimeError):
    """The guest trapped; `native` is the runtime's own error.

    On wasmtime the raised class also inherits `wasmtime.Trap`, and on wasmer a trap is a `RuntimeError`,
    so that code written for the bare runtime still catches it.
    """

    def __init__(self, message: str, native: BaseException | None = None) -> None:
        super().__init__(message)
        self.native = native


class GuestExit(MemslotError, RuntimeError):
    """A WASI guest called proc_exit; `code` is its exit status (0 to 255, 0 is success)."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the guest ended itself with exit status {code}")
        self.code = code


class GrowthRefused(MemslotError, MemoryError):
    """The embedder asked for a growth that a limit or a plugin refuses; a guest sees -1 instead."""


class SnapshotRefused(MemslotError, RuntimeError):
    """An instance has state that a snapshot cannot hold; the message names it and the remedy."""


class AccessOutOfBounds(MemslotError, IndexError):
    """The embedder read or wrote outside `[0, byte_size)` of a linear memory."""


class PoolExhausted(MemslotError, MemoryError):
    """Every slot of the pool is leased: `in_use` of `limit`."""

    def __init__(self, message: str, *, limit: int = 0, in_use: int = 0) -> None:
        super().__init__(message)
        self.limit = limit
        self.in_use = in_use


class PoolTimeout(PoolExhausted, TimeoutError):
    """Every slot stayed leased for as long as the caller was willing to wait."""


class MemoryTooLarge(MemslotError, ValueError):
    """A guest needs more memory or tables than a setting allows; the message names the setting."""


class SlotError(MemslotError, RuntimeError):
    """A slot or a leased memory was used in a state that does not allow it, such as released twice."""


class InvariantBroken(SlotError, AssertionError):
    """A slot differs from its image or from the kernel's view of it."""


class InUse(MemslotError, RuntimeError):
    """A host or a pool was closed while its instances are live; it stays open."""


class UsedAfterClose(MemslotError, ValueError):
    """The object was closed before its use; the message names it."""


class WrongThread(MemslotError, RuntimeError):
    """An object that its runtime confines to one thread was used on another."""


class Unsupported(MemslotError, NotImplementedError):
    """This kernel or host cannot do what was asked; the message gives the reason."""


class SystemCallError(MemslotError, OSError):
    """A system call failed; `errno` is set as in OSError, and the message names the limit to lift."""
