"""WASI preview 1 on wasmer: an environment of its own for each instance, and the standard streams.

wasmer-python can neither capture what a guest writes nor keep it from reading this process's
standard input.  Where a guest imports a function that could, a small module of ours, the shim,
stands between it and wasmer's own function:

    guest -- fd_read(0) ----> shim --> nothing to read
          -- fd_write(1) ---> shim --> `Streams`, in Python, unless the stream is inherited
          -- fd_write(5) ---> shim --> wasmer's fd_write, unless every folder is read-only
          -- fd_close(1) ---> shim --> wasmer's fd_close, and a note that descriptors have changed
          -- path_open() ---> shim --> wasmer's path_open, for what is a file or a folder

The note is for resets and snapshots: an instance can be reset in place as long as nothing that only a
new environment has was changed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Literal

from memslot_plugin._core import ffi
from memslot_plugin.errors import SettingError, Unsupported
from memslot_plugin.hosts.wasi import Wasi
from memslot_plugin.hosts.wasmer_runtime import wasmer

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
    # errno::notsup: under another number a stream would no longer be recognised.
    "fd_renumber": "(return (i32.const 58))",
}
REPLACED = tuple(_SERVED)
"""What the shim serves itself where a descriptor is ours: all that moves its bytes, and what gives it
another number.
"""

_REFUSED = "(return (i32.const 69))"
"""`errno::rofs`: a read-only file system."""

_READ_ONLY = {
    # Neither a stream nor a descriptor that a stream can have become.
    "fd_write": f"(if (i32.ge_u (local.get 0) (i32.const 3)) (then {_REFUSED}))",
    "fd_pwrite": f"(if (i32.ge_u (local.get 0) (i32.const 3)) (then {_REFUSED}))",
    # oflags::creat and oflags::trunc, and the right fd_write.
    "path_open": f"(if (i32.and (local.get 4) (i32.const 9)) (then {_REFUSED}))"
    f" (if (i64.ne (i64.and (local.get 5) (i64.const 64)) (i64.const 0)) (then {_REFUSED}))",
    "fd_allocate": _REFUSED,
    "fd_filestat_set_size": _REFUSED,
    "fd_filestat_set_times": _REFUSED,
    "path_create_directory": _REFUSED,
    "path_filestat_set_times": _REFUSED,
    "path_link": _REFUSED,
    "path_remove_directory": _REFUSED,
    "path_rename": _REFUSED,
    "path_symlink": _REFUSED,
    "path_unlink_file": _REFUSED,
}
"""How the shim begins each function that can change a folder, for a guest that may change none: wasmer-python
opens every folder for writing.
"""

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


_KEPT = range(0, 64, 8)
"""Offsets of the words of a `filestat`, for which the shim borrows room in the guest's memory."""

_SPECIAL = f"""
  (func $special (param $fd i32) (param $flags i32) (param $path i32) (param $length i32) (result i32)
    (local $at i32) (local $type i32) {"".join(f"(local $kept{place} i64)" for place in _KEPT)}
    (if (i32.or (i32.eqz (memory.size))
          (i64.gt_u (i64.add (i64.extend_i32_u (local.get $path)) (i64.extend_i32_u (local.get $length)))
            (i64.shl (i64.extend_i32_u (memory.size)) (i64.const 16))))
      (then (return (i32.const 0))))
    (if (i32.lt_u (local.get $path) (i32.const 64)) (then (local.set $at (i32.const 4160))))
    {"".join(f"(local.set $kept{place} (i64.load offset={place} (local.get $at)))" for place in _KEPT)}
    (local.set $type (i32.const 4))
    (if (i32.eqz (call $path_filestat_get
          (local.get $fd) (local.get $flags) (local.get $path) (local.get $length) (local.get $at)))
      (then (local.set $type (i32.load8_u offset=16 (local.get $at)))))
    {"".join(f"(i64.store offset={place} (local.get $at) (local.get $kept{place}))" for place in _KEPT)}
    (i32.eqz (i32.and (i32.shl (i32.const 1) (local.get $type)) (i32.const {1 << 3 | 1 << 4 | 1 << 7}))))
"""
"""True if a path leads to something else than a folder, a file or a link: opening a FIFO would wait, and nothing
can interrupt that.  A path has up to 4096 bytes, so the room that is borrowed lies before or after it.
"""

_ORDINARY = (
    # errno::nametoolong and errno::notsup
    "(if (i32.gt_u (local.get 3) (i32.const 4096)) (then (return (i32.const 37))))"
    " (if (call $special (local.get 0) (local.get 1) (local.get 2) (local.get 3))"
    " (then (return (i32.const 58))))"
)


def shim_text(functions: Mapping[str, Any], *, folders: bool, writable: bool) -> str:
    """The shim for `functions`, wasmer's own by name: of `REPLACED`, and what is not harmless.

    Where the environment has no `folders`, a call that fails is not noted, and neither is one that only
    looks: language runtimes look for files even where there are none.  `writable` says that the guest may
    change its folders.
    """
    imports, bodies = [], []
    special = ""
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
        if name in REPLACED:
            ours = "(call $ours (local.get 0))"
            if name == "fd_renumber":
                ours = f"(i32.or {ours} (call $ours (local.get 1)))"
            serve = f" (if {ours} (then {_SERVED[name]}))"
        if not writable and name in _READ_ONLY:
            serve += f" {_READ_ONLY[name]}"
        if name == "path_open":
            special = _SPECIAL
            serve += f" {_ORDINARY}"
        if name not in HARMLESS and (folders or name not in LOOKS):
            note = " (global.set $changed (i32.const 1))"
            if results == ["i32"] and not folders:
                local = " (local $before i32) (local $errno i32)"
                note = f" (local.set $before (global.get $changed)){note}"
                fail = (
                    " (local.set $errno) (if (local.get $errno)"
                    " (then (global.set $changed (local.get $before)))) (local.get $errno)"
                )
        bodies.append(
            f'(func (export "{name}"){type_}{local}{serve}{note} (call ${name} {passed}){fail})'
        )
    return "\n".join(
        [
            "(module",
            *imports,
            '(import "memslot" "write" (func $write (param i32 i32 i32 i32) (result i32)))',
            '(import "memslot" "memory" (memory 0))',
            '(import "memslot" "changed" (global $changed (mut i32)))',
            '(export "memory" (memory 0))',  # where wasmer's functions look for it
            _OURS,
            special,
            *bodies,
            ")",
        ]
    )


def write_type() -> Any:
    """The type of `Streams.write`, which is that of `fd_write`."""
    i32 = wasmer.Type.I32
    return wasmer.FunctionType([i32] * 4, [i32])


def environment(wasi: Wasi) -> Any:
    """The environment of one instance; raises SettingError for what wasmer refuses, Unsupported for folders
    of which only some are writable: a path in one of them can lead into another.
    """
    if len({writable for _, _, writable in wasi.folders()}) > 1:
        raise Unsupported(
            "wasi preopened has writable folders beside read-only ones, which wasmer cannot keep apart;"
            " give folders of one kind, or use wasmtime"
        )
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
