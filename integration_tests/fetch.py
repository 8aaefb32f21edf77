"""Files that are downloaded once and kept in a folder of pytest's cache, for all processes."""

from __future__ import annotations

import fcntl
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ATTEMPTS = 3


def kept(path: Path, download: Callable[[Path], bytes]) -> bytes:
    """Return the content of `path`. The first process calls `download` with a folder to work in."""
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as work:
                part = Path(work) / "part"
                part.write_bytes(download(Path(work)))
                part.rename(path)
    return path.read_bytes()


def fetched(what: str, command: Sequence[str], folder: Path | None = None) -> None:
    """Run a command in `folder`, up to three times: a network may fail for a moment.

    Raise AssertionError with the reason after the last failure.
    """
    for attempt in range(1, ATTEMPTS + 1):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if attempt < ATTEMPTS:
            time.sleep(5)
    raise AssertionError(f"{what} cannot be fetched: {done.stdout}{done.stderr}")
