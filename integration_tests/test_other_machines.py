"""Other machines: an emulated processor (qemu-user), an older kernel with sysctls of its own (User-Mode Linux), and
larger pages.  What is missing there is found by trying, and the same is served.
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

from . import cells
from .children import ROOT, run

NAMES = [host for host in cells.HOSTS if cells.Cell(host, "memfd").missing is None]
HOSTS = [
    pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if reason else [])
    for name in cells.HOSTS
    for reason in [cells.Cell(name, "memfd").missing]
]


@functools.cache
def unhindered(*options: str) -> dict[str, Any]:
    done = run("-m", "integration_tests.story", *options, *NAMES)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


# An emulated processor, for which a page of address space has its price

SMALL = {
    "MEMSLOT_BOUNDS_CHECKS": "code",
    "MEMSLOT_RESERVED": "64MiB",
    "MEMSLOT_GUARD": "64KiB",
    "MEMSLOT_MEMORY_LIMIT": "64MiB",
}


@functools.cache
def emulated(*command: str, **variables: str) -> Any:
    """What a Python program prints, as JSON, under qemu's emulation of this processor's own kind."""
    qemu = f"qemu-{os.uname().machine}"
    if shutil.which(qemu) is None:
        pytest.skip(f"impossible: {qemu} is not installed")
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("MEMSLOT_")
    }
    done = subprocess.run(
        [qemu, sys.executable, *command],
        cwd=ROOT,
        env={**inherited, "MEMSLOT_SLOTS": "2", **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("host", HOSTS)
def test_under_emulation_the_same_is_served(host: str) -> None:
    """Without traps: qemu-user ends the process at the first one, also of a runtime alone, for they are signals."""
    report = emulated("-m", "integration_tests.story", "--without-traps", *NAMES)[host]
    assert report == unhindered("--without-traps")[host]


def test_under_emulation_traps_are_traps_where_code_checks_bounds() -> None:
    command = ("-m", "integration_tests.story", *(name for name in NAMES if name != "wasmer"))
    for host, report in emulated(*command, **SMALL).items():
        assert report == unhindered()[host]


def test_under_emulation_doctor_says_what_is_missing() -> None:
    report = emulated("-m", "memslot_plugin.cli", "doctor", "--json", **SMALL)
    found = report["probe"]
    assert found["pagemap"]["works"] is False  # qemu does not pass this ioctl on
    assert found["pagemap"]["detail"].startswith("PAGEMAP_SCAN: ")
    strategy = "madvise" if found["dontneed"]["works"] else "remap"
    assert report["allocation"]["detail"].endswith(f"reset by {strategy}")
    assert report["works"] is True


# An older kernel of our own, whose settings nobody shares


INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
export HOME=/root PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin PYTHONDONTWRITEBYTECODE=1 {variables}
cd {root}
({command}) >{out}/stdout 2>{out}/stderr
echo $? >{out}/status
sync
echo o >/proc/sysrq-trigger
sleep 10
"""
"""The first and only process: runs one command and switches the machine off."""


