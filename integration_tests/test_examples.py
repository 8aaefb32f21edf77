"""The examples run and print what they say, and the plugin among them is found where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .cells import REAL_HOSTS, Cell

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PRINTED = {
    "first_steps.py": """\
next: 42 43
its first bytes: 2b 00 00 00
next after a reset: 42
next in another instance: 42
{host}: 2 leases of 1 slot, memory by {backend}
""",
    "tenants.py": """\
bob reads: 0
ann asks for 3 more pages: granted
bob asks for 3 more pages: {bob}
eve has to come back later: 2 of 2 slots are in use
shed: 2 of 2
eve reads: 0 of 1 page
""",
    "asyncio_calls.py": """\
sums: 1 3 6 10 15 21 28 36 45 55
deadline: interrupt
gave up before the deadline: True
and then: 5050
leased at the end: 0
""",
}


def test_every_program_has_an_expectation() -> None:
    programs = {path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("test_")}
    assert programs == set(PRINTED)


@pytest.mark.parametrize("backend", ["memfd", pytest.param("anonymous", marks=pytest.mark.gate)])
@pytest.mark.parametrize("host", REAL_HOSTS)
@pytest.mark.parametrize(
    "name",
    ["first_steps.py", "tenants.py", pytest.param("asyncio_calls.py", marks=pytest.mark.gate)],
)
def test_example_prints_what_it_says(name: str, host: str, backend: str, monkeypatch: Any) -> None:
    if missing := Cell(host, backend).missing:
        pytest.skip(missing)
    if host == "wasmer" and name == "asyncio_calls.py":
        pytest.skip("impossible: wasmer interrupts no guest")
    monkeypatch.setenv("MEMSLOT_PLUGINS", backend)
    monkeypatch.setenv("MEMSLOT_HOST", host)
    command = [sys.executable, "-W", "error", EXAMPLES / name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    bob = "refused" if host == "wasmtime" else "granted"  # wasmer grows before it tells
    assert done.stdout == PRINTED[name].format(host=host, backend=backend, bob=bob)


# A third party's plugin, found by its entry point: unpacked by hand in T0, installed by pip in T1

TENANT_LIMITS = EXAMPLES / "tenant_limits"
PROGRAM = """
import importlib.metadata, io, json, logging, os
import memslot_plugin as memslot
from memslot_plugin.plugins import Plugins

MODULE = bytes.fromhex("0061736d 01000000 05 04 01 01 01 08")  # a memory of 1 to 8 pages

def report(limits, allocator):
    os.environ["TENANT_LIMITS"] = limits
    log, pages = io.StringIO(), {}
    logging.basicConfig(level="INFO", stream=log, format="%(name)s: %(message)s", force=True)
    settings = memslot.Settings(slots=1, plugins=["tenant-limits", allocator])
    with memslot.FakeHost(settings) as host:
        guest = host.prepare(MODULE)
        for tenant in ("ann", "bob", "eve"):
            with guest.instantiate(tenant=tenant) as instance:
                try:
                    while True:
                        instance.memory.grow(1)
                except memslot.GrowthRefused:
                    pages[tenant] = instance.memory.byte_size // 65536
        plugin = host.plugins.manager.get_plugin("tenant-limits")
        info = {each.name: each for each in host.plugins.describe()}["tenant-limits"]
        said = [each.reason for each in host.plugins.answers() if each.plugin == info.name]
    return {
        "pages": pages,
        "created": plugin and dict(plugin.created),
        "info": [info.state, info.distribution, info.version, info.reason],
        "said": said,
        "log": log.getvalue(),
    }

scan, scans = importlib.metadata.entry_points, []
importlib.metadata.entry_points = lambda **group: scans.append(group) or scan(**group)
reports = {
    "memfd": report("ann=131072, bob=262144", "memfd"),
    "anonymous": report("ann=131072, bob=262144", "anonymous"),
    "all others": report("ann=1048576,*=65536", "memfd"),
    "wrong": report("ann=lots", "memfd"),
}
pid = os.fork()
if pid == 0:
    os._exit(Plugins(only=["memfd"]).names != ("memfd",) or len(scans) != 1)
reports["scans"], reports["status of a forked child"] = len(scans), os.waitpid(pid, 0)[1]
print(json.dumps(reports))
"""


@pytest.fixture(scope="module", params=["unpacked", pytest.param("pip", marks=pytest.mark.gate)])
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A process in which the example is installed prints a report of each setting of the example's."""
    folder = tmp_path_factory.mktemp("third_party")
    if request.param == "pip":
        source = shutil.copytree(TENANT_LIMITS, folder / "source")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--no-build-isolation", "--no-deps", "--target", str(folder), str(source)]
        subprocess.run(command, check=True)
    else:
        shutil.copy(TENANT_LIMITS / "tenant_limits.py", folder)
        metadata = folder / "memslot_tenant_limits-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Name: memslot-tenant-limits\nVersion: 1.0\n")
        entry = "[memslot]\ntenant-limits = tenant_limits:TenantLimits\n"
        (metadata / "entry_points.txt").write_text(entry)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("allocator", ["memfd", "anonymous"])
def test_plugin_limits_each_tenant_and_counts(reports: Any, allocator: str) -> None:
    report = reports[allocator]
    assert report["pages"] == {"ann": 2, "bob": 4, "eve": 8}
    assert report["created"] == {"ann": 1, "bob": 1, "eve": 1}
    assert report["info"] == ["loaded", "memslot-tenant-limits", "1.0", None]
    assert report["said"] == ["limits 2 tenants"]
    assert "tenant_limits: bob grows from 65536 to 131072 bytes" in report["log"]
    assert "tenant_limits: ann may not grow to 196608 bytes: the limit is 131072" in report["log"]
    assert reports["all others"]["pages"] == {"ann": 8, "bob": 1, "eve": 1}


def test_plugin_with_a_wrong_setting_is_skipped_and_says_why(reports: Any) -> None:
    report = reports["wrong"]
    reason = "ValueError: TENANT_LIMITS: 'ann=lots' is not tenant=bytes"
    assert report["info"] == ["failed", "memslot-tenant-limits", "1.0", reason]
    assert f"'tenant-limits' (memslot-tenant-limits 1.0) is skipped: {reason}" in report["log"]
    assert (report["pages"]["ann"], report["created"]) == (8, None)


def test_process_and_its_forked_child_scan_once(reports: Any) -> None:
    assert (reports["scans"], reports["status of a forked child"]) == (1, 0)
