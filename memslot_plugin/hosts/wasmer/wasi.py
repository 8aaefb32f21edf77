"""WASI preview 1 on wasmer: an environment for each instance, and a shim before wasmer's functions.

wasmer-python can neither capture a guest's output nor keep the guest from this process's standard input.  So the
functions that could reach something outside pass a small WebAssembly module, the shim:

    guest -- fd_read(0) ----> shim --> end of the stream
          -- fd_write(1) ---> shim --> `Streams`, in Python, unless the stream is inherited
          -- fd_write(5) ---> shim --> wasmer's fd_write, if `Folders` has 5 as writable
          -- fd_close(1) ---> shim --> wasmer's fd_close, and a note that descriptors have changed
          -- path_open() ---> shim --> wasmer's path_open, if `Folders` lets the path pass
          -- fd_renumber() -> shim --> refused: `Folders` knows a descriptor by its number

Resets and snapshots read the note: only a new environment undoes what it stands for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import wasmer

from memslot_plugin.errors import SettingError
from memslot_plugin.hosts.wasi import Wasi
from memslot_plugin.hosts.wasmer.errors import Boundary, at_instantiate
from memslot_plugin.hosts.wasmer.folders import (
    CHANGE,
    FAULT,
    NOTSUP,
    OPEN,
    RENAME,
    ROFS,
    SPIPE,
    Folders,
)
from memslot_plugin.hosts.wasmer.values import compiled

VERSIONS = {
    "wasi_unstable": wasmer.wasi.Version.SNAPSHOT0,
    "wasi_snapshot_preview1": wasmer.wasi.Version.SNAPSHOT1,
}
"""wasmer's version of WASI for each import module of preview 1."""

_PASSED = frozenset(
    {
        "args_get",
        "args_sizes_get",
        "clock_res_get",
        "clock_time_get",
        "environ_get",
        "environ_sizes_get",
        "fd_fdstat_get",
        "fd_filestat_get",
        "fd_prestat_dir_name",
        "fd_prestat_get",
        "fd_seek",
        "fd_tell",
        "poll_oneoff",
        "proc_exit",
        "random_get",
        "sched_yield",
    }
)
"""Functions that the guest gets from wasmer directly: they change nothing that outlives the open files."""

_STREAMS = {
    # Zero bytes read are the end of the stream.
    "fd_read": "(i32.store (local.get 3) (i32.const 0)) (return (i32.const 0))",
    "fd_write": "(return (call $write (local.get 0) (local.get 1) (local.get 2) (local.get 3)))",
    "fd_pread": f"(return (i32.const {SPIPE}))",
    "fd_pwrite": f"(return (i32.const {SPIPE}))",
}
"""Answers of the shim for a standard stream; with other descriptors these functions move an offset at most."""

_LOOKING = frozenset({"path_filestat_get", "path_readlink"})
"""Functions that change nothing if there are no folders; otherwise wasmer remembers what it met on a path."""


def _locals(places: Iterable[int]) -> str:
    return " ".join(f"(local.get {place})" for place in places)


def _check(what: str, *paths: tuple[int, int, int]) -> str:
    """Return code that asks `Folders` for each path: the parameters of its folder, its address and its length."""
    return "".join(
        f" (local.set $errno (call $refused {_locals(path)} {what}))"
        " (if (local.get $errno) (then (return (local.get $errno))))"
        for path in paths
    )


