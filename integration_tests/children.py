"""Children on machines where something is refused, missing or short, for real: seccomp filters, limits, namespaces,
control groups.

Each way is a prefix of the child's command, so that they can be combined; what cannot be had here says why.
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

import pytest

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
"""Refuses system calls (or, IGNORED, does as if they had been made) and lowers limits, then becomes the program that
follows: both outlive execve(2).
"""

MEMFD = "memfd_create:{}"
SEALS = "fcntl:{}:1=1033"  # F_ADD_SEALS
PAGEMAP_SCAN = "ioctl:{}:1=3227543056"  # 0xc0606610
MADV_DONTNEED = "madvise:{}:2=4"

WITHOUT_PROC = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")
"""Nothing is mounted at /proc, as in a bare chroot."""

NOEXEC_MEMFDS = (
    "unshare", "--mount", "--pid", "--fork", "--mount-proc",
    "sh", "-c", 'echo 2 > /proc/sys/vm/memfd_noexec && exec "$@"', "sh",
)  # fmt: skip
"""vm.memfd_noexec = 2, which is a matter of the pid namespace."""


def run(
    *command: str,
    refused: str = "",
    limits: str = "",
    environment: dict[str, str] | None = None,
    inside: Sequence[str] = (),
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """A Python program with both allocators installed, whatever this leg of the matrix is limited to."""
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
        timeout=timeout,
    )


@functools.cache
def why_impossible(inside: tuple[str, ...]) -> str | None:
    """Why a child cannot be put inside of this here, or None."""
    if shutil.which(inside[0]) is None:
        return f"{inside[0]} is not installed"
    tried = subprocess.run([*inside, "true"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else tried.stderr.strip() or f"status {tried.returncode}"


def require(inside: tuple[str, ...]) -> None:
    """Skip a test where a child cannot be put inside of this."""
    reason = why_impossible(inside)
    if reason is not None:
        pytest.skip(f"impossible: {reason}")


_numbers = itertools.count()


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group with a limit on memory (bytes) below this process's own, or at the root of version 2; impossible
    without the right to make one.
    """
    name = f"memslot-{os.getpid()}-{next(_numbers)}"
    group, file = _place(name)
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"impossible: a control group cannot be made: {error}")
    try:
        try:
            (group / file).write_text(str(limit))
        except OSError as error:
            pytest.skip(f"impossible: a control group cannot be limited: {error}")
        yield group
    finally:
        group.rmdir()


def _place(name: str) -> tuple[Path, str]:
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().split())
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mounted, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(mounted, own["memory"].lstrip("/"), name), "memory.limit_in_bytes"
        if (
            kind == "cgroup2"
            and "memory" in Path(mounted, "cgroup.subtree_control").read_text().split()
        ):
            return Path(mounted, name), "memory.max"
    pytest.skip("impossible: no control group hierarchy here limits memory")


def joining(group: Path) -> tuple[str, ...]:
    """What puts a child into a control group."""
    return ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")
