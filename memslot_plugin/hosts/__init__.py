"""Hosts: the adapters to runtimes, and how one of them is opened."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from memslot_plugin.errors import HostUnavailable, PluginError, SettingError
from memslot_plugin.hosts.fake import FakeHost
from memslot_plugin.hosts.guest import Guest, Lease
from memslot_plugin.hosts.host import Host, HostStatistics
from memslot_plugin.hosts.instance import Instance
from memslot_plugin.hosts.memory import Memory
from memslot_plugin.hosts.saved import Loaded
from memslot_plugin.hosts.wasi import Folder, Wasi
from memslot_plugin.plugins import Plugins
from memslot_plugin.settings import Settings

if TYPE_CHECKING:
    from memslot_plugin.hosts.wasmtime.runtime import WasmtimeHost

__all__ = [
    "FakeHost",
    "Folder",
    "Guest",
    "Host",
    "HostStatistics",
    "Instance",
    "Lease",
    "Loaded",
    "Memory",
    "Wasi",
    "available_hosts",
    "open_host",
]

BUILT_IN = {
    "wasmtime": "memslot_plugin.hosts.wasmtime.runtime:WasmtimeHost",
    "wasmer": "memslot_plugin.hosts.wasmer.runtime:WasmerHost",
    "fake": "memslot_plugin.hosts.fake:FakeHost",
}
"""Our own hosts, imported when they are opened; `auto` takes the first of the first two that can be
imported.
"""

AUTOMATIC = ("wasmtime", "wasmer")


@overload
def open_host(
    name: Literal["wasmtime"],
    *,
    settings: Settings | None = None,
    plugins: Sequence[object] = (),
    **options: Any,
) -> WasmtimeHost: ...


@overload
def open_host(
    name: str | None = None,
    *,
    settings: Settings | None = None,
    plugins: Sequence[object] = (),
    **options: Any,
) -> Host: ...


def open_host(
    name: str | None = None,
    *,
    settings: Settings | None = None,
    plugins: Sequence[object] = (),
    **options: Any,
) -> Host:
    """Open the host `name`: "auto", "wasmtime", "wasmer", "fake", or one that a plugin registers.

    Without a name the setting `host` decides.  Keyword arguments that name a setting change
    `settings` (which are read from the environment if not given); the others go to the host.
    `plugins` are the embedder's own, on top of the entry points, which are looked for once per
    process.  Raises HostUnavailable with what to install, SettingError, PluginError.
    """
    changes = {key: options.pop(key) for key in list(options) if key in Settings.__struct_fields__}
    if settings is None:
        settings = Settings(**changes)
    elif changes:
        settings = settings.replace(**changes)
    wanted = settings.host if name is None else name
    if wanted != "auto":
        return _factory(wanted, settings)(settings, plugins=plugins, **options)
    reasons = []
    for candidate in AUTOMATIC:
        try:
            return _factory(candidate, settings)(settings, plugins=plugins, **options)
        except HostUnavailable as error:
            reasons.append(str(error))
    raise HostUnavailable("no runtime can be imported here: " + "; ".join(reasons))


def available_hosts(settings: Settings | None = None) -> dict[str, str | None]:
    """Every host by name, with None if it can be opened here and otherwise the reason why not."""
    settings = Settings() if settings is None else settings
    found: dict[str, str | None] = {}
    for name in BUILT_IN:
        try:
            _factory(name, settings)
        except HostUnavailable as error:
            found[name] = str(error)
        else:
            found[name] = None
    return found | dict.fromkeys(_registered(settings))


def _registered(settings: Settings) -> dict[str, Callable[..., Host]]:
    """Hosts that plugins of the entry points add."""
    hosts = Plugins(only=settings.plugins, blocked=settings.blocked).hosts()
    for name in hosts:
        if name in BUILT_IN or name == "auto":
            raise PluginError(
                f"a plugin registers the host {name!r}, which is one of memslot's own"
            )
    return hosts


def _factory(name: str, settings: Settings) -> Callable[..., Host]:
    """The callable that opens this host, imported now; raises HostUnavailable, or SettingError for
    an unknown name.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        factory: Callable[..., Host] = getattr(importlib.import_module(module), attribute)
        return factory
    registered = _registered(settings)
    if name not in registered:
        allowed = ", ".join(["auto", *BUILT_IN, *registered])
        raise SettingError(f"setting host: expected one of {allowed}, got {name!r}")
    return registered[name]
