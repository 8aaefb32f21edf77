"""Machines whose kernel really refuses something: a child (children.py) per refusal.

Each child reports the behaviour of each host under several settings, and the output of `memslot doctor`.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest

from .children import hosts, output, present, require, run

WITHOUT_PROC = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")
"""Prefix for a child without /proc, as in a bare chroot."""

NOEXEC_MEMFDS = (
    "unshare", "--mount", "--pid", "--fork", "--mount-proc",
    "sh", "-c", 'echo 2 > /proc/sys/vm/memfd_noexec && exec "$@"', "sh",
)  # fmt: skip
"""Prefix for a child with vm.memfd_noexec = 2, which belongs to the pid namespace."""

LITTLE = 6 << 30
"""Bytes of address space: enough for one slot of 4 GiB."""

SETTINGS = ("memfd=on", "memfd=off", "reset=pagemap", "plugins=anonymous", "reserved=1GiB")

on_every_host = pytest.mark.parametrize("host", hosts())


@dataclass(frozen=True)
class Refusal:
    """A rule for the filter of a child, and its traces: in the probe, in doctor's detail, and under a setting."""

    rule: str
    probed: str
    effect: str
    demanded: str = ""
    refused: str = ""


MEMFD = Refusal("memfd_create:{}", "memfd", "", "memfd=on", "memfd = on .*: {}; allowed: auto, off")
SEALS = replace(MEMFD, rule="fcntl:{}:1=1033", probed="seals")  # F_ADD_SEALS
SCAN = Refusal(
    "ioctl:{}:1=3227543056",  # 0xc0606610
    "pagemap",
    "reset by madvise",
    "reset=pagemap",
    "reset = pagemap .*: PAGEMAP_SCAN: .*; allowed: auto, madvise, copy",
)
DONTNEED = Refusal("madvise:{}:2=4", "dontneed", "reset by remap")
POPULATE = "madvise:{}:2=23"  # MADV_POPULATE_WRITE, Linux 5.14


def one_of(refusal: Any, first: str, *others: str) -> list[Any]:
    """Return a refusal per errno as parameters: the first in T0, the others in the gate."""
    name = getattr(refusal, "probed", "populate")
    return [
        pytest.param(refusal, error, id=f"{name}-{error}", marks=pytest.mark.gate if more else ())
        for more, error in enumerate((first, *others))
    ]


every_refusal = pytest.mark.parametrize(
    ("refusal", "error"),
    [
        *one_of(MEMFD, "EPERM", "ENOSYS", "EACCES"),
        *one_of(SEALS, "EINVAL", "EPERM"),
        *one_of(SCAN, "ENOTTY", "EPERM"),
        *one_of(DONTNEED, "IGNORED", "EPERM", "EINVAL"),
    ],
)


@pytest.fixture(scope="module", autouse=True)
def _seccomp() -> None:
    """Skip without libseccomp: the tests bring the package pyseccomp, and not the library of the system."""
    try:
        import pyseccomp  # noqa: F401
    except (OSError, RuntimeError):
        pytest.skip("libseccomp.so.2 is not installed (libseccomp2)")


@functools.cache
def stories(
    refused: str = "", limits: str = "", inside: tuple[str, ...] = (), plugins: str = ""
) -> dict[str, Any]:
    """Return reports by setting and host, and doctor's. A host that does not open may leave nothing."""
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
def test_host_under_every_setting_answers_alike(host: str) -> None:
    told = stories()
    for setting in ("", *SETTINGS):
        assert_serves(told[setting][host], host)
    assert told[""][host]["plugins"]["memfd"] > 0
    assert told[""][host]["plugins"]["anonymous"] == 0
    assert list(told["memfd=off"][host]["plugins"]) == ["anonymous"]
    assert told["memfd=off"][host]["answers"]["memfd"] == "the setting memfd is off"
    assert told["doctor"]["allocation"]["detail"].startswith("memfd handed out a memory")


@every_refusal
@on_every_host
def test_refused_call_is_replaced_by_another_unless_demanded(
    host: str, refusal: Refusal, error: str
) -> None:
    told = stories(refused=refusal.rule.format(error))
    report = told[""][host]
    assert_serves(report, host)
    assert_serves(told["plugins=anonymous"][host], host)
    if refusal.demanded == "memfd=on":
        assert report["plugins"] == {"anonymous": stories()[""][host]["plugins"]["memfd"]}
        assert report["answers"]["memfd"].endswith(said(error))
    else:
        assert report["plugins"] == stories()[""][host]["plugins"]
    if refusal.demanded:
        expected = "Unsupported: " + refusal.refused.format(said(error))
        assert re.fullmatch(expected, told[refusal.demanded][host]["error"])


