"""WASI preview 1 on wasmer: an environment of its own for each instance, and the standard streams.

wasmer-python can neither capture what a guest writes nor keep it from reading this process's
standard input.  Where a guest imports a function that could, a small module of ours, the shim,
stands between it and wasmer's own function:

    guest -- fd_read(0) ----> shim --> nothing to read
          -- fd_write(1) ---> shim --> `Streams`, in Python, unless the stream is inherited
          -- fd_write(5) ---> shim --> wasmer's fd_write, if `Folders` has it among the writable
          -- fd_close(1) ---> shim --> wasmer's fd_close, and a note that descriptors have changed
          -- path_open() ---> shim --> wasmer's path_open, if `Folders` lets the path pass
          -- fd_renumber() -> shim --> refused: under another number a descriptor would not be recognised

The note is for resets and snapshots: an instance can be reset in place as long as nothing that only a
new environment has was changed.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from typing import Any, Literal

from memslot_plugin._core import ffi
from memslot_plugin.errors import SettingError
from memslot_plugin.hosts.wasi import Wasi
from memslot_plugin.hosts.wasmer.folders import CHANGE, NOTSUP, OPEN, RENAME, ROFS, Folders
from memslot_plugin.hosts.wasmer.values import wasmer

VERSIONS = {
    "wasi_unstable": wasmer.wasi.Version.SNAPSHOT0,
    "wasi_snapshot_preview1": wasmer.wasi.Version.SNAPSHOT1,
}
"""The import modules of WASI preview 1, and wasmer's names for their versions."""

FAULT = 21
"""`errno::fault` of WASI preview 1: an address outside of the memory."""

_OURS = """
  (global $streams (import "memslot" "streams") i32)
  (func $ours (param $fd i32) (result i32)
    (i32.and
      (i32.lt_u (local.get $fd) (i32.const 3))
      (i32.shr_u (global.get $streams) (local.get $fd))))
"""
"""Whether a descriptor is a standard stream that the shim serves; `streams` has a bit for each."""

_SERVED = {
    # The number of bytes read is 0, which is the end of the stream.
    "fd_read": "(i32.store (local.get 3) (i32.const 0)) (return (i32.const 0))",
    "fd_write": "(return (call $write (local.get 0) (local.get 1) (local.get 2) (local.get 3)))",
    # errno::spipe: a stream has no offsets.
    "fd_pread": "(return (i32.const 70))",
    "fd_pwrite": "(return (i32.const 70))",
}
REPLACED = tuple(_SERVED)
"""Functions that the shim serves itself where a descriptor is ours: all that move its bytes."""

_PATHS = {
    "path_create_directory": ((0, 1, 2),),
    "path_filestat_get": ((0, 2, 3),),
    "path_filestat_set_times": ((0, 2, 3),),
    "path_link": ((0, 2, 3), (4, 5, 6)),
    "path_open": ((0, 2, 3),),
    "path_readlink": ((0, 1, 2),),
    "path_remove_directory": ((0, 1, 2),),
    "path_rename": ((0, 1, 2), (3, 4, 5)),
    "path_unlink_file": ((0, 1, 2),),
}
"""Functions with paths: the parameters that hold a folder's descriptor, and the address and length of a path."""

_CHANGES = frozenset(_PATHS) - {"path_filestat_get", "path_open", "path_readlink"}

_ASKED = {
    "refused": "(param i32 i32 i32 i32) (result i32)",
    "writable": "(param i32) (result i32)",
    "opened": "(param i32)",
    "closed": "(param i32)",
}
"""Methods of `Folders` that the shim calls."""

_WRITES = frozenset(
    {
        "fd_allocate",
        "fd_filestat_set_size",
        "fd_filestat_set_times",
        "fd_pwrite",
        "fd_write",
    }
)
"""Functions that change an open file."""

HARMLESS = frozenset(
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
        "fd_pread",
        "fd_pwrite",
        "fd_read",
        "fd_seek",
        "fd_tell",
        "fd_write",
        "poll_oneoff",
        "proc_exit",
        "random_get",
        "sched_yield",
    }
)
"""What leaves an environment as it was: reading and writing move the offset of a file alone, which
something else has to open first.
"""

LOOKS = frozenset({"path_filestat_get", "path_readlink"})
"""What leaves an environment without folders as it was, too; on a path, wasmer remembers what it came by."""


class Streams:
    """What a guest writes to the standard streams that it does not inherit.

    `mask` has a bit for each descriptor that is ours; `write` is `fd_write` for those.  `changed` is
    a global of wasmer's that is not 0 once something was called that is not harmless.
    """

    __slots__ = ("_address", "_limit", "_memory", "captured", "changed", "mask")

    def __init__(self, wasi: Wasi, memory: Any, address: int, changed: Any) -> None:
        self._memory = memory
        self.changed = changed
        self._address = address
        self._limit = wasi.capture_limit
        self.captured: dict[int, bytearray] = {}
        self.mask = 1
        for descriptor, stream in ((1, wasi.stdout), (2, wasi.stderr)):
            if stream != "inherit":
                self.mask |= 1 << descriptor
            if stream == "capture":
                self.captured[descriptor] = bytearray()

    def write(self, descriptor: int, vectors: int, count: int, written: int) -> int:
        """Take what `count` pairs of address and length at `vectors` say; errno."""
        vectors, count, written = vectors & 0xFFFFFFFF, count & 0xFFFFFFFF, written & 0xFFFFFFFF
        size = self._memory.data_size
        if vectors + 8 * count > size or written + 4 > size:
            return FAULT
        view = memoryview(ffi.buffer(ffi.cast("uint8_t *", self._address), size))
        pieces = struct.iter_unpack("<II", view[vectors : vectors + 8 * count])
        captured = self.captured.get(descriptor)
        room = 0 if captured is None else self._limit - len(captured)
        taken = bytearray()
        total = 0
        for address, length in pieces:
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
        """Forget what was captured."""
        for taken in self.captured.values():
            taken.clear()

    def output(self, stream: Literal["stdout", "stderr"]) -> bytes:
        """What was captured of a stream so far; nothing of one that is not captured."""
        return bytes(self.captured.get(1 if stream == "stdout" else 2, b""))


