"""The machine of a run, without which a ratio is worth little."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path

from memslot_plugin._core import PAGE_SIZE
from memslot_plugin.hosts.versions import installed_version
from memslot_plugin.memory.probe import probe

DISTRIBUTIONS = ("memslot", "wasmtime", "wasmer", "extism")


def facts() -> dict[str, str | int | dict[str, str]]:
    """Return the machine, the kernel, Python, and the versions of what was measured."""
    uname = os.uname()
    versions = {name: installed_version(name) for name in DISTRIBUTIONS}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "kernel": f"{uname.sysname} {'.'.join(uname.release.split('.')[:2])}",
        "architecture": uname.machine,
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "page_size": PAGE_SIZE,
        "pagemap_scan": probe().pagemap.detail,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "versions": {name: version for name, version in versions.items() if version},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # /proc is hidden
        return "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")
