"""What hosts and plugin authors import: the markers, the specifications and the types they speak.

Depends on pluggy alone.
"""

from memslot_hooks.specs import (
    DECIDING,
    HEEDED,
    HOOKS,
    LIFECYCLE,
    PROJECT,
    WATCHING,
    MemslotSpecs,
    hookimpl,
    hookspec,
)
from memslot_hooks.types import (
    RETIRED,
    Answer,
    Backing,
    Extent,
    HostMapping,
    Image,
    InitialContent,
    LinearMemory,
    MemoryRequest,
    PoolStatistics,
    ResetResult,
    Segment,
)

__all__ = [
    "DECIDING",
    "HEEDED",
    "HOOKS",
    "LIFECYCLE",
    "PROJECT",
    "RETIRED",
    "WATCHING",
    "Answer",
    "Backing",
    "Extent",
    "HostMapping",
    "Image",
    "InitialContent",
    "LinearMemory",
    "MemoryRequest",
    "MemslotSpecs",
    "PoolStatistics",
    "ResetResult",
    "Segment",
    "hookimpl",
    "hookspec",
]
