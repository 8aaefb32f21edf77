"""The plan for a guest: the rewritten module, the contents of its images, and the kind of its reset.

A runtime would copy active data segments over an image and so dirty its pages. Therefore the bytes of
an image leave the module. Each data segment is either in an image or still in the module, so that
instantiation gives the same bytes and the same traps as without memslot.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from memslot_hooks.types import InitialContent, Segment
from memslot_plugin import wasm
from memslot_plugin.guest.analysis import CodeReport, analyse
from memslot_plugin.guest.reasons import imageless_reason, native_reason
from memslot_plugin.guest.target import Target
from memslot_plugin.guest.verdict import Verdict, changing_globals, judge, uncaptured_state


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """One linear memory of a guest.

    `imported` is the import that the module itself made of it; such a memory belongs to the embedder.
    `segment_count` and `data_bytes` count its active data segments. `image` is true if an image
    provides its contents, and `reason` is a sentence if not. Without a maximum, `maximum_bytes` is
    None.
    """

    index: int
    imported: str | None
    exported_as: tuple[str, ...]
    minimum_bytes: int
    maximum_bytes: int | None
    memory64: bool
    segment_count: int
    data_bytes: int
    image: bool
    reason: str | None


@dataclass(frozen=True, slots=True)
class SavedGlobal:
    """A global of the module's own whose value may change, so that a reset restores it.

    `type` is the name of its value type. `export_name` is the reserved name under which the host
    reaches it, or None if the module is left to the runtime. `initial` are the bits of its first value, as
    `wasm.encode_constant` takes them. None if only instantiation knows them, or for a reference.
    """

    index: int
    type: str
    export_name: str | None
    initial: int | None


@dataclass(frozen=True, slots=True)
class Origin:
    """The module of a guest before the guest was saved: its size, and its SHA-256 in hexadecimal digits."""

    source_bytes: int
    source_sha256: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan for a module on one host.

    - `module`: the bytes to compile, which are `source` itself if nothing was rewritten.
    - `native`: the sentence that says why the whole module is left to the runtime, and no slot may
      serve its memories; None for a module that is served.
    - `structure`, `code`: the declarations of `source` and the report about its instructions; None if
      the module was not understood.
    - `contents`: the contents of each image to be built, by memory index.
    - `import_name`: the import that replaced the defined memory, or None.
    - `is_snapshot`: true if instances start from the state of a captured instance.
    - `has_contents`: true if only the images have the first bytes of the memories, and `source` lacks
      them.
    - `origin`: the module before the guest was saved, if `source` is the saved module.
    - `maximums_lowered`: true if maximums of memories or tables in `module` are lower than in `source`.
    """

    source: bytes
    module: bytes
    native: str | None
    verdict: Verdict
    target: Target
    memories: tuple[MemoryReport, ...] = ()
    contents: Mapping[int, InitialContent] = field(default_factory=dict)
    import_name: wasm.ImportName | None = None
    structure: wasm.Module | None = None
    code: CodeReport | None = None
    saved_globals: tuple[SavedGlobal, ...] = ()
    is_snapshot: bool = False
    has_contents: bool = False
    origin: Origin | None = None
    maximums_lowered: bool = False


def plan(source: bytes, target: Target) -> Plan:
    """Decide which memories of a module get an image, and rewrite the module accordingly.

    Raises InvalidModule for bytes that are no core module, and nothing else. The plan says what cannot
    be served.
    """
    try:
        module = wasm.parse(source)
    except wasm.NotUnderstood as error:
        sentence = f"{error.reason[0].upper()}{error.reason[1:]}; the runtime decides about it."
        return Plan(source, source, sentence, Verdict(in_place=False, reasons=(sentence,)), target)
    native = native_reason(module, import_memory=target.import_memory)
    memories, contents = _plan_memories(module, native, target)
    code = analyse(module)
    changing = changing_globals(module, code)
    exports: dict[int, str] = {}
    import_name = None
    if native is None:
        exports = wasm.state_exports(module, changing)
        if target.import_memory and any(memory.imported is None for memory in module.memories):
            # A module of imports of its own, so that nothing can collide.
            taken = {imported.name.module for imported in module.imports}
            import_name = wasm.ImportName(wasm.free_name(taken), "memory")
    # Slots bound the memories of a module that is served.
    lowered_memories = {} if native is None else target.lowered_memories(module)
    lowered_tables = target.lowered_tables(module)
    rewritten = wasm.rewrite(
        module,
        emptied=[each.index for each in module.data_segments if each.memory in contents],
        named_segments=code.named_segments,
        import_memory=import_name,
        memory_types=lowered_memories,
        table_types=lowered_tables,
        exports=exports,
    )
    return Plan(
        source,
        rewritten,
        native,
        _verdict(module, code, memories, target, native=native),
        target,
        memories,
        contents,
        import_name,
        structure=module,
        code=code,
        saved_globals=tuple(
            _saved_global(module.globals[index], exports.get(index)) for index in changing
        ),
        maximums_lowered=bool(lowered_memories or lowered_tables),
    )


