"""An emulated processor (qemu-user), an older kernel with its own sysctls (User-Mode Linux), and larger pages.

The probe finds the missing calls by trying, and hosts serve alike.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .children import ROOT, hosts, output, present

pytestmark = pytest.mark.gate

on_every_host = pytest.mark.parametrize("host", hosts())


@functools.cache
def unhindered(*options: str) -> Any:
    return json.loads(output("-m", "integration_tests.story", *options, *present()))[""]


def assert_alike(report: dict[str, Any], host: str, *options: str) -> None:
    expected = unhindered(*options)[host]
    assert {**report, "warmed": None} == expected  # a kernel may lack what warming needs


# An emulated processor, for which a page of address space has its price

SMALL = ("BOUNDS_CHECKS=code", "RESERVED=64MiB", "GUARD=64KiB", "MEMORY_LIMIT=64MiB")


@functools.cache
def emulated(*command: str, settings: tuple[str, ...] = ()) -> Any:
    """Return the JSON that a Python program prints under qemu, which emulates the kind of this processor."""
    qemu = f"qemu-{os.uname().machine}"
    if shutil.which(qemu) is None:
        pytest.skip(f"{qemu} is not installed (qemu-user)")
    variables = [f"MEMSLOT_{setting}" for setting in ("SLOTS=2", *settings)]
    done = subprocess.run(
        ["env", *variables, qemu, sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@on_every_host
def test_host_on_an_emulated_processor_serves_as_on_a_real_one(host: str) -> None:
    """Traps are left out: they are signals, and qemu-user ends the process at the first one, also natively."""
    told = emulated("-m", "integration_tests.story", "--without-traps", *present())
    assert_alike(told[""][host], host, "--without-traps")


@pytest.mark.parametrize("host", hosts()[:2])
def test_guest_on_an_emulated_processor_with_bounds_checks_traps(host: str) -> None:
    told = emulated("-m", "integration_tests.story", *present()[:2], settings=SMALL)
    assert_alike(told[""][host], host)


def test_doctor_on_an_emulated_processor_names_the_missing_calls() -> None:
    report = emulated("-m", "memslot_plugin", "doctor", "--json", settings=SMALL)
    found = report["probe"]
    assert found["pagemap"]["works"] is False  # qemu does not pass this ioctl on
    assert found["pagemap"]["detail"].startswith("PAGEMAP_SCAN: ")
    strategy = "madvise" if found["dontneed"]["works"] else "remap"
    assert report["allocation"]["detail"].endswith(f"reset by {strategy}")
    assert report["works"] is True


# An older kernel with settings of its own

INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
export HOME=/root PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin PYTHONDONTWRITEBYTECODE=1 MEMSLOT_SLOTS=2
cd {root}
({command}) >{out}/stdout 2>{out}/stderr
echo $? >{out}/status
sync
echo o >/proc/sysrq-trigger
sleep 10
"""
"""The first process of the machine: runs one command and switches the machine off."""


