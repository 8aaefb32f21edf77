"""Hosts: the adapters to runtimes, and `open_host`, which opens one by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from memslot_plugin.errors import HostUnavailable, SettingError
from memslot_plugin.files.guests import Loaded
from memslot_plugin.hosts.builtin import AUTOMATIC, load_plugins
from memslot_plugin.hosts.fake import FakeHost
from memslot_plugin.hosts.guest import Guest, Lease
from memslot_plugin.hosts.host import Host, HostStatistics
from memslot_plugin.hosts.instance import Instance
from memslot_plugin.hosts.memory import Memory
from memslot_plugin.hosts.wasi import Folder, Wasi
from memslot_plugin.settings import Settings

if TYPE_CHECKING:
    from memslot_plugin.hosts.wasmtime.host import WasmtimeHost

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
    `settings`, which are read from the environment if not given; the others go to the host.
    `plugins` are the embedder's own, in addition to the installed ones.  Raises HostUnavailable with
    the package to install, SettingError for an unknown name, and PluginError.
    """
    changes = {key: options.pop(key) for key in list(options) if key in Settings.__struct_fields__}
    if settings is None:
        settings = Settings(**changes)
    elif changes:
        settings = settings.replace(**changes)
    wanted = settings.host if name is None else name
    found = load_plugins(settings, plugins)
    factories: dict[str, Callable[..., Host]] = found.hosts()
    if wanted not in factories and wanted != "auto":
        allowed = ", ".join(["auto", *factories])
        raise SettingError(f"setting host: expected one of {allowed}, got {wanted!r}")
    if wanted != "auto":
        # The host gets the plugins that were found: the one that registered it is among them.
        return factories[wanted](settings, plugins=found, **options)
    reasons = []
    for candidate in AUTOMATIC:
        if candidate not in factories:
            reasons.append(f"{candidate} is blocked by the setting blocked")
            continue
        try:
            return factories[candidate](settings, plugins=found, **options)
        except HostUnavailable as error:
            reasons.append(str(error))
    raise HostUnavailable("no runtime can be imported here: " + "; ".join(reasons))


def available_hosts(settings: Settings | None = None) -> dict[str, str | None]:
    """Return each host by name with None, or with the reason why it cannot be opened here."""
    plugins = load_plugins(Settings() if settings is None else settings)
    return {
        name: factory.unavailable() if hasattr(factory, "unavailable") else None
        for name, factory in plugins.hosts().items()
    }
