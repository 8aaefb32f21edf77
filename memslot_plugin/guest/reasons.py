"""Reasons why a module is left to the runtime, and why a memory of it gets no image: sentences for people."""

from __future__ import annotations

from memslot_plugin import wasm
from memslot_plugin._core import PAGE_SIZE, align_up
from memslot_plugin.guest.target import Target
from memslot_plugin.memory import image as images

MOST_ZEROS = 16 << 20
"""Bytes of zeros that an image may hold between scattered data, so that a small module makes no large image."""

SLOT_LARGEST = 1 << 32
"""The most bytes that a slot can hold: all that a 32-bit address reaches."""


def image_too_large(byte_size: int, limit: int) -> str:
    """Return the predicate of a sentence about an image that spans more than `limit` bytes."""
    return f"spans {byte_size} bytes and the limit is {limit}; raise the setting image_limit"


def native_reason(module: wasm.Module, *, import_memory: bool) -> str | None:
    """Return the reason why no slot can serve this module, whatever its data, or None."""
    defined = [memory for memory in module.memories if memory.imported is None]
    if import_memory:
        for table in module.tables:
            if table.imported is not None:
                return (
                    f"It imports the table {table.imported}, through which its functions could be called after it"
                    " ended; let the module define its table to get an image."
                )
        if defined and len(module.memories) > 1:
            return (
                f"The module has {len(module.memories)} memories and this host can be given a single"
                " one; use a host that provides all of them."
            )
    for memory in defined:
        kind = memory.type
        if kind.shared:
            return (
                f"Memory {memory.index} is shared between threads, which a slot cannot be;"
                " compile without threads to get an image."
            )
        if kind.page_size != wasm.WASM_PAGE:
            return (
                f"Memory {memory.index} has pages of {kind.page_size} bytes and a slot grows by"
                f" {wasm.WASM_PAGE}; compile without a page size of its own to get an image."
            )
        if kind.memory64 and kind.maximum_bytes is None:
            return (
                f"Memory {memory.index} has 64-bit addresses and no maximum; declare one of at most"
                f" {SLOT_LARGEST} bytes to get an image."
            )
        if kind.maximum_bytes is not None and kind.maximum_bytes > SLOT_LARGEST:
            return (
                f"Memory {memory.index} may grow to {kind.maximum_bytes} bytes and a slot holds at"
                f" most {SLOT_LARGEST}; declare a smaller maximum to get an image."
            )
    return None


def imageless_reason(
    memory: wasm.Memory, segments: list[wasm.DataSegment], target: Target
) -> str | None:
    """Return the reason why the runtime initialises this memory, or None if an image does."""
    if memory.imported is not None:
        return (
            f"It is imported as {memory.imported} and belongs to the embedder; let the module define"
            " its memory to get an image."
        )
    if not target.builds_images:
        return "No plugin builds images; load memfd or anonymous (settings plugins and blocked)."
    size, address = memory.type.minimum_bytes, "i64" if memory.type.memory64 else "i32"
    pages = []
    first, last = size, 0
    for segment in segments:
        offset = segment.offset
        if offset is None or offset.value is None:
            why = "is missing" if offset is None else offset.reason
            return (
                f"The offset of data segment {segment.index} {why}; place it at a constant to get"
                " an image."
            )
        if offset.type != address:
            return (
                f"The offset of data segment {segment.index} is an {offset.type} and the memory's"
                f" addresses are {address}, so the runtime refuses the module."
            )
        end = offset.value + len(segment.data)
        if end > size:
            return (
                f"Data segment {segment.index} ends at byte {end} and the memory starts with"
                f" {size}, so instantiation traps; raise the memory's minimum to get an image."
            )
        if segment.data:
            first, last = min(first, offset.value), max(last, end)
            pages.append((offset.value - offset.value % PAGE_SIZE, align_up(end)))
    if last - first > target.settings.image_limit:
        return f"Its image {image_too_large(last - first, target.settings.image_limit)}."
    zeros = _zeros_between(pages)
    if zeros > MOST_ZEROS:
        return (
            f"Its data is so scattered that an image would hold {zeros} bytes of zeros between it, and the"
            f" limit is {MOST_ZEROS}; put the data together to get an image."
        )
    return None


def _zeros_between(pages: list[tuple[int, int]]) -> int:
    """Return the bytes that an image would hold outside of the page ranges of its segments."""
    if len(pages) <= images.MAX_EXTENTS:
        return 0
    reached = images.joined(sorted(pages), 1)
    stored = images.few(reached)
    return sum(end - start for start, end in stored) - sum(end - start for start, end in reached)
