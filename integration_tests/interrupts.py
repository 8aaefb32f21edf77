"""An exception at any line of memslot's own code, as a signal or a refused allocation would raise it there."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import memslot_hooks
import memslot_plugin

FOLDERS = tuple(str(Path(package.__file__).parent) for package in (memslot_plugin, memslot_hooks))
TESTS = str(Path(memslot_plugin.__file__).parent / "tests")
EVENTS = ("call", "line", "return")
"""Where a frame begins, before each of its lines, and where it returns to whoever has not stored the result yet."""


def ours(code: CodeType) -> bool:
    """Whether the code is memslot's, and no finalizer: what is raised in one reaches nobody, wherever it came from."""
    name = code.co_filename
    finalizer = code.co_name in (
        "__del__",
        "<genexpr>",
    )  # a generator that is not exhausted is closed by one
    return name.startswith(FOLDERS) and not name.startswith(TESTS) and not finalizer


@functools.cache
def unreachable(code: CodeType) -> frozenset[int]:
    """Offsets at which tracing shows a line and no exception can come: where nothing is done, where a block of
    `with` has ended and its `__exit__` is about to be called, and where a handler is left at once.

    The interpreter looks for signals after calls and at jumps, and allocates nothing there.  From CPython 3.11 on, what
    a trace function raises where a handler is left makes what was handled stay handled, and alive, on that thread.
    """
    found = list(dis.get_instructions(code))
    ends = {
        each.offset
        for each, then in zip(found, [*found[1:], found[0]], strict=True)
        if "WITH_EXCEPT_START" in (each.opname, then.opname)
        or each.opname in ("NOP", "POP_BLOCK", "SETUP_FINALLY", "POP_EXCEPT")
    }
    for place, each in enumerate(found):
        rest = [
            later
            for later in found[place : place + 10]
            if later.opname not in ("POP_BLOCK", "NOP", "SWAP", "ROT_TWO", "PRECALL", "CACHE")
        ]
        nones = [
            later.opname == "DUP_TOP" or (later.opname == "LOAD_CONST" and later.argval is None)
            for later in rest[:3]
        ]
        if nones == [True] * 3 and (rest[3].opname, rest[3].arg) in (
            ("CALL", 2),
            ("CALL_FUNCTION", 3),
        ):
            ends.add(each.offset)
    return frozenset(ends)


def finalizing(frame: FrameType | None) -> bool:
    """Whether the frame was called by a finalizer."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


class Tracing:
    """Counts the events of what `run` is given, on the thread that runs it; `reached` is called at each."""

    def __init__(self) -> None:
        self.seen = 0

    def run(self, action: Callable[[], Any]) -> Any:
        sys.settrace(self._enter)
        try:
            return action()
        finally:
            sys.settrace(None)

    def reached(self, frame: FrameType, event: str) -> None:
        raise NotImplementedError

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._step(frame, event, argument) if ours(frame.f_code) else None

    def _step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event in EVENTS and frame.f_lasti not in unreachable(frame.f_code):
            self.seen += 1
            self.reached(frame, event)
        return self._step


def place_of(frame: FrameType, event: str) -> str:
    """Where an event was, for whoever reads a failure."""
    code = frame.f_code
    return f"{event} at {Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"


class Interruption(Tracing):
    """Raises `error` at the `at`-th event, or never."""

    def __init__(self, error: BaseException | None = None, at: int = 0) -> None:
        super().__init__()
        self.error = error
        self.at = at
        self.place = ""
        """Where the exception was raised."""

    def reached(self, frame: FrameType, event: str) -> None:
        if self.seen >= self.at and self.error is not None and not finalizing(frame):
            self.place = place_of(frame, event)
            sys.settrace(None)
            raise self.error


class Halts(Tracing):
    """Has each `every`-th event from the `first` one on wait until `halt`, which is told the place, has returned."""

    def __init__(self, halt: Callable[[str], None], every: int, first: int) -> None:
        super().__init__()
        self.halt = halt
        self.every = every
        self.first = first

    def reached(self, frame: FrameType, event: str) -> None:
        if self.seen % self.every == self.first % self.every:
            self.halt(place_of(frame, event))
