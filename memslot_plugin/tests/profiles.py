"""How much the property tests try: the profiles of MEMSLOT_PROFILE, and nowhere else.

(not set)    what the gate runs: minutes for everything
expensive    60 times as many examples, and others each time: hours
"""

from __future__ import annotations

import os

from hypothesis import settings

FACTORS = {"": 1, "expensive": 60}

_name = os.environ.get("MEMSLOT_PROFILE", "")
if _name not in FACTORS:
    raise ValueError(
        f"MEMSLOT_PROFILE={_name} is not allowed: it is"
        f" {' or '.join(name for name in FACTORS if name)}, or not set"
    )
FACTOR = FACTORS[_name]
EXPENSIVE = FACTOR > 1


def examples(count: int) -> int:
    """How many examples a test tries that tries `count` of them in the gate."""
    return count * FACTOR


def load() -> None:
    """Let hypothesis follow the profile, also where a test names no number of examples."""
    # Deadlines measure a busy machine.
    settings.register_profile("memslot", deadline=None)
    # Not derandomised where CI is set, which hypothesis itself would make of it.
    settings.register_profile(
        "expensive", deadline=None, derandomize=False, max_examples=examples(100)
    )
    # hypothesis's own "ci": the examples of one run are those of the next.
    gate = "ci" if os.environ.get("CI") else "memslot"
    settings.load_profile("expensive" if EXPENSIVE else gate)