def boot(command: str, out: Path, memory: str = "512M", **variables: str) -> str:
    """What a shell command prints on a machine that is a process here: User-Mode Linux, on this file system."""
    if shutil.which("linux.uml") is None:
        pytest.skip("impossible: linux.uml is not installed (user-mode-linux)")
    init = out / "init"
    exported = " ".join(f"{name}={value}" for name, value in variables.items())
    init.write_text(INIT.format(variables=exported, root=ROOT, command=command, out=out))
    init.chmod(0o755)
    machine = ["linux.uml", f"mem={memory}", "root=/dev/root", "rootfstype=hostfs", "rootflags=/"]
    started = subprocess.run(
        [*machine, "rw", "quiet", f"init={init}", "con=null", "con0=null,fd:1"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    status = out / "status"
    if not status.exists():
        pytest.skip(f"impossible: User-Mode Linux does not start here: {started.stdout[-400:]}")
    said = (out / "stderr").read_text()
    assert status.read_text() == "0\n", said
    return (out / "stdout").read_text()


STORY = f"{sys.executable} -m integration_tests.story {' '.join(NAMES)}"
DOCTOR = f"{sys.executable} -m memslot_plugin.cli doctor --json"


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The story and the doctor of one boot: by default, and where every byte has to be committed."""
    committed = "echo 2 >/proc/sys/vm/overcommit_memory"
    told = boot(
        f"uname -r; {STORY}; {DOCTOR}; {committed}; {STORY}; {sys.executable} -c '{GREEDY}'",
        tmp_path_factory.mktemp("older"),
        MEMSLOT_SLOTS="2",
    )
    lines = iter(told.splitlines())
    release = next(lines)
    decoder, rest, documents = json.JSONDecoder(), "\n".join(lines), []
    while rest.strip():
        document, end = decoder.raw_decode(rest.lstrip())
        rest = rest.lstrip()[end:]
        documents.append(document)
    story, doctor, committed_story, greedy = documents
    return {
        "release": release,
        "story": story,
        "doctor": doctor,
        "committed": committed_story,
        "greedy": greedy,
    }


GREEDY = """
import json
import memslot_plugin as memslot
from integration_tests import cells, expect, toy
from integration_tests.leaks import Footprint
said = {}
large = toy.assemble("(module (memory (export \\"memory\\") 16000) (data (i32.const 8) \\"x\\"))")
for backend in ("memfd", "anonymous"):
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


@pytest.mark.parametrize("host", HOSTS)
def test_an_older_kernel_without_a_pagemap_scan_serves_the_same(
    host: str, older: dict[str, Any]
) -> None:
    if tuple(int(part) for part in older["release"].split(".")[:2]) >= (6, 7):
        pytest.skip(f"impossible: this User-Mode Linux is {older['release']}, which has the scan")
    assert older["story"][host] == unhindered()[host]
    found = older["doctor"]["probe"]
    assert found["pagemap"]["works"] is False
    assert found["pagemap"]["detail"].endswith("(Linux has it since 6.7)")
    assert found["memfd"]["works"] is True  # without MFD_NOEXEC_SEAL, which came with 6.3
    assert older["doctor"]["allocation"]["detail"].endswith("reset by madvise")


@pytest.mark.parametrize("host", HOSTS)
def test_where_all_memory_is_committed_reservations_cost_nothing(
    host: str, older: dict[str, Any]
) -> None:
    """vm.overcommit_memory = 2: two slots reserve 8 GiB of a machine that may commit a fraction of 512 MiB."""
    assert older["committed"][host] == unhindered()[host]


@pytest.mark.parametrize("backend", ["memfd", "anonymous"])
def test_what_cannot_be_committed_is_an_error_that_names_the_setting(
    backend: str, older: dict[str, Any]
) -> None:
    said = older["greedy"][backend]
    assert "of a slot accessible: Cannot allocate memory" in said
    assert "vm.overcommit_memory is 2 and vm.overcommit_ratio 50" in said


# Larger pages


@pytest.fixture(scope="module", params=[16384, 65536])
def larger_pages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The C library as it would be on such a kernel; a runtime asks the kernel itself, so that none can be tried."""
    library = tmp_path_factory.mktemp("pages") / "larger_pages.so"
    source = Path(__file__).with_name("larger_pages.c")
    command = ["cc", "-shared", "-fPIC", "-O1", f"-DPAGE={request.param}", "-o", library, source]
    subprocess.run([*command, "-ldl"], check=True)
    return request.param, {"LD_PRELOAD": str(library)}


def test_with_larger_pages_the_same_is_served(larger_pages: Any) -> None:
    size, environment = larger_pages
    done = run("-m", "integration_tests.story", "fake", environment=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fake"] == unhindered()["fake"]
    asked = "import memslot_plugin; print(memslot_plugin.probe().page_size)"
    assert run("-c", asked, environment=environment).stdout == f"{size}\n"


def test_with_larger_pages_slots_keep_their_promises(larger_pages: Any) -> None:
    """The tests of slots, images and pools, none of which may count on pages of 4096 bytes."""
    _, environment = larger_pages
    tests = [f"memslot_plugin.tests.test_{name}" for name in ("slot", "image", "pool")]
    options = ("-q", "-p", "no:cacheprovider", "-x")
    done = run("-m", "pytest", *options, "--pyargs", *tests, environment=environment)
    assert done.returncode == 0, done.stdout[-4000:]
