"""The Python half of the bridge to wasmtime: binding the C half to the library, and the callbacks of the C half.

The C half (`_core/wasmtime_*.c`) makes the hot calls without ctypes and gives wasmtime its memories.  It calls Python
to decide about a growth, to lease a memory for an instance of bare wasmtime-py, and to run a host function.

An exception that escapes from a callback aborts the process.  So each callback catches every exception and keeps it
under a number, which travels through wasmtime; the entry raises it (`memslot_plugin.hosts.wasmtime.errors`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import itertools
import logging
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from memslot_hooks.types import LinearMemory
from memslot_plugin._core import ffi, leaks, lib
from memslot_plugin.errors import HostUnavailable

try:
    import wasmtime
    from wasmtime import _bindings as bindings
    from wasmtime import _ffi as wasmtime_ffi
    from wasmtime import _func as wasmtime_func
except (ImportError, OSError, RuntimeError) as error:
    # OSError: the shared library does not load here; RuntimeError: wasmtime-py does not know this platform.
    raise HostUnavailable(
        f"wasmtime cannot be imported ({error}); install it with: pip install 'memslot[wasmtime]'"
    ) from error

__all__ = ["bindings", "wasmtime", "wasmtime_ffi"]

_log = logging.getLogger("memslot.wasmtime")

TESTED = "50"
"""The version of wasmtime that the bridge was tested with.  `bind` refuses another one only if something is missing."""


def address_of(pointer: Any) -> int:
    """Return the address in a ctypes pointer or function."""
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0


def error_at(address: int) -> wasmtime.WasmtimeError:
    """Return the object of wasmtime-py's that owns the wasmtime_error_t at an address."""
    # wasmtime-py has no public way to take over a pointer.
    pointer = ctypes.cast(address, ctypes.POINTER(wasmtime_ffi.wasmtime_error_t))
    return wasmtime.WasmtimeError._from_ptr(pointer)


@functools.cache
def bind() -> None:
    """Give the C half the addresses of wasmtime's functions, once per process.

    Raises HostUnavailable if this wasmtime lacks one of them or has other layouts of its structures.
    """
    version = importlib.metadata.version("wasmtime")
    addresses, missing = [], []
    symbol = ffi.NULL
    for index in itertools.count():
        symbol = lib.ms_wt_symbol(index)
        if symbol == ffi.NULL:
            break
        name = ffi.string(symbol).decode()
        try:
            addresses.append(address_of(getattr(wasmtime_ffi.dll, name)))
        except AttributeError:
            missing.append(name)
    if missing:
        raise HostUnavailable(
            f"wasmtime {version} has no {', '.join(missing)}, and memslot needs it; install wasmtime {TESTED}"
        )
    layout = ffi.new("size_t[]", 64)
    ours = list(layout[0 : lib.ms_wt_layout(layout, 64)])
    try:
        theirs = _layout()
    except AttributeError as error:
        raise HostUnavailable(
            f"wasmtime-py {version} has no {error.name}, and memslot needs it; install wasmtime {TESTED}"
        ) from None
    if ours != theirs:
        raise HostUnavailable(
            f"wasmtime {version} lays its structures out as {theirs}, and memslot was built for {ours};"
            f" install wasmtime {TESTED}"
        )
    lib.ms_wt_bind(addresses)


def _layout() -> list[int]:
    """Return for wasmtime-py's declarations what `ms_wt_layout` returns for ours."""
    memory, creator = bindings.wasmtime_linear_memory, bindings.wasmtime_memory_creator
    sized: Sequence[Any] = (
        bindings.wasmtime_instance,
        bindings.wasmtime_func,
        bindings.wasmtime_global,
        bindings.wasmtime_memory,
        bindings.wasmtime_extern,
    )
    offset: Callable[[Any], int] = lambda field: field.offset  # noqa: E731 - the stubs give fields their values' types
    return [
        *(ctypes.sizeof(each) for each in sized),
        offset(bindings.wasmtime_extern.of),
        ctypes.sizeof(bindings.wasmtime_val_raw),
        ctypes.sizeof(bindings.wasmtime_val),
        offset(bindings.wasmtime_val.of),
        ctypes.sizeof(bindings.wasmtime_externref),
        ctypes.sizeof(memory),
        offset(memory.get_memory),
        offset(memory.grow_memory),
        offset(memory.finalizer),
        ctypes.sizeof(creator),
        offset(creator.new_memory),
        offset(creator.finalizer),
    ]


