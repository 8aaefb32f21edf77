"""The tree of errors: one base, a builtin under each leaf, and attributes that survive a trip between processes."""

from __future__ import annotations

import builtins
import copy
import errno
import inspect
import pickle
import re
from typing import Any

import pytest

import memslot_plugin
from memslot_plugin import errors
from memslot_plugin.errors import MemslotError
from memslot_plugin.hosts.short_of import short_of

DRAWN = {
    found[1]: (getattr(builtins, found[2]), len(found[0].split("+--")[0]))
    for found in re.finditer(r"[ |]*\+-- (\w+) +\((\w+)\)", errors.__doc__ or "")
}
LEAVES: list[type[MemslotError]] = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, MemslotError) and value is not MemslotError
]
SAMPLES: dict[str, Any] = {
    "GuestTrap": lambda leaf: leaf("unreachable", RuntimeError("native")),
    "GuestExit": lambda leaf: leaf(3),
    "PoolExhausted": lambda leaf: leaf("all 4 in use", limit=4, in_use=4),
    "PoolTimeout": lambda leaf: leaf("all 4 in use", limit=4, in_use=4),
    "SystemCallError": lambda leaf: leaf(errno.ENOMEM, "mapping: no memory"),
}


def test_the_drawn_tree_is_the_tree_and_public() -> None:
    assert set(DRAWN) == {leaf.__name__ for leaf in LEAVES}
    for leaf in LEAVES:
        builtin, depth = DRAWN[leaf.__name__]
        assert issubclass(leaf, builtin), leaf
        (parent,) = [base for base in leaf.__bases__ if issubclass(base, MemslotError)]
        parent_depth = DRAWN[parent.__name__][1] if parent is not MemslotError else 0
        assert parent_depth == depth - 4, leaf
        assert getattr(memslot_plugin, leaf.__name__) is leaf


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_error_has_a_message_and_can_be_sent_to_another_process(leaf: type[MemslotError]) -> None:
    """An exception that cannot be unpickled breaks the pool of processes that it was raised in."""
    error = SAMPLES.get(leaf.__name__, lambda leaf: leaf("what happened"))(leaf)
    assert str(error)
    for arrived in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(arrived) is leaf
        assert str(arrived) == str(error)
        for name in ("code", "limit", "in_use", "errno"):
            assert getattr(arrived, name, None) == getattr(error, name, None), name


def test_errors_hold_their_attributes() -> None:
    native = ValueError("native")
    assert errors.GuestTrap("m", native).native is native
    assert errors.GuestTrap("m").native is None
    assert errors.GuestExit(7).code == 7
    assert "exit status 7" in str(errors.GuestExit(7))
    exhausted = errors.PoolTimeout("m", limit=3, in_use=2)
    assert (exhausted.limit, exhausted.in_use) == (3, 2)
    failed = errors.SystemCallError(errno.EPERM, "sealing: no")
    assert (failed.errno, failed.strerror) == (errno.EPERM, "sealing: no")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("mmap failed to allocate 0x5000 bytes; Cannot allocate memory (os error 12)", 12),
        ('SystemCall(Os { code: 24, kind: Other, message: "Too many open files" })', 24),
        ("unknown import: env.code has not been defined", None),
        ("the guest says: os error 12", None),
    ],
)
def test_shortage_of_a_runtime_is_found_in_its_text(text: str, number: int | None) -> None:
    found = short_of(text, "compiling x")
    assert (None if found is None else found.errno) == number
    assert found is None or str(found).startswith(f"[Errno {number}] compiling x: {text}: ")
