"""Ctrl-C that ends the process by itself, also in guest code, where Python never runs a handler."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Give SIGINT its default action for a block: no runtime's callback meets an exception that it did not expect."""
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
