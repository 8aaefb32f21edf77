"""The number of examples of the tests that scale, by tier: MEMSLOT_PROFILE.

`pytest -m gate` and `pytest -m long` set it.

(not set)    T0: a moment
gate         T1: 4 times as many examples
long         T2: 240 times as many, and others each time: hours
"""

from __future__ import annotations

import os

from hypothesis import settings

FACTORS = {"": 1, "gate": 4, "long": 240}

_name = os.environ.get("MEMSLOT_PROFILE", "")
if _name not in FACTORS:
    raise ValueError(
        f"MEMSLOT_PROFILE={_name} is not allowed: it is"
        f" {' or '.join(name for name in FACTORS if name)}, or not set"
    )
FACTOR = FACTORS[_name]
LONG = _name == "long"


def examples(count: int) -> int:
    """Examples that a test tries in this tier; `count` is the number in T0."""
    return count * FACTOR


def load() -> None:
    """Let hypothesis follow the tier, also where a test names no number of examples."""
    # No deadlines: they measure a busy machine. In T0 and T1 the examples of one run are those of the next.
    settings.register_profile(
        "memslot", deadline=None, derandomize=not LONG, max_examples=examples(25)
    )
    settings.load_profile("memslot")
