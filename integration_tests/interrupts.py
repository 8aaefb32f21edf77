"""Exceptions at any line of memslot's own code, as a signal or a refused allocation raises them."""

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
"""Start of a frame, each of its lines, and its return to a caller that has not stored the result yet."""


def ours(code: CodeType) -> bool:
    """Return True if the code is memslot's and no finalizer, whose exceptions reach no caller.

    A finalizer closes a generator that is not exhausted, too.
    """
    name = code.co_filename
    finalizer = code.co_name in ("__del__", "<genexpr>")
    return name.startswith(FOLDERS) and not name.startswith(TESTS) and not finalizer


@functools.cache
def unreachable(code: CodeType) -> frozenset[int]:
    """Return offsets at which tracing shows a line and no exception can come.

    They are instructions that do nothing, the end of a block of `with` before the call of `__exit__`, and the end of a
    handler. CPython looks for signals after calls and at jumps, and allocates nothing there. From CPython 3.11 on, an
    exception of a trace function at the end of a handler keeps the handled exception alive on that thread.
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
    """Return True if a finalizer called the frame."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


class Interruption:
    """An exception at the `at`-th event of an action, or none. `places` are the events until then."""

    def __init__(self, error: BaseException | None = None, at: int = 0) -> None:
        self.places: list[str] = []
        self.error = error
        self.at = at

    def cut(self, action: Callable[[], Any]) -> None:
        """Run an action, and raise any exception of it but the interruption."""
        before = sys.gettrace()  # coverage: its tracing goes on afterwards
        sys.settrace(self._enter)
        try:
            action()
        except BaseException as error:
            if error is not self.error:
                raise
        finally:
            sys.settrace(before)
        self.error = None  # its traceback keeps the frames that it went through

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._step(frame, event, argument) if ours(frame.f_code) else None

    def _step(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if event in EVENTS and frame.f_lasti not in unreachable(code):
            place = f"{event} at {Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
            self.places.append(place)
            if len(self.places) >= self.at and self.error is not None and not finalizing(frame):
                sys.settrace(None)
                raise self.error
        return self._step
