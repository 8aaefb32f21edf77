"""WASI preview 1 on wasmtime: the state of each instance, its captured streams, and bounds on waiting."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memslot_plugin._core import ffi, lib
from memslot_plugin.errors import SettingError, Unsupported
from memslot_plugin.hosts.wasi import Wasi
from memslot_plugin.hosts.wasmtime.bridge import address_of, define_wait, error_at, wasmtime

_NONE = ffi.NULL
_set = lib.ms_wt_wasi_set


class Streams:
    """The output of a guest to its captured streams.  The C half collects it, also while another thread reads."""

    def __init__(self, wasi: Wasi) -> None:
        self.outputs: dict[str, Any] = {}
        for name in ("stdout", "stderr"):
            if getattr(wasi, name) == "capture":
                output = ffi.gc(lib.ms_wt_output_new(wasi.capture_limit), lib.ms_wt_output_release)
                if output == ffi.NULL:
                    raise MemoryError("no memory is left to capture a stream")
                self.outputs[name] = output

    def read(self, name: str) -> bytes:
        """Return the output so far, up to the limit; nothing for a stream that is not captured."""
        output = self.outputs.get(name)
        if output is None:
            return b""
        length = lib.ms_wt_output_read(output, ffi.NULL, 0)
        taken = ffi.new("uint8_t[]", length)
        lib.ms_wt_output_read(output, taken, length)
        return bytes(ffi.buffer(taken))


class Environment:
    """The WASI of many instances, as the C half takes it; each store gets a state of its own with one call."""

    def __init__(self, wasi: Wasi) -> None:
        self._wasi = wasi
        self._uncaptured = None if "capture" in (wasi.stdout, wasi.stderr) else Streams(wasi)
        """The streams of all instances if none is captured."""
        self._folders = wasi.folders()
        self.has_folders = bool(self._folders)
        self._kept: list[Any] = []
        """The texts and arrays that `_given` has bare pointers to."""
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
        """Raise Unsupported in a child of a fork in which folders or captured streams may wait for ever."""
        if (self._uncaptured is None or self.has_folders) and lib.ms_wt_workers_lost():
            raise Unsupported(
                "folders and captured output cannot be used in this child of a fork, because its parent used them and"
                " wasmtime's worker threads stayed there: fork before that, or start workers with spawn or forkserver"
            )

    def give(self, cell: Any) -> Streams:
        """Give the store of a cell a new state of WASI.

        Raises SettingError if a folder or a text is refused, and Unsupported as `require_workers` does.
        """
        self.require_workers()
        streams = self._uncaptured or Streams(self._wasi)
        out, err = streams.outputs.get("stdout", _NONE), streams.outputs.get("stderr", _NONE)
        refused = _set(cell, self._given, out, err)
        if refused:
            raise SettingError(self._refusal(refused, cell.error))
        return streams

    def _refusal(self, refused: int, error: int) -> str:
        """Return the sentence that says which part was refused, and why."""
        if refused == lib.MS_WT_SET:
            return f"wasi is refused by wasmtime: {error_at(error)}"
        if refused < lib.MS_WT_FOLDER:
            what = "arguments" if refused == lib.MS_WT_ARGUMENTS else "environment"
            return f"wasi {what} is refused by wasmtime: it is not text"
        folder, seen, _ = self._folders[refused - lib.MS_WT_FOLDER]
        why = "there is no such folder" if not Path(folder).is_dir() else "it cannot be opened"
        return f"wasi preopened {seen!r} = {folder!r} is not allowed: {why}"


WAITS = ("poll_oneoff", "path_open")
"""The functions of WASI that can wait past a deadline; path_open waits if it opens a FIFO."""

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
    """Return the text of the module through which the C half calls WASI on a guest's memory of this type."""
    if memory is None:
        return _SHIM.replace("MEMORY", "0")
    index = "i64 " if memory.is_64 else ""
    # An import of a shared memory must have the same maximum or a larger one.
    shared = f" {memory.limits.max} shared" if memory.is_shared else ""
    return _SHIM.replace("MEMORY", f"{index}0{shared}")


class Shim:
    """The shim compiled for an engine, and WASI for it.  The C half makes an instance of it when a guest waits."""

    def __init__(self, engine: wasmtime.Engine, module: wasmtime.Module) -> None:
        self._linker = wasmtime.Linker(engine)
        self._linker.define_wasi()
        self._module = module
        self._types: dict[str | None, Any] = {each.name: each.type for each in module.imports}
        self.given = ffi.new(
            "ms_wt_shim *", [address_of(module.ptr()), address_of(self._linker.ptr())]
        )

    def stand_before(self, linker: wasmtime.Linker, name: str, *, foreign: bool) -> None:
        """Define one of `WAITS` again in the linker; `foreign` is true if that is for a store of the embedder's."""
        linker.allow_shadowing = True
        define_wait(linker, self._types[name], self, opens=name == "path_open", foreign=foreign)
        linker.allow_shadowing = False


def provides(module: str) -> bool:
    """Return true if wasmtime's linker defines WASI under this import module."""
    return module == "wasi_snapshot_preview1"
