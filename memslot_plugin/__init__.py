"""memslot: pooled, copy-on-write linear memories for WebAssembly guests run from Python.

    import memslot_plugin as memslot

    with memslot.open_host("auto") as host:
        guest = host.prepare("guest.wasm")
        with guest.instantiate() as instance:
            instance.call("run", 1, 2)

`__all__` is what is promised; everything else may change.
"""

from memslot_plugin.errors import (
    AccessOutOfBounds,
    ArgumentError,
    ExportNotFound,
    GrowthRefused,
    GuestExit,
    GuestNotFound,
    GuestTrap,
    HostUnavailable,
    InUse,
    InvalidContainer,
    InvalidModule,
    InvariantBroken,
    LinkError,
    MemoryTooLarge,
    MemslotError,
    PluginError,
    PoolExhausted,
    PoolTimeout,
    RepeatedRandomness,
    SettingError,
    SlotError,
    SnapshotRefused,
    SystemCallError,
    Unsupported,
    UsedAfterClose,
    WrongThread,
)
from memslot_plugin.files.share import SharedGuest
from memslot_plugin.guest.analysis import CodeReport, Occurrence, Verdict
from memslot_plugin.guest.plan import MemoryReport, SavedGlobal, SegmentReport
from memslot_plugin.guest.report import GuestReport
from memslot_plugin.hosts import (
    FakeHost,
    Folder,
    Guest,
    Host,
    HostStatistics,
    Instance,
    Lease,
    Loaded,
    Memory,
    Wasi,
    available_hosts,
    open_host,
)
from memslot_plugin.memory.image import BytesImage, Image, MemfdImage
from memslot_plugin.memory.pool import Pool
from memslot_plugin.memory.probe import Finding, Probe, probe
from memslot_plugin.memory.slot import Slot, State
from memslot_plugin.plugins import PluginInfo, Plugins
from memslot_plugin.settings import Settings

__version__ = "0.1.0"

__all__ = [
    "AccessOutOfBounds",
    "ArgumentError",
    "BytesImage",
    "CodeReport",
    "ExportNotFound",
    "FakeHost",
    "Finding",
    "Folder",
    "GrowthRefused",
    "Guest",
    "GuestExit",
    "GuestNotFound",
    "GuestReport",
    "GuestTrap",
    "Host",
    "HostStatistics",
    "HostUnavailable",
    "Image",
    "InUse",
    "Instance",
    "InvalidContainer",
    "InvalidModule",
    "InvariantBroken",
    "Lease",
    "LinkError",
    "Loaded",
    "MemfdImage",
    "Memory",
    "MemoryReport",
    "MemoryTooLarge",
    "MemslotError",
    "Occurrence",
    "PluginError",
    "PluginInfo",
    "Plugins",
    "Pool",
    "PoolExhausted",
    "PoolTimeout",
    "Probe",
    "RepeatedRandomness",
    "SavedGlobal",
    "SegmentReport",
    "SettingError",
    "Settings",
    "SharedGuest",
    "Slot",
    "SlotError",
    "SnapshotRefused",
    "State",
    "SystemCallError",
    "Unsupported",
    "UsedAfterClose",
    "Verdict",
    "Wasi",
    "WrongThread",
    "available_hosts",
    "open_host",
    "probe",
]
