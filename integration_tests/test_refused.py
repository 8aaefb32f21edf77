"""Machines where the kernel refuses something, for real: in child processes (children.py)."""

from __future__ import annotations

import errno
import functools
import json
import os
from typing import Any

import pytest

from . import cells
from .children import (
    MADV_DONTNEED,
    MEMFD,
    NOEXEC_MEMFDS,
    PAGEMAP_SCAN,
    SEALS,
    WITHOUT_PROC,
    require,
    run,
)

HOSTS = [
    pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if reason else [])
    for name in cells.HOSTS
    for reason in [cells.Cell(name, "memfd").missing]
]


@pytest.fixture(scope="module", autouse=True)
def _seccomp() -> None:
    """The package pyseccomp comes with the tests, the system's library does not."""
    try:
        import pyseccomp  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        pytest.skip("impossible: libseccomp.so.2 is not installed")


@functools.cache
def stories(
    refused: str = "", limits: str = "", inside: tuple[str, ...] = (), **settings: str
) -> dict[str, Any]:
    """The story on every host that is here, told by one process."""
    names = [host for host in cells.HOSTS if cells.Cell(host, "memfd").missing is None]
    environment = {f"MEMSLOT_{name.upper()}": value for name, value in settings.items()}
    done = run(
        "-m",
        "integration_tests.story",
        *names,
        refused=refused,
        environment=environment,
        limits=limits,
        inside=inside,
    )
    assert done.returncode == 0, done.stderr
    told = dict(json.loads(done.stdout))
    for host, report in told.items():
        assert not report.get("lost"), f"{host} left behind: {report['lost']}"
    return told


def unhindered(host: str) -> dict[str, Any]:
    """What happens on this machine as it is."""
    report = stories()[host]
    assert report["error"] is None
    return dict(report)


def doctor(**how: Any) -> dict[str, Any]:
    done = run("-m", "memslot_plugin.cli", "doctor", "--json", **how)
    assert done.returncode in {0, 1}, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("error", ["ENOSYS", "EPERM", "EACCES"])
@pytest.mark.parametrize("host", HOSTS)
def test_without_memfd_create_the_anonymous_plugin_answers_the_same(host: str, error: str) -> None:
    report = stories(refused=MEMFD.format(error))[host]
    assert report["error"] is None
    assert report["happened"] == unhindered(host)["happened"]
    assert report["plugins"] == {"anonymous": 4 + 4 * (host == "wasmer")}
    assert report["answers"]["memfd"].endswith(os.strerror(getattr(errno, error)))
    assert unhindered(host)["plugins"]["memfd"] > 0
    assert unhindered(host)["plugins"]["anonymous"] == 0


@pytest.mark.parametrize("error", ["ENOSYS", "EPERM", "EACCES"])
def test_doctor_says_why_the_anonymous_plugin_answers(error: str) -> None:
    report = doctor(refused=MEMFD.format(error))
    said = os.strerror(getattr(errno, error))
    assert report["works"] is True
    assert report["answering"] == "anonymous"
    assert report["probe"]["memfd"]["works"] is False
    assert report["probe"]["memfd"]["detail"].endswith(said)
    (memfd,) = (plugin for plugin in report["plugins"] if plugin["plugin"] == "memfd")
    assert (memfd["answers"], memfd["reason"]) == (False, report["probe"]["memfd"]["detail"])
    assert report["allocation"]["works"] is True


def test_doctor_says_it_to_people_too() -> None:
    assert doctor()["answering"] == "memfd"
    text = run("-m", "memslot_plugin.cli", "doctor", refused=MEMFD.format("EPERM")).stdout
    assert "Operation not permitted" in " ".join(text.split())


