"""An application for servers that fork. Its guest is prepared and has served before the workers begin.

SERVED_BY names the host. Each request looks for bytes of other tenants at each place, and leaves its own there.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable
from typing import Any

import memslot_plugin as memslot

from . import cells, toy
from .toy import PAGE

PAGES = 4
PRISTINE = toy.laid(PAGES, toy.SEGMENTS["a"])
REQUESTS = 1000

HOST = cells.Cell(os.environ["SERVED_BY"], "memfd").open(slots=4, audit=0.0)
GUEST = HOST.prepare(toy.assemble(toy.text("a", "4 8")))

_numbers = itertools.count()


def tenant(instance: memslot.Instance) -> None:
    """Fail on bytes of others; leave a secret in the image, above it, at both ends, and in a global.

    Each process draws some pages for itself: a reset of the master's pages would miss writes of a worker to others.
    """
    assert instance.memory.byte_size == len(PRISTINE)
    assert instance.memory.read(0, len(PRISTINE)) == PRISTINE
    assert instance.call("bump") == 8
    secret = f"secret {next(_numbers)} of process {os.getpid()} ".encode() * 8
    drawn = [random.randrange(len(PRISTINE) // 1024 - 1) * 1024 for _ in range(4)]
    for at in (0, PAGE, 3 * PAGE + 77, len(PRISTINE) - len(secret), *drawn):
        instance.memory.write(at, secret)


def request(_number: int = 0) -> dict[str, Any]:
    """Serve a request by a lease and by a new instance; return the process and the numbers of its pool."""
    with GUEST.lease() as leased, GUEST.instantiate() as new:
        tenant(leased)
        tenant(new)
    with GUEST.instantiate() as grows:
        tenant(grows)
        assert grows.call("grow", 2) == PAGES
        assert grows.memory.read(PAGES * PAGE, 2 * PAGE) == bytes(2 * PAGE)
        grows.memory.write(5 * PAGE, b"grown secret")
    now = cells.pool(HOST).statistics()
    return {
        "process": os.getpid(),
        "failed": now.failed_resets + (now.destroyed if HOST.name != "wasmer" else 0),
        "resets_by": now.resets_by,
    }


HELD = GUEST.instantiate()
"""Instance in use when the server forks."""
tenant(HELD)
for _ in range(3):
    request()


def application(
    environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]
) -> Iterable[bytes]:
    """Answer a WSGI request. The server answers with its own error if the request finds bytes of others."""
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(request()).encode()]


def multiprocess(method: str) -> None:
    """Serve with workers of multiprocessing; print all answers."""
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    with context.Pool(4) as pool:
        print(json.dumps(pool.map(request, range(REQUESTS), chunksize=1)))
