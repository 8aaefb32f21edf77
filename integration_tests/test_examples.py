"""The examples: printed output as documented, and the plugin found where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memslot_plugin.tests.installed import install

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


def test_example_program_of_any_name_has_an_expectation() -> None:
    programs = {path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("test_")}
    assert programs == set(PRINTED)


@pytest.mark.parametrize("backend", ["memfd", pytest.param("anonymous", marks=pytest.mark.gate)])
@pytest.mark.parametrize("host", REAL_HOSTS)
@pytest.mark.parametrize(
    "name",
    ["first_steps.py", "tenants.py", pytest.param("asyncio_calls.py", marks=pytest.mark.gate)],
)
def test_example_when_run_prints_its_documented_output(
    name: str, host: str, backend: str, monkeypatch: Any
) -> None:
    if missing := Cell(host, backend).missing:
        pytest.skip(missing)
    if host == "wasmer" and name == "asyncio_calls.py":
        pytest.skip("impossible: wasmer interrupts no guest")
    monkeypatch.setenv("MEMSLOT_PLUGINS", backend)
    monkeypatch.setenv("MEMSLOT_HOST", host)
    command = [sys.executable, "-W", "error", EXAMPLES / name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    bob = "refused" if host == "wasmtime" else "granted"  # wasmer grows before it reports
    assert done.stdout == PRINTED[name].format(host=host, backend=backend, bob=bob)


# A plugin of another distribution, found by its entry point: unpacked by hand in T0, installed by pip in T1

TENANT_LIMITS = EXAMPLES / "tenant_limits"
PROGRAM = """
import io, json, logging, os
import memslot_plugin as memslot

MODULE = bytes.fromhex("0061736d 01000000 05 04 01 01 01 08")  # a memory of 1 to 8 pages

def report(limits):
    os.environ["TENANT_LIMITS"] = limits
    log, pages = io.StringIO(), {}
    logging.basicConfig(level="INFO", stream=log, format="%(name)s: %(message)s", force=True)
    settings = memslot.Settings(slots=1, plugins=["tenant-limits", "memfd"])
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

print(json.dumps(list(map(report, ("ann=131072, bob=262144", "ann=1048576,*=65536", "ann=lots")))))
"""


@pytest.mark.parametrize("installer", ["none", pytest.param("pip", marks=pytest.mark.gate)])
def test_plugin_limits_each_tenant_counts_and_names_a_wrong_setting(
    installer: str, tmp_path: Path
) -> None:
    if installer == "pip":
        source = shutil.copytree(TENANT_LIMITS, tmp_path / "source")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--no-build-isolation", "--no-deps", "--target", str(tmp_path), str(source)]
        subprocess.run(command, check=True)
    else:
        code, entry = (TENANT_LIMITS / "tenant_limits.py").read_text(), ":TenantLimits"
        named = ("memslot-tenant-limits", "tenant_limits", code, "1.0")
        install(tmp_path, *named, **{"tenant-limits": entry})
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    printed = subprocess.check_output([sys.executable, "-c", PROGRAM], env=environment)
    report, of_all_others, wrong = json.loads(printed)
    assert report["pages"] == {"ann": 2, "bob": 4, "eve": 8}
    assert report["created"] == {"ann": 1, "bob": 1, "eve": 1}
    assert report["info"] == ["loaded", "memslot-tenant-limits", "1.0", None]
    assert report["said"] == ["limits 2 tenants"]
    assert "tenant_limits: bob grows from 65536 to 131072 bytes" in report["log"]
    assert "tenant_limits: ann may not grow to 196608 bytes: the limit is 131072" in report["log"]
    assert of_all_others["pages"] == {"ann": 8, "bob": 1, "eve": 1}
    reason = "ValueError: TENANT_LIMITS: 'ann=lots' is not tenant=bytes"
    assert wrong["info"] == ["failed", "memslot-tenant-limits", "1.0", reason]
    assert f"'tenant-limits' (memslot-tenant-limits 1.0) is skipped: {reason}" in wrong["log"]
    assert (wrong["pages"]["ann"], wrong["created"]) == (8, None)
