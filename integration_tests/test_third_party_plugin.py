"""A third party's plugin, found by its entry point in another process: unpacked by hand, and installed by pip."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "examples" / "tenant_limits"
OURS = ["tenant-limits"]
SCENARIOS: dict[str, dict[str, Any]] = {
    "two tenants": {"limits": "ann=131072, bob=262144", "only": OURS},
    "memfd": {"limits": "ann=131072", "only": [*OURS, "memfd"], "owner": False},
    "anonymous": {"limits": "ann=131072", "only": [*OURS, "anonymous"], "owner": False},
    "all others": {"limits": "ann=1048576,*=65536", "only": OURS},
    "not selected": {"limits": "*=65536", "only": []},
    "blocked": {"limits": "*=65536", "blocked": OURS, "only": []},
    "wrong": {"limits": "ann=lots", "only": OURS},
    "beside a broken one": {"limits": "*=65536", "only": [*OURS, "broken"]},
}

PROGRAM = """
import importlib.metadata, io, json, logging, os, sys

from memslot_hooks import LinearMemory, MemoryRequest, hookimpl
from memslot_plugin.plugins import Plugins
from memslot_plugin.settings import Settings

class Owner:
    @hookimpl
    def memslot_create_memory(self, request):
        return LinearMemory(request, 0x7F00_0000_0000, request.minimum, owner=self)

    @hookimpl
    def memslot_grow_memory(self, memory, byte_size):
        return True

def report(limits, owner=True, **options):
    os.environ["TENANT_LIMITS"] = limits
    log = io.StringIO()
    logging.basicConfig(level="INFO", stream=log, format="%(name)s: %(message)s", force=True)
    plugins = Plugins(**options)
    if owner:
        plugins.register(Owner)
    plugins.open_host("fake", Settings(slots=8))
    grown = {}
    for tenant in ("ann", "bob", "eve"):
        memory = plugins.armed.create_memory(MemoryRequest(
            minimum=65536, maximum=None, reserved=2**32, guard=2**25, image=None, guest_id="g",
            memory_index=0, host="fake", tenant=tenant,
        ))
        if plugins.armed.memory_created is not None:
            plugins.armed.memory_created(memory)
        grown[tenant] = [plugins.armed.grow_memory(memory, pages * 65536) for pages in (2, 4, 16)]
        if not owner:
            plugins.armed.release_memory(memory)
    found = plugins.manager.get_plugin("tenant-limits")
    return {
        "grown": grown,
        "created": None if found is None else dict(found.created),
        "plugins": {each.name: [each.state, each.distribution, each.version, each.reason]
                    for each in plugins.describe()},
        "answers": [each.reason for each in plugins.answers() if each.plugin == "tenant-limits"],
        "log": log.getvalue(),
    }

scan, scans = importlib.metadata.entry_points, []
importlib.metadata.entry_points = lambda **group: scans.append(group) or scan(**group)
reports = {name: report(**options) for name, options in json.loads(sys.argv[1]).items()}
reports["scans"] = len(scans)
pid = os.fork()
if pid == 0:
    os._exit(Plugins(only=["memfd"]).names != ("memfd",) or len(scans) != 1)
reports["status of a forked child"] = os.waitpid(pid, 0)[1]
print(json.dumps(reports))
"""


@pytest.fixture(scope="module", params=["unpacked", pytest.param("pip", marks=pytest.mark.gate)])
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A process that has the example, and a plugin that cannot be imported, prints a report of each scenario."""
    folder = tmp_path_factory.mktemp("third_party")
    site, broken = folder / "site", folder / "broken"
    if request.param == "pip":
        source = shutil.copytree(SOURCE, folder / "source")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--no-build-isolation", "--no-deps", "--target", str(site), str(source)]
        subprocess.run(command, check=True)
    else:
        unpack(site, "memslot-tenant-limits", "1.0", "tenant-limits = tenant_limits:TenantLimits")
        shutil.copy(SOURCE / "tenant_limits.py", site)
    unpack(broken, "broken", "0.1", "broken = broken_plugin")
    (broken / "broken_plugin.py").write_text("raise OSError('no licence server')\n")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(SCENARIOS)],
        env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{broken}"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def unpack(site: Path, distribution: str, version: str, entry: str) -> None:
    metadata = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    (metadata / "METADATA").write_text(text)
    (metadata / "entry_points.txt").write_text(f"[memslot]\n{entry}\n")


FREE, NONE = [True, True, True], [False, False, False]


def test_plugin_limits_each_tenant_and_counts(reports: Any) -> None:
    report = reports["two tenants"]
    assert report["grown"] == {
        "ann": [True, False, False],
        "bob": [True, True, False],
        "eve": FREE,
    }
    assert report["created"] == {"ann": 1, "bob": 1, "eve": 1}
    assert report["plugins"]["tenant-limits"] == ["loaded", "memslot-tenant-limits", "1.0", None]
    assert report["answers"] == ["limits 2 tenants"]
    assert "tenant_limits: bob grows from 65536 to 262144 bytes" in report["log"]
    assert "tenant_limits: ann may not grow to 262144 bytes: the limit is 131072" in report["log"]
    assert reports["all others"]["grown"] == {"ann": FREE, "bob": NONE, "eve": NONE}


@pytest.mark.parametrize("allocator", ["memfd", "anonymous"])
def test_plugin_limits_memories_of_our_allocators(reports: Any, allocator: str) -> None:
    report = reports[allocator]
    assert report["plugins"][allocator][:2] == ["loaded", "memslot"]
    assert report["grown"] == {"ann": [True, False, False], "bob": FREE, "eve": FREE}


@pytest.mark.parametrize("scenario", ["not selected", "blocked"])
def test_plugin_that_is_not_loaded_has_no_say(reports: Any, scenario: str) -> None:
    report = reports[scenario]
    assert report["plugins"]["tenant-limits"][0] == scenario
    assert report["grown"]["eve"] == FREE
    assert (report["created"], report["log"]) == (None, "")


def test_plugin_that_fails_is_skipped_alone_and_says_why(reports: Any) -> None:
    wrong, beside = reports["wrong"], reports["beside a broken one"]
    state, _, _, reason = wrong["plugins"]["tenant-limits"]
    assert (state, reason) == (
        "failed",
        "ValueError: TENANT_LIMITS: 'ann=lots' is not tenant=bytes",
    )
    assert "'tenant-limits' (memslot-tenant-limits 1.0) is skipped: ValueError" in wrong["log"]
    assert wrong["grown"]["ann"] == FREE
    assert beside["plugins"]["broken"] == ["failed", "broken", "0.1", "OSError: no licence server"]
    assert "memslot.plugins: plugin 'broken' (broken 0.1) is skipped" in beside["log"]
    assert beside["grown"]["eve"] == NONE


def test_process_and_its_forked_child_scan_once(reports: Any) -> None:
    assert (reports["scans"], reports["status of a forked child"]) == (1, 0)
