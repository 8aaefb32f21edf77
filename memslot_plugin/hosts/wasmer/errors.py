"""The boundary at which wasmer's exceptions become errors of memslot.

wasmer raises four classes, and tells their causes apart by text alone:

    RuntimeError                 a trap, an exit, a link error, an invalid module, no memory left
    TypeError, OverflowError     a Python value that does not fit a WebAssembly type
    pyo3_runtime.PanicException  an object on a foreign thread, a reference type in a call

PanicException is a BaseException and cannot be imported.  `Boundary` is a context manager because `__exit__` sees
every class without naming it.  Other exceptions come from host functions, and reach the caller unchanged.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

from memslot_plugin._core.limits import errno_in_text, system_call_error
from memslot_plugin.errors import (
    ArgumentError,
    GuestExit,
    GuestTrap,
    InvalidModule,
    LinkError,
    MemslotError,
    Unsupported,
    WrongThread,
    cause_of,
)
from memslot_plugin.wasm import Offsets

_EXIT = re.compile(r"RuntimeError: WASI exited with code: (\d+)")
_FRAME = re.compile(r"^(    at .*)\[(\d+)\]:(0x[0-9a-f]+)\)$", re.MULTILINE)
_MOST_FRAMES = 64
"""Frames of a trap's text that are kept: wasmer prints all, half a million in a stack of 8 MiB."""
_LINK = ("Error while importing", "Host env initialization error", "Link error")
_RESOURCES = ("Insufficient resources", "Error when allocating memory")
_WRONG_RESULT = "RuntimeError: Dynamic function returned wrong signature"

_LOST = "a Display implementation returned an error unexpectedly"
"""The panic if an import's name has no text: PyObject_Str calls the handlers of signals first, and one has raised."""

VALUE_ERRORS = (TypeError, OverflowError)
"""Classes that wasmer raises for a value that does not fit its type."""


class Boundary:
    """A block whose exceptions of wasmer's are raised as `mapped(error, *arguments)`.

    The call into wasmer stands in the block itself, otherwise `made_by_wasmer` takes the error for a host function's.
    """

    __slots__ = ("_arguments", "_mapped")

    def __init__(self, mapped: Callable[..., BaseException], *arguments: object) -> None:
        self._mapped = mapped
        self._arguments = arguments

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None and made_by_wasmer(error):
            raise self._mapped(error, *self._arguments) from cause_of(error)


def made_by_wasmer(error: BaseException) -> bool:
    """Return True if wasmer made the `error` that the calling frame has just caught.

    A host function's exception has the frame of its Python code in the traceback; wasmer's own has no second frame.
    """
    if type(error) in (RuntimeError, *VALUE_ERRORS):
        return error.__traceback__ is None or error.__traceback__.tb_next is None
    return _is_panic(error)


def at_compile(error: BaseException, name: str, hint: str | None = None) -> MemslotError:
    """Return the error for an exception from assembling or compiling `name`, where no host function runs."""
    return errno_in_text(str(error), f"compiling {name}") or InvalidModule(
        f"wasmer refuses {name}: {error}" + (f" ({hint})" if hint else "")
    )


def at_instantiate(
    error: BaseException, name: str, offsets: Offsets | None = None
) -> BaseException:
    """Return the error for an exception from linking the guest `name` or running its start function."""
    if isinstance(error, TypeError):
        return LinkError(f"an import of {name} is not what wasmer can take: {error}")
    text = str(error)
    refused = errno_in_text(text, f"instantiating {name}")
    if refused is not None:
        return refused
    if text.startswith(_LINK):
        return LinkError(f"{name} cannot be linked: {text}")
    if text.startswith(_RESOURCES):
        return system_call_error(errno.ENOMEM, f"instantiating {name}: {text}")
    return at_call(error, name, offsets, host_function_is_wrong=True)


def at_call(
    error: BaseException,
    name: str,
    offsets: Offsets | None = None,
    *,
    host_function_is_wrong: bool,
) -> BaseException:
    """Return the error for an exception from a call of `name`; `offsets` translates those of a trap's frames.

    If `host_function_is_wrong`, a value that does not fit is the result of a host function, and not an argument.
    """
    text = str(error)
    if _is_panic(error):
        refused = errno_in_text(text, f"calling {name}")
        if refused is not None:
            return refused
        if _LOST in text:
            return Unsupported(
                f"wasmer-python dropped the exception of a signal handler that came while it linked {name}"
            )
        if "unsendable" in text:
            return WrongThread(f"wasmer confines its objects to their thread: {text}")
        return Unsupported(
            f"wasmer-python cannot do this ({text}): values of reference types do not cross into Python"
        )
    does_not_fit = isinstance(error, VALUE_ERRORS)
    if text.startswith(_WRONG_RESULT) or (host_function_is_wrong and does_not_fit):
        return LinkError(
            f"a host function that {name} called returned what its type forbids: {text}"
        )
    if does_not_fit:
        return ArgumentError(f"{name}: {text}")
    exited = _EXIT.match(text)
    if exited is not None:
        # The operating system hands on the low eight of the 32 bits of a status (exit(3)).
        return GuestExit(int(exited[1]) & 0xFF)
    text = "\n".join(text.split("\n", _MOST_FRAMES + 1)[: _MOST_FRAMES + 1])
    if offsets is not None:
        text = _FRAME.sub(lambda found: _translated(found, offsets), text)
    return GuestTrap(text.removeprefix("RuntimeError: "), error)


def _translated(frame: re.Match[str], offsets: Offsets) -> str:
    """Return a frame of a trap with its offset in the module that the embedder gave."""
    at, function, offset = frame.groups()
    return f"{at}[{function}]:{offsets.given(int(function), int(offset, 16)):#x})"


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException" and type(error).__module__ == "pyo3_runtime"
