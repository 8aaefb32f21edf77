"""The long run over mixed guests: nothing grows, the audit finds nothing, and the end is as fast as the start.

MEMSLOT_SOAK_SECONDS says how long: seconds for each runtime, 5 if it is not set.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from .cells import Cell
from .leaks import MIB
from .soak import soak

SECONDS = float(os.environ.get("MEMSLOT_SOAK_SECONDS", "5"))


def test_a_soak_leaves_the_process_as_it_was(
    real_cell: Cell, quickjs: bytes, note: Callable[[str, object], None]
) -> None:
    measured = soak(real_cell, SECONDS, quickjs)
    note("soak", str(measured))
    print(measured)
    assert not measured.lost
    assert measured.descriptors <= 0
    assert measured.mappings <= 16
    assert measured.resident <= 2 * MIB
    assert measured.objects <= 200
    assert measured.audits > 0
    assert measured.slowdown < 1.5, str(measured)
