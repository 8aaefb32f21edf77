"""Snapshots: from a live instance to the plan of a guest that starts there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from memslot_hooks.types import InitialContent, Segment
from memslot_plugin._core import ffi
from memslot_plugin.errors import SnapshotRefused
from memslot_plugin.guest import plan as guests
from memslot_plugin.guest.plan import Plan
from memslot_plugin.hosts.live import KEYS, Live
from memslot_plugin.hosts.wasi import MODULES


@contextmanager
def captured(plan: Plan, guest_name: str, live: Live, generation: int, name: str) -> Iterator[Plan]:
    """Hold a live instance of `plan`, and return the plan of its snapshot, whose contents lie in its memories.

    They stay as they are within the block.  Raises SnapshotRefused, InUse, UsedAfterClose.
    """
    what = f"the instance of {guest_name} cannot be captured"
    reason = guests.reason_against_snapshots(plan, native_exposed=live.native_exposed)
    if reason is not None:
        raise SnapshotRefused(f"{what}: {reason}")
    key = next(KEYS)
    try:
        live.acquire(generation, key)
        descriptors = live.descriptors_changed()
        if descriptors is not None:
            raise SnapshotRefused(
                f"{what}: {descriptors}; initialise it without, or take the snapshot before"
            )
        leased = {memory.request.memory_index: memory for memory in live.memories}
        contents = {}
        for memory in plan.memories:
            if memory.imported is None:
                base, byte_size = live.locate(memory.index)
                view = memoryview(ffi.buffer(ffi.cast("uint8_t *", base), byte_size))
                segments = (Segment(0, view),) if byte_size else ()
                contents[memory.index] = InitialContent(
                    byte_size, segments, name, leased.get(memory.index)
                )
        yield guests.snapshot(plan, contents=contents, values=live.saved_values())
    finally:
        live.release(key)


def draws(plan: Plan) -> tuple[str, ...]:
    """Return the imports from WASI whose answers differ from one moment to the next."""
    imports = () if plan.structure is None else plan.structure.imports
    return tuple(
        each.name.name
        for each in imports
        if each.name.module in MODULES and each.name.name in ("random_get", "clock_time_get")
    )
