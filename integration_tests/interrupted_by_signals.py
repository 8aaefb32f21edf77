"""KeyboardInterrupt from real signals at random moments of verbs, in a process of its own.

usage: python -m integration_tests.interrupted_by_signals HOST BACKEND SECONDS
"""

from __future__ import annotations

import faulthandler
import random
import signal
import sys
import time
from types import FrameType

import memslot_plugin as memslot
from memslot_plugin.tests.leaks import Footprint

from .cells import Cell
from .verbs import World


def everything(guest: memslot.Guest) -> None:
    """Use the verbs in turn, until the signal comes."""
    while True:
        with guest.instantiate() as instance:
            instance.call("fill", 0, 5000, 0xEE)
            instance.reset()
            instance.call("grow", 1)
            instance.reset()
        with guest.lease() as instance:
            instance.call("store", 5, 5)
        guest.instantiate().call("fill", 0, 5000, 0xEE)


def ring(_: int, frame: FrameType | None) -> None:
    """Interrupt the verbs alone: the timer may ring again after their end."""
    while frame is not None:
        if frame.f_code is everything.__code__:
            raise KeyboardInterrupt
        frame = frame.f_back


def interrupted_once(world: World) -> None:
    """Run verbs until a timer interrupts them. The timer rings again: a finalizer swallows an interrupt."""
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.001 + random.random() * 0.01, 0.1)
    try:
        everything(world.guest)
    except KeyboardInterrupt:
        pass
    except memslot.Unsupported as lost:
        if "dropped the exception of a signal handler" not in str(lost):
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    name, backend, seconds = sys.argv[1:]
    faulthandler.dump_traceback_later(120, exit=True)
    swallowed: list[object] = []
    sys.unraisablehook = swallowed.append  # a finalizer cannot raise to a caller
    with World(Cell(name, backend)):
        pass
    before = Footprint.now()
    with World(Cell(name, backend), slots=4) as world:
        times, end = 0, time.monotonic() + float(seconds)
        while time.monotonic() < end:
            interrupted_once(world)
            swallowed.clear()  # an exception keeps the objects that its finalizer had to end
            world.serves()
            times += 1
    # 2000 mappings: a signal while the runtime's package takes over compiled code loses that code, with and without
    # memslot.
    lost = Footprint.now().lost_since(before, mappings=2000)
    assert not lost, lost
    print(times)


if __name__ == "__main__":
    main()
