"""System calls that Python makes for memslot, past the gate of the core: strace makes each fail."""

from __future__ import annotations

import errno
import functools
import json
import os
from typing import Any

import pytest

from .children import output, require, run

PAGEMAP = "/proc/self/pagemap"
LIMIT = "/proc/sys/vm/max_map_count"


@functools.cache
def story(path: str = "", calls: str = "", fault: str = "") -> dict[str, Any]:
    """Return reports of the fake host by setting. strace's option `inject` makes system calls on a path fail."""
    require("strace", "-o", os.devnull)
    inject = ("-P", path, "-e", f"trace={calls}", "-e", f"inject={calls}:{fault}")
    told = output(
        *("-m", "integration_tests.story", "fake", "reset=pagemap"),
        inside=("strace", "-f", "-o", os.devnull, *inject) if path else (),
    )
    return {setting: reports["fake"] for setting, reports in json.loads(told).items()}


def one_of(*errors: str) -> pytest.MarkDecorator:
    """Return the errors as parameters: the first in T0, all in the gate."""
    others = [pytest.param(error, marks=pytest.mark.gate) for error in errors[1:]]
    return pytest.mark.parametrize("error", [errors[0], *others])


def said(error: str) -> str:
    return os.strerror(getattr(errno, error))


@one_of("ENOENT", "EACCES", "EPERM")
def test_pagemap_that_cannot_be_opened_is_replaced_unless_demanded(error: str) -> None:
    told = story(PAGEMAP, "openat", f"error={error}")
    assert told[""] == story()[""]
    demanded = told["reset=pagemap"]["error"]
    assert demanded.startswith("Unsupported: reset = pagemap is not possible here: ")
    assert said(error) in demanded


@one_of("EMFILE", "ENFILE", "ENOMEM")
def test_pagemap_that_cannot_be_opened_later_raises_an_error_with_the_limit(error: str) -> None:
    told = story(PAGEMAP, "openat", f"error={error}")[""]
    number = getattr(errno, error)
    assert told["error"].startswith(f"SystemCallError: [Errno {number}] opening {PAGEMAP}")
    assert f"{said(error)} (" in told["error"]


@one_of("ENOMEM", "EPERM", "EACCES")
@pytest.mark.parametrize("which", [1, pytest.param(2, marks=pytest.mark.gate)])
def test_image_whose_file_cannot_be_inspected_raises(which: int, error: str) -> None:
    told = story("/memfd:memslot:module", "newfstatat,fstat", f"error={error}:when={which}")[""]
    assert told["error"].startswith("SystemCallError: ")
    assert f"looking at the image of module: {said(error)}" in told["error"]


@one_of("EIO", "EACCES", "EMFILE")
@pytest.mark.parametrize("calls", ["read", pytest.param("openat", marks=pytest.mark.gate)])
def test_limit_that_cannot_be_read_is_unknown(calls: str, error: str) -> None:
    assert story(LIMIT, calls, f"error={error}")[""] == story()[""]


FORKED = """
import os, sys
import memslot_plugin as memslot
from memslot_plugin.memory.probe import pagemap_descriptor, probe
from integration_tests import cells, expect, toy
from integration_tests.exhausted import descriptors
from integration_tests.processes import in_child
short = sys.argv[1] == "short"
with cells.Cell("fake", "memfd", reset="pagemap").serving(slots=2) as host:
    guest = host.prepare(toy.A)
    guest.instantiate().close()
    instance = guest.instantiate()

    def child():
        instance.memory.write(0, b"the child's")
        if short:
            with descriptors(0):
                instance.reset()
            (pool,) = host.statistics().pools
            assert "madvise: PAGEMAP_SCAN: Too many open files" in pool.resets_by
        else:
            instance.reset()
        instance.close()
        expect.still_serves(host)
        assert probe().pagemap.works

    if not short:
        os.close(pagemap_descriptor())  # so that close(2) fails in the child
    said = in_child(child)
    instance.close()
assert not said, said
"""


@pytest.mark.parametrize("how", ["short", pytest.param("closed", marks=pytest.mark.gate)])
def test_forked_child_opens_a_pagemap_of_its_own_or_drops_pages(how: str) -> None:
    """Without a free descriptor one reset drops pages. A failed close of the parent's pagemap costs nothing."""
    done = run("-c", FORKED, how)
    assert (done.returncode, done.stderr) == (0, "")
