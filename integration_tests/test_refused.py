"""Machines where the kernel refuses something, for real: one child process (children.py) for each refusal tells what
every host does there under several settings, and what `memslot doctor` says.
"""

from __future__ import annotations

import errno
import functools
import json
import os
from typing import Any

import pytest

from .children import hosts, output, present, require, run

MEMFD = "memfd_create:{}"
SEALS = "fcntl:{}:1=1033"  # F_ADD_SEALS
PAGEMAP_SCAN = "ioctl:{}:1=3227543056"  # 0xc0606610
DONTNEED = "madvise:{}:2=4"
POPULATE = "madvise:{}:2=23"  # MADV_POPULATE_WRITE, Linux 5.14

WITHOUT_PROC = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")
"""Nothing is mounted at /proc, as in a bare chroot."""

NOEXEC_MEMFDS = (
    "unshare", "--mount", "--pid", "--fork", "--mount-proc",
    "sh", "-c", 'echo 2 > /proc/sys/vm/memfd_noexec && exec "$@"', "sh",
)  # fmt: skip
"""vm.memfd_noexec = 2, which is a matter of the pid namespace."""

LITTLE = 6 << 30
"""Bytes of address space: room for a slot of 4 GiB, and not for two."""

SETTINGS = ("memfd=on", "memfd=off", "reset=pagemap", "plugins=anonymous", "reserved=1GiB")

on_every_host = pytest.mark.parametrize("host", hosts())


def refusals(rule: str, first: str, *others: str) -> list[Any]:
    """A rule with errors, of which the first one is tried in T0 and the others in the gate."""
    call = rule.partition(":")[0]
    return [pytest.param(rule, first, id=f"{call}-{first}")] + [
        pytest.param(rule, other, id=f"{call}-{other}", marks=pytest.mark.gate) for other in others
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
    refused: str = "", limits: str = "", inside: tuple[str, ...] = (), plugins: str = ""
) -> dict[str, Any]:
    """Reports by setting and host, and doctor's; nothing may be left behind by a host that does not open."""
    told = output(
        *("-m", "integration_tests.story", *present(), *SETTINGS, "doctor"),
        refused=refused,
        limits=limits,
        inside=inside,
        environment={"MEMSLOT_PLUGINS": plugins} if plugins else {},
    )
    told = dict(json.loads(told))
    for setting in ("", *SETTINGS):
        for host, report in told[setting].items():
            assert not report.get("lost"), f"{host} {setting} left behind: {report['lost']}"
    return told


def assert_serves(report: dict[str, Any], host: str) -> None:
    assert report["error"] is None
    assert report["happened"] == stories()[""][host]["happened"]


def said(error: str) -> str:
    return "left the old bytes" if error == "IGNORED" else os.strerror(getattr(errno, error))


@on_every_host
def test_machine_that_refuses_nothing_answers_alike_under_every_setting(host: str) -> None:
    told = stories()
    for setting in ("", *SETTINGS):
        assert_serves(told[setting][host], host)
    assert told[""][host]["plugins"]["memfd"] > 0
    assert told[""][host]["plugins"]["anonymous"] == 0
    assert list(told["memfd=off"][host]["plugins"]) == ["anonymous"]
    assert told["memfd=off"][host]["answers"]["memfd"] == "the setting memfd is off"
    assert told["doctor"]["answering"] == "memfd"


NO_MEMFD = [
    *refusals(MEMFD, "EPERM", "ENOSYS", "EACCES"),
    *refusals(SEALS, "EINVAL", "EPERM"),
]


@pytest.mark.parametrize(("rule", "error"), NO_MEMFD)
@on_every_host
def test_memfd_refused_serves_from_anonymous_memory_unless_demanded(
    host: str, rule: str, error: str
) -> None:
    told = stories(refused=rule.format(error))
    report = told[""][host]
    assert_serves(report, host)
    assert report["plugins"] == {"anonymous": stories()[""][host]["plugins"]["memfd"]}
    assert report["answers"]["memfd"].endswith(said(error))
    demanded = told["memfd=on"][host]["error"]
    assert demanded.startswith("Unsupported: memfd = on is not possible here: ")
    assert demanded.endswith(f"{said(error)}; allowed: auto, off")


@pytest.mark.parametrize(("rule", "error"), NO_MEMFD)
def test_memfd_refused_doctor_names_the_reason(rule: str, error: str) -> None:
    report = stories(refused=rule.format(error))["doctor"]
    assert (report["works"], report["answering"]) == (True, "anonymous")
    found = report["probe"]["memfd" if rule == MEMFD else "seals"]
    assert found["works"] is False
    assert found["detail"].endswith(said(error))
    (memfd,) = (plugin for plugin in report["plugins"] if plugin["plugin"] == "memfd")
    assert (memfd["answers"], memfd["reason"]) == (False, found["detail"])
    assert report["allocation"]["works"] is True


NO_SCAN = refusals(PAGEMAP_SCAN, "ENOTTY", "EPERM")


@pytest.mark.parametrize(("rule", "error"), NO_SCAN)
@on_every_host
def test_pagemap_scan_refused_serves_alike_unless_demanded(
    host: str, rule: str, error: str
) -> None:
    told = stories(refused=rule.format(error))
    for setting in ("", "plugins=anonymous"):
        assert_serves(told[setting][host], host)
    demanded = told["reset=pagemap"][host]["error"]
    assert demanded.startswith("Unsupported: reset = pagemap is not possible here: PAGEMAP_SCAN: ")
    assert demanded.endswith("allowed: auto, madvise, copy")


