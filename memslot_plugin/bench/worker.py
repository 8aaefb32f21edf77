"""One process of family `scaling`: serves requests in slots that map the sealed image behind an inherited descriptor.

Started as a program of its own, with the descriptor and the seconds as arguments, it prints a line when it is ready,
begins when it reads one, and prints how many requests per second it served.
"""

from __future__ import annotations

import sys
import time

from memslot_plugin._core import align_up
from memslot_plugin.bench.memory import Pages, strategy
from memslot_plugin.memory.backing import Memfd
from memslot_plugin.memory.image import MemfdImage, Piece
from memslot_plugin.memory.pool import Pool
from memslot_plugin.settings import MIB

GUEST = 4 * MIB
WRITTEN = 16


def received(descriptor: int, byte_size: int) -> MemfdImage:
    """An image whose sealed file somebody else made; it is one extent from 0 on."""
    return MemfdImage.of_pieces(
        "received", [Piece(0, byte_size, Memfd("received", descriptor, byte_size), 0)]
    )


def serve(image: MemfdImage, ends: float) -> float:
    """Requests per second until then, of at least one request: lease a slot, write, release it."""
    pages = Pages.spread(WRITTEN, GUEST)
    with Pool(slots=4, reserved=align_up(GUEST), guard=MIB, reset=strategy("auto")) as pool:
        done, started = 0, time.monotonic()
        while not done or time.monotonic() < ends:
            slot = pool.lease(image, GUEST, affinity="guest")
            pages.write(slot.base)
            pool.release(slot)
            done += 1
        return done / (time.monotonic() - started)


def main() -> None:
    """Serve on the descriptor that was passed."""
    strategy("auto")  # measures prices, once per process
    with received(int(sys.argv[1]), GUEST) as image:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        sys.stdout.write(repr(serve(image, time.monotonic() + float(sys.argv[2]))))
