"""memslot: pooled, copy-on-write linear memories for WebAssembly guests run from Python.

    import memslot_plugin as memslot

    with memslot.open_host("auto") as host:
        guest = host.prepare("guest.wasm")
        with guest.instantiate() as instance:
            instance.call("run", 1, 2)

`__all__` is the promise; everything else may change.  A name is imported when it is first used, because
importing all of them costs more than wasmtime's own import.  `__init__.pyi` has their types.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "AccessOutOfBounds": "errors",
    "ArgumentError": "errors",
    "ExportNotFound": "errors",
    "GrowthRefused": "errors",
    "GuestExit": "errors",
    "GuestNotFound": "errors",
    "GuestTrap": "errors",
    "HostUnavailable": "errors",
    "InUse": "errors",
    "InvalidContainer": "errors",
    "InvalidModule": "errors",
    "InvariantBroken": "errors",
    "LinkError": "errors",
    "MemoryTooLarge": "errors",
    "MemslotError": "errors",
    "PluginError": "errors",
    "PoolExhausted": "errors",
    "PoolTimeout": "errors",
    "RepeatedRandomness": "errors",
    "SettingError": "errors",
    "SlotError": "errors",
    "SnapshotRefused": "errors",
    "SystemCallError": "errors",
    "Unsupported": "errors",
    "UsedAfterClose": "errors",
    "WrongThread": "errors",
    "SharedGuest": "files.share",
    "CodeReport": "guest.analysis",
    "Occurrence": "guest.analysis",
    "Verdict": "guest.verdict",
    "GuestReport": "guest.report",
    "MemoryReport": "guest.plan",
    "SavedGlobal": "guest.plan",
    "FakeHost": "hosts",
    "Folder": "hosts",
    "Guest": "hosts",
    "Host": "hosts",
    "HostStatistics": "hosts",
    "Instance": "hosts",
    "Lease": "hosts",
    "Loaded": "hosts",
    "Memory": "hosts",
    "Wasi": "hosts",
    "available_hosts": "hosts",
    "open_host": "hosts",
    "BytesImage": "memory.image",
    "Image": "memory.image",
    "MemfdImage": "memory.image",
    "Pool": "memory.pool",
    "Finding": "memory.probe",
    "Probe": "memory.probe",
    "probe": "memory.probe",
    "Slot": "memory.slot",
    "State": "memory.region",
    "PluginInfo": "plugins",
    "Plugins": "plugins",
    "Settings": "settings",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605 - type checkers read it in `__init__.pyi`


def __getattr__(name: str) -> object:
    """Import a public name at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(
        importlib.import_module(f"memslot_plugin.{_HOMES[name]}"), name
    )
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
