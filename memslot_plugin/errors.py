"""Every error that memslot raises.

One base, so that `except MemslotError` catches everything of ours; every leaf also inherits the
builtin that a caller would already catch.

    MemslotError
    +-- SettingError        (ValueError)          a setting has a value that is not allowed
    +-- HostUnavailable     (ImportError)         no runtime, or not this one, can be imported
    +-- PluginError         (RuntimeError)        no plugin answered, or one answered nonsense
    +-- InvalidModule       (ValueError)          not WebAssembly, truncated, a component
    +-- InvalidContainer    (ValueError)          no saved guest, a damaged one, or one for elsewhere
    +-- GuestNotFound       (FileNotFoundError)   the path of a guest does not exist
    +-- LinkError           (RuntimeError)        an import is missing or has the wrong type
    +-- ExportNotFound      (LookupError)         no export of that name and kind
    +-- ArgumentError       (TypeError)           a call with arguments that it does not take
    +-- GuestTrap           (RuntimeError)        the guest trapped; `native` is the runtime's error
    +-- GuestExit           (RuntimeError)        a WASI guest ended itself with an exit status
    +-- GrowthRefused       (MemoryError)         the embedder asked for too much growth
    +-- SnapshotRefused     (RuntimeError)        an instance has state that no snapshot holds
    +-- AccessOutOfBounds   (IndexError)          outside of the linear memory
    +-- PoolExhausted       (MemoryError)         every slot is in use
    |   +-- PoolTimeout     (TimeoutError)        ... and none came back in the time given
    +-- MemoryTooLarge      (ValueError)          a memory fits no slot, or a setting allows less
    +-- SlotError           (RuntimeError)        a slot's state does not allow that use
    |   +-- InvariantBroken (AssertionError)      a slot is not what its state says
    +-- InUse               (RuntimeError)        closed while instances of it are live
    +-- UsedAfterClose      (ValueError)          what was used is closed already
    +-- WrongThread         (RuntimeError)        touched outside of its own thread
    +-- Unsupported         (NotImplementedError) not possible on this machine or host
    +-- SystemCallError     (OSError)             the kernel refused; names the limit to lift
"""

from __future__ import annotations

import re
from typing import Any, cast


def shown(value: object) -> str:
    """Return any value as a message can show it; Python refuses to write out the digits of a huge integer."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def printable(text: str) -> str:
    """Return text as one line that does nothing to a terminal or a log, whatever a guest or a file has put
    into it: other characters are escaped, as by repr.
    """
    if text.isprintable():
        return text
    # Not by a pattern with spaces around the end of a line, which takes quadratic time for many spaces.
    line = " ".join(filter(None, map(str.strip, re.split(r"[\r\n]", text))))
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in line
    )


def cause_of(error: BaseException) -> BaseException | None:
    """Return a runtime's error as the cause of ours; None if its text, which a traceback prints as it is,
    would do something to a terminal.
    """
    return error if str(error).replace("\n", "").isprintable() else None


class MemslotError(Exception):
    """The base of every error that memslot raises on its own account.

    Its message is one line of printable characters.  It can be copied and pickled, and comes back with
    its class, arguments and attributes; only `native` is None then, if it is the runtime's own object,
    which belongs to its process.
    """

    def __init__(self, *args: object, **named: Any) -> None:
        super().__init__(*(printable(a) if isinstance(a, str) else a for a in args), **named)

    def __reduce__(self) -> tuple[Any, ...]:
        """The class, what it is made of (a message, for all but the kernel's), and its attributes."""
        _, made_of, *state = cast("tuple[Any, ...]", super().__reduce__())
        attributes = {**(state[0] if state else {}), "args": self.args}
        if type(attributes.get("native")).__module__ != "builtins":
            attributes["native"] = None
        return type(self), made_of, attributes


class RepeatedRandomness(UserWarning):
    """A snapshot was taken of a guest that may have drawn random numbers or read the clock before."""


class SettingError(MemslotError, ValueError):
    """A setting has a value that is not allowed; the message names setting, value and what is
    allowed.
    """


class HostUnavailable(MemslotError, ImportError):
    """The runtime that was asked for cannot be imported, or none can."""


class PluginError(MemslotError, RuntimeError):
    """No plugin answered a deciding hook, or a plugin broke the contract of one."""


class InvalidModule(MemslotError, ValueError):
    """The bytes are not a core WebAssembly module that can be compiled here."""


class InvalidContainer(MemslotError, ValueError):
    """A file is no saved guest, or is damaged, or is one that cannot be loaded here; the message says
    which.
    """


class GuestNotFound(MemslotError, FileNotFoundError):
    """The path that should hold a guest does not exist."""


class LinkError(MemslotError, RuntimeError):
    """An import of the guest is missing, or what was given for it has the wrong type."""


class ExportNotFound(MemslotError, LookupError):
    """The guest exports nothing of that name, or something of another kind."""


class ArgumentError(MemslotError, TypeError):
    """A function was called with a number or type of arguments that it does not take."""


class GuestTrap(MemslotError, RuntimeError):
    """The guest trapped.

    The runtime's own error object is `native`.  On wasmtime the raised class
    also inherits `wasmtime.Trap`, and on wasmer a trap is a `RuntimeError`, so code written for the
    bare runtime still catches it.
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
    """The embedder asked for a growth that a limit or a plugin does not allow (a guest sees -1
    instead).
    """


class SnapshotRefused(MemslotError, RuntimeError):
    """An instance has state that a snapshot cannot hold; the message says which, and what to do."""


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
    """A guest needs more than a slot reserves, or than a setting allows of memories or tables; the message names
    the setting.
    """


class SlotError(MemslotError, RuntimeError):
    """A slot or a leased memory was used in a state that does not allow it (released twice, for
    example).
    """


class InvariantBroken(SlotError, AssertionError):
    """A check compared a slot with its image and with the kernel's view, and they differ."""


class InUse(MemslotError, RuntimeError):
    """A host or a pool was closed while instances of it are live; it stays open and goes on
    serving.
    """


class UsedAfterClose(MemslotError, ValueError):
    """The object was closed before; the message names it."""


class WrongThread(MemslotError, RuntimeError):
    """An object of a runtime whose objects are confined to their thread was used on another one."""


class Unsupported(MemslotError, NotImplementedError):
    """This kernel or host cannot do what a setting demands; the message gives the reason."""


class SystemCallError(MemslotError, OSError):
    """A system call failed; `errno` and `strerror` as in OSError, the message names the knob where
    one is known.
    """
