"""The one boundary at which what wasmer raises becomes an error of memslot.

wasmer knows four classes of its own making, and tells them apart by text alone:

    RuntimeError                 a trap, an exit, a link error, an invalid module, no memory left
    TypeError, OverflowError     a Python value that does not fit a WebAssembly type
    pyo3_runtime.PanicException  an object on a foreign thread, a reference type in a call

Everything else that comes out of wasmer is an exception of a host function, which reaches the caller
as it is.  So does a RuntimeError of a host function: what Python code raised has that code in its
traceback, and what wasmer made has none.
"""

from __future__ import annotations

import errno
import re

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
)
from memslot_plugin.wasm import Offsets

_EXIT = re.compile(r"RuntimeError: WASI exited with code: (\d+)")
_IMPORT = re.compile(r'Error while importing "(.*?)"\."(.*?)": (.*)', re.DOTALL)
_FRAME = re.compile(r"^(    at .*)\[(\d+)\]:(0x[0-9a-f]+)\)$", re.MULTILINE)
_MOST_FRAMES = 64
"""wasmer tells every frame, of which a guest makes half a million in a stack of 8 MiB."""
_LINK = ("Host env initialization error", "Link error")
_RESOURCES = ("Insufficient resources", "Error when allocating memory")
_WRONG_RESULT = "RuntimeError: Dynamic function returned wrong signature"

VALUE_ERRORS = (TypeError, OverflowError)


def made_by_wasmer(error: BaseException) -> bool:
    """Whether wasmer itself made `error`, which its caller has just caught."""
    if type(error) in (RuntimeError, *VALUE_ERRORS):
        return error.__traceback__ is None or error.__traceback__.tb_next is None
    return _is_panic(error)


def at_compile(error: BaseException, name: str, hint: str | None = None) -> MemslotError:
    """What assembling or compiling `name` raised; no host function runs there."""
    return errno_in_text(str(error), f"compiling {name}") or InvalidModule(
        f"wasmer refuses {name}: {error}" + (f" ({hint})" if hint else "")
    )


def at_instantiate(
    error: BaseException, name: str, offsets: Offsets | None = None
) -> BaseException:
    """What wasmer made while it instantiated the guest `name`: linked it, or ran its start function."""
    if isinstance(error, TypeError):
        return LinkError(f"an import of {name} is not what wasmer can take: {error}")
    text = str(error)
    refused = errno_in_text(text, f"instantiating {name}")
    if refused is not None:
        return refused
    found = _IMPORT.match(text)
    if found is not None:
        return LinkError(f"the import {found[1]}.{found[2]} of {name}: {found[3]}")
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
    """The exception for what wasmer raised while `name` was called, with offsets of the module that was given.

    `host_function_is_wrong` says that a value which does not fit was a host function's result, and not
    an argument of the call.
    """
    if _is_panic(error):
        return errno_in_text(str(error), f"calling {name}") or _panic(error)
    text = str(error)
    if text.startswith(_WRONG_RESULT) or (
        host_function_is_wrong and isinstance(error, VALUE_ERRORS)
    ):
        return LinkError(
            f"a host function that {name} called returned what its type forbids: {text}"
        )
    if isinstance(error, VALUE_ERRORS):
        return ArgumentError(f"{name}: {text}")
    exited = _EXIT.match(text)
    if exited is not None:
        # The status is 32 bits; the operating system hands on the low eight of them (exit(3)).
        return GuestExit(int(exited[1]) & 0xFF)
    text = "\n".join(text.split("\n", _MOST_FRAMES + 1)[: _MOST_FRAMES + 1])
    if offsets is not None:
        text = _FRAME.sub(lambda found: _given(found, offsets), text)
    return GuestTrap(text.removeprefix("RuntimeError: "), error)


def _given(found: re.Match[str], offsets: Offsets) -> str:
    """A frame of a trap with the offset that its function has in the module that was given."""
    return f"{found[1]}[{found[2]}]:{offsets.given(int(found[2]), int(found[3], 16)):#x})"


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException" and type(error).__module__ == "pyo3_runtime"


def _panic(error: BaseException) -> BaseException:
    if "unsendable" in str(error):
        return WrongThread(f"wasmer confines its objects to their thread: {error}")
    return Unsupported(
        f"wasmer-python cannot do this ({error}): values of reference types do not cross into Python"
    )