def boot(command: str, out: Path) -> str:
    """Return the output of a shell command under User-Mode Linux, on this file system."""
    if shutil.which("linux.uml") is None:
        pytest.skip("linux.uml is not installed (user-mode-linux)")
    init = out / "init"
    init.write_text(INIT.format(root=ROOT, command=command, out=out))
    init.chmod(0o755)
    machine = ["linux.uml", "mem=512M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "rw"]
    started = subprocess.run(
        [*machine, "quiet", f"init={init}", "con=null", "con0=null,fd:1"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    status = out / "status"
    if not status.exists():
        pytest.skip(f"impossible: User-Mode Linux does not start here: {started.stdout[-400:]}")
    assert status.read_text() == "0\n", (out / "stderr").read_text()
    return (out / "stdout").read_text()


GREEDY = """
import json
import memslot_plugin as memslot
from integration_tests import cells, expect, toy
from memslot_plugin.tests.leaks import Footprint
said = {}
large = toy.assemble("(module (memory (export \\"memory\\") 16000) (data (i32.const 8) \\"x\\"))")
for backend in cells.BACKENDS:
    with cells.Cell("wasmtime", backend).serving(slots=2, reserved="2GiB") as host:
        guest, greedy = host.prepare(toy.A), host.prepare(large)
        with guest.instantiate(): pass
        before = Footprint.now()
        try:
            greedy.instantiate()
        except memslot.SystemCallError as error:
            said[backend] = str(error)
        lost = Footprint.now().lost_since(before, mappings=8)
        assert not lost, lost
        expect.still_serves(host)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the reports of one boot: with default sysctls, and with all memory committed."""
    story = f"{sys.executable} -m integration_tests.story {' '.join(present())}"
    told = boot(
        f"uname -r; {story} doctor; echo 2 >/proc/sys/vm/overcommit_memory;"
        f" {story}; {sys.executable} -c '{GREEDY}'",
        tmp_path_factory.mktemp("older"),
    )
    release, *documents = told.splitlines()
    told, committed, greedy = map(json.loads, documents)
    return {
        "release": release,
        "story": told[""],
        "doctor": told["doctor"],
        "committed": committed[""],
        "greedy": greedy,
    }


@on_every_host
def test_host_on_a_kernel_without_pagemap_scan_serves_as_on_a_newer_one(
    host: str, older: dict[str, Any]
) -> None:
    if tuple(int(part) for part in older["release"].split(".")[:2]) >= (6, 7):
        pytest.skip(f"impossible: this User-Mode Linux is {older['release']}, which has the scan")
    assert_alike(older["story"][host], host)
    found = older["doctor"]["probe"]
    assert found["pagemap"]["works"] is False
    assert found["pagemap"]["detail"].endswith("(Linux has it since 6.7)")
    assert found["memfd"]["works"] is True  # MFD_NOEXEC_SEAL came with Linux 6.3
    assert older["doctor"]["allocation"]["detail"].endswith("reset by madvise")


@on_every_host
def test_reservation_on_a_machine_that_commits_all_memory_costs_nothing(
    host: str, older: dict[str, Any]
) -> None:
    """vm.overcommit_memory = 2: two slots reserve 8 GiB of a machine that may commit a fraction of 512 MiB."""
    assert_alike(older["committed"][host], host)


@pytest.mark.parametrize("backend", ["memfd", "anonymous"])
def test_memory_that_cannot_be_committed_raises_an_error_with_the_setting(
    backend: str, older: dict[str, Any]
) -> None:
    said = older["greedy"][backend]
    assert "of a slot accessible: Cannot allocate memory" in said
    assert "vm.overcommit_memory is 2 and vm.overcommit_ratio 50" in said


# Larger pages


@pytest.mark.parametrize("size", [16384, 65536])
def test_host_with_larger_pages_serves_alike_and_its_slots_keep_their_promises(
    size: int, tmp_path: Path
) -> None:
    """A preloaded library acts as a kernel with larger pages. Runtimes ask the kernel itself: none can be tried."""
    library = tmp_path / "larger_pages.so"
    source = Path(__file__).with_name("larger_pages.c")
    command = ["cc", "-shared", "-fPIC", "-O1", f"-DPAGE={size}", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True)
    preloaded = {"LD_PRELOAD": str(library)}
    told = output("-m", "integration_tests.story", "fake", environment=preloaded)
    assert_alike(json.loads(told)[""]["fake"], "fake")
    asked = "import memslot_plugin; print(memslot_plugin.probe().page_size)"
    assert output("-c", asked, environment=preloaded) == f"{size}\n"
    tests = [f"memslot_plugin.tests.test_{name}" for name in ("slot", "image", "pool")]
    # Not strace, which would see the calls of larger_pages.c too.
    options = ("-q", "-p", "no:cacheprovider", "-x", "-n", "0", "-k", "not strace")
    output("-m", "pytest", *options, "--pyargs", *tests, environment=preloaded)