# The streams are below 3, and no other descriptor gets their numbers.
_WRITABLE = (
    "(if (i32.ge_u (local.get 0) (i32.const 3)) (then (if (i32.eqz (call $writable (local.get 0)))"
    f" (then (return (i32.const {ROFS}))))))"
)
_UNSUPPORTED = f"(return (i32.const {NOTSUP}))"
_CHANGE, _LOOK = f"(i32.const {CHANGE})", "(i32.const 0)"
# A file is changed with the right fd_write, or with oflags::creat or oflags::trunc.
_OPEN = (
    f"(i32.or (i32.const {OPEN}) (i32.or (i64.ne (i64.and (local.get 5) (i64.const 64)) (i64.const 0))"
    " (i32.ne (i32.and (local.get 4) (i32.const 9)) (i32.const 0))))"
)
_GUARDS = {
    "fd_allocate": _WRITABLE,
    "fd_close": "(call $closed (local.get 0))",
    "fd_filestat_set_size": _WRITABLE,
    "fd_filestat_set_times": _WRITABLE,
    "fd_pwrite": _WRITABLE,
    "fd_renumber": _UNSUPPORTED,
    "fd_write": _WRITABLE,
    "path_create_directory": _check(_CHANGE, (0, 1, 2)),
    "path_filestat_get": _check(_LOOK, (0, 2, 3)),
    "path_filestat_set_times": _check(_CHANGE, (0, 2, 3)),
    "path_link": _check(_CHANGE, (0, 2, 3), (4, 5, 6)),
    "path_open": _check(_OPEN, (0, 2, 3)),
    "path_readlink": _check(_LOOK, (0, 1, 2)),
    "path_remove_directory": _check(_CHANGE, (0, 1, 2)),
    "path_rename": _check(f"(i32.const {CHANGE | RENAME})", (0, 1, 2), (3, 4, 5)),
    "path_symlink": _UNSUPPORTED,
    "path_unlink_file": _check(_CHANGE, (0, 1, 2)),
}
"""Code before wasmer's function, which returns the errno of a call that wasmer must not get."""

_CALLBACKS = {
    "write": (4, 1),
    "refused": (4, 1),
    "writable": (1, 1),
    "opened": (1, 0),
    "closed": (1, 0),
}
"""Numbers of i32 parameters and results of the methods of `Streams` and `Folders` that a shim calls."""


class Streams:
    """The standard streams of one guest, as far as it does not inherit them.

    `mask` has a bit for each descriptor that the shim serves.  `changed` is a global of wasmer's that is not 0 after
    a call that changed the environment.
    """

    __slots__ = ("_limit", "_memory", "captured", "changed", "mask")

    def __init__(self, wasi: Wasi, memory: Any, changed: Any) -> None:
        self._memory = memory
        self.changed = changed
        self._limit = wasi.capture_limit
        self.captured: dict[int, bytearray] = {}
        self.mask = 1
        for descriptor, stream in ((1, wasi.stdout), (2, wasi.stderr)):
            if stream != "inherit":
                self.mask |= 1 << descriptor
            if stream == "capture":
                self.captured[descriptor] = bytearray()

    def write(self, descriptor: int, vectors: int, count: int, written: int) -> int:
        """Capture the bytes of `count` pairs of address and length at `vectors`, as fd_write; return the errno."""
        vectors, count, written = vectors & 0xFFFFFFFF, count & 0xFFFFFFFF, written & 0xFFFFFFFF
        view = memoryview(self._memory.buffer)
        size = len(view)
        if vectors + 8 * count > size or written + 4 > size:
            return FAULT
        captured = self.captured.get(descriptor)
        room = 0 if captured is None else self._limit - len(captured)
        taken = bytearray()
        total = 0
        for address, length in struct.iter_unpack("<II", view[vectors : vectors + 8 * count]):
            if address + length > size:
                return FAULT
            total += length
            if len(taken) < room:
                taken += view[address : address + min(length, room - len(taken))]
        if captured is not None:
            captured += taken
        struct.pack_into("<I", view, written, total & 0xFFFFFFFF)
        return 0

    def clear(self) -> None:
        """Forget the captured bytes."""
        for taken in self.captured.values():
            taken.clear()

    def output(self, stream: Literal["stdout", "stderr"]) -> bytes:
        """Return the captured bytes of a stream; none if it is not captured."""
        return bytes(self.captured.get(1 if stream == "stdout" else 2, b""))


