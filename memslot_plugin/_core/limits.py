"""An errno as an exception that names the limit which lifts it, and the limit's value now."""

from __future__ import annotations

import errno
import os
import re
import resource

from memslot_plugin._core import proc
from memslot_plugin.errors import SystemCallError

LIMITS = {
    errno.EMFILE: ("RLIMIT_NOFILE", resource.RLIMIT_NOFILE, "ulimit -n"),
    errno.ENFILE: ("RLIMIT_NOFILE", resource.RLIMIT_NOFILE, "ulimit -n"),
    errno.EFBIG: ("RLIMIT_FSIZE", resource.RLIMIT_FSIZE, "ulimit -f"),  # for memfds, too
    # mmap(2) after mlockall(2)
    errno.EAGAIN: ("RLIMIT_MEMLOCK", resource.RLIMIT_MEMLOCK, "ulimit -l"),
}
"""The one limit of the process that lifts an error: its name, its number, and the shell's command for it."""

_ERRNO = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+),")
"""An errno in an error message of Rust's, as Display and as Debug print it."""


def system_call_error(error: int, what: str) -> SystemCallError:
    """Return the exception for `error`; `what` was attempted."""
    knob = _knob(error)
    message = f"{what}: {os.strerror(error)}" + (f" ({knob})" if knob else "")
    return SystemCallError(error, message)


def errno_in_text(text: str, what: str) -> SystemCallError | None:
    """Return the exception for the errno in a message of a runtime written in Rust, or None; `what` was attempted."""
    found = _ERRNO.search(text)
    if found is None:
        return None
    return system_call_error(int(found[1] or found[2]), f"{what}: {text}")


def _knob(error: int) -> str:
    if error == errno.ENOMEM:
        return "; ".join(_limits_of_memory())
    if error in LIMITS:
        name, which, command = LIMITS[error]
        return f"{name} ({command}) is {_limit(which)}"
    return ""


def _limits_of_memory() -> list[str]:
    allowed, used = (_or_unknown(count) for count in (proc.max_map_count(), proc.map_count()))
    parts = [f"vm.max_map_count is {allowed} with {used} mappings in use"]
    parts.append(f"RLIMIT_AS (ulimit -v) is {_limit(resource.RLIMIT_AS)}")
    if resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY:
        parts.append(f"RLIMIT_DATA (ulimit -d) is {_limit(resource.RLIMIT_DATA)}")
    if proc.sysctl("vm/overcommit_memory") == 2:
        ratio = _or_unknown(proc.sysctl("vm/overcommit_ratio"))
        parts.append(
            f"vm.overcommit_memory is 2 and vm.overcommit_ratio {ratio}, which limits what can be committed"
        )
    return parts


def _limit(which: int) -> str:
    soft, _ = resource.getrlimit(which)
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def _or_unknown(number: int | None) -> str:
    return "unknown" if number is None else str(number)
