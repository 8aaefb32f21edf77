"""Errors that are copied, and that travel to other processes: what comes back is equal."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

from memslot_plugin.errors import MemslotError


def travels(error: MemslotError) -> None:
    """Check that an error comes back with its class, arguments, text and attributes by each way that Python has.

    `native` may be None then, as the runtime's own errors belong to their process.
    """
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        _check_equal(pickle.loads(pickle.dumps(error, protocol)), error)
    for arrived in (copy.copy(error), copy.deepcopy(error), copy.copy(copy.copy(error))):
        _check_equal(arrived, error)


def _check_equal(arrived: MemslotError, error: MemslotError) -> None:
    assert type(arrived) is type(error)
    assert arrived.args == error.args
    assert str(arrived) == str(error) != ""
    assert _attributes(arrived) == _attributes(error)


def _attributes(error: MemslotError) -> dict[str, Any]:
    """All that can be read of an error; errors within it by their text."""
    names = {*dir(error)} - {*dir(Exception), "native"}
    # An OSError's characters_written exists only once it was set.
    found = {each: getattr(error, each, None) for each in names if not each.startswith("_")}
    plain = {name: value for name, value in found.items() if not callable(value)}
    native = getattr(error, "native", None)
    if type(native) is RuntimeError:
        plain["native"] = repr(native)
    return plain


def tree(kind: type[MemslotError] = MemslotError) -> Iterator[type[MemslotError]]:
    """Every class of the tree but the base, those of the runtimes' adapters included."""
    for each in kind.__subclasses__():
        yield each
        yield from tree(each)
