"""Expectations of each mistake: an error of memslot's tree, and a host that goes on serving."""

from __future__ import annotations

from typing import Any

import pytest

import memslot_plugin as memslot

from . import cells, toy
from .toy import PAGE


def still_serves(host: memslot.Host) -> None:
    """Fail unless two instances at once are pristine, in slots that may have had other tenants."""
    guest = host.prepare(toy.A)
    with guest.instantiate() as first, guest.instantiate() as second:
        for instance in (first, second):
            assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
            instance.call("fill", 0, 2 * PAGE, 0xEE)
    cells.check(host, in_use=0)


def raises(expected: type[memslot.MemslotError], match: str, builtin: type[Exception]) -> Any:
    """Return `pytest.raises` for an error that is the builtin one too."""
    assert issubclass(expected, builtin)
    assert issubclass(expected, memslot.MemslotError)
    return pytest.raises(expected, match=match)
