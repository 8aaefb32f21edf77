"""The host on wasmtime-py."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from memslot_plugin.hosts.host import Host
from memslot_plugin.hosts.wasmtime.bridge import wasmtime
from memslot_plugin.hosts.wasmtime.runtime import WasmtimeRuntime
from memslot_plugin.settings import Settings


class WasmtimeHost(Host):
    """Guests on wasmtime (wasmtime-py).  Any thread may use it; an instance serves one thread at a time.

    `configure(config)` may change a `wasmtime.Config` before an engine is made of it (epochs, fuel,
    proposals); what memory needs is set after it, and a pool of wasmtime's own is refused
    (Unsupported).  It is called once per engine.  `configure_store(store)` is called with each new
    store before its instance starts (epoch deadline, fuel, limits within those of the settings), and
    again when its instance is reset in place and at the begin of each lease.
    """

    runtime: WasmtimeRuntime

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        plugins: Iterable[object] = (),
        configure: Callable[[wasmtime.Config], None] | None = None,
        configure_store: Callable[[wasmtime.Store], None] | None = None,
    ) -> None:
        super().__init__(WasmtimeRuntime(configure, configure_store), settings, plugins=plugins)

    @property
    def engine(self) -> wasmtime.Engine:
        """The engine whose memories are leased; bare wasmtime-py may use it too."""
        return self.runtime.engine

    @property
    def native_engine(self) -> wasmtime.Engine:
        """The engine of guests that run natively: wasmtime's defaults, changed by `configure` alone."""
        return self.runtime.native_engine

    def increment_epoch(self) -> None:
        """Let a tick pass on both engines (`wasmtime.Engine.increment_epoch`); any thread may call this at any time."""
        self.runtime.engine.increment_epoch()
        if self.runtime.has_native_engine:
            self.runtime.native_engine.increment_epoch()
