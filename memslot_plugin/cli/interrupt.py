"""Ctrl-C between two requests, never inside one: no runtime's callback meets an exception that it did not expect."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, final

from memslot_plugin.cli.output import INTERRUPTED

GRACE_SECONDS = 2.0
"""How long guest code may go on after Ctrl-C before the process ends under it."""

_SHOW_CURSOR = b"\r\x1b[2K\x1b[?25h"
"""Empties the line of a progress display, which hides the cursor (ECMA-48 and DEC private mode 25)."""


@final
class Interruptible:
    """A block in which `check` raises KeyboardInterrupt after Ctrl-C, and in which nothing else does.

    A guest that computes forever never comes back to a check.  A thread then ends the process after GRACE_SECONDS,
    which works where the runtime lets other threads run (wasmtime); under wasmer the process has to be killed.
    """

    def __init__(self) -> None:
        self._asked = False
        self._left = threading.Event()
        self._previous: Any = None
        self._pipe = (-1, -1)
        self._stderr = -1
        self._watchdog: threading.Thread | None = None

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self._asked:
            raise KeyboardInterrupt

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            os.set_blocking(self._pipe[0], True)
            with suppress(OSError):  # closed from the start: nobody to talk to
                self._stderr = os.dup(2)
            self._previous = signal.signal(signal.SIGINT, self._ask)
            signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._watchdog = threading.Thread(target=self._watch, daemon=True)
            self._watchdog.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._watchdog is None:
            return
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, self._previous)
        self._left.set()
        os.write(self._pipe[1], b"\0")
        self._watchdog.join()
        for descriptor in (*self._pipe, self._stderr):
            if descriptor >= 0:
                os.close(descriptor)
        self._watchdog = None

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    def _watch(self) -> None:
        """Wait for the byte that the signal writes (or that leaving writes), which needs no Python code to run."""
        while not self._left.is_set():
            number = os.read(self._pipe[0], 1)
            if number == bytes([signal.SIGINT]) and not self._left.wait(GRACE_SECONDS):
                if self._stderr >= 0:
                    shown = _SHOW_CURSOR if os.isatty(self._stderr) else b""
                    os.write(self._stderr, shown + b"memslot: interrupted\n")
                os._exit(INTERRUPTED)