@every_refusal
def test_refused_call_is_named_by_doctor(refusal: Refusal, error: str) -> None:
    report = stories(refused=refusal.rule.format(error))["doctor"]
    found = report["probe"][refusal.probed]
    assert found["works"] is False
    assert said(error) in found["detail"]
    assert found["detail"].endswith("; slots are mapped over instead") == (refusal is DONTNEED)
    assert report["works"] is True
    assert report["allocation"]["detail"].endswith(refusal.effect)
    if refusal.demanded == "memfd=on":
        assert report["allocation"]["detail"].startswith("anonymous handed out a memory")
        (memfd,) = (plugin for plugin in report["plugins"] if plugin["plugin"] == "memfd")
        assert (memfd["answers"], memfd["reason"]) == (False, found["detail"])


@pytest.mark.parametrize(("rule", "error"), one_of(POPULATE, "EINVAL", "ENOSYS", "EPERM"))
@on_every_host
def test_warming_with_populate_refused_raises_and_costs_no_slot(
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
def test_host_with_every_call_refused_at_once_serves_alike(host: str) -> None:
    rules = (each.rule.format("EPERM") for each in (MEMFD, SCAN, DONTNEED))
    report = stories(refused=",".join(rules))[""][host]
    assert_serves(report, host)
    assert list(report["plugins"]) == ["anonymous"]


@on_every_host
def test_error_without_address_space_names_the_limit(host: str) -> None:
    told = stories(limits=f"RLIMIT_AS={LITTLE}", plugins="memfd")
    error = told[""][host]["error"]
    assert error.startswith("SystemCallError: ")
    assert "mapping a memory in wasmer" in error or "address space for 2 slots" in error
    assert f"RLIMIT_AS (ulimit -v) is {LITTLE}" in error
    smaller = told["reserved=1GiB"][host]
    if host == "wasmer":  # wasmer reserves 6 GiB for each memory of any maximum
        assert smaller["error"].startswith("SystemCallError: ")
    else:
        assert_serves(smaller, host)


@pytest.mark.gate
@on_every_host
def test_host_with_executable_memfds_forbidden_serves_from_memfds(host: str) -> None:
    require(*NOEXEC_MEMFDS)
    report = stories(inside=NOEXEC_MEMFDS)[""][host]
    assert_serves(report, host)
    assert report["plugins"] == stories()[""][host]["plugins"]
    executable = "import ctypes; assert ctypes.CDLL(None).memfd_create(b'x', 0x10) >= 0"
    assert run("-c", executable, inside=NOEXEC_MEMFDS).returncode == 1, "nothing was forbidden"


@on_every_host
def test_host_without_proc_drops_pages_or_names_what_it_needs(host: str) -> None:
    require(*WITHOUT_PROC)
    told = stories(inside=WITHOUT_PROC)
    for report in (told[""][host], told["plugins=anonymous"][host]):
        if (
            host == "wasmer"
        ):  # /proc alone shows the address space that wasmer reserves for a memory
            assert report["error"].startswith("Unsupported: /proc/self/maps cannot be read (No")
            assert report["error"].endswith("mount proc")
        else:
            assert_serves(report, host)
    if host != "wasmer":
        demanded = told["reset=pagemap"][host]["error"]
        assert demanded.startswith("Unsupported: reset = pagemap is not possible here: ")
        assert "opening /proc/self/pagemap: No such file or directory" in demanded


def test_doctor_without_proc_works() -> None:
    require(*WITHOUT_PROC)
    report = stories(inside=WITHOUT_PROC)["doctor"]
    assert report["works"] is True
    assert report["probe"]["pagemap"]["works"] is False
    assert "/proc/self/pagemap" in report["probe"]["pagemap"]["detail"]
    (mappings,) = (each for each in report["limits"] if each["name"] == "memory mappings")
    assert (mappings["value"], mappings["needed"]) == (None, None)


@pytest.mark.gate
def test_doctor_without_proc_and_address_space_names_the_limit() -> None:
    require(*WITHOUT_PROC)
    report = stories(inside=WITHOUT_PROC, limits=f"RLIMIT_AS={LITTLE}")["doctor"]
    assert report["works"] is False
    said = report["allocation"]["detail"]
    assert "vm.max_map_count is unknown with unknown mappings in use" in said
    assert f"RLIMIT_AS (ulimit -v) is {LITTLE}" in said
