"""The folders of a WASI guest on wasmer: every path of a call is checked here before wasmer sees it.

wasmer 1.1.0 opens every folder for writing, takes an absolute path for one of this machine, and follows links out of
the folder.  So a path here stays below its folder, and no part of it is a link.
"""

from __future__ import annotations

import os
import stat
from typing import Any

from memslot_plugin.hosts.wasi import Wasi

BADF, FAULT, LOOP, NAMETOOLONG, NOENT, NOTSUP, ROFS, SPIPE, NOTCAPABLE = (
    8, 21, 32, 37, 44, 58, 69, 70, 76,
)  # fmt: skip
"""Values of `errno` in WASI preview 1."""

CHANGE, OPEN, RENAME = 1, 2, 4
"""Bits of what a call is about to do with a path; 0 if it only looks."""

PATH_MAX = 4096
"""The longest path that Linux takes; checking each part of a longer one would cost a system call."""

_ROOT = 3
"""wasmer's own descriptor of the folder that contains the given ones and can only be listed; theirs follow."""


class Folders:
    """The descriptors through which one guest reaches folders of this machine, and its rights there."""

    def __init__(self, wasi: Wasi, memory: Any) -> None:
        self._memory = memory
        self._open = {
            descriptor: (os.fsencode(folder), writable)
            for descriptor, (folder, _, writable) in enumerate(wasi.folders(), _ROOT + 1)
        }
        self._checked: tuple[bytes, bool] | None = None
        """The path that `refused` let pass last, and true if it is writable."""

    def refused(self, descriptor: int, path: int, length: int, what: int) -> int:
        """Return 0 if wasmer may get the call, or its errno."""
        path, length = path & 0xFFFFFFFF, length & 0xFFFFFFFF
        if path + length > self._memory.data_size:
            return FAULT
        if length > PATH_MAX:
            return NAMETOOLONG
        text = bytes(memoryview(self._memory.buffer)[path : path + length])
        if descriptor == _ROOT:
            self._checked = None
            if what & CHANGE:
                return ROFS
            return 0 if text in {b"", b".", b"/"} else NOENT
        if descriptor not in self._open:
            return BADF
        folder, writable = self._open[descriptor]
        if what & CHANGE and not writable:
            return ROFS
        if text.startswith(b"/") or b"\0" in text:
            return NOTCAPABLE
        below: list[bytes] = []
        mode = stat.S_IFDIR
        for part in text.split(b"/"):
            if part == b"..":
                if not below:
                    return NOTCAPABLE
                below.pop()
                mode = stat.S_IFDIR
            elif part not in {b"", b"."}:
                below.append(part)
                try:
                    mode = os.lstat(b"/".join([folder, *below])).st_mode
                except OSError:
                    mode = stat.S_IFREG  # wasmer returns the errno, or creates the file
                if stat.S_ISLNK(mode):
                    return LOOP
        # Opening a pipe or a device would block this thread, or reach out of the folder.
        if what & OPEN and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            return NOTSUP
        # Descriptors of a renamed folder would keep its old path here, and the next check would look at other files.
        if what & RENAME and stat.S_ISDIR(mode):
            return NOTSUP
        self._checked = b"/".join([folder, *below]), writable
        return 0

    def opened(self, descriptor: int) -> None:
        """Note that wasmer opened the last checked path as `descriptor`."""
        if self._checked is not None:
            self._open[descriptor] = self._checked

    def closed(self, descriptor: int) -> None:
        """Forget a descriptor, whose number wasmer does not use again."""
        self._open.pop(descriptor, None)

    def writable(self, descriptor: int) -> int:
        """Return 1 if the guest may change what it opened as `descriptor`, or 0."""
        return int(descriptor in self._open and self._open[descriptor][1])
