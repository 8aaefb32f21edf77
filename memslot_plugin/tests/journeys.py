"""Errors that are copied or sent to another process, and come back equal."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

from memslot_plugin.errors import MemslotError


def travels(error: MemslotError) -> None:
    """Fail unless an error keeps its class, arguments, text and attributes by copy, deepcopy and pickle.

    `native` may be None afterwards: the runtime's own errors belong to their process.
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
    """Return the attributes of an error, with the text of each error within it."""
    names = {*dir(error)} - {*dir(Exception), "native"}
    # OSError.characters_written exists only once it was set.
    found = {each: getattr(error, each, None) for each in names if not each.startswith("_")}
    plain = {name: value for name, value in found.items() if not callable(value)}
    native = getattr(error, "native", None)
    if type(native) is RuntimeError:
        plain["native"] = repr(native)
    return plain


def tree(kind: type[MemslotError] = MemslotError) -> Iterator[type[MemslotError]]:
    """Return each class of the tree but the base, with those of the adapters."""
    for each in kind.__subclasses__():
        yield each
        yield from tree(each)
