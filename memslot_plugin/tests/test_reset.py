"""The probe says what the kernel does, and a reset is chosen by that and not by what was hoped for."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from memslot_plugin import BytesImage, MemfdImage, Slot, Unsupported, _core
from memslot_plugin import probe as public_probe
from memslot_plugin import reset as resets
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin.errors import SystemCallError
from memslot_plugin.probe import Finding, pagemap_descriptor, probe

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def fresh_probe() -> Iterator[None]:
    """The probe is asked anew, and again for everybody else afterwards."""
    probe.cache_clear()
    yield
    probe.cache_clear()
    probe()


def pretend(monkeypatch: pytest.MonkeyPatch, **findings: bool) -> None:
    changes: dict[str, Any] = {
        name: Finding(works, f"pretended {works}") for name, works in findings.items()
    }
    found = replace(probe(), **changes)
    monkeypatch.setattr(resets, "probe", lambda: found)


def used(reset: Callable[[Slot], Any], image: Any = None) -> Any:
    """What a reset says of itself, after it put back a written memory."""
    slot = Slot.create(16 * P)
    slot.instantiate(image, 8 * P)
    ctypes.memset(slot.base, 7, 8 * P)
    result = slot.reset(reset)
    slot.check()
    slot.destroy()
    return result


def test_the_probe_is_made_once_and_finds_what_is_here() -> None:
    found = probe()
    assert probe() is found is public_probe()
    assert found.page_size == P
    for finding in (found.memfd, found.seals, found.dontneed, found.pagemap):
        assert isinstance(finding.works, bool)
        assert finding.detail


@pytest.mark.usefixtures("fresh_probe")
@pytest.mark.parametrize(
    ("call", "error", "wrong"),
    [
        ("memfd_create", errno.ENOSYS, "memfd"),
        ("memfd_create", errno.EPERM, "memfd"),
        ("memfd_create", errno.EACCES, "memfd"),
        ("fcntl", errno.EPERM, "memfd"),
        ("fcntl", errno.EINVAL, "memfd"),
        ("pagemap_scan", errno.ENOTTY, "pagemap"),
        ("pagemap_scan", errno.EPERM, "pagemap"),
        ("madvise", errno.EINVAL, "dontneed"),
        ("madvise", errno.EPERM, "dontneed"),
    ],
)
def test_what_is_refused_is_a_finding_with_its_reason(
    inject: Any, call: str, error: int, wrong: str
) -> None:
    inject(call, error=error)
    found = probe()
    finding = getattr(found, wrong)
    assert not finding.works
    assert os.strerror(error) in finding.detail


def test_a_child_that_was_forked_probes_again(child: Any) -> None:
    child(
        """
import os
from memslot_plugin import probe
from memslot_plugin.probe import pagemap_descriptor
found = probe()
mine = os.readlink(f"/proc/self/fd/{pagemap_descriptor()}")
if not (pid := os.fork()):
    try:
        assert probe() is not found and probe() == probe()
        assert os.readlink(f"/proc/self/fd/{pagemap_descriptor()}") != mine
    except BaseException as error:
        os.write(2, repr(error).encode()); os._exit(1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    )


def test_the_descriptor_does_not_survive_exec() -> None:
    command = [sys.executable, "-c", f"import os; os.fstat({pagemap_descriptor()})"]
    done = subprocess.run(command, capture_output=True, text=True, close_fds=False, check=False)
    assert "Bad file descriptor" in done.stderr


# The choice


@pytest.mark.parametrize(
    ("setting", "here", "strategy"),
    [
        ("madvise", {}, "madvise"),
        ("copy", {}, "copy"),
        ("copy", {"dontneed": False, "memfd": False, "pagemap": False}, "copy"),
        ("auto", {"pagemap": False}, "madvise"),
        ("auto", {"pagemap": False, "dontneed": False}, "remap"),
        ("auto", {"pagemap": True, "dontneed": False}, "remap"),
        ("madvise", {"dontneed": False}, "remap"),
        ("madvise", {"dontneed": False, "memfd": False}, "remap"),
    ],
)
def test_a_setting_becomes_what_the_kernel_can_do(
    monkeypatch: pytest.MonkeyPatch, setting: str, here: dict[str, bool], strategy: str
) -> None:
    pretend(monkeypatch, **here)
    with MemfdImage("chosen", b"x" * 2 * P) as image:
        assert used(resets.choose(setting, 0), image).strategy == strategy


@pytest.mark.skipif(not probe().pagemap.works, reason="impossible: no PAGEMAP_SCAN")
@pytest.mark.parametrize("setting", ["pagemap", "copy"])
def test_nothing_is_dropped_where_dropping_does_not_work(
    monkeypatch: pytest.MonkeyPatch, calls: Any, setting: str
) -> None:
    pretend(monkeypatch, dontneed=False)
    with MemfdImage("kept", b"x" * 2 * P) as image, calls() as made:
        assert used(resets.choose(setting, 0), image).strategy == setting
    assert "madvise" not in made


