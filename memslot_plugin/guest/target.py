"""The target of a plan: a host, its settings, and the maximums that they lower."""

from __future__ import annotations

from dataclasses import dataclass, replace

from memslot_plugin import wasm
from memslot_plugin.settings import Settings

MOST_GLOBALS = 1000
"""Globals that wasmtime restores one by one in less time than a new instance takes: 15 us for 400 of them and 234 us
for 1600, against 15 and 132 us (wasmtime 50, Linux 6.18, two virtual cores).
"""


@dataclass(frozen=True, slots=True)
class Target:
    """The host for which a module is planned.

    - `import_memory`: true if the host can put a memory of its own only into an import. The defined
      memory then becomes an import, with or without an image.
    - `builds_images`: false if no plugin builds images.
    - `most_globals`: a guest with more globals to restore gets a new instance at each reset; None for
      no limit.
    - `limits_growth`: true if the runtime itself limits the growth of tables and of memories without a
      slot, except shared memories. Whatever it does not limit gets a lower maximum in the module.
    """

    settings: Settings
    import_memory: bool
    builds_images: bool = True
    most_globals: int | None = None
    limits_growth: bool = True

    def lowered_memories(self, module: wasm.Module) -> dict[int, wasm.MemoryType]:
        """Return lower maximums of memories without a slot, by index."""
        most = self.settings.largest_native_memory
        lowered = {}
        for memory in module.memories:
            kind = memory.type
            if memory.imported is not None or (self.limits_growth and not kind.shared):
                continue
            pages = max(most // kind.page_size, kind.minimum_pages)
            if kind.maximum_pages is None or kind.maximum_pages > pages:
                lowered[memory.index] = replace(kind, maximum_pages=pages)
        return lowered

    def lowered_tables(self, module: wasm.Module) -> dict[int, wasm.TableType]:
        """Return lower maximums of tables, by index."""
        most = self.settings.table_limit
        if self.limits_growth:
            return {}
        return {
            table.index: replace(table.type, maximum=max(most, table.type.minimum))
            for table in module.tables
            if table.imported is None
            and (table.type.maximum is None or table.type.maximum > max(most, table.type.minimum))
        }
