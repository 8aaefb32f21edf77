"""Draw public calls at random on handles that are live, ended, of other guests and of other hosts.

    python -m integration_tests.misuse HOST --seed 1 --rounds 500 --threads 1

Each tenant writes one word (32 bits) that no other lease has. A read may find the guest's own words and the tenant's
word alone. The memory of a tenant that only one thread uses equals a model byte by byte. A call returns the right
answer or raises the fitting error of memslot. The world leaves nothing behind. A seed draws the same calls each time.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import signal
import sys
import threading
import time
from typing import Any

from integration_tests import cells
from memslot_plugin.tests import hosts
from memslot_plugin.tests.leaks import Footprint

from . import calls, lives, mutants
from .player import Player
from .world import World, Wrong

WEIGHTS = {
    lives.prepare: 2,
    lives.close_guest: 1,
    lives.instantiate: 10,
    lives.lease: 12,
    lives.leave_one: 10,
    lives.share: 3,
    lives.end_of_another: 3,
    lives.reset: 10,
    lives.copy: 3,
    calls.fill: 20,
    calls.get: 6,
    calls.keep: 10,
    calls.call_kept: 10,
    calls.read: 16,
    calls.write: 12,
    calls.use_native: 8,
    calls.grow: 4,
    calls.use_global: 8,
    calls.ask: 10,
    calls.mistake: 5,
    lives.spare_host: 0.3,
    calls.statistics: 2,
    lives.child: 0.5,
}
"""Weights with which the acts are drawn."""


def play(world: World) -> None:
    """Let every thread draw its rounds, and end what they leave."""
    wrong: list[BaseException] = []
    played, ending = threading.Barrier(world.threads), threading.Lock()

    def draw(number: int) -> None:
        try:
            player = Player(world, number, WEIGHTS)
            player.play()
            played.wait()
            if world.confined:
                with ending:  # a collection does nothing while another thread collects
                    player.end()
        except BaseException as error:  # noqa: BLE001 - raised below
            wrong.append(error)
            played.abort()

    if world.threads == 1:
        draw(0)
    else:
        threads = [threading.Thread(target=draw, args=(n,)) for n in range(world.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if wrong:
        raise wrong[0]
    world.end()


def misuse(name: str, seed: int, rounds: int, threads: int) -> str:
    """Play a world from its first call to its end, and return the number of calls of each kind."""
    unraisable: list[str] = []

    def noticed(raised: Any) -> None:
        unraisable.append(f"{raised.exc_value!r} in {raised.object!r}")

    sys.unraisablehook = noticed
    # Make what a process makes once and keeps: otherwise the first footprint lacks it.
    hosts.start_wasi()
    play(World(name, seed + 1_000_000, threads, min(rounds, 100)))
    before = Footprint.now()
    world = World(name, seed, threads, rounds)
    play(world)
    deadline = time.monotonic() + 5
    # The kernel lists a joined thread for a moment longer: Python's join does not wait for its exit.
    while lost := Footprint.now().lost_since(before, mappings=64):
        if time.monotonic() > deadline:
            break
    if lost:
        raise Wrong(f"seed {seed}: left behind: {', '.join(lost)}")
    if unraisable:
        raise Wrong(f"seed {seed}: unraisable exceptions: {unraisable[:3]}")
    acts = ", ".join(f"{count} {name}" for name, count in sorted(world.done.items()))
    return f"{name}, seed {seed}: {acts}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m integration_tests.misuse")
    parser.add_argument("host", choices=cells.REAL_HOSTS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--seconds", type=int, default=120, help="limit after which a hang is reported"
    )
    parser.add_argument("--mutant", choices=sorted(mutants.MUTANTS), help="a fault to put back")
    options = parser.parse_args()
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, chain=True)
    faulthandler.dump_traceback_later(options.seconds, exit=True)
    importlib.import_module(f"memslot_plugin.hosts.{options.host}.runtime")  # before it is patched
    if options.mutant is not None:
        mutants.MUTANTS[options.mutant].put_back()
    print(misuse(options.host, options.seed, options.rounds, options.threads))


if __name__ == "__main__":
    main()
