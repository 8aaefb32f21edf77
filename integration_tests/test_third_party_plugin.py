"""A third party's plugin, installed for real and found by its entry point in another process."""

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

PROGRAM = """
import json, logging, sys

from memslot_hooks import LinearMemory, MemoryRequest, hookimpl
from memslot_plugin.plugins import Plugins
from memslot_plugin.settings import Settings

logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")


class Owner:
    @hookimpl
    def memslot_create_memory(self, request):
        return LinearMemory(request, 0x7F00_0000_0000, request.minimum, owner=self)

    @hookimpl
    def memslot_grow_memory(self, memory, byte_size):
        return True


options = json.loads(sys.argv[1])
builtin = options.pop("builtin", False)
plugins = Plugins(**options)
if not builtin:
    plugins.register(Owner)
plugins.open_host("fake", Settings(slots=8))
grown = {}
for tenant in ("ann", "bob", "eve"):
    for growth in ("report", "decide"):
        memory = plugins.armed.create_memory(MemoryRequest(
            minimum=65536, maximum=None, reserved=2**32, guard=2**25, image=None, guest_id="g",
            memory_index=0, host="fake", tenant=tenant, growth=growth,
        ))
        if plugins.armed.memory_created is not None:
            plugins.armed.memory_created(memory)
    grown[tenant] = [plugins.armed.grow_memory(memory, pages * 65536) for pages in (2, 4, 16)]
    if builtin:
        plugins.armed.release_memory(memory)
limits = plugins.manager.get_plugin("tenant-limits")
print(json.dumps({
    "grown": grown,
    "created": None if limits is None else dict(limits.created),
    "plugins": {info.name: [info.state, info.distribution, info.version, info.reason]
                for info in plugins.describe()},
    "answers": [answer.reason for answer in plugins.answers() if answer.plugin == "tenant-limits"],
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the example."""
    folder = tmp_path_factory.mktemp("third_party")
    source = shutil.copytree(SOURCE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    target = folder / "site"
    command += ["--no-build-isolation", "--no-deps", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run(*sites: Path, limits: str = "", **options: object) -> tuple[dict[str, Any], str]:
    """What the program printed, and its log."""
    path = os.pathsep.join([*map(str, sites), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(options)],
        env={**os.environ, "PYTHONPATH": path, "TENANT_LIMITS": limits},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_it_limits_each_tenant_and_counts(site: Path) -> None:
    report, log = run(site, limits="ann=131072, bob=262144", only=["tenant-limits"])
    assert report["grown"] == {
        "ann": [True, False, False],
        "bob": [True, True, False],
        "eve": [True, True, True],
    }
    assert report["created"] == {"ann": 2, "bob": 2, "eve": 2}
    assert report["plugins"]["tenant-limits"] == ["loaded", "memslot-tenant-limits", "1.0", None]
    assert report["answers"] == ["limits 2 tenants"]
    assert "tenant_limits: bob grows from 65536 to 262144 bytes" in log
    assert "tenant_limits: ann may not grow to 262144 bytes: the limit is 131072" in log


@pytest.mark.parametrize("allocator", ["memfd", "anonymous"])
def test_it_limits_what_our_allocators_own(site: Path, allocator: str) -> None:
    report, _ = run(site, limits="ann=131072", only=["tenant-limits", allocator], builtin=True)
    assert report["plugins"][allocator][:2] == ["loaded", "memslot"]
    assert report["grown"]["ann"] == [True, False, False]
    assert report["grown"]["eve"] == [True, True, True]
    assert report["created"] == {"ann": 2, "bob": 2, "eve": 2}


def test_a_limit_for_everybody_else(site: Path) -> None:
    report, _ = run(site, limits="ann=1048576,*=65536", only=["tenant-limits"])
    assert report["grown"]["ann"] == [True, True, True]
    assert report["grown"]["eve"] == [False, False, False]


@pytest.mark.parametrize("options", [{"only": []}, {"blocked": ["tenant-limits"], "only": []}])
def test_unselected_or_blocked_it_has_no_say(site: Path, options: dict[str, list[str]]) -> None:
    report, log = run(site, limits="*=65536", **options)
    assert report["grown"]["eve"] == [True, True, True]
    assert report["created"] is None
    assert "tenant_limits" not in log


def test_a_wrong_limit_skips_the_plugin_and_says_why(site: Path) -> None:
    report, log = run(site, limits="ann=lots", only=["tenant-limits"])
    state, _, _, reason = report["plugins"]["tenant-limits"]
    assert state == "failed"
    assert reason == "ValueError: TENANT_LIMITS: 'ann=lots' is not tenant=bytes"
    assert "'tenant-limits' (memslot-tenant-limits 1.0) is skipped: ValueError" in log
    assert report["grown"]["ann"] == [True, True, True]


def test_beside_one_that_cannot_be_imported(site: Path, tmp_path: Path) -> None:
    metadata = tmp_path / "broken-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[memslot]\nbroken = broken_plugin\n")
    (tmp_path / "broken_plugin.py").write_text("raise OSError('no licence server')\n")
    report, log = run(site, tmp_path, limits="*=65536", only=["tenant-limits", "broken"])
    assert report["plugins"]["broken"] == ["failed", "broken", "0.1", "OSError: no licence server"]
    assert "memslot.plugins: plugin 'broken' (broken 0.1) is skipped" in log
    assert report["grown"]["eve"] == [False, False, False]
