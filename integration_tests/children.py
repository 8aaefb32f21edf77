"""Children on machines that really refuse or lack something: seccomp filters, limits, namespaces, control groups.

Each way is a prefix of the child's command, so that they can be combined.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from .cells import HOSTS, Cell

ROOT = Path(__file__).resolve().parents[1]

HINDER = """
import errno, os, resource, sys
for rule in filter(None, sys.argv[2].split(",")):
    name, value = rule.split("=")
    resource.setrlimit(getattr(resource, name), (int(value), int(value)))
if sys.argv[1]:
    import pyseccomp
    refused = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for rule in sys.argv[1].split(","):
        call, error, *compared = rule.split(":")
        conditions = [pyseccomp.Arg(int(number), pyseccomp.EQ, int(value))
                      for number, value in (each.split("=") for each in compared)]
        action = pyseccomp.ERRNO(0 if error == "IGNORED" else getattr(errno, error))
        refused.add_rule(action, call, *conditions)
    refused.load()
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Program that refuses or ignores system calls, lowers limits, and executes another one. Both outlive execve(2)."""


def hosts(names: Sequence[str] = HOSTS) -> list[Any]:
    """Return names of hosts as parameters."""
    return [
        pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if reason else [])
        for name in names
        for reason in [Cell(name, "memfd").missing]
    ]


def present() -> list[str]:
    """Return the names of the hosts that this Python can open."""
    return [name for name in HOSTS if Cell(name, "memfd").missing is None]


def run(
    *command: str,
    refused: str = "",
    limits: str = "",
    environment: dict[str, str] | None = None,
    inside: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run a Python program with both allocators, and with these variables of memslot alone."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("MEMSLOT_")
    }
    return subprocess.run(
        [*inside, sys.executable, "-c", HINDER, refused, limits, sys.executable, *command],
        cwd=ROOT,
        env={**inherited, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


def output(*command: str, **how: Any) -> str:
    """Run a Python program that has to end well, and return its output."""
    done = run(*command, **how)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return done.stdout


@functools.cache
def why_not(inside: tuple[str, ...]) -> str | None:
    """Return the reason why a child cannot run behind this prefix, or None."""
    if shutil.which(inside[0]) is None:
        return f"{inside[0]} is not installed"
    tried = subprocess.run([*inside, "true"], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return None
    return f"impossible: {tried.stderr.strip() or f'status {tried.returncode}'}"


def require(*inside: str) -> None:
    """Skip a test if a child cannot run behind this prefix."""
    if reason := why_not(inside):
        pytest.skip(reason)


_numbers = itertools.count()


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """Make a control group with a limit on memory in bytes, below the group of this process or the root of version 2.

    Skip the test without the right to make one.
    """
    group, file = _place(f"memslot-{os.getpid()}-{next(_numbers)}")
    try:
        group.mkdir()
        try:
            (group / file).write_text(str(limit))
        except OSError:
            group.rmdir()
            raise
    except OSError as error:
        pytest.skip(f"impossible: a control group with a limit cannot be made: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def _place(name: str) -> tuple[Path, str]:
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().split())
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mounted, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(mounted, own["memory"].lstrip("/"), name), "memory.limit_in_bytes"
        controllers = Path(mounted, "cgroup.subtree_control")
        if kind == "cgroup2" and "memory" in controllers.read_text().split():
            return Path(mounted, name), "memory.max"
    pytest.skip("impossible: no control group hierarchy here limits memory")
