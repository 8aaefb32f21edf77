"""Ctrl-C between two requests, never inside one: no runtime's callback meets an exception that it did not expect."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from memslot_plugin.cli.output import INTERRUPTED

GRACE_SECONDS = 2.0
"""Seconds that guest code may go on after Ctrl-C before the process ends under it."""

_SHOW_CURSOR = b"\r\x1b[2K\x1b[?25h"
"""Empties the line of a progress display, which hides the cursor (ECMA-48 and DEC private mode 25)."""


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Yield a check that raises KeyboardInterrupt after Ctrl-C; in this block nothing else does.

    A guest that computes forever never comes back to a check.  A thread then ends the process after GRACE_SECONDS,
    which works where the runtime lets other threads run (wasmtime); under wasmer the process has to be killed.
    """
    asked = False
    left = threading.Event()
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    stderr = os.dup(2)  # file descriptor 2 is /dev/null while a guest runs

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    def watch() -> None:
        """Wait for the byte that the signal writes, which needs no Python code to run, or for the pipe's end."""
        if os.read(reader, 1) and not left.wait(GRACE_SECONDS):
            shown = _SHOW_CURSOR if os.isatty(stderr) else b""
            os.write(stderr, shown + b"memslot: interrupted\n")
            os._exit(INTERRUPTED)

    watchdog = threading.Thread(target=watch, daemon=True)
    watchdog.start()
    previous = signal.signal(signal.SIGINT, ask)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield check
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, previous)
        left.set()
        os.close(writer)
        watchdog.join()
        os.close(reader)
        os.close(stderr)
