"""WASI preview 1: the parts of this machine that a guest may see, which are none by default."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from memslot_plugin.errors import SettingError, shown

MODULES = ("wasi_snapshot_preview1", "wasi_unstable")
"""The import modules of WASI preview 1, and of the snapshot before it."""

Stream = Literal["inherit", "capture", "discard"]


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of this machine for a WASI guest, which may change it only if it is `writable`."""

    path: str | os.PathLike[str]
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Wasi:
    """Arguments, environment, standard streams and folders for a WASI guest.

    `arguments` are the program's own, without its name, which is `program`.  Standard input is empty.
    `stdout` and `stderr` are "discard", "inherit" (this process's) or "capture" (read them from
    `instance.stdout` and `instance.stderr`).  `preopened` maps the path that the guest sees to a
    folder of this machine: a path, which the guest can only read, or a `Folder`.  The first
    `capture_limit` bytes of each captured stream are kept and the rest dropped, so that no guest can
    fill this process.
    """

    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    stdout: Stream = "discard"
    stderr: Stream = "discard"
    preopened: Mapping[str, str | os.PathLike[str] | Folder] = field(default_factory=dict)
    program: str = "guest"
    capture_limit: int = 2**20

    def __post_init__(self) -> None:
        for name in ("stdout", "stderr"):
            stream = getattr(self, name)
            allowed = stream in ("inherit", "capture", "discard")
            _require(allowed, name, stream, "it must be inherit, capture or discard")
        limit = self.capture_limit
        allowed = isinstance(limit, int) and 0 <= limit <= sys.maxsize
        _require(allowed, "capture_limit", limit, f"it must be 0 to {sys.maxsize} bytes")
        for name in ("environment", "preopened"):
            given = getattr(self, name)
            _require(isinstance(given, Mapping), name, given, "it must be a mapping")
        allowed = isinstance(self.arguments, Sequence) and not isinstance(self.arguments, str)
        _require(allowed, "arguments", self.arguments, "it must be a sequence of texts")
        _require_texts("program", [self.program])
        _require_texts("arguments", self.arguments)
        _require_texts("environment", [*self.environment, *self.environment.values()])
        for name in self.environment:
            if not name or "=" in name:
                raise SettingError(
                    f"wasi environment {name!r} is not allowed: a name has at least one character and no ="
                )
        _require_texts("preopened", self.preopened)
        _require_texts("preopened", [path for path, _, _ in self.folders()])

    def folders(self) -> list[tuple[str, str, bool]]:
        """Each folder as its path here, the path that the guest sees, and true if it is writable."""
        folders = []
        for seen, given in self.preopened.items():
            folder = given if isinstance(given, Folder) else Folder(given)
            where = f"preopened {seen!r}"
            allowed = isinstance(folder.path, (str, os.PathLike))
            _require(allowed, where, given, "it must be a path or a memslot.Folder")
            allowed = isinstance(folder.writable, bool)
            _require(allowed, where, given, "writable must be True or False")
            folders.append((os.fspath(folder.path), seen, folder.writable))
        return folders


def _require(allowed: bool, name: str, value: object, rule: str) -> None:
    """Raise SettingError if a value is not allowed."""
    if not allowed:
        raise SettingError(f"wasi {name} = {shown(value)} is not allowed: {rule}")


def _require_texts(what: str, texts: Any) -> None:
    """Refuse a value that WASI cannot pass on whole: its texts are UTF-8 and end with a zero byte."""
    for text in texts:
        if not isinstance(text, str):
            why = "it must be text"
        elif "\0" in text:
            why = "the guest would see it cut at its zero character"
        else:
            try:
                text.encode()
            except UnicodeEncodeError:
                why = "it is not UTF-8"
            else:
                continue
        raise SettingError(f"wasi {what} {text!r} is not allowed: {why}")
