"""`memslot doctor`: what this machine supports, which plugin will answer and why, which hosts work; all of it tried."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import click
import msgspec

from memslot_hooks.types import Answer, InitialContent, LinearMemory, MemoryRequest, Segment
from memslot_plugin import __version__
from memslot_plugin._core import PAGE_SIZE
from memslot_plugin._core.proc import map_count, max_map_count
from memslot_plugin.cli.options import json_option, read_settings, settings_options
from memslot_plugin.cli.output import (
    FAILED,
    NO_RUNTIME,
    OK,
    Output,
    byte_size,
    console,
    sentence,
    table,
    write_json,
    yes_or_no,
)
from memslot_plugin.cli.source import EXAMPLE, EXAMPLE_MODULE
from memslot_plugin.errors import MemslotError
from memslot_plugin.hosts import available_hosts, open_host
from memslot_plugin.hosts.builtin import load_plugins
from memslot_plugin.hosts.versions import installed_version
from memslot_plugin.memory.pool import MAPPINGS_PER_SLOT
from memslot_plugin.memory.probe import Finding, Probe, probe
from memslot_plugin.plugins import Plugins
from memslot_plugin.settings import Settings

LIBRARIES = ("wasmtime", "wasmer", "wasmer_compiler_cranelift", "pluggy", "cffi", "msgspec")

EXAMPLE_ANSWER = 34
"""The answer of `demo` in a fresh instance of the bundled guest."""

_DATA = b"memslot doctor"


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit of this process: its value (None: unlimited or unknown), what the settings need of it, and its knob."""

    name: str
    value: int | None
    needed: int | None
    knob: str

    @property
    def enough(self) -> bool:
        """Whether the settings fit."""
        return self.value is None or self.needed is None or self.needed <= self.value