def snapshot(
    plan: Plan, *, contents: Mapping[int, InitialContent], values: Mapping[int, int | None]
) -> Plan:
    """Return the plan for a guest that starts with the state of an instance of `plan`.

    `contents` are the bytes of every memory that the module defines, by index, and their size becomes
    the minimum. `values` are the bits of the saved globals, as `wasm.encode_constant` takes them. No
    start function runs. The rewriting starts from `plan.source`, also if `plan` is a snapshot itself.

    Raises ValueError if `plan` is native, or if a memory or a value is missing or does not fit.
    """
    module, code = plan.structure, plan.code
    if plan.native is not None or module is None or code is None:
        raise ValueError(f"a module that is left to the runtime has no snapshot: {plan.native}")
    for what, wanted, given in (
        ("memories", {m.index for m in plan.memories if m.imported is None}, set(contents)),
        ("globals", {each.index for each in plan.saved_globals}, set(values)),
    ):
        if wanted != given:
            raise ValueError(
                f"a snapshot needs the {what} {sorted(wanted)} and has {sorted(given)}"
            )
    memories = tuple(
        replace(memory, minimum_bytes=contents[memory.index].byte_size, image=True, reason=None)
        if memory.imported is None
        else memory
        for memory in plan.memories
    )
    exports = {
        each.index: each.export_name for each in plan.saved_globals if each.export_name is not None
    }
    rewritten = wasm.rewrite(
        module,
        emptied=[each.index for each in module.data_segments if each.memory in contents],
        named_segments=code.named_segments,
        import_memory=plan.import_name,
        memory_types=memory_types(module, memories),
        table_types=plan.target.lowered_tables(module),
        exports=exports,
        initial_values=values,
        drop_start=True,
    )
    return replace(
        plan,
        module=rewritten,
        memories=memories,
        contents=contents,
        verdict=_verdict(module, code, memories, plan.target, start_dropped=True),
        saved_globals=tuple(
            replace(each, initial=values[each.index]) for each in plan.saved_globals
        ),
        is_snapshot=True,
        has_contents=True,
    )


def runs_same_code(plan: Plan, parent: Plan) -> bool:
    """Return True if the compiled code of `parent` also serves its snapshot `plan`.

    The instances then differ in their images and in the values of globals that the host sets.
    """
    if plan.structure is None or plan.structure is not parent.structure:
        return False
    return (
        parent.native is plan.native is None
        and (parent.structure.start is None or parent.is_snapshot)
        and all(
            old.imported is not None or (old.image and old.minimum_bytes == new.minimum_bytes)
            for old, new in zip(parent.memories, plan.memories, strict=True)
        )
        and all(each.initial is not None for each in plan.saved_globals)
    )


def module_but_for_globals(plan: Plan) -> bytes | None:
    """Return the module of `plan` with zeros in its saved globals.

    The bytes are equal for all plans that run the same code. None if the host cannot set the globals.
    """
    if plan.native is not None or any(each.initial is None for each in plan.saved_globals):
        return None
    zeros = dict.fromkeys((each.index for each in plan.saved_globals), 0)
    return wasm.rewrite(wasm.parse(plan.module), initial_values=zeros)


def offsets(plan: Plan) -> wasm.Offsets | None:
    """Return the translation of code offsets to the given module, or None if no offset differs."""
    if plan.structure is None or plan.module is plan.source:
        return None
    return wasm.Offsets(plan.structure, plan.module)


