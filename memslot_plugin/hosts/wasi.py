"""What a WASI preview 1 guest may see of this machine: nothing, unless it is given here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from memslot_plugin.errors import SettingError

MODULES = ("wasi_snapshot_preview1", "wasi_unstable")
"""The import modules of WASI preview 1, and of the snapshot before it."""

Stream = Literal["inherit", "capture", "discard"]


@dataclass(frozen=True, slots=True)
class Wasi:
    """Arguments, environment, standard streams and folders for a WASI guest.

    `arguments` are the program's own, without its name, which is `program`.  `stdout` and `stderr`
    are "inherit" (this process's), "capture" (read them from `instance.stdout` and
    `instance.stderr`) or "discard".  `preopened` maps the path that the guest sees to a folder of
    this machine.  The first `capture_limit` bytes of each captured stream are kept and the rest
    dropped, so that no guest can fill this process.
    """

    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    stdout: Stream = "inherit"
    stderr: Stream = "inherit"
    preopened: Mapping[str, str] = field(default_factory=dict)
    program: str = "guest"
    capture_limit: int = 2**20

    def __post_init__(self) -> None:
        for name in ("stdout", "stderr"):
            if getattr(self, name) not in ("inherit", "capture", "discard"):
                raise SettingError(
                    f"wasi {name} = {getattr(self, name)!r} is not allowed: it must be inherit, capture or discard"
                )
        if self.capture_limit < 0:
            raise SettingError(
                f"wasi capture_limit = {self.capture_limit} is not allowed: it must be at least 0 bytes"
            )
