"""A report, as JSON, of a host that serves the toy guest: made on machines that refuse something, and compared.

usage: python -m integration_tests.story [--without-traps] HOST ... [SETTING=VALUE ...] [doctor]

Prints a report per host with the default settings under "", then one per host under each SETTING=VALUE, then the
report of doctor.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import memslot_plugin as memslot
from memslot_plugin.tests.leaks import Footprint

from . import cells, toy
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
"""Calls that trap. A runtime learns of traps by a signal, which an emulator may not pass on."""

PROC = Path("/proc/self/maps").exists()

with_traps = True


def result(instance: memslot.Instance, *call: Any) -> Any:
    if call in TRAPS and not with_traps:
        return "left out"
    try:
        return instance.call(*call)
    except memslot.GuestTrap:
        return "trap"


def digest(instance: memslot.Instance) -> str:
    memory = instance.memory
    return hashlib.sha256(memory.read(0, memory.byte_size)).hexdigest()


def tell(host: memslot.Host) -> dict[str, Any]:
    """Use two guests in turn; return their bytes, results, growth, traps, and bytes after a reset.

    Then warm a guest; return the error, and the same after it.
    """
    happened: list[Any] = []
    guests = [host.prepare(module) for module in (toy.A, toy.B)]

    def use(guest: memslot.Guest) -> None:
        with guest.instantiate() as instance:
            happened.append(digest(instance))
            happened.extend(result(instance, *call) for call in CALLS)
            happened.append(digest(instance))
            instance.reset()
            happened.append(digest(instance))
            happened.extend(result(instance, *call) for call in (("load", 2 * PAGE), ("bump",)))
        if PROC:
            cells.check(host, in_use=0)

    for guest in (*guests, *guests):
        use(guest)
    pools = host.statistics().pools
    with guests[0].instantiate() as instance:
        instance.call("fill", 0, 2 * PAGE, 1)
    warmed = None
    try:
        guests[0].warm(2)
    except memslot.SystemCallError as error:
        warmed = str(error).partition("] ")[2]
    use(guests[0])
    return {
        "error": None,
        "happened": happened,
        "plugins": {pool.plugin: pool.leases for pool in pools},
        "answers": {answer.plugin: answer.reason for answer in host.plugins.answers()},
        "warmed": warmed,
        "limits": [pool.limit for pool in host.statistics().pools],
    }


def attempt(name: str, settings: dict[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {"functions": toy.FUNCTIONS} if name == "fake" else {}
    try:
        with memslot.open_host(
            name, settings=memslot.Settings(slots=2, **settings), **options
        ) as host:
            return tell(host)
    except memslot.MemslotError as error:
        return {"error": f"{type(error).__name__}: {error}"}


def report(name: str, setting: str) -> dict[str, Any]:
    """Return what happened on a host and which plugin provided the memory, or the error that kept it from serving.

    An error comes with what a second such attempt has left behind.
    """
    settings = dict([setting.split("=")]) if setting else {}
    told = attempt(name, settings)
    if told["error"] is not None and PROC:
        before = Footprint.now()
        attempt(name, settings)
        told["lost"] = Footprint.now().lost_since(before, mappings=4)
    return told


def doctor() -> Any:
    from click.testing import CliRunner

    from memslot_plugin.cli import main

    return json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)


if __name__ == "__main__":
    words = sys.argv[1:]
    with_traps = "--without-traps" not in words
    settings = ["", *(word for word in words if "=" in word)]
    names = [word for word in words if word in cells.HOSTS]
    told = {setting: {name: report(name, setting) for name in names} for setting in settings}
    if "doctor" in words:
        told["doctor"] = doctor()
    print(json.dumps(told))
