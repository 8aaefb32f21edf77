"""A third-party plugin: logs and limits each tenant's growth, and counts each tenant's memories.

The plugin owns no memory: it is asked first, answers False to refuse, and None to let the owner decide.
A runtime that grows memories by itself, such as wasmer, does not ask; there the plugin logs a growth
over the limit.  The environment has the limits in bytes per memory, `*` for tenants without one:

    TENANT_LIMITS="ann=1048576,bob=131072,*=65536"
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter

from memslot_hooks import Answer, LinearMemory, hookimpl

log = logging.getLogger("tenant_limits")


def parse_limits(text: str) -> dict[str, int]:
    """Read `tenant=bytes` pairs between commas; a pair that is not one is a ValueError."""
    limits = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        tenant, equals, number = pair.partition("=")
        if not (tenant and equals and number.isascii() and number.isdigit()):
            raise ValueError(f"TENANT_LIMITS: {pair!r} is not tenant=bytes")
        limits[tenant] = int(number)
    return limits


class TenantLimits:
    """Made once per host; the entry point names this class."""

    def __init__(self) -> None:
        self.limits = parse_limits(os.environ.get("TENANT_LIMITS", ""))
        self.created: Counter[str] = Counter()
        self._lock = threading.Lock()  # hosts may serve from several threads

    @hookimpl
    def memslot_describe(self) -> Answer:
        return Answer("tenant-limits", answers=False, reason=f"limits {len(self.limits)} tenants")

    @hookimpl
    def memslot_memory_created(self, memory: LinearMemory) -> None:
        tenant = memory.request.tenant or "*"
        with self._lock:
            self.created[tenant] += 1

    @hookimpl(tryfirst=True)
    def memslot_grow_memory(self, memory: LinearMemory, byte_size: int) -> bool | None:
        tenant, limit = self._limit_of(memory)
        if limit is None or byte_size <= limit:
            log.info("%s grows from %d to %d bytes", tenant, memory.byte_size, byte_size)
            return None
        log.warning("%s may not grow to %d bytes: the limit is %d", tenant, byte_size, limit)
        return False

    @hookimpl
    def memslot_memory_grown(self, memory: LinearMemory, byte_size: int) -> None:
        tenant, limit = self._limit_of(memory)
        if limit is not None and byte_size > limit:
            log.warning("%s grew to %d bytes by itself: the limit is %d", tenant, byte_size, limit)

    def _limit_of(self, memory: LinearMemory) -> tuple[str, int | None]:
        tenant = memory.request.tenant or "*"
        return tenant, self.limits.get(tenant, self.limits.get("*"))
