"""`memslot doctor`: the kernel, limits, plugins and hosts of this machine, all of them tried."""

from __future__ import annotations

import os
import platform
from typing import Any

import click

from memslot_hooks.types import Answer
from memslot_plugin import __version__
from memslot_plugin._core import PAGE_SIZE
from memslot_plugin._core.proc import map_count, max_map_count
from memslot_plugin.cli.options import json_option, settings_options
from memslot_plugin.cli.output import (
    FAILED,
    NO_RUNTIME,
    OK,
    Output,
    byte_size,
    console,
    report,
    sentence,
)
from memslot_plugin.cli.source import EXAMPLE, EXAMPLE_MODULE
from memslot_plugin.errors import MemslotError
from memslot_plugin.hosts import FakeHost, available_hosts, open_host
from memslot_plugin.hosts.builtin import load_plugins
from memslot_plugin.hosts.versions import installed_version
from memslot_plugin.memory.inventory import MAPPINGS_PER_SLOT
from memslot_plugin.memory.probe import Finding, probe
from memslot_plugin.plugins import Plugins
from memslot_plugin.settings import Settings

LIBRARIES = ("wasmtime", "wasmer", "wasmer_compiler_cranelift", "pluggy", "cffi", "msgspec")

CONCLUSIONS = {
    OK: "memslot works here.",
    NO_RUNTIME: "memslot has no runtime here: install memslot[wasmtime], or memslot[wasmer] on CPython 3.10.",
    FAILED: "memslot does not work here; what says no above is why.",
}

EXAMPLE_ANSWER = 34
"""The answer of `demo` in a fresh instance of the bundled guest."""


@click.command()
@settings_options
@json_option
def doctor(*, settings: Settings, as_json: bool) -> int:
    """Show what this machine supports, by trying it: the kernel, the limits, the plugins and the hosts.

    The exit code is 0 if a runtime and an allocator work, 3 if no runtime is installed, else 1.
    """
    found = diagnose(settings)
    code = OK if found["works"] else FAILED
    if not any(host["installed"] for host in found["hosts"]):
        code = NO_RUNTIME
    report(found, _show, as_json)
    if not as_json:
        console().print(CONCLUSIONS[code])
    return code


def diagnose(settings: Settings) -> dict[str, Any]:
    """Try everything under these settings."""
    plugins = load_plugins(settings)
    allocation = _try_allocation(settings, plugins)
    hosts = [
        _try_host(name, reason, settings)
        for name, reason in available_hosts(settings).items()
        if name != "fake"  # which runs Python functions, for tests
    ]
    uname = os.uname()
    return {
        "works": allocation.works and any(each["works"] for each in hosts),
        "versions": {
            "memslot": __version__,
            **{name: installed_version(name) for name in LIBRARIES},
        },
        "machine": {
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "kernel": f"{uname.sysname} {uname.release}",
            "architecture": uname.machine,
            "processors": str(os.cpu_count() or "unknown"),
        },
        "probe": probe(),
        "limits": _limits(settings),
        "settings": settings,
        "plugins": plugins.answers(),
        "allocation": allocation,
        "skipped_plugins": dict(plugins.failed),
        "hosts": hosts,
    }


def _try_allocation(settings: Settings, plugins: Plugins) -> Finding:
    """Lease a memory with an image on the host that needs no runtime, write to it, reset and release it."""
    module = EXAMPLE_MODULE.read_bytes()
    try:
        with FakeHost(settings, plugins=plugins) as host:
            with host.prepare(module, name=EXAMPLE).instantiate() as instance:
                pristine = instance.memory.read(0, PAGE_SIZE)
                instance.memory.write(0, bytes(PAGE_SIZE))
                instance.reset()
                restored = instance.memory.read(0, PAGE_SIZE)
            pools = host.statistics().pools
    except MemslotError as error:
        return Finding(False, sentence(error))
    if pristine not in module:
        return Finding(False, "a new memory did not hold its image")
    if restored != pristine:
        return Finding(False, "a reset left what was written")
    answering = next((pool.plugin for pool in pools), "a plugin")
    ways = ", ".join(sorted({way for pool in pools for way in pool.resets_by})) or "it"
    return Finding(True, f"{answering} handed out a memory, written to and reset by {ways}")


def _limits(settings: Settings) -> list[dict[str, Any]]:
    """Return limits of this process: value (None: unlimited or unknown), what the settings need, and the knob."""
    in_use = map_count()
    mappings = None if in_use is None else in_use + settings.slots * MAPPINGS_PER_SLOT
    slots = settings.slots if settings.allocation == "pooling" else 1
    address_space = settings.guard + slots * (settings.reserved + settings.guard)
    return [
        {
            "name": name,
            "value": value,
            "needed": needed,
            "knob": knob,
            "enough": value is None or needed is None or needed <= value,
        }
        for name, value, needed, knob in (
            ("memory mappings", max_map_count(), mappings, "sysctl vm.max_map_count"),
            ("address space", probe().address_space, address_space, "ulimit -v"),
            ("file descriptors", probe().descriptors, None, "ulimit -n"),
        )
    ]


def _try_host(name: str, reason: str | None, settings: Settings) -> dict[str, Any]:
    """Serve a request of the example on a host; `reason` tells why it cannot be imported, if it cannot."""
    works, said = False, reason
    if reason is None:
        try:
            with open_host(name, settings=settings) as host:
                guest = host.prepare(EXAMPLE_MODULE.read_bytes(), name=EXAMPLE)
                with guest.instantiate() as instance:
                    answer = instance.call("demo")
            works = answer == EXAMPLE_ANSWER
            said = "ran a guest" if works else f"a guest answered {answer!r}, not {EXAMPLE_ANSWER}"
        except MemslotError as error:
            said = sentence(error)
    version = installed_version(name) if reason is None else None
    return {
        "name": name,
        "installed": reason is None,
        "version": version,
        "works": works,
        "reason": said,
    }


def _show(output: Output, found: dict[str, Any]) -> None:
    versions = [f"{name} {version}" for name, version in found["versions"].items() if version]
    output.print(", ".join(versions))
    machine = ", ".join(found["machine"].values())
    output.print(f"{machine} processors, pages of {PAGE_SIZE} bytes\n")
    kernel = {
        "memfd_create": found["probe"].memfd,
        "sealing": found["probe"].seals,
        "MADV_DONTNEED": found["probe"].dontneed,
        "PAGEMAP_SCAN": found["probe"].pagemap,
    }
    output.show_table(
        "What the kernel does (tried)",
        [{"": name, "works": each.works, "seen": each.detail} for name, each in kernel.items()],
    )
    limits = []
    for limit in found["limits"]:
        written = byte_size if limit["name"] == "address space" else "{:,}".format
        value, needed = limit["value"], limit["needed"]
        limits.append(
            {
                "": limit["name"],
                "value": "unlimited" if value is None else written(value),
                "these settings need": None if needed is None else written(needed),
                "enough": limit["enough"],
                "knob": limit["knob"],
            }
        )
    output.show_table("Limits", limits)
    skipped = found["skipped_plugins"].items()
    allocators = [
        *found["plugins"],
        *(Answer(name, answers=False, reason=f"skipped: {reason}") for name, reason in skipped),
    ]
    rows = [
        {"plugin": each.plugin, "answers": each.answers, "because": each.reason}
        for each in allocators
    ]
    output.show_table("Allocators", rows)
    output.print(f"Tried: {found['allocation'].detail}\n")
    shown = ("name", "version", "works", "reason")
    output.show_table("Hosts", [{key: host[key] for key in shown} for host in found["hosts"]])
