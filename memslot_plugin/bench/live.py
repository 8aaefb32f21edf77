"""The cost of live instances: `hold`, and the process in which family `density` calls it.

Density needs a process of its own, because one that has measured anything else has uncounted memory to hand out.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from memslot_plugin._core.proc import map_count, private_bytes
from memslot_plugin.bench import guests
from memslot_plugin.bench.baseline import RUNTIMES
from memslot_plugin.errors import MemslotError
from memslot_plugin.hosts import Instance, open_host
from memslot_plugin.settings import MIB

DATA = 4 * MIB
FUNCTION = "touch_4"

FIRST = 8
"""Instances that density does not count."""


class Held(NamedTuple):
    """Private bytes and mappings of each further live instance (None if only one could live), and the number held."""

    bytes: float | None
    mappings: float | None
    instances: int


def hold(
    begin: Callable[[], Any],
    request: Callable[[Any], object],
    end: Callable[[Any], object],
    most: int,
    *,
    first: int = 1,
    most_bytes: float = math.inf,
) -> Held:
    """Hold up to `most` instances, each after a request; fewer if address space, slots or `most_bytes` are used up.

    The `first` ones are not counted, for they pay for what all of them share.  The bytes are looked at whenever the
    number of instances has doubled.
    """
    held: list[Any] = []
    served = bytes_before = mappings_before = 0
    try:
        while served < most:
            try:
                held.append(begin())
                request(held[-1])
            except MemslotError:
                if served < 2:
                    raise
                break
            served += 1
            if served == first:
                bytes_before, mappings_before = _footprint()
            elif served.bit_count() == 1 and private_bytes() - bytes_before > most_bytes:
                break
        further = served - first
        if further < 1:
            return Held(None, None, served)
        bytes_now, mappings_now = _footprint()
        private = max(bytes_now - bytes_before, 0)
        return Held(private / further, (mappings_now - mappings_before) / further, served)
    finally:
        while held:
            end(held.pop())


def _footprint() -> tuple[int, int]:
    gc.collect()
    return private_bytes(), map_count() or 0


def main(host: str, side: str, count: int) -> Held:
    """Hold so many instances of a guest of 4 MiB; `side` is memslot or alone."""
    module, most = guests.writer(DATA), FIRST + count
    begin: Any
    call: Any
    end: Any
    with ExitStack() as stack:
        if side == "alone":
            runtime = RUNTIMES[host](module)
            begin, call, end = runtime.instantiate, runtime.call, id
        else:
            opened = stack.enter_context(open_host(host, slots=most))
            guest = stack.enter_context(opened.prepare(module))
            begin, call, end = guest.instantiate, Instance.call, Instance.close
        return hold(begin, lambda instance: call(instance, FUNCTION), end, most, first=FIRST)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))._asdict()))
