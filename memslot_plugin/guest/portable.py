"""A guest that leaves the process: its plan as a module and an `Origin`, and a plan made of them again.

The module has no part that only one kind of host needs. The contents of memories travel as images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from memslot_hooks.types import InitialContent, Segment
from memslot_plugin import wasm
from memslot_plugin._core import align_up
from memslot_plugin.errors import InvalidContainer, Unsupported
from memslot_plugin.guest.plan import MemoryReport, Origin, Plan, memory_types, plan
from memslot_plugin.guest.target import Target


def portable_module(plan: Plan) -> bytes:
    """Return the module of `plan` for any host: without the data in images, with saved globals."""
    module = plan.structure
    if plan.native is not None or module is None:
        return plan.source
    imaged = {memory.index for memory in plan.memories if memory.image}
    emptied = [each.index for each in module.data_segments if each.memory in imaged]
    if not plan.is_snapshot:
        return wasm.rewrite(module, emptied=emptied)
    return wasm.rewrite(
        module,
        emptied=emptied,
        memory_types=memory_types(module, plan.memories),
        initial_values={each.index: each.initial for each in plan.saved_globals},
        drop_start=True,
    )


def origin_of(plan: Plan) -> Origin:
    """Return the description of the original module that is saved beside `portable_module`."""
    return plan.origin or Origin(len(plan.source), hashlib.sha256(plan.source).hexdigest())


def saved_plan(
    source: bytes,
    target: Target,
    *,
    contents: Mapping[int, tuple[Segment, ...]],
    origin: Origin,
    is_snapshot: bool,
) -> Plan:
    """Return the plan for a guest that was saved as the module `source` with these contents.

    The code is analysed again; nothing about it is believed. Raises InvalidContainer if module and
    contents do not belong together. Raises Unsupported if this host leaves the module to the runtime,
    which cannot use the contents.
    """
    made = plan(source, target)
    if is_snapshot and made.structure is not None and made.structure.start is not None:
        raise InvalidContainer("it claims to be a snapshot, and its module has a start function")
    made = replace(made, origin=origin, is_snapshot=is_snapshot)
    if not contents:
        return made
    if made.native is not None:
        raise Unsupported(
            "the saved guest has contents for its memories, and on this host no slot may serve them."
            f" {made.native}"
        )
    memories = {memory.index: memory for memory in made.memories}
    sized = {}
    for index, segments in contents.items():
        memory = _fitting(index, memories.get(index), segments)
        sized[index] = InitialContent(memory.minimum_bytes, segments)
    return replace(made, contents={**made.contents, **sized}, has_contents=True)


def _fitting(
    index: int, memory: MemoryReport | None, segments: tuple[Segment, ...]
) -> MemoryReport:
    """Return `memory`, the one of this index; raises InvalidContainer if it cannot have these contents."""
    if memory is None or memory.imported is not None:
        raise InvalidContainer(f"there are contents for memory {index}, which is not the module's")
    if memory.data_bytes or not memory.image:
        raise InvalidContainer(
            f"there are contents for memory {index}, and data of its own in the module"
        )
    end = max((each.offset + len(each.data) for each in segments), default=0)
    if end > align_up(memory.minimum_bytes):
        raise InvalidContainer(
            f"the contents of memory {index} end at byte {end}, and it starts with"
            f" {memory.minimum_bytes} bytes"
        )
    return memory
