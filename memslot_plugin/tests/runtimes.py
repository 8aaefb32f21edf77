"""Runtimes that this Python can open. Imports no pytest, so that children can use it."""

from __future__ import annotations

import importlib.util
import sys


def missing(name: str) -> str | None:
    """Return the reason why this Python cannot open the host of this name, or None."""
    if name == "wasmer" and sys.version_info >= (3, 11):
        return "impossible: the last wasmer, 1.1.0, has no build for CPython 3.11 and later"
    if name != "fake" and importlib.util.find_spec(name) is None:
        return f"{name} is not installed"
    return None
