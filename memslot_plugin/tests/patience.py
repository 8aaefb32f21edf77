"""Figures on a machine that others use too."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

from memslot_hooks import ResetResult


def attempts(number: int) -> Iterator[int]:
    """So many tries at a figure that others can make worse and never better; leave the loop when one is good enough.

    The later ones come after pauses, of 1, 2, 4, 8 and then 16 seconds: a noisy moment may be a noisy minute.
    """
    for attempt in range(number):
        if attempt >= 2:
            time.sleep(min(2 ** (attempt - 2), 16))
        yield attempt


def count_objects() -> int:
    """What the garbage collector looks at, but for results of resets: of those a bounded number, one per duration that
    was ever seen, is kept for the next of the same kind.
    """
    return sum(type(each) is not ResetResult for each in gc.get_objects())
