"""The report about a guest, for people and, through `dataclasses.asdict`, for scripts."""

from __future__ import annotations

from dataclasses import dataclass

from memslot_plugin.guest.analysis import CodeReport
from memslot_plugin.guest.plan import MemoryReport, Plan, SavedGlobal
from memslot_plugin.guest.verdict import Verdict


@dataclass(frozen=True, slots=True)
class GuestReport:
    """A plan without the bytes of module and images.

    `changes` has a sentence for each rewriting. `native` is a sentence if the whole module was left to
    the runtime. `verdict` is the kind of reset with its reasons. `code` is the report about the
    instructions, or None if the module was not understood.
    """

    source_bytes: int
    native: str | None
    import_name: str | None
    changes: tuple[str, ...]
    memories: tuple[MemoryReport, ...]
    verdict: Verdict
    code: CodeReport | None
    saved_globals: tuple[SavedGlobal, ...]


def report_on(plan: Plan) -> GuestReport:
    """Return the report about `plan`; a saved guest is reported with its original module."""
    return GuestReport(
        source_bytes=len(plan.source) if plan.origin is None else plan.origin.source_bytes,
        native=plan.native,
        import_name=None if plan.import_name is None else str(plan.import_name),
        changes=tuple(_changes(plan)),
        memories=plan.memories,
        verdict=plan.verdict,
        code=plan.code,
        saved_globals=plan.saved_globals,
    )


def _changes(plan: Plan) -> list[str]:
    if plan.module is plan.source and plan.origin is None:
        return []
    changes = [
        f"{memory.segment_count} data segment{'s' if memory.segment_count > 1 else ''} of memory"
        f" {memory.index} ({memory.data_bytes} bytes) went from the module into its image."
        for memory in plan.memories
        if memory.image and memory.data_bytes
    ]
    if plan.is_snapshot:
        changes.append("Memories and globals start as they were when the snapshot was taken.")
        if plan.structure is not None and plan.structure.start is not None:
            changes.append(f"Function {plan.structure.start} does not run at instantiation.")
    if plan.import_name is not None:
        changes.append(f"Memory 0 is imported as {plan.import_name} instead of defined.")
    names = [each.export_name for each in plan.saved_globals if each.export_name is not None]
    if names:
        changes.append(f"Mutable globals are exported as {', '.join(names)} to be restored.")
    if plan.maximums_lowered:
        changes.append("Maximums of memories and tables are lowered to what the settings allow.")
    return changes
