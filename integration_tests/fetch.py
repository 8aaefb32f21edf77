"""Commands that fetch something, which a network may refuse for a moment."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ATTEMPTS = 3


def fetched(what: str, command: Sequence[str], folder: Path | None = None) -> None:
    """Run it, in `folder`, up to three times; an AssertionError says what could not be fetched, and why."""
    for attempt in range(1, ATTEMPTS + 1):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if attempt < ATTEMPTS:
            time.sleep(5)
    raise AssertionError(f"{what} cannot be fetched: {done.stdout}{done.stderr}")
