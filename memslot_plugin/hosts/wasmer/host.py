"""The host on wasmer-python."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from memslot_plugin.hosts.host import Host
from memslot_plugin.hosts.wasmer.runtime import WasmerRuntime
from memslot_plugin.settings import Settings


class WasmerHost(Host):
    """Runs guests on wasmer-python 1.1.0; every use has to be on the thread that opened it."""

    runtime: WasmerRuntime

    def __init__(self, settings: Settings | None = None, *, plugins: Iterable[object] = ()) -> None:
        super().__init__(WasmerRuntime(), settings, plugins=plugins)

    @property
    def store(self) -> Any:
        """The wasmer.Store of imports; None once the host is closed."""
        return self.runtime.store
