"""On what a run was made: without it a ratio is worth little."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import datetime, timezone
from pathlib import Path

from memslot_plugin._core import PAGE_SIZE
from memslot_plugin.memory.probe import probe

DISTRIBUTIONS = ("memslot", "wasmtime", "wasmer", "extism")


def facts() -> dict[str, str | int | dict[str, str]]:
    """The machine, the kernel, Python, and the versions of everything that was measured."""
    found = probe()
    uname = os.uname()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "kernel": f"{uname.sysname} {'.'.join(uname.release.split('.')[:2])}",
        "architecture": uname.machine,
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "page_size": PAGE_SIZE,
        "pagemap_scan": found.pagemap.detail,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "versions": {name: version for name in DISTRIBUTIONS if (version := _version(name))},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # hidden
        return "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
