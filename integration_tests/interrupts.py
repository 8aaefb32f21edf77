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
import memslot_plugin as memslot

FOLDERS = tuple(str(Path(package.__file__).parent) for package in (memslot, memslot_hooks))
TESTS = str(Path(memslot.__file__).parent / "tests")
EVENTS = ("call", "line", "return")
"""The start of a frame, each of its lines, and its return to a caller that has not stored the result yet."""


def ours(code: CodeType) -> bool:
    """True if the code is memslot's, and no finalizer: what is raised in one reaches no caller.

    A generator that is not exhausted is closed by a finalizer too.
    """
    name = code.co_filename
    finalizer = code.co_name in ("__del__", "<genexpr>")
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
    silent = ("POP_BLOCK", "NOP", "SWAP", "ROT_TWO", "PRECALL", "CACHE")
    for place, each in enumerate(found):
        rest = [later for later in found[place : place + 10] if later.opname not in silent]
        nones = [
            later.opname == "DUP_TOP" or (later.opname == "LOAD_CONST" and later.argval is None)
            for later in rest[:3]
        ]
        exits = (("CALL", 2), ("CALL_FUNCTION", 3))
        if nones == [True] * 3 and (rest[3].opname, rest[3].arg) in exits:
            ends.add(each.offset)
    return frozenset(ends)


def finalizing(frame: FrameType | None) -> bool:
    """True if the frame was called by a finalizer."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


class Tracing:
    """The events of what `run` is given, on the thread that runs it; `reached` is called with each place."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def run(self, action: Callable[[], Any]) -> Any:
        before = sys.gettrace()  # a measurement of coverage goes on afterwards
        sys.settrace(self._enter)
        try:
            return action()
        finally:
            sys.settrace(before)

    def reached(self, frame: FrameType) -> None:
        raise NotImplementedError

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._step(frame, event, argument) if ours(frame.f_code) else None

    def _step(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if event in EVENTS and frame.f_lasti not in unreachable(code):
            place = f"{event} at {Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
            self.places.append(place)
            self.reached(frame)
        return self._step


class Interruption(Tracing):
    """Raises `error` at the `at`-th event, or never; the last of `places` is where that was."""

    def __init__(self, error: BaseException | None = None, at: int = 0) -> None:
        super().__init__()
        self.error = error
        self.at = at

    def reached(self, frame: FrameType) -> None:
        if len(self.places) >= self.at and self.error is not None and not finalizing(frame):
            sys.settrace(None)
            raise self.error

    def cut(self, action: Callable[[], Any]) -> None:
        """Run it, and let nothing but the interruption end it."""
        try:
            self.run(action)
        except BaseException as error:
            if error is not self.error:
                raise
        self.error = None  # its traceback holds what it went through


class Halts(Tracing):
    """Has each `every`-th event from the `first` one on wait until `halt`, which is told the place, has returned."""

    def __init__(self, halt: Callable[[str], None], every: int, first: int) -> None:
        super().__init__()
        self.halt = halt
        self.every = every
        self.first = first

    def reached(self, frame: FrameType) -> None:
        if len(self.places) % self.every == self.first % self.every:
            self.halt(self.places[-1])
