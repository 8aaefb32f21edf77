"""WASI preview 1 on wasmtime: what each instance is given of it, and its captured streams."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memslot_plugin._core import ffi, lib
from memslot_plugin.errors import SettingError, Unsupported
from memslot_plugin.hosts.wasi import Wasi
from memslot_plugin.hosts.wasmtime.bridge import address_of, define_wait, wasmtime, wasmtime_ffi

_NONE = ffi.NULL
_set = lib.ms_wt_wasi_set


class Streams:
    """What a guest wrote to its captured streams; the C half collects it, also while another thread reads here."""

    def __init__(self, wasi: Wasi) -> None:
        self.outputs: dict[str, Any] = {}
        for name in ("stdout", "stderr"):
            if getattr(wasi, name) == "capture":
                output = ffi.gc(lib.ms_wt_output_new(wasi.capture_limit), lib.ms_wt_output_release)
                if output == ffi.NULL:
                    raise MemoryError("no memory is left to capture a stream")
                self.outputs[name] = output

    def read(self, name: str) -> bytes:
        """Everything so far, up to the limit; nothing for a stream that is not captured."""
        output = self.outputs.get(name)
        if output is None:
            return b""
        length = lib.ms_wt_output_read(output, ffi.NULL, 0)
        taken = ffi.new("uint8_t[]", length)
        lib.ms_wt_output_read(output, taken, length)
        return bytes(ffi.buffer(taken))


class Environment:
    """What instances get of WASI, made ready once; each gets its own of it with one call into C."""

    def __init__(self, wasi: Wasi) -> None:
        self._wasi = wasi
        self._uncaptured = None if "capture" in (wasi.stdout, wasi.stderr) else Streams(wasi)
        """What all instances share where none has a stream of its own."""
        self._folders = wasi.folders()
        self.has_folders = bool(self._folders)
        self._kept: list[Any] = []
        self._given = ffi.new("ms_wt_wasi *")
        given = self._given
        given.argument_count = 1 + len(wasi.arguments)
        given.arguments = self._texts([wasi.program, *wasi.arguments])
        given.variable_count = len(wasi.environment)
        given.names = self._texts(wasi.environment.keys())
        given.values = self._texts(wasi.environment.values())
        given.folder_count = len(self._folders)
        given.folders = self._texts(folder for folder, _, _ in self._folders)
        given.known_as = self._texts(seen for _, seen, _ in self._folders)
        writable = ffi.new("uint8_t[]", [writable for _, _, writable in self._folders])
        self._kept.append(writable)
        given.writable = writable
        given.inherit_stdout = wasi.stdout == "inherit"
        given.inherit_stderr = wasi.stderr == "inherit"

    def _texts(self, texts: Iterable[str]) -> Any:
        encoded = [ffi.new("char[]", text.encode()) for text in texts]
        array = ffi.new("const char *[]", encoded)
        self._kept += encoded, array
        return array

    def require_workers(self) -> None:
        """Raise Unsupported in a child of a fork where folders or captured streams may wait for ever."""
        if (self._uncaptured is None or self.has_folders) and lib.ms_wt_workers_lost():
            raise Unsupported(
                "folders and captured output cannot be used in this child of a fork, because its parent used them and"
                " wasmtime's worker threads stayed there: fork before that, or start workers with spawn or forkserver"
            )

    def give(self, cell: Any) -> Streams:
        """Give the store of a cell a new state of WASI.

        Raises SettingError where this machine does not have what it takes, and Unsupported as `require_workers`.
        """
        self.require_workers()
        streams = self._uncaptured or Streams(self._wasi)
        out, err = streams.outputs.get("stdout", _NONE), streams.outputs.get("stderr", _NONE)
        refused = _set(cell, self._given, out, err)
        if refused:
            raise SettingError(self._refusal(refused, cell.error))
        return streams

    def _refusal(self, refused: int, error: int) -> str:
        """The sentence that says what was not taken."""
        if refused == lib.MS_WT_SET:
            pointer = ctypes.cast(error, ctypes.POINTER(wasmtime_ffi.wasmtime_error_t))
            why = str(wasmtime.WasmtimeError._from_ptr(pointer))
            return f"wasi is refused by wasmtime: {why}"
        if refused < lib.MS_WT_FOLDER:
            what = "arguments" if refused == lib.MS_WT_ARGUMENTS else "environment"
            return f"wasi {what} is refused by wasmtime: it is not text"
        folder, seen, _ = self._folders[refused - lib.MS_WT_FOLDER]
        why = "there is no such folder" if not Path(folder).is_dir() else "it cannot be opened"
        return f"wasi preopened {seen!r} = {folder!r} is not allowed: {why}"


WAITS = ("poll_oneoff", "path_open")
"""Functions of WASI that can wait past a deadline; path_open by opening a FIFO."""

_SHIM = """(module
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_filestat_get" (func $stat (param i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "clock_time_get" (func $time (param i32 i64 i32) (result i32)))
  (import "memslot" "memory" (memory MEMORY))
  (export "memory" (memory 0))
  (func (export "tick"))
  (func (export "poll_oneoff") (param i32 i32 i32 i32) (result i32)
    (call $poll (local.get 0) (local.get 1) (local.get 2) (local.get 3)))
  (func (export "path_open") (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)
    (call $open (local.get 0) (local.get 1) (local.get 2) (local.get 3) (local.get 4) (local.get 5) (local.get 6)
      (local.get 7) (local.get 8)))
  (func (export "path_filestat_get") (param i32 i32 i32 i32 i32) (result i32)
    (call $stat (local.get 0) (local.get 1) (local.get 2) (local.get 3) (local.get 4)))
  (func (export "clock_time_get") (param i32 i64 i32) (result i32)
    (call $time (local.get 0) (local.get 1) (local.get 2))))"""


def shim_text(memory: wasmtime.MemoryType | None) -> str:
    """The module through which the C half calls WASI on a guest's memory of this type."""
    if memory is None:
        return _SHIM.replace("MEMORY", "0")
    index = "i64 " if memory.is_64 else ""
    # A shared memory fits an import of no smaller maximum.
    shared = f" {memory.limits.max} shared" if memory.is_shared else ""
    return _SHIM.replace("MEMORY", f"{index}0{shared}")


class Shim:
    """The shim compiled for an engine, and WASI for it; the C half makes an instance of it where a guest waits."""

    def __init__(self, engine: wasmtime.Engine, module: wasmtime.Module) -> None:
        self._linker = wasmtime.Linker(engine)
        self._linker.define_wasi()
        self._module = module
        self._types: dict[str | None, Any] = {each.name: each.type for each in module.imports}
        self.given = ffi.new(
            "ms_wt_shim *", [address_of(module.ptr()), address_of(self._linker.ptr())]
        )

    def stand_before(self, linker: wasmtime.Linker, name: str, *, foreign: bool) -> None:
        """Take the place of one of `WAITS`; `foreign` says that the linker is for one store of the embedder's."""
        linker.allow_shadowing = True
        define_wait(linker, self._types[name], self, opens=name == "path_open", foreign=foreign)
        linker.allow_shadowing = False


def provides(module: str) -> bool:
    """Whether wasmtime's linker defines WASI under this import module."""
    return module == "wasi_snapshot_preview1"
