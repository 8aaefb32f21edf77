"""What a runtime was short of: both are written in Rust, which puts the errno of a failed system call into its text."""

from __future__ import annotations

import re

from memslot_plugin._core import system_call_error
from memslot_plugin.errors import SystemCallError

_ERRNO = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+),")


def short_of(text: str, what: str) -> SystemCallError | None:
    """The kernel's refusal that a runtime's message tells of, as ours, or None; `what` was attempted."""
    found = _ERRNO.search(text)
    if found is None:
        return None
    return system_call_error(int(found[1] or found[2]), f"{what}: {text}")