@pytest.mark.parametrize(("rule", "error"), NO_SCAN)
def test_pagemap_scan_refused_doctor_says_so(rule: str, error: str) -> None:
    report = stories(refused=rule.format(error))["doctor"]
    assert report["probe"]["pagemap"]["works"] is False
    assert said(error) in report["probe"]["pagemap"]["detail"]
    assert report["allocation"]["detail"].endswith("reset by madvise")


NO_DONTNEED = refusals(DONTNEED, "IGNORED", "EPERM", "EINVAL")


@pytest.mark.parametrize(("rule", "error"), NO_DONTNEED)
@on_every_host
def test_madv_dontneed_without_effect_serves_alike(host: str, rule: str, error: str) -> None:
    told = stories(refused=rule.format(error))
    for setting in ("", "plugins=anonymous"):
        assert_serves(told[setting][host], host)


@pytest.mark.parametrize(("rule", "error"), NO_DONTNEED)
def test_madv_dontneed_without_effect_doctor_says_so(rule: str, error: str) -> None:
    report = stories(refused=rule.format(error))["doctor"]
    found = report["probe"]["dontneed"]
    assert found["works"] is False
    assert said(error) in found["detail"]
    assert found["detail"].endswith("; slots are mapped over instead")
    assert report["allocation"]["detail"].endswith("reset by remap")


@pytest.mark.parametrize(("rule", "error"), refusals(POPULATE, "EINVAL", "ENOSYS", "EPERM"))
@on_every_host
def test_populate_refused_warming_raises_and_costs_no_slot(
    host: str, rule: str, error: str
) -> None:
    report = stories(refused=rule.format(error))["reset=pagemap"][host]
    assert_serves(report, host)
    expected = "populating a slot (MADV_POPULATE_WRITE, Linux 5.14): "
    assert report["warmed"].startswith(expected)
    assert said(error) in report["warmed"]
    assert set(report["limits"]) == {2}
    assert stories()["reset=pagemap"][host]["warmed"] is None


@pytest.mark.gate
@on_every_host
def test_everything_refused_at_once_serves_alike(host: str) -> None:
    rules = MEMFD.format("EPERM"), PAGEMAP_SCAN.format("ENOTTY"), DONTNEED.format("EPERM")
    report = stories(refused=",".join(rules))[""][host]
    assert_serves(report, host)
    assert list(report["plugins"]) == ["anonymous"]


@on_every_host
def test_address_space_short_error_names_the_limit(host: str) -> None:
    told = stories(limits=f"RLIMIT_AS={LITTLE}", plugins="memfd")
    error = told[""][host]["error"]
    assert error.startswith("SystemCallError: ")
    assert "mapping a memory in wasmer" in error or "address space for 2 slots" in error
    assert f"RLIMIT_AS (ulimit -v) is {LITTLE}" in error
    smaller = told["reserved=1GiB"][host]
    if host == "wasmer":  # it reserves 6 GiB for each memory, whatever its maximum
        assert smaller["error"].startswith("SystemCallError: ")
    else:
        assert_serves(smaller, host)


@pytest.mark.gate
@on_every_host
def test_executable_memfds_forbidden_serves_from_memfds(host: str) -> None:
    require(*NOEXEC_MEMFDS)
    report = stories(inside=NOEXEC_MEMFDS)[""][host]
    assert_serves(report, host)
    assert report["plugins"] == stories()[""][host]["plugins"]
    executable = "import ctypes; assert ctypes.CDLL(None).memfd_create(b'x', 0x10) >= 0"
    assert run("-c", executable, inside=NOEXEC_MEMFDS).returncode == 1, "nothing was forbidden"


@on_every_host
def test_proc_missing_drops_pages_and_wasmer_says_what_it_needs(host: str) -> None:
    require(*WITHOUT_PROC)
    told = stories(inside=WITHOUT_PROC)
    for report in (told[""][host], told["plugins=anonymous"][host]):
        if host == "wasmer":  # nothing else tells how much address space it reserves for a memory
            assert report["error"].startswith("Unsupported: /proc/self/maps cannot be read (No")
            assert report["error"].endswith("mount proc")
        else:
            assert_serves(report, host)
    if host != "wasmer":
        demanded = told["reset=pagemap"][host]["error"]
        assert demanded.startswith("Unsupported: reset = pagemap is not possible here: ")
        assert "opening /proc/self/pagemap: No such file or directory" in demanded


def test_proc_missing_doctor_works() -> None:
    require(*WITHOUT_PROC)
    report = stories(inside=WITHOUT_PROC)["doctor"]
    assert report["works"] is True
    assert report["probe"]["pagemap"]["works"] is False
    assert "/proc/self/pagemap" in report["probe"]["pagemap"]["detail"]
    (mappings,) = (each for each in report["limits"] if each["name"] == "memory mappings")
    assert (mappings["value"], mappings["needed"]) == (None, None)


@pytest.mark.gate
def test_proc_missing_and_address_space_short_doctor_names_the_limit() -> None:
    require(*WITHOUT_PROC)
    report = stories(inside=WITHOUT_PROC, limits=f"RLIMIT_AS={LITTLE}")["doctor"]
    assert report["works"] is False
    said = report["allocation"]["detail"]
    assert "vm.max_map_count is unknown with unknown mappings in use" in said
    assert f"RLIMIT_AS (ulimit -v) is {LITTLE}" in said
