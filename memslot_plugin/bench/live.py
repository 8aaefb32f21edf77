"""Holds many live instances and prints what each of them costs: `python -m memslot_plugin.bench.live HOST SIDE COUNT`.

A program of its own, because a process that has measured anything else has memory to hand out that nobody counts.  SIDE
is memslot or alone; standard output is one JSON object.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from memslot_plugin._core.proc import map_count, private_bytes
from memslot_plugin.bench import guests
from memslot_plugin.hosts import open_host
from memslot_plugin.hosts.alone import KNOWN
from memslot_plugin.settings import MIB

DATA = 4 * MIB
FUNCTION = "touch_4"

FIRST = 8
"""Instances that are made before counting: they pay for what all of them share."""


@contextmanager
def _maker(host: str, side: str, count: int) -> Iterator[Callable[[], Any]]:
    """A function that makes an instance and calls it once; everything ends with the block."""
    module = guests.writer(DATA)
    if side == "alone":
        runtime = KNOWN[host](module, None)

        def make_alone() -> Any:
            instance = runtime.instantiate()
            runtime.call(instance, FUNCTION, ())
            return instance

        yield make_alone
        return
    with open_host(host, slots=count + FIRST) as opened, opened.prepare(module) as guest:

        def make() -> Any:
            instance = guest.instantiate()
            instance.call(FUNCTION)
            return instance

        yield make


def main(host: str, side: str, count: int) -> dict[str, float]:
    """What each further instance costs: private resident bytes, and mappings."""
    with _maker(host, side, count) as make:
        held = [make() for _ in range(FIRST)]
        gc.collect()
        bytes_before, mappings_before = private_bytes(), map_count() or 0
        held += [make() for _ in range(count)]
        gc.collect()
        private, mappings = private_bytes() - bytes_before, (map_count() or 0) - mappings_before
        held.clear()
    return {"bytes": private / count, "mappings": mappings / count}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