class Shims:
    """The compiled shims of one store."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._modules: dict[tuple[object, ...], tuple[Any, list[str]]] = {}

    def before(
        self, module: str, served: Mapping[str, Any], streams: Streams, memory: Any, wasi: Wasi
    ) -> tuple[dict[str, Any], object]:
        """Return the functions that stand before some of wasmer's `served` ones, and what they need to live.

        wasmer keeps no import alive: dropping the second before the guest's instance ends makes the guest call
        freed code.
        """
        behind = {name: function for name, function in served.items() if name not in _PASSED}
        if not behind:
            return {}, None
        folders = bool(wasi.preopened)
        key = (module, folders, streams.mask, *behind)
        if key not in self._modules:
            text, callbacks = _shim(behind, streams.mask, folders=folders)
            self._modules[key] = compiled(self._store, text, f"the shim before {module}"), callbacks
        shim, callbacks = self._modules[key]
        methods, i32 = Folders(wasi, memory), wasmer.Type.I32
        ours = {"memory": memory, "changed": streams.changed}
        for name in callbacks:
            parameters, results = _CALLBACKS[name]
            ours[name] = wasmer.Function(
                self._store,
                getattr(streams if name == "write" else methods, name),
                wasmer.FunctionType([i32] * parameters, [i32] * results),
            )
        with Boundary(at_instantiate, f"the shim before {module}"):
            instance = wasmer.Instance(shim, {"wasi": behind, "memslot": ours})
        return {name: getattr(instance.exports, name) for name in behind}, (instance, behind, ours)


def _shim(functions: Mapping[str, Any], mask: int, *, folders: bool) -> tuple[str, list[str]]:
    """Return the text of a shim before wasmer's `functions`, and the names of the callbacks that it imports.

    Without `folders` a failed call is not noted, nor is one that only looks: language runtimes look for files
    even if there are none.
    """
    imports, bodies = [], []
    for name, function in functions.items():
        kinds = [wasmer.Type(int(each)).name.lower() for each in function.type.params]
        type_ = "".join(f" (param {kind})" for kind in kinds) + " (result i32)"
        imports.append(f'(import "wasi" "{name}" (func ${name}{type_}))')
        stream = note = opened = failed = ""
        if name in _STREAMS:
            stream = f" (if (call $ours (local.get 0)) (then {_STREAMS[name]}))"
        elif folders or name not in _LOOKING:
            # Noted before the call, because a trap in it leaves a changed environment behind.
            note = " (local.set $before (global.get $changed)) (global.set $changed (i32.const 1))"
            if not folders:
                failed = " (if (local.get $errno) (then (global.set $changed (local.get $before))))"
        if name == "path_open":
            opened = (
                " (if (i32.eqz (local.get $errno)) (then (call $opened (i32.load (local.get 8)))))"
            )
        given = _locals(range(len(kinds)))
        bodies.append(
            f'(func (export "{name}"){type_} (local $before i32) (local $errno i32)'
            f"{stream} {_GUARDS.get(name, '')}{note}"
            f" (local.set $errno (call ${name} {given})){opened}{failed} (local.get $errno))"
        )
    code = "\n".join(bodies)
    callbacks = [name for name in _CALLBACKS if f"(call ${name} " in code]
    for name in callbacks:
        parameters, results = _CALLBACKS[name]
        type_ = " (param i32)" * parameters + " (result i32)" * results
        imports.append(f'(import "memslot" "{name}" (func ${name}{type_}))')
    return (
        f"""(module {" ".join(imports)}
          (import "memslot" "memory" (memory 0))
          (import "memslot" "changed" (global $changed (mut i32)))
          (export "memory" (memory 0)) ;; where wasmer's functions look for it
          (func $ours (param $fd i32) (result i32)
            (i32.and (i32.lt_u (local.get $fd) (i32.const 3))
                     (i32.shr_u (i32.const {mask}) (local.get $fd))))
          {code})""",
        callbacks,
    )


def environment(wasi: Wasi) -> Any:
    """Return the environment of one instance; raises SettingError if wasmer refuses it."""
    try:
        builder = wasmer.wasi.StateBuilder(wasi.program)
        for argument in wasi.arguments:
            builder.argument(argument)
        for name, value in wasi.environment.items():
            builder.environment(name, value)
        for folder, seen, _ in wasi.folders():
            builder.map_directory(seen, folder)
        return builder.finalize()
    except (RuntimeError, TypeError) as error:
        raise SettingError(f"wasi is not allowed as it was given: {error}") from error
