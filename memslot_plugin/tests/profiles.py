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
    """Return the number of examples of a test in this tier; `count` is the number in T0."""
    return count * FACTOR


def load() -> None:
    """Set the tier's number of examples as the default of hypothesis."""
    # No deadlines: a busy machine would miss them. In T0 and T1 each run tries the same examples.
    settings.register_profile(
        "memslot", deadline=None, derandomize=not LONG, max_examples=examples(25)
    )
    settings.load_profile("memslot")