def _guard(name: str) -> str:
    """The beginning of a function of the shim that could reach a folder: it returns what `Folders` refuses."""
    if name in _WRITES:  # below 3 are the streams, and no other descriptor gets their numbers
        return (
            " (if (i32.ge_u (local.get 0) (i32.const 3)) (then (if (i32.eqz (call $writable (local.get 0)))"
            f" (then (return (i32.const {ROFS}))))))"
        )
    if name == "fd_close":
        return " (call $closed (local.get 0))"
    if name in {"fd_renumber", "path_symlink"}:
        return f" (return (i32.const {NOTSUP}))"
    changes = CHANGE | RENAME if name == "path_rename" else CHANGE
    what = f"(i32.const {changes if name in _CHANGES else 0})"
    if name == "path_open":  # oflags::creat, oflags::trunc, and the right fd_write
        what = (
            f"(i32.or (i32.const {OPEN}) (i32.or (i64.ne (i64.and (local.get 5) (i64.const 64)) (i64.const 0))"
            " (i32.ne (i32.and (local.get 4) (i32.const 9)) (i32.const 0))))"
        )
    return "".join(
        f" (local.set $errno (call $refused {' '.join(f'(local.get {place})' for place in places)} {what}))"
        " (if (local.get $errno) (then (return (local.get $errno))))"
        for places in _PATHS.get(name, ())
    )


def shim_text(functions: Mapping[str, Any], *, folders: bool) -> str:
    """The shim for `functions`, wasmer's own by name: of `REPLACED`, and what is not harmless.

    Where the environment has no `folders`, a call that fails is not noted, and neither is one that only
    looks: language runtimes look for files even where there are none.
    """
    imports, bodies = [], []
    for name, function in functions.items():
        kinds, results = (
            [wasmer.Type(int(number)).name.lower() for number in side]
            for side in (function.type.params, function.type.results)
        )
        type_ = "".join(f" (param {kind})" for kind in kinds)
        type_ += "".join(f" (result {kind})" for kind in results)
        passed = " ".join(f"(local.get {place})" for place in range(len(kinds)))
        imports.append(f'(import "wasi" "{name}" (func ${name}{type_}))')
        serve = note = local = fail = ""
        call = f"(call ${name} {passed})"
        if name in REPLACED:
            serve = f" (if (call $ours (local.get 0)) (then {_SERVED[name]}))"
        serve += _guard(name)
        if name in _PATHS:
            local = " (local $errno i32)"
        if name == "path_open":
            call = (
                f"(local.set $errno {call}) (if (i32.eqz (local.get $errno)) (then"
                " (call $opened (i32.load (local.get 8))))) (local.get $errno)"
            )
        if name not in HARMLESS and (folders or name not in LOOKS):
            note = " (global.set $changed (i32.const 1))"
            if results == ["i32"] and not folders:
                local = " (local $before i32) (local $errno i32)"
                note = f" (local.set $before (global.get $changed)){note}"
                fail = (
                    " (local.set $errno) (if (local.get $errno)"
                    " (then (global.set $changed (local.get $before)))) (local.get $errno)"
                )
        bodies.append(f'(func (export "{name}"){type_}{local}{serve}{note} {call}{fail})')
    imports += [
        f'(import "memslot" "{name}" (func ${name} {type_}))'
        for name, type_ in _ASKED.items()
        if any(f"${name} " in body for body in bodies)
    ]
    return "\n".join(
        [
            "(module",
            *imports,
            '(import "memslot" "write" (func $write (param i32 i32 i32 i32) (result i32)))',
            '(import "memslot" "memory" (memory 0))',
            '(import "memslot" "changed" (global $changed (mut i32)))',
            '(export "memory" (memory 0))',  # where wasmer's functions look for it
            _OURS,
            *bodies,
            ")",
        ]
    )


def asked(folders: Folders, store: Any, text: str) -> dict[str, Any]:
    """The methods of `Folders` that a shim imports, as wasmer's functions."""
    return {
        name: wasmer.Function(store, getattr(folders, name), _function_type(type_))
        for name, type_ in _ASKED.items()
        if f'"memslot" "{name}"' in text
    }


def write_type() -> Any:
    """The type of `Streams.write`, which is that of `fd_write`."""
    return _function_type("(param i32 i32 i32 i32) (result i32)")


@functools.cache
def _function_type(text: str) -> Any:
    parameters, _, results = text.partition("(result")
    i32 = wasmer.Type.I32
    return wasmer.FunctionType([i32] * parameters.count("i32"), [i32] * results.count("i32"))


def environment(wasi: Wasi) -> Any:
    """The environment of one instance; raises SettingError for what wasmer refuses."""
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