# -- exceptions on their way through wasmtime ----------------------------------------------------

LOST = -1
"""The number of an exception that could not be kept."""

KEPT: dict[int, BaseException] = {}
"""The exceptions on their way, by number.  An entry takes them (`Outcome`), or forgets them (function.c)."""
_numbers = itertools.count(1)


def keep(error: BaseException) -> int:
    """Keep an exception, and return its number."""
    number = next(_numbers)
    KEPT[number] = error
    return number


def raised(error: BaseException) -> int:
    """Make the innermost entry raise `error` instead of an earlier exception; returns its number."""
    number = keep(error)
    KEPT.pop(lib.ms_wt_raise(number), None)
    return number


def taken(number: int) -> BaseException:
    """Return the exception of that number, and forget it."""
    return KEPT.pop(number, None) or RuntimeError(
        "an exception was lost on its way through wasmtime"
    )


# -- memories ------------------------------------------------------------------------------------


class Memories(Protocol):
    """A creator as the bridge sees it."""

    def granted(self, token: int, index: int, byte_size: int) -> bool:
        """Grow the index-th memory of that group to `byte_size` bytes; false if that is refused."""

    def leased(self, token: Any, minimum: int, maximum: int) -> LinearMemory:
        """Lease a memory for an instance that is not ours, and put its token into `token[0]`; sizes are bytes."""

    def unlease(self, token: int) -> None:
        """Drop a memory of which wasmtime has not heard."""


CREATORS: weakref.WeakValueDictionary[int, Memories] = weakref.WeakValueDictionary()
"""The creators of open hosts, by identity."""


def _refused(_: type, error: BaseException, __: object) -> int:
    """Keep an exception that came before `ms_wt_python_grow` could catch it, as a signal's handler may raise one."""
    return -keep(error) if lib.ms_wt_first_deferred() else 0


@ffi.def_extern(error=0, onerror=_refused)  # type: ignore[untyped-decorator]
def ms_wt_python_grow(creator: int, token: int, index: int, byte_size: int) -> int:
    try:
        return int(CREATORS[creator].granted(token, index, byte_size))
    except BaseException as error:  # noqa: BLE001  # escaping would abort the process; the entry raises it
        if lib.ms_wt_first_deferred():
            return -keep(error)
        if lib.ms_wt_depth():  # keep only the first one: a guest may ask again any number of times
            return 0
        # wasmtime-py itself made the call, and cannot raise the exception.
        # Log it as text: a kept record would keep the traceback, and with it the memory.
        _log.error(
            "a growth to %d bytes was refused, because deciding about it failed: %s",
            byte_size,
            traceback.format_exc(),
        )
        return 0


@ffi.def_extern(error=0)  # type: ignore[untyped-decorator]
def ms_wt_python_lease(  # noqa: PLR0917 - C calls it
    creator: int,
    minimum: int,
    maximum: int,
    token: Any,
    base: Any,
    capacity: Any,
    message: Any,
    room: int,
) -> int:
    try:
        memory = CREATORS[creator].leased(token, minimum, maximum)
        base[0], capacity[0] = memory.base, memory.request.reserved
    except BaseException as error:  # noqa: BLE001  # escaping would abort the process; bare wasmtime-py raises the text
        said = f"{type(error).__name__}: {error}"
        if creator in CREATORS:
            CREATORS[creator].unlease(token[0])
        else:
            said = "the host was closed"
        text = said.encode(errors="replace").replace(b"\0", b"")[: room - 1] + b"\0"
        ffi.memmove(message, text, len(text))
        return 0
    return 1


