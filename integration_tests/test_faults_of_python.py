"""System calls that Python makes in our name, which the core's gate does not see: strace lets each fail for real."""

from __future__ import annotations

import errno
import functools
import json
import os
from typing import Any

import pytest

from .children import require, run

IMAGE = "/memfd:memslot:module"


def traced(path: str, calls: str, fault: str) -> tuple[str, ...]:
    """What lets system calls on a path fail, as strace's option `inject` says it."""
    return (
        *("strace", "-f", "-o", os.devnull, "-P", path),
        *("-e", f"trace={calls}", "-e", f"inject={calls}:{fault}"),
    )


@functools.cache
def story(inside: tuple[str, ...] = ()) -> dict[str, Any]:
    require(("strace", "-o", os.devnull))
    done = run("-m", "integration_tests.story", "fake", inside=inside)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout)["fake"])


def said(error: str) -> str:
    return os.strerror(getattr(errno, error))


@pytest.mark.parametrize("error", ["ENOENT", "EACCES", "EPERM"])
def test_a_pagemap_that_cannot_be_opened_is_done_without(error: str) -> None:
    told = story(traced("/proc/self/pagemap", "openat", f"error={error}"))
    assert told == story()
    demanded = run(
        *("-m", "integration_tests.story", "fake"),
        inside=traced("/proc/self/pagemap", "openat", f"error={error}"),
        environment={"MEMSLOT_RESET": "pagemap"},
    )
    told = json.loads(demanded.stdout)["fake"]
    assert told["error"].startswith("Unsupported: reset = pagemap is not possible here: ")
    assert said(error) in told["error"]


@pytest.mark.parametrize("error", ["EMFILE", "ENFILE", "ENOMEM"])
def test_a_pagemap_that_cannot_be_opened_now_is_an_error_that_names_the_limit(error: str) -> None:
    told = story(traced("/proc/self/pagemap", "openat", f"error={error}"))
    number = getattr(errno, error)
    assert told["error"].startswith(f"SystemCallError: [Errno {number}] opening /proc/self/pagemap")
    assert f"{said(error)} (" in told["error"]


@pytest.mark.parametrize("error", ["ENOMEM", "EPERM", "EACCES"])
@pytest.mark.parametrize("which", [1, 2])
def test_an_image_that_cannot_be_looked_at_is_an_error(which: int, error: str) -> None:
    told = story(traced(IMAGE, "newfstatat,fstat", f"error={error}:when={which}"))
    assert ("looking at the image of module: " + said(error)) in told["error"]
    assert told["error"].startswith("SystemCallError: ")


@pytest.mark.parametrize("error", ["EACCES", "EMFILE", "EIO"])
@pytest.mark.parametrize("calls", ["openat", "read"])
def test_a_limit_that_cannot_be_read_is_unknown(calls: str, error: str) -> None:
    told = story(traced("/proc/sys/vm/max_map_count", calls, f"error={error}"))
    assert told == story()


FORKED = """
import os, sys
from contextlib import nullcontext
import memslot_plugin as memslot
from memslot_plugin.probe import pagemap_descriptor, probe
from integration_tests import cells, expect, toy
from integration_tests.exhausted import descriptors
short = sys.argv[1] == "short"
with cells.Cell("fake", "memfd", reset="pagemap").serving(slots=2) as host:
    guest = host.prepare(toy.A)
    guest.instantiate().close()
    instance = guest.instantiate()
    if not short:
        os.close(pagemap_descriptor())  # so that close(2) fails in the child
    child = os.fork()
    if child == 0:
        instance.memory.write(0, b"the child's")
        with descriptors(0) if short else nullcontext():
            try:
                instance.reset()
            except memslot.SystemCallError as error:
                assert short and "RLIMIT_NOFILE (ulimit -n) is 200" in str(error), error
                assert instance.closed
            else:
                assert not short
                instance.close()
        expect.still_serves(host)
        assert probe().pagemap.works
        os._exit(0)
    if not short:
        pagemap_descriptor.cache_clear()
        pagemap_descriptor()
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    instance.close()
"""


def test_a_forked_child_that_has_no_descriptor_left_loses_one_reset() -> None:
    """Its parent's pagemap shows the parent, so that it has to open its own at its first reset."""
    done = run("-c", FORKED, "short")
    assert done.returncode == 0, done.stderr


def test_a_forked_child_forgets_its_parents_pagemap_even_if_closing_fails() -> None:
    done = run("-c", FORKED, "closed")
    assert done.returncode == 0, done.stderr
    assert "Exception ignored" not in done.stderr