@dataclass(frozen=True, slots=True)
class HostState:
    """A host by name: whether it can be imported, its runtime's version, and whether it served a request just now."""

    name: str
    installed: bool
    version: str | None
    works: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found; `answering` is the plugin that handed out a memory when it was asked for one."""

    versions: dict[str, str | None]
    machine: dict[str, str]
    found: Probe
    limits: tuple[Limit, ...]
    settings: Settings
    answers: tuple[Answer, ...]
    answering: str | None
    allocation: Finding
    skipped: dict[str, str]
    hosts: tuple[HostState, ...]

    @property
    def exit_code(self) -> int:
        """OK if a runtime and an allocator work."""
        runtimes = [host for host in self.hosts if host.name != "fake"]
        if not any(host.installed for host in runtimes):
            return NO_RUNTIME
        return OK if self.allocation.works and any(host.works for host in runtimes) else FAILED


@click.command()
@settings_options
@json_option
def doctor(settings_file: str | None, changes: tuple[str, ...], as_json: bool) -> int:
    """Show what this machine supports, by trying it: the kernel, the limits, the plugins and the hosts.

    The exit code is 0 if a runtime and an allocator work, 3 if no runtime is installed, else 1.
    """
    found = diagnose(read_settings(settings_file, changes))
    if as_json:
        write_json(_document(found))
    else:
        _show(console(), found)
    return found.exit_code


def diagnose(settings: Settings) -> Diagnosis:
    """Try everything under these settings."""
    plugins = load_plugins(settings)
    answering, allocation, answers = _try_allocation(plugins, settings)
    uname = os.uname()
    return Diagnosis(
        versions={"memslot": __version__, **{name: installed_version(name) for name in LIBRARIES}},
        machine={
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "kernel": f"{uname.sysname} {uname.release}",
            "architecture": uname.machine,
            "processors": str(os.cpu_count() or "unknown"),
        },
        found=probe(),
        limits=_limits(settings),
        settings=settings,
        answers=tuple(answers),
        answering=answering,
        allocation=allocation,
        skipped=dict(plugins.failed),
        hosts=tuple(
            _try_host(name, reason, settings) for name, reason in available_hosts(settings).items()
        ),
    )


def _try_allocation(
    plugins: Plugins, settings: Settings
) -> tuple[str | None, Finding, list[Answer]]:
    """Ask the plugins for a memory with an image, write to it, have it reset, look, and give it back."""
    try:
        plugins.open_host("doctor", settings)
    except MemslotError as error:
        return None, Finding(False, sentence(error)), plugins.answers()
    answers = plugins.answers()
    answering: str | None = None
    try:
        content = InitialContent(PAGE_SIZE * 16, (Segment(PAGE_SIZE, _DATA),), "doctor")
        image = plugins.armed.build_image(content)
        try:
            memory = plugins.armed.create_memory(
                MemoryRequest(
                    minimum=content.byte_size,
                    maximum=None,
                    reserved=settings.reserved,
                    guard=settings.guard,
                    image=image,
                    guest_id="doctor",
                    memory_index=0,
                    host="doctor",
                    bounds_checks=settings.bounds_checks,
                )
            )
            answering = plugins.manager.get_name(memory.owner) or type(memory.owner).__name__
            try:
                finding = _try_reset(plugins, memory, b"" if image is None else _DATA)
            finally:
                plugins.armed.release_memory(memory)
        finally:
            if image is not None:
                image.close()
                plugins.forget_image(image)
    except MemslotError as error:
        finding = Finding(False, sentence(error))
    finally:
        plugins.close_host("doctor")
    return answering, finding, answers


def _try_reset(plugins: Plugins, memory: LinearMemory, expected: bytes) -> Finding:
    pristine = expected.ljust(PAGE_SIZE, b"\0")
    address = memory.base + PAGE_SIZE
    if ctypes.string_at(address, PAGE_SIZE) != pristine:
        return Finding(False, "a new memory did not hold its image")
    ctypes.memset(address, 0x5A, PAGE_SIZE)
    result = plugins.armed.reset_memory(memory)
    if ctypes.string_at(address, PAGE_SIZE) != pristine:
        return Finding(False, f"a reset by {result.strategy} left what was written")
    return Finding(True, f"a memory was handed out, written to and reset by {result.strategy}")


def _limits(settings: Settings) -> tuple[Limit, ...]:
    found = probe()
    pooled = settings.allocation == "pooling"
    in_use = map_count()
    stride = settings.reserved + settings.guard
    return (
        Limit(
            "memory mappings",
            max_map_count(),
            None if in_use is None else in_use + settings.slots * MAPPINGS_PER_SLOT,
            "sysctl vm.max_map_count",
        ),
        Limit(
            "address space",
            found.address_space,
            settings.guard + settings.slots * stride if pooled else settings.guard + stride,
            "ulimit -v",
        ),
        Limit("file descriptors", found.descriptors, None, "ulimit -n"),
    )


def _try_host(name: str, reason: str | None, settings: Settings) -> HostState:
    version = installed_version(name)
    if reason is not None:
        return HostState(name, False, None, False, reason)
    if name == "fake":
        return HostState(name, True, None, True, "runs Python functions, for tests")
    try:
        with open_host(name, settings=settings) as host:
            guest = host.prepare(EXAMPLE_MODULE.read_bytes(), name=EXAMPLE)
            with guest.instantiate() as instance:
                answer = instance.call("demo")
    except MemslotError as error:
        return HostState(name, True, version, False, sentence(error))
    works = answer == EXAMPLE_ANSWER
    said = "ran a guest" if works else f"a guest answered {answer!r} instead of {EXAMPLE_ANSWER}"
    return HostState(name, True, version, works, said)


def _document(found: Diagnosis) -> dict[str, Any]:
    return {
        "works": found.exit_code == OK,
        "versions": found.versions,
        "machine": found.machine,
        "probe": asdict(found.found),
        "limits": [{**asdict(limit), "enough": limit.enough} for limit in found.limits],
        "settings": msgspec.to_builtins(found.settings),
        "plugins": [asdict(answer) for answer in found.answers],
        "answering": found.answering,
        "allocation": asdict(found.allocation),
        "skipped_plugins": found.skipped,
        "hosts": [asdict(host) for host in found.hosts],
    }


def _show(output: Output, found: Diagnosis) -> None:
    versions = [f"{name} {version}" for name, version in found.versions.items() if version]
    output.print(", ".join(versions))
    output.print(f"{', '.join(found.machine.values())} processors, pages of {PAGE_SIZE} bytes\n")

    kernel = table("", "works", "seen")
    for label, what in (
        ("memfd_create", "memfd"),
        ("sealing", "seals"),
        ("MADV_DONTNEED", "dontneed"),
        ("PAGEMAP_SCAN", "pagemap"),
    ):
        finding: Finding = getattr(found.found, what)
        kernel.add_row(label, yes_or_no(finding.works), finding.detail)
    output.show_table("What the kernel does (tried)", kernel)

    numbers = ("value", "these settings need")
    limits = table("", *numbers, "enough", "knob", numbers=numbers)
    for limit in found.limits:
        shown = byte_size if limit.name == "address space" else _count
        limits.add_row(
            limit.name,
            "unlimited" if limit.value is None else shown(limit.value),
            "-" if limit.needed is None else shown(limit.needed),
            yes_or_no(limit.enough),
            limit.knob,
        )
    output.show_table("Limits", limits)

    plugins = table("plugin", "answers", "because")
    for answer in found.answers:
        plugins.add_row(answer.plugin, yes_or_no(answer.answers), answer.reason)
    for name, reason in found.skipped.items():
        plugins.add_row(name, yes_or_no(False), f"skipped: {reason}")
    output.show_table("Allocators", plugins)
    who = f"{found.answering} answers" if found.answering else "No plugin answers"
    output.print(f"{who}: {found.allocation.detail}\n")

    hosts = table("host", "version", "works", "because")
    for host in found.hosts:
        hosts.add_row(host.name, host.version or "-", yes_or_no(host.works), host.reason)
    output.show_table("Hosts", hosts)
    output.print(_verdict(found))


def _verdict(found: Diagnosis) -> str:
    if found.exit_code == OK:
        return "memslot works here."
    if found.exit_code == NO_RUNTIME:
        return "memslot has no runtime here: install memslot[wasmtime], or memslot[wasmer] on CPython 3.10."
    return "memslot does not work here; what says no above is why."


def _count(value: float) -> str:
    return f"{value:,}"