# -- host functions ------------------------------------------------------------------------------

HostFunction = Callable[[Any], None]
"""A function of a buffer with 16 bytes per argument, into which it puts its results."""

FUNCTIONS: dict[int, weakref.ref[Any]] = {}
"""Host functions, and shims of WASI, by the identity that the C half calls them by.

Their owner is a `BoundImports`.  The references here are weak: a host function may refer to its instance, and a strong
reference from here would keep both for ever.
"""

_identities = itertools.count(1)


def define(
    linker: wasmtime.Linker,
    module: str,
    name: str,
    kind: wasmtime.FuncType,
    function: HostFunction,
    *,
    foreign: bool,
) -> None:
    """Put a host function into a linker, for as long as the caller keeps it; raises WasmtimeError.

    `foreign` says that the linker is for a store of the embedder's own.
    """
    drop_functions()  # here, because each instance with imports of its own adds entries
    identity = next(_identities)
    FUNCTIONS[identity] = weakref.ref(function)
    module_bytes, name_bytes = module.encode(), name.encode()
    failed = lib.ms_wt_define(
        address_of(linker.ptr()),
        module_bytes,
        len(module_bytes),
        name_bytes,
        len(name_bytes),
        address_of(kind.ptr()),
        identity,
        foreign,
    )
    if failed:
        raise error_at(failed)


def define_wait(
    linker: wasmtime.Linker, kind: wasmtime.FuncType, shim: Any, *, opens: bool, foreign: bool
) -> None:
    """Put a function of WASI that waits into a linker, until the caller drops the shim; raises WasmtimeError."""
    identity = next(_identities)
    FUNCTIONS[identity] = weakref.ref(shim)
    failed = lib.ms_wt_define_wait(
        address_of(linker.ptr()), address_of(kind.ptr()), identity, shim.given, opens, foreign
    )
    if failed:
        raise error_at(failed)


def drop_functions() -> None:
    """Drop the host functions that wasmtime no longer needs, and log the heaps that its finalizers leaked."""
    identities = ffi.new("uint64_t[]", 64)
    while count := lib.ms_wt_drain_functions(identities, 64):
        for identity in identities[0:count]:
            FUNCTIONS.pop(identity, None)
    if leaked := lib.ms_wt_leaked_heaps():
        leaks["heap of wasmtime's garbage collector"] += leaked
        _log.error(
            "%d heaps of wasmtime's garbage collector could not be unmapped; their address space is lost until this"
            " process ends",
            leaked,
        )


def _raised(_: type, error: BaseException, __: object) -> int:
    """Keep an exception that `ms_wt_python_call` did not catch, instead of one that it had caught before."""
    return raised(error) if lib.ms_wt_depth() else LOST


@ffi.def_extern(error=LOST, onerror=_raised)  # type: ignore[untyped-decorator]
def ms_wt_python_call(identity: int, values: Any, count: int) -> int:
    try:
        function: Any = FUNCTIONS[identity]()  # alive: the caller's `BoundImports` has it
        function(ffi.buffer(values, 16 * count))
    except BaseException as error:  # noqa: BLE001  # escaping would abort the process; the entry raises it
        if lib.ms_wt_depth():
            return raised(error)
        # wasmtime-py itself made the call, and raises the exception that it finds here.
        wasmtime_func.LAST_EXCEPTION = error  # type: ignore[assignment]
        return LOST
    return 0


def raised_in_wasmtime_py(error: BaseException) -> None:
    """Make the innermost entry raise an exception of a host function that wasmtime-py runs."""
    if lib.ms_wt_depth():
        raised(error)


def take_last_exception(error: BaseException | None = None) -> BaseException | None:
    """Return the exception that wasmtime-py's next call would raise, and take it away; None if there is none.

    With `error`, take away only that one.
    """
    last = wasmtime_func.LAST_EXCEPTION
    if last is None or (error is not None and last is not error):
        return None
    wasmtime_func.LAST_EXCEPTION = None
    return last
