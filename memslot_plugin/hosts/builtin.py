"""Plugins that register memslot's own hosts; a runtime is imported only when its host is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from memslot_hooks import hookimpl
from memslot_plugin.errors import HostUnavailable
from memslot_plugin.plugins import Plugins
from memslot_plugin.settings import Settings


class BuiltInHost:
    """The plugin of one host, and the factory that it registers."""

    def __init__(self, name: str, module: str, class_name: str) -> None:
        self._name, self._module, self._class_name = name, module, class_name

    @hookimpl
    def memslot_register_hosts(self) -> Mapping[str, BuiltInHost]:
        """Register this host under its name."""
        return {self._name: self}

    def __call__(self, settings: Settings, **options: Any) -> Any:
        """Open the host; raises HostUnavailable if its runtime cannot be imported."""
        return self._load()(settings, **options)

    def unavailable(self) -> str | None:
        """Return the reason why the host cannot be opened here, or None."""
        try:
            self._load()
        except HostUnavailable as error:
            return str(error)
        return None

    def _load(self) -> Any:
        return getattr(importlib.import_module(self._module), self._class_name)


AUTOMATIC = ("wasmtime", "wasmer")
"""The hosts that "auto" tries, in this order."""

BUILT_IN: Mapping[str, BuiltInHost] = {
    name: BuiltInHost(name, f"memslot_plugin.hosts.{module}", class_name)
    for name, module, class_name in (
        ("wasmtime", "wasmtime.host", "WasmtimeHost"),
        ("wasmer", "wasmer.host", "WasmerHost"),
        ("fake", "fake", "FakeHost"),
    )
}


def load_plugins(settings: Settings, plugins: Iterable[object] = ()) -> Plugins:
    """Return the plugins of a host: the installed ones, memslot's hosts, and the embedder's `plugins`.

    If `plugins` is a `Plugins` already, it is returned as it is.
    """
    if isinstance(plugins, Plugins):
        return plugins
    found = Plugins(only=settings.plugins, blocked=settings.blocked, built_in=BUILT_IN)
    for plugin in plugins:
        found.register(plugin)
    return found
