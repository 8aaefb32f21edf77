"""What a host does with the toy guest, told as JSON: run on machines that refuse something, and compared.

usage: python -m integration_tests.story [--without-traps] HOST ...
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import memslot_plugin as memslot

from . import cells, toy
from .leaks import Footprint
from .toy import PAGE

CALLS = (
    ("load", 16),
    ("fill", 1000, 70000, 9),
    ("grow", 2),
    ("store", 4 * PAGE - 1, 3),
    ("load", 4 * PAGE),
    ("fill_and_trap", 5, 5, 5),
    ("grow", 100),
    ("bump",),
)


TRAPS = {("load", 4 * PAGE), ("load", 2 * PAGE), ("fill_and_trap", 5, 5, 5)}
"""A runtime learns of them by a signal, which an emulator may not pass on."""

PROC = Path("/proc/self/maps").exists()

with_traps = True


def told(call: Any, *arguments: Any) -> Any:
    """A result, or the error's name."""
    if arguments in TRAPS and not with_traps:
        return "left out"
    try:
        return call(*arguments)
    except memslot.GuestTrap:
        return "trap"


def digest(instance: memslot.Instance) -> str:
    memory = instance.memory
    return hashlib.sha256(memory.read(0, memory.byte_size)).hexdigest()


def tell(host: memslot.Host) -> list[Any]:
    """Two guests in turn: what they hold, compute, grow to, trap at, and hold after a reset."""
    happened: list[Any] = []
    guests = [host.prepare(module) for module in (toy.A, toy.B)]
    for guest in (*guests, *guests):
        with guest.instantiate() as instance:
            happened.append(digest(instance))
            happened += [told(instance.call, *call) for call in CALLS]
            happened.append(digest(instance))
            instance.reset()
            happened += [
                digest(instance),
                told(instance.call, "load", 2 * PAGE),
                instance.call("bump"),
            ]
        if PROC:
            cells.check(host, in_use=0)
    return happened


def report(name: str) -> dict[str, Any]:
    """What happened on a host, and who provided the memory; or the error that kept it from opening or serving, and what
    a second such attempt has left behind.
    """
    options = {"functions": toy.FUNCTIONS} if name == "fake" else {}
    told = attempt(name, options)
    if told["error"] is not None and PROC:
        before = Footprint.now()
        attempt(name, options)
        told["lost"] = Footprint.now().lost_since(before, mappings=4)
    return told


def attempt(name: str, options: dict[str, Any]) -> dict[str, Any]:
    try:
        with memslot.open_host(name, slots=2, **options) as host:
            return {
                "error": None,
                "happened": tell(host),
                "plugins": {pool.plugin: pool.leases for pool in host.statistics().pools},
                "answers": {answer.plugin: answer.reason for answer in host.plugins.answers()},
            }
    except memslot.MemslotError as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    with_traps = "--without-traps" not in sys.argv
    names = [name for name in sys.argv[1:] if not name.startswith("--")]
    print(json.dumps({name: report(name) for name in names}))