@pytest.mark.parametrize("error", ["ENOSYS", "EPERM", "EACCES"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_memfd_that_was_demanded_is_an_error(host: str, error: str) -> None:
    report = stories(refused=MEMFD.format(error), memfd="on")[host]
    said = os.strerror(getattr(errno, error))
    assert report["error"].startswith("Unsupported: memfd = on is not possible here: ")
    assert report["error"].endswith(f"{said}; allowed: auto, off")


@pytest.mark.parametrize("host", HOSTS)
def test_a_memfd_that_was_switched_off(host: str) -> None:
    report = stories(memfd="off")[host]
    assert report["happened"] == unhindered(host)["happened"]
    assert list(report["plugins"]) == ["anonymous"]
    assert report["answers"]["memfd"] == "the setting memfd is off"


@pytest.mark.parametrize("error", ["EPERM", "EINVAL"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_memfd_that_cannot_be_sealed_is_none(host: str, error: str) -> None:
    report = stories(refused=SEALS.format(error))[host]
    assert report["happened"] == unhindered(host)["happened"]
    assert list(report["plugins"]) == ["anonymous"]
    assert report["answers"]["memfd"].endswith(os.strerror(getattr(errno, error)))


@pytest.mark.parametrize("backend", cells.backends())
@pytest.mark.parametrize("error", ["ENOTTY", "EPERM"])
@pytest.mark.parametrize("host", HOSTS)
def test_without_a_pagemap_scan_madvise_does_it(host: str, error: str, backend: str) -> None:
    how = {"refused": PAGEMAP_SCAN.format(error), "plugins": backend}
    report = stories(**how)[host]
    assert report["happened"] == unhindered(host)["happened"]
    demanded = stories(**how, reset="pagemap")[host]
    assert demanded["error"].startswith(
        "Unsupported: reset = pagemap is not possible here: PAGEMAP_SCAN: "
    )
    assert demanded["error"].endswith("allowed: auto, madvise, copy")


@pytest.mark.parametrize("host", HOSTS)
def test_everything_refused_at_once(host: str) -> None:
    report = stories(refused=",".join((MEMFD.format("EPERM"), PAGEMAP_SCAN.format("ENOTTY"))))[host]
    assert report["happened"] == unhindered(host)["happened"]
    assert list(report["plugins"]) == ["anonymous"]


LITTLE = 6 << 30
"""Bytes of address space: room for a slot of 4 GiB, and not for two."""


@pytest.mark.parametrize("host", HOSTS)
def test_too_little_address_space_names_the_limit(host: str) -> None:
    error = stories(limits=f"RLIMIT_AS={LITTLE}", plugins="memfd")[host]["error"]
    assert error.startswith("SystemCallError: ")
    assert "mapping a memory in wasmer" in error or "address space for 2 slots" in error
    assert f"RLIMIT_AS (ulimit -v) is {LITTLE}" in error
    smaller = stories(limits=f"RLIMIT_AS={LITTLE}", plugins="memfd", reserved="1GiB")[host]
    if host == "wasmer":  # it reserves 6 GiB for each memory, whatever its maximum
        assert smaller["error"].startswith("SystemCallError: ")
    else:
        assert smaller["happened"] == unhindered(host)["happened"]


# What follows refuses something else than a whole system call.


@pytest.mark.parametrize("host", HOSTS)
def test_where_memfds_must_not_be_executable_they_are_not(host: str) -> None:
    require(NOEXEC_MEMFDS)
    report = stories(inside=NOEXEC_MEMFDS)[host]
    assert report["error"] is None
    assert report["happened"] == unhindered(host)["happened"]
    assert report["plugins"] == unhindered(host)["plugins"]
    ours = "from memslot_plugin import MemfdImage; MemfdImage('x', b'x')"
    assert run("-c", ours, inside=NOEXEC_MEMFDS).returncode == 0
    executable = "import ctypes; assert ctypes.CDLL(None).memfd_create(b'x', 0x10) >= 0"
    assert run("-c", executable, inside=NOEXEC_MEMFDS).returncode == 1, "nothing was forbidden"


@pytest.mark.parametrize("error", ["EPERM", "EINVAL", "IGNORED"])
@pytest.mark.parametrize("backend", cells.backends())
@pytest.mark.parametrize("host", HOSTS)
def test_where_madv_dontneed_does_nothing_slots_are_mapped_over(
    host: str, backend: str, error: str
) -> None:
    report = stories(refused=MADV_DONTNEED.format(error), plugins=backend)[host]
    assert report["error"] is None
    assert report["happened"] == unhindered(host)["happened"]


@pytest.mark.parametrize("error", ["EPERM", "EINVAL", "IGNORED"])
def test_doctor_says_that_madv_dontneed_does_nothing(error: str) -> None:
    report = doctor(refused=MADV_DONTNEED.format(error))
    said = report["probe"]["dontneed"]
    reason = "left the old bytes" if error == "IGNORED" else os.strerror(getattr(errno, error))
    assert said["works"] is False
    assert reason in said["detail"]
    assert said["detail"].endswith("; slots are mapped over instead")
    assert report["allocation"]["detail"].endswith("reset by remap")


@pytest.mark.parametrize("error", ["ENOTTY", "EPERM"])
def test_doctor_says_that_there_is_no_pagemap_scan(error: str) -> None:
    report = doctor(refused=PAGEMAP_SCAN.format(error))
    said = report["probe"]["pagemap"]
    assert said["works"] is False
    assert os.strerror(getattr(errno, error)) in said["detail"]
    assert report["allocation"]["detail"].endswith("reset by madvise")


@pytest.mark.parametrize("error", ["EPERM", "EINVAL"])
def test_doctor_says_that_nothing_can_be_sealed(error: str) -> None:
    report = doctor(refused=SEALS.format(error))
    said = report["probe"]["seals"]
    assert said["works"] is False
    assert said["detail"].endswith(os.strerror(getattr(errno, error)))
    assert report["answering"] == "anonymous"


@pytest.mark.parametrize("error", ["ENOSYS", "EPERM", "EINVAL"])
@pytest.mark.parametrize("host", HOSTS)
def test_pages_that_cannot_be_made_resident_ahead_are_an_error_and_cost_no_slot(
    host: str, error: str
) -> None:
    """MADV_POPULATE_WRITE, Linux 5.14, is what warming asks for."""
    done = run("-c", WARMING, host, refused=f"madvise:{error}:2=23")
    assert done.returncode == 0, done.stderr
    told = dict(json.loads(done.stdout))
    said = os.strerror(getattr(errno, error))
    assert told["error"].startswith("populating a slot (MADV_POPULATE_WRITE, Linux 5.14): ")
    assert said in told["error"]
    assert told["limit"] == 2


WARMING = """
import json, sys
import memslot_plugin as memslot
from integration_tests import cells, expect, toy
host_name = sys.argv[1]
with cells.Cell(host_name, "memfd", reset="pagemap").serving(slots=2) as host:
    guest = host.prepare(toy.A)
    with guest.instantiate() as instance:
        instance.call("fill", 0, 2 * toy.PAGE, 1)
    try:
        guest.warm(2)
    except memslot.SystemCallError as error:
        said = str(error).partition("] ")[2]
    expect.still_serves(host)
    (pool,) = host.statistics().pools
    print(json.dumps({"error": said, "limit": pool.limit}))
"""


@pytest.mark.parametrize("backend", cells.backends())
@pytest.mark.parametrize("host", HOSTS)
def test_without_proc_pages_are_dropped_and_wasmer_says_what_it_needs(
    host: str, backend: str
) -> None:
    require(WITHOUT_PROC)
    report = stories(inside=WITHOUT_PROC, plugins=backend)[host]
    if host == "wasmer":  # nothing else tells how much address space it reserves for a memory
        assert report["error"].startswith("Unsupported: /proc/self/maps cannot be read (No such")
        assert report["error"].endswith("mount proc")
        return
    assert report["error"] is None
    assert report["happened"] == unhindered(host)["happened"]
    demanded = stories(inside=WITHOUT_PROC, plugins=backend, reset="pagemap")[host]
    assert demanded["error"].startswith("Unsupported: reset = pagemap is not possible here: ")
    assert "opening /proc/self/pagemap: No such file or directory" in demanded["error"]


def test_doctor_works_without_proc() -> None:
    require(WITHOUT_PROC)
    report = doctor(inside=WITHOUT_PROC)
    assert report["works"] is True
    assert report["probe"]["pagemap"]["works"] is False
    assert "/proc/self/pagemap" in report["probe"]["pagemap"]["detail"]
    (mappings,) = (each for each in report["limits"] if each["name"] == "memory mappings")
    assert (mappings["value"], mappings["needed"]) == (None, None)
    short = doctor(inside=WITHOUT_PROC, limits=f"RLIMIT_AS={LITTLE}")
    assert short["works"] is False
    assert (
        "vm.max_map_count is unknown with unknown mappings in use" in short["allocation"]["detail"]
    )
    assert f"RLIMIT_AS (ulimit -v) is {LITTLE}" in short["allocation"]["detail"]


def test_the_probe_does_not_take_a_shortage_of_the_moment_for_the_kernels_last_word() -> None:
    done = run("-c", SHORT)
    assert done.returncode == 0, done.stderr


SHORT = """
import os, resource
import memslot_plugin as memslot
from integration_tests.exhausted import descriptors
with descriptors(0):
    try:
        memslot.probe()
    except memslot.SystemCallError as error:
        assert "RLIMIT_NOFILE (ulimit -n) is 200" in str(error), error
    else:
        raise AssertionError("it found out without a descriptor")
found = memslot.probe()
assert found.memfd.works and found.pagemap.works, found
"""