def reason_against_snapshots(plan: Plan, *, native_exposed: bool) -> str | None:
    """Return the reason why no snapshot captures an instance of this plan whole, or None.

    `native_exposed` is true if the embedder has the runtime's own objects.
    """
    module, code = plan.structure, plan.code
    if plan.native is not None or module is None or code is None:
        return f"the module is left to the runtime. {plan.native}"
    return uncaptured_state(module, code, native_exposed=native_exposed)


def reason_too_large(plan: Plan) -> str | None:
    """Return the predicate of a sentence about a need that exceeds the settings, or None."""
    settings = plan.target.settings
    most, named = settings.largest_memory, "memory_limit and reserved"
    if plan.native is not None:
        most, named = settings.largest_native_memory, "memory_limit"
    memories = [memory for memory in plan.memories if memory.imported is None]
    tables = [] if plan.structure is None else plan.structure.tables
    tables = [table for table in tables if table.imported is None]
    for need, what, limit, names in (
        (len(memories), "memories", settings.memories_per_instance, "memories_per_instance"),
        *((each.minimum_bytes, f"bytes for memory {each.index}", most, named) for each in memories),
        (len(tables), "tables", settings.tables_per_instance, "tables_per_instance"),
        *(
            (
                each.type.minimum,
                f"elements for table {each.index}",
                settings.table_limit,
                "table_limit",
            )
            for each in tables
        ),
    ):
        if need > limit:
            return f"needs {need} {what}, and the settings allow {limit} ({names})"
    return None


def memory_types(
    module: wasm.Module, memories: tuple[MemoryReport, ...]
) -> dict[int, wasm.MemoryType]:
    """Return the types of the memories that the module defines, with the minimums of `memories`."""
    return {
        each.index: replace(
            each.type, minimum_pages=-(-memories[each.index].minimum_bytes // each.type.page_size)
        )
        for each in module.memories
        if each.imported is None
    }


def _plan_memories(
    module: wasm.Module, native: str | None, target: Target
) -> tuple[tuple[MemoryReport, ...], dict[int, InitialContent]]:
    """Return all memories of the module, and the contents of the images that they get."""
    segments: dict[int | None, list[wasm.DataSegment]] = defaultdict(list)
    for segment in module.data_segments:
        segments[segment.memory].append(segment)
    names: dict[int, list[str]] = defaultdict(list)
    for export in module.exports:
        if export.kind is wasm.ExternKind.MEMORY:
            names[export.index].append(export.name)
    memories, contents = [], {}
    for memory in module.memories:
        own, kind = segments[memory.index], memory.type
        reason = native or imageless_reason(memory, own, target)
        if reason is None:
            contents[memory.index] = InitialContent(
                kind.minimum_bytes,
                tuple(
                    Segment(each.offset.value, each.data)
                    for each in own
                    if each.data and each.offset is not None and each.offset.value is not None
                ),
            )
        memories.append(
            MemoryReport(
                index=memory.index,
                imported=None if memory.imported is None else str(memory.imported),
                exported_as=tuple(names[memory.index]),
                minimum_bytes=kind.minimum_bytes,
                maximum_bytes=kind.maximum_bytes,
                memory64=kind.memory64,
                segment_count=len(own),
                data_bytes=sum(len(segment.data) for segment in own),
                image=reason is None,
                reason=reason,
            )
        )
    return tuple(memories), contents


def _verdict(
    module: wasm.Module,
    code: CodeReport,
    memories: tuple[MemoryReport, ...],
    target: Target,
    *,
    native: str | None = None,
    start_dropped: bool = False,
) -> Verdict:
    """Return the verdict about the code, with the reasons that memories and the host add."""
    verdict = judge(module, code, start_dropped=start_dropped)
    if native is not None:
        reasons = [native]
    else:
        reasons = [
            f"Memory {memory.index} has no image, so that only a new instance copies its data again."
            for memory in memories
            if memory.imported is None and not memory.image and memory.data_bytes
        ]
    reasons += verdict.reasons
    count = len(changing_globals(module, code))
    if target.most_globals is not None and count > target.most_globals:
        reasons.append(
            f"Restoring {count} globals takes longer than a new instance, as it does beyond"
            f" {target.most_globals}."
        )
    return replace(verdict, in_place=not reasons, reasons=tuple(reasons))


def _saved_global(found: wasm.Global, export_name: str | None) -> SavedGlobal:
    assert found.initializer is not None
    return SavedGlobal(found.index, found.type.value.name, export_name, found.initializer.value)