def test_a_copy_within_its_budget_makes_no_system_call(calls: Any) -> None:
    with MemfdImage("small", b"x" * 2 * P) as image:
        slot = Slot.create(16 * P)
        slot.instantiate(image, 8 * P)
        ctypes.memset(slot.base, 7, 8 * P)
        with calls() as made:
            result = slot.reset(resets.choose("copy", 8 * P))
        assert (result.dirty_bytes, result.reason) == (8 * P, "")
        assert sum(made.values()) == 0
        slot.instantiate(image, 8 * P)
        ctypes.memset(slot.base, 7, 8 * P)
        result = slot.reset(resets.choose("copy", 7 * P))
        assert (result.dirty_bytes, result.reason) == (None, "keep_resident")
        slot.check()
        slot.destroy()


def test_a_copy_that_cannot_drop_makes_the_slot_unknown(inject: Any) -> None:
    with MemfdImage("kept", b"x" * 2 * P) as image:
        slot = Slot.create(16 * P)
        slot.instantiate(image, 8 * P)
        ctypes.memset(slot.base, 7, 8 * P)
        inject("madvise", error=errno.ENOMEM)
        with pytest.raises(SystemCallError, match="MADV_DONTNEED in a reset"):
            slot.reset(resets.choose("copy", 0))
        slot.instantiate(image, 8 * P)
        slot.check()
        slot.destroy()


@pytest.mark.usefixtures("fresh_probe")
@pytest.mark.parametrize("works", [True, False])
def test_without_a_memfd_dropping_is_tried_on_zeros(inject: Any, works: bool) -> None:
    inject("memfd_create", error=errno.ENOSYS)
    if not works:
        inject("madvise", error=errno.EINVAL)
    assert probe().dontneed.works == works


def test_pagemap_is_refused_where_the_kernel_has_it_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, pagemap=False)
    sentence = "reset = pagemap is not possible here: pretended False; allowed: auto, madvise, copy"
    with pytest.raises(Unsupported, match=re.escape(sentence)):
        resets.choose("pagemap", 0)


@pytest.mark.skipif(not probe().pagemap.works, reason="impossible: no PAGEMAP_SCAN")
@pytest.mark.parametrize("kind", [MemfdImage, BytesImage, None])
@pytest.mark.parametrize("first", [0, 1, 40])
@pytest.mark.parametrize("keep", [0, P, 3 * P, 1 << 30])
@pytest.mark.parametrize("setting", ["pagemap", "auto", "copy"])
def test_what_passes_keep_resident_is_given_back(
    kind: Any, first: int, keep: int, setting: str
) -> None:
    """Except for what was copied from an image, which would not come back."""
    image = kind("kept", bytes(first * P) + b"x" * 2 * P) if kind else None
    slot = Slot.create(128 * P)
    slot.instantiate(image, 64 * P)
    for _ in range(3):
        ctypes.memset(slot.base, 7, 64 * P)
        slot.reset(resets.choose(setting, keep))
        slot.check()
        report = _core.ffi.new("ms_reset_report *")
        counted = _core.lib.ms_count_private(pagemap_descriptor(), slot.base, 64 * P, report)
        assert counted == 0
        assert report.private_pages <= keep // P + 2 * (kind is BytesImage)
        slot.instantiate(image, 64 * P)
    slot.destroy()
    if image is not None:
        image.close()


@pytest.mark.skipif(not probe().pagemap.works, reason="impossible: no PAGEMAP_SCAN")
def test_a_scan_that_fails_makes_the_slot_unknown_and_the_next_use_right(inject: Any) -> None:
    with MemfdImage("scanned", b"x" * 2 * P) as image:
        slot = Slot.create(16 * P)
        slot.instantiate(image, 8 * P)
        ctypes.memset(slot.base, 7, 8 * P)
        inject("pagemap_scan", error=errno.EPERM)
        with pytest.raises(
            SystemCallError, match="PAGEMAP_SCAN in a reset: Operation not permitted"
        ):
            slot.reset(resets.choose("pagemap", 1 << 30))
        slot.instantiate(image, 8 * P)
        slot.check()
        assert ctypes.string_at(slot.base, 8 * P) == b"x" * 2 * P + bytes(6 * P)
        slot.destroy()


def test_resets_in_many_threads_report_their_own_numbers() -> None:
    """One report that all shared would tell one slot's numbers of another."""
    import threading

    reset = resets.choose("auto", 1 << 30)
    if used(reset).dirty_bytes is None:
        pytest.skip("impossible: no PAGEMAP_SCAN")
    wrong: list[tuple[int, int | None]] = []

    def work(pages: int) -> None:
        slot = Slot.create(1024 * P)
        for _ in range(30):
            slot.instantiate(None, 1024 * P)
            for page in range(pages):
                ctypes.memset(slot.base + page * P, 1, 1)
            found = slot.reset(reset).dirty_bytes
            if found != pages * P:
                wrong.append((pages, found))
        slot.destroy()

    threads = [threading.Thread(target=work, args=(pages,)) for pages in (1, 300, 700, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
