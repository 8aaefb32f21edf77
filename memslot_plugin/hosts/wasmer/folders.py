"""The folders of a WASI guest on wasmer: each call with a path is asked about here before wasmer sees it.

wasmer 1.1.0 opens every folder for writing, takes an absolute path for one of this machine, and follows links
wherever they lead.  So a path stays below its folder here, and no part of it is a link.
"""

from __future__ import annotations

import os
import stat
from typing import Any

from memslot_plugin._core import ffi
from memslot_plugin.hosts.wasi import Wasi

BADF, FAULT, LOOP, NAMETOOLONG, NOENT, NOTSUP, ROFS, NOTCAPABLE = 8, 21, 32, 37, 44, 58, 69, 76
"""Of `errno` in WASI preview 1."""

CHANGE, OPEN, RENAME = 1, 2, 4
"""The things that a call is about to do with a path, as bits; none: to look."""

PATH_MAX = 4096
"""The longest path that Linux takes.  A longer one is not even looked at: each of its parts costs a call."""

_ROOT = 3
"""wasmer's own descriptor of a folder that holds the given ones and can only be listed; theirs come after it."""


class Folders:
    """The descriptors through which one guest reaches folders of this machine, and what it may do there."""

    def __init__(self, wasi: Wasi, memory: Any, address: int) -> None:
        self._memory = memory
        self._address = address
        self._open = {
            descriptor: (os.fsencode(folder), writable)
            for descriptor, (folder, _, writable) in enumerate(wasi.folders(), _ROOT + 1)
        }
        self._asked: tuple[bytes, bool] = b"", False

    def refused(self, descriptor: int, path: int, length: int, what: int) -> int:
        """The errno of a call that may not reach wasmer, or 0."""
        path, length = path & 0xFFFFFFFF, length & 0xFFFFFFFF
        if path + length > self._memory.data_size:
            return FAULT
        if length > PATH_MAX:
            return NAMETOOLONG
        text = bytes(ffi.buffer(ffi.cast("uint8_t *", self._address + path), length))
        if descriptor == _ROOT:
            self._asked = b"", False
            if what & CHANGE:
                return ROFS
            return 0 if text in {b"", b".", b"/"} else NOENT
        if descriptor not in self._open:
            return BADF
        place, writable = self._open[descriptor]
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
                    mode = os.lstat(b"/".join([place, *below])).st_mode
                except OSError:
                    mode = stat.S_IFREG  # wasmer says why, or makes it
                if stat.S_ISLNK(mode):
                    return LOOP
        if what & OPEN and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            return NOTSUP
        # wasmer would follow a renamed folder through descriptors of it, whose paths here are the old ones.
        if what & RENAME and stat.S_ISDIR(mode):
            return NOTSUP
        self._asked = b"/".join([place, *below]), writable
        return 0

    def opened(self, descriptor: int) -> None:
        """Note what the path that was asked about last was opened as."""
        if self._asked[0]:
            self._open[descriptor] = self._asked

    def closed(self, descriptor: int) -> None:
        """Forget a descriptor, whose number wasmer gives to nothing else."""
        self._open.pop(descriptor, None)

    def writable(self, descriptor: int) -> int:
        """1 if the guest may change what it opened as this descriptor."""
        return int(self._open.get(descriptor, (b"", False))[1])
