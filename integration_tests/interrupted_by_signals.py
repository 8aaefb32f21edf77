"""A real SIGINT at random moments, while every verb is used: run as a process of its own.

usage: python -m integration_tests.interrupted_by_signals HOST BACKEND SECONDS
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from memslot_plugin.tests.leaks import Footprint

from .cells import Cell
from .verbs import COMPILE, VERBS, World


def everything(world: World) -> None:
    """Verbs in turn, until the signal comes."""
    while True:
        for verb, (setup, action) in VERBS.items():
            if verb not in COMPILE - {"close a fork"}:
                action(world, setup(world))


class Bell(threading.Thread):
    """While it is armed it interrupts the main thread, a random moment later and then again and again: a finalizer
    swallows an interrupt.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.armed = threading.Event()

    def run(self) -> None:
        while True:
            self.armed.wait()
            time.sleep(random.random() * 0.01)
            while self.armed.is_set():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)


def interrupted_once(bell: Bell, world: World) -> None:
    """From arming the bell to the KeyboardInterrupt."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        bell.armed.set()
        everything(world)
    except KeyboardInterrupt:
        while signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            with suppress(KeyboardInterrupt):  # the bell may ring again before that
                bell.armed.clear()
                signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> None:
    name, backend, seconds = sys.argv[1:]
    faulthandler.dump_traceback_later(120, exit=True)
    swallowed: list[Any] = []
    sys.unraisablehook = swallowed.append  # a finalizer cannot raise it to a caller
    bell = Bell()
    bell.start()
    with World(Cell(name, backend)).host:
        pass
    before = Footprint.now()
    world = World(Cell(name, backend))
    times, end = 0, time.monotonic() + float(seconds)
    while time.monotonic() < end:
        interrupted_once(bell, world)
        world.serves()
        times += 1
    swallowed.clear()
    world.close()
    # A signal between the runtime's package being given compiled code and keeping it loses that code, as it does
    # without memslot; descriptors, images and reservations are memslot's.
    lost = Footprint.now().lost_since(before, mappings=2000)
    assert not lost, lost
    print(times)


if __name__ == "__main__":
    main()
