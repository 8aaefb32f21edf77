"""The plan for a guest: which of its memories get an image, which do not and why, and how an instance
of it can be reset.

A runtime would copy active data segments over the image and so dirty its pages.  What an image holds
is therefore taken out of the module, and only then: a segment is either in an image or, as it was,
in the module, so that instantiation gives the same bytes and the same traps as it does natively.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from memslot_hooks.types import InitialContent, Segment
from memslot_plugin import wasm
from memslot_plugin._core import PAGE_SIZE, align_up
from memslot_plugin.errors import InvalidContainer, Unsupported
from memslot_plugin.guest import analysis
from memslot_plugin.guest.analysis import CodeReport, Verdict
from memslot_plugin.memory import image as images
from memslot_plugin.settings import Settings
from memslot_plugin.wasm import ImportName

MOST_ZEROS = 16 << 20
"""Bytes of zeros that an image may hold because its data is scattered: a small module must not make a large image."""

MOST_GLOBALS = 1000
"""Globals that wasmtime puts back, one by one, in less time than a new instance takes: 15 us for 400 of them and 234 us
for 1600, against 15 and 132 us (wasmtime 50, Linux 6.18, two virtual cores).
"""

SLOT_LARGEST = 1 << 32
"""The most bytes that a slot can ever hold: everything a 32-bit address reaches."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What becomes of one linear memory.

    `content` is what its image holds, or None with the `reason`, a sentence; sizes are bytes, and
    `maximum_bytes` is None where the memory declares no maximum.  `imported` is the import that the
    module itself made of it, and such a memory belongs to whoever provides it.  `segment_count` and
    `data_bytes` are its active data segments.
    """

    index: int
    imported: ImportName | None
    exported_as: tuple[str, ...]
    minimum_bytes: int
    maximum_bytes: int | None
    page_size: int
    shared: bool
    memory64: bool
    segment_count: int
    data_bytes: int
    content: InitialContent | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class SavedGlobal:
    """A mutable global of the module's own whose value may change, so that a reset restores it.

    `type` is the name of what it holds.  `export_name` is the reserved name under which a host
    reaches it, or None where the plan was not asked to export state.  `initial` are the bits it
    starts with, as `wasm.encode_constant` takes them, or None where they are known only at
    instantiation or are a reference.
    """

    index: int
    type: str
    export_name: str | None
    initial: int | None


@dataclass(frozen=True, slots=True)
class Origin:
    """What a saved guest was before: its module's bytes and their SHA-256, its segments, and what had
    been rewritten.
    """

    source_bytes: int
    source_sha256: bytes
    segments: tuple[SegmentReport, ...]
    changes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of a module.

    `module` is what a runtime shall compile: `source` itself where nothing had to be rewritten.
    `native`, where it is not None, is the sentence that says why the whole module is left to the
    runtime: nothing of ours may serve its memories.  `import_name` is the name under which `module`
    imports the memory that `source` defines, or None where it still defines it.  `structure` is
    what was read of `source`, and `code` of its instructions, or None where it was not understood.
    `verdict` says how an instance can be reset, and `saved_globals` what has to be restored then.
    `is_snapshot` is whether it starts from the state of an instance instead of its own beginning.
    `has_contents` is whether only the contents hold what memories begin with, and `source` does not.
    `origin` is what the module was before the guest was saved, where it was: `source` is then what
    was saved.  `lowered` is true if `bounded` lowered maximums in `module`.
    """

    source: bytes
    module: bytes
    native: str | None
    verdict: Verdict
    memories: tuple[MemoryPlan, ...] = ()
    import_name: ImportName | None = None
    structure: wasm.Module | None = None
    code: CodeReport | None = None
    saved_globals: tuple[SavedGlobal, ...] = ()
    is_snapshot: bool = False
    has_contents: bool = False
    origin: Origin | None = None
    lowered: bool = False

    def report(self) -> GuestReport:
        """The plan without the bytes."""
        if self.origin is not None:
            segments = self.origin.segments
        elif self.structure is not None:
            segments = tuple(map(self._segment_report, self.structure.data_segments))
        else:
            segments = ()
        return GuestReport(
            source_bytes=len(self.source) if self.origin is None else self.origin.source_bytes,
            module_bytes=len(self.module),
            native=self.native,
            import_name=None if self.import_name is None else str(self.import_name),
            changes=tuple(self._changes()),
            memories=tuple(_memory_report(memory) for memory in self.memories),
            segments=segments,
            verdict=self.verdict,
            code=self.code,
            saved_globals=self.saved_globals,
        )

    def kept_changes(self) -> list[str]:
        """What was rewritten and is so on every host, one sentence each."""
        before = () if self.origin is None else self.origin.changes
        changes = [
            f"{memory.segment_count} data segment{'s' if memory.segment_count > 1 else ''} of memory"
            f" {memory.index} ({memory.data_bytes} bytes) went from the module into its image."
            for memory in self.memories
            if memory.content is not None and memory.data_bytes
        ]
        if self.is_snapshot:
            changes.append("Memories and globals start as they were when the snapshot was taken.")
            if self.structure is not None and self.structure.start is not None:
                changes.append(f"Function {self.structure.start} does not run at instantiation.")
        return [*before, *(each for each in changes if each not in before)]

    def _changes(self) -> list[str]:
        """What was rewritten, one sentence each."""
        changes = self.kept_changes()
        if self.import_name is not None:
            changes.append(f"Memory 0 is imported as {self.import_name} instead of defined.")
        names = [each.export_name for each in self.saved_globals if each.export_name is not None]
        if names:
            changes.append(f"Mutable globals are exported as {', '.join(names)} to be restored.")
        if self.lowered:
            changes.append(
                "Maximums of memories and tables are lowered to what the settings allow."
            )
        return [] if self.module is self.source and self.origin is None else changes

    def _segment_report(self, segment: wasm.DataSegment) -> SegmentReport:
        return SegmentReport(
            index=segment.index,
            mode="active" if segment.active else "passive",
            memory=segment.memory,
            offset=None if segment.offset is None else segment.offset.value,
            byte_size=len(segment.data),
            in_image=segment.memory is not None
            and self.memories[segment.memory].content is not None,
        )


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """One linear memory, as a person or a script reads it; `reason` is why it has no image."""

    index: int
    imported: str | None
    exported_as: tuple[str, ...]
    minimum_bytes: int
    maximum_bytes: int | None
    page_size: int
    shared: bool
    memory64: bool
    segment_count: int
    data_bytes: int
    image: bool
    reason: str | None


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """One data segment; `offset` is None for a passive one and where it is not constant."""

    index: int
    mode: Literal["active", "passive"]
    memory: int | None
    offset: int | None
    byte_size: int
    in_image: bool


@dataclass(frozen=True, slots=True)
class GuestReport:
    """A plan as a person or, through `dataclasses.asdict`, a script reads it.

    `changes` are sentences, one for each thing that was rewritten; `native` is the sentence that
    says why nothing was, and None where that is not so.  `verdict` is how an instance can be reset,
    and because of what; `code` what was found in its instructions, None where nothing was read.
    """

    source_bytes: int
    module_bytes: int
    native: str | None
    import_name: str | None
    changes: tuple[str, ...]
    memories: tuple[MemoryReport, ...]
    segments: tuple[SegmentReport, ...]
    verdict: Verdict
    code: CodeReport | None
    saved_globals: tuple[SavedGlobal, ...]


def plan(
    source: bytes, *, image_limit: int, import_memory: bool, export_state: bool = True
) -> Plan:
    """Decide which memories of a module get an image, and rewrite it accordingly.

    `image_limit` is the most bytes that an image may span, from its first byte of data to its last.
    `import_memory` is for a host that can only put a memory of ours into an import: the defined
    memory becomes one, with or without an image.  `export_state` exports every global that may
    change, under a reserved name, so that the host can restore it.  Raises `InvalidModule` for what
    is no core module and for nothing else: what cannot be served is said in the plan.
    """
    try:
        module = wasm.parse(source)
    except wasm.NotUnderstood as error:
        sentence = _sentence(f"{error.reason}; the runtime decides about it")
        return Plan(source, source, sentence, Verdict(in_place=False, reasons=(sentence,)))
    native = _native_reason(module, import_memory=import_memory)
    segments: dict[int | None, list[wasm.DataSegment]] = defaultdict(list)
    for segment in module.data_segments:
        segments[segment.memory].append(segment)
    names: dict[int, list[str]] = defaultdict(list)
    for export in module.exports:
        if export.kind is wasm.ExternKind.MEMORY:
            names[export.index].append(export.name)
    memories = tuple(
        _plan_memory(
            memory,
            segments[memory.index],
            exported_as=tuple(names[memory.index]),
            reason=native or _imageless_reason(memory, segments[memory.index], image_limit),
        )
        for memory in module.memories
    )
    code = analysis.analyse(module)
    changing = analysis.changing_globals(module, code)
    verdict = _verdict(module, code, memories, native)
    if native is not None:
        saved = _saved_globals(module, changing, ())
        return Plan(source, source, native, verdict, memories, None, module, code, saved)
    name = None
    if import_memory and any(memory.imported is None for memory in module.memories):
        name = _free_name(module)
    emptied = [
        segment.index
        for segment in module.data_segments
        if segment.memory is not None and memories[segment.memory].content is not None
    ]
    exports = wasm.state_exports(module, globals_=changing) if export_state else ()
    rewritten = wasm.rewrite(
        module,
        emptied=emptied,
        named_segments=code.named_segments,
        import_memory=name,
        exports=exports,
    )
    saved = _saved_globals(module, changing, exports)
    return Plan(source, rewritten, None, verdict, memories, name, module, code, saved)


def snapshot(
    plan: Plan, *, contents: Mapping[int, InitialContent], values: Mapping[int, int | None]
) -> Plan:
    """The plan for a guest that starts where an instance of `plan` is.

    `contents` are what its memories hold, by index, for every memory that the module defines; they
    give the new minimums too.  `values` are the bits of its globals, as `wasm.encode_constant`
    takes them.  Active segments of these memories are empty in it and no start function runs.
    Starts over from `plan.source`, so that it makes no difference whether `plan` is a snapshot.

    Raises ValueError if `plan` is native, a memory or a value is missing or does not fit.
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
        memory
        if memory.imported is not None
        else replace(
            memory,
            minimum_bytes=contents[memory.index].byte_size,
            content=contents[memory.index],
            reason=None,
        )
        for memory in plan.memories
    )
    rewritten = wasm.rewrite(
        module,
        emptied=[each.index for each in module.data_segments if each.memory in contents],
        named_segments=code.named_segments,
        import_memory=plan.import_name,
        minimums=_minimum_pages(memories),
        exports=[
            wasm.Export(each.export_name, wasm.ExternKind.GLOBAL, each.index)
            for each in plan.saved_globals
            if each.export_name is not None
        ],
        initial_values=values,
        drop_start=True,
    )
    return replace(
        plan,
        module=rewritten,
        memories=memories,
        verdict=_verdict(module, code, memories, None, start_dropped=True),
        saved_globals=tuple(
            replace(each, initial=values[each.index]) for each in plan.saved_globals
        ),
        is_snapshot=True,
        has_contents=True,
    )


def runs_same_code(plan: Plan, parent: Plan) -> bool:
    """Whether an instance of `parent` becomes one of its snapshot `plan` by other images and values of
    globals, so that the module need not be compiled again.
    """
    if plan.structure is None or plan.structure is not parent.structure:
        return False
    return (
        parent.native is plan.native is None
        and (parent.structure.start is None or parent.is_snapshot)
        and all(
            old.imported is not None
            or (old.content is not None and old.minimum_bytes == new.minimum_bytes)
            for old, new in zip(parent.memories, plan.memories, strict=True)
        )
        and _globals_can_be_set(plan)
    )


def _globals_can_be_set(plan: Plan) -> bool:
    return all(
        each.initial is not None and each.export_name is not None for each in plan.saved_globals
    )


def but_for_globals(plan: Plan) -> bytes | None:
    """The module of `plan` with zeros in its saved globals: the same for all plans that run the same code.
    None where globals cannot be set from outside.
    """
    if plan.native is not None or plan.structure is None or not _globals_can_be_set(plan):
        return None
    zeros = dict.fromkeys((each.index for each in plan.saved_globals), 0)
    return wasm.rewrite(wasm.parse(plan.module), initial_values=zeros)


def portable(plan: Plan) -> bytes:
    """The module of `plan` without what its images hold, and with saved globals as initial values, but
    with nothing in it that one kind of host needs: what `of_saved` makes a plan of again, anywhere.
    """
    module = plan.structure
    if plan.native is not None or module is None:
        return plan.source
    held = {memory.index for memory in plan.memories if memory.content is not None}
    emptied = [each.index for each in module.data_segments if each.memory in held]
    if not plan.is_snapshot:
        return wasm.rewrite(module, emptied=emptied)
    return wasm.rewrite(
        module,
        emptied=emptied,
        minimums=_minimum_pages(plan.memories),
        initial_values={each.index: each.initial for each in plan.saved_globals},
        drop_start=True,
    )


def origin(plan: Plan) -> Origin:
    """What a guest of `plan` was, to be kept with what `portable` makes of it."""
    if plan.origin is not None:
        return replace(plan.origin, changes=tuple(plan.kept_changes()))
    return Origin(
        source_bytes=len(plan.source),
        source_sha256=hashlib.sha256(plan.source).digest(),
        segments=plan.report().segments,
        changes=tuple(plan.kept_changes()),
    )


def of_saved(
    source: bytes,
    *,
    contents: Mapping[int, InitialContent],
    origin: Origin,
    is_snapshot: bool,
    image_limit: int,
    import_memory: bool,
) -> Plan:
    """The plan for a guest that was saved as the module `source` and these contents of its memories.

    Nothing else is taken on trust: what may be reset in place is found out again.  Raises
    InvalidContainer where module and contents cannot belong together, Unsupported where this host
    leaves such a module to the runtime, which knows nothing of contents.
    """
    made = plan(source, image_limit=image_limit, import_memory=import_memory)
    if is_snapshot and made.structure is not None and made.structure.start is not None:
        raise InvalidContainer("it claims to be a snapshot, and its module has a start function")
    made = replace(made, origin=origin, is_snapshot=is_snapshot)
    if not contents:
        return made
    require_ours(made)
    by_index = {memory.index: memory for memory in made.memories}
    for index, content in contents.items():
        memory = by_index.get(index)
        end = max((each.offset + len(each.data) for each in content.segments), default=0)
        if memory is None or memory.imported is not None:
            raise InvalidContainer(
                f"there are contents for memory {index}, which is not the module's"
            )
        if memory.data_bytes or memory.content is None:
            raise InvalidContainer(
                f"there are contents for memory {index}, and data of its own in the module"
            )
        if end > align_up(memory.minimum_bytes):
            raise InvalidContainer(
                f"the contents of memory {index} end at byte {end}, and it starts with"
                f" {memory.minimum_bytes} bytes"
            )
    return replace(
        made,
        has_contents=True,
        memories=tuple(
            memory
            if memory.index not in contents
            else replace(
                memory, content=replace(contents[memory.index], byte_size=memory.minimum_bytes)
            )
            for memory in made.memories
        ),
    )


def offsets(plan: Plan) -> wasm.Offsets | None:
    """The places in the given module of the code that a runtime compiles of this plan; None if it is
    in the same place.
    """
    if plan.structure is None or plan.module is plan.source:
        return None
    return wasm.Offsets(plan.structure, plan.module)


def require_ours(plan: Plan) -> None:
    """Raise Unsupported for a saved guest whose module this host leaves to the runtime."""
    if plan.native is not None:
        raise Unsupported(
            "the saved guest has contents for its memories, and on this host nothing of ours may serve"
            f" them. {plan.native}"
        )


def without_bytes(plan: Plan) -> Plan:
    """The same plan without what the images were built from."""
    return replace(
        plan,
        memories=tuple(
            memory
            if memory.content is None
            else replace(memory, content=replace(memory.content, segments=(), memory=None))
            for memory in plan.memories
        ),
    )


def reason_against_snapshots(plan: Plan, *, given_away: bool) -> str | None:
    """Why no instance of this plan can be captured whole, a sentence without its beginning; None if
    one can.  `given_away` says that the embedder has the runtime's own objects.
    """
    module, code = plan.structure, plan.code
    if plan.native is not None or module is None or code is None:
        return f"the module is left to the runtime. {plan.native}"
    return analysis.reason_against_snapshots(module, code, given_away=given_away)


def _minimum_pages(memories: Iterable[MemoryPlan]) -> dict[int, int]:
    """The minimum of each memory that the module defines, in its pages, by index."""
    return {
        memory.index: -(-memory.minimum_bytes // memory.page_size)
        for memory in memories
        if memory.imported is None
    }


def _verdict(
    module: wasm.Module,
    code: CodeReport,
    memories: tuple[MemoryPlan, ...],
    native: str | None,
    *,
    start_dropped: bool = False,
) -> Verdict:
    """The verdict about the code, and what having no image adds to it."""
    verdict = analysis.verdict(module, code, start_dropped=start_dropped)
    if native is not None:
        reasons = [native]
    else:
        reasons = [
            f"Memory {memory.index} has no image, so that only a new instance copies its data again."
            for memory in memories
            if memory.imported is None and memory.content is None and memory.data_bytes
        ]
    if not reasons:
        return verdict
    return replace(verdict, in_place=False, reasons=(*reasons, *verdict.reasons))


def _saved_globals(
    module: wasm.Module, changing: tuple[int, ...], exports: tuple[wasm.Export, ...]
) -> tuple[SavedGlobal, ...]:
    names = {export.index: export.name for export in exports}
    saved = []
    for index in changing:
        held, initializer = module.globals[index].type.value, module.globals[index].initializer
        initial = None if initializer is None else wasm.constant_bits(held, initializer)
        saved.append(SavedGlobal(index, held.name, names.get(index), initial))
    return tuple(saved)


def _plan_memory(
    memory: wasm.Memory,
    segments: list[wasm.DataSegment],
    *,
    exported_as: tuple[str, ...],
    reason: str | None,
) -> MemoryPlan:
    content = None
    if reason is None:
        laid = tuple(
            Segment(segment.offset.value, segment.data)
            for segment in segments
            if segment.data and segment.offset is not None and segment.offset.value is not None
        )
        content = InitialContent(memory.type.minimum_bytes, laid)
    return MemoryPlan(
        index=memory.index,
        imported=memory.imported,
        exported_as=exported_as,
        minimum_bytes=memory.type.minimum_bytes,
        maximum_bytes=memory.type.maximum_bytes,
        page_size=memory.type.page_size,
        shared=memory.type.shared,
        memory64=memory.type.memory64,
        segment_count=len(segments),
        data_bytes=sum(len(segment.data) for segment in segments),
        content=content,
        reason=reason,
    )


def reason_too_large(plan: Plan, settings: Settings) -> str | None:
    """A sentence without its beginning: something that a guest of `plan` needs and the settings do not allow; None if
    it fits.
    """
    memories = [memory for memory in plan.memories if memory.imported is None]
    if len(memories) > settings.memories_per_instance:
        return (
            f"defines {len(memories)} memories, and the settings allow {settings.memories_per_instance}"
            " (memories_per_instance)"
        )
    limit, names = settings.largest_memory, "memory_limit and reserved"
    if plan.native is not None:
        limit, names = settings.largest_native_memory, "memory_limit"
    for memory in memories:
        if memory.minimum_bytes > limit:
            return (
                f"needs {memory.minimum_bytes} bytes for memory {memory.index}, and the settings allow"
                f" {limit} ({names})"
            )
    every = () if plan.structure is None else plan.structure.tables
    tables = [table for table in every if table.imported is None]
    if len(tables) > settings.tables_per_instance:
        return (
            f"defines {len(tables)} tables, and the settings allow {settings.tables_per_instance}"
            " (tables_per_instance)"
        )
    for table in tables:
        if table.type.minimum > settings.table_limit:
            return (
                f"needs {table.type.minimum} elements for table {table.index}, and the settings allow"
                f" {settings.table_limit} (table_limit)"
            )
    return None


def with_few_globals(plan: Plan, most: int | None) -> Plan:
    """The plan, with a new instance at each reset if more than `most` globals would have to be put back."""
    verdict, many = plan.verdict, len(plan.saved_globals)
    if most is None or many <= most:
        return plan
    reason = (
        f"Putting back {many} globals takes longer than a new instance, as it does beyond {most}."
    )
    return replace(
        plan, verdict=replace(verdict, in_place=False, reasons=(*verdict.reasons, reason))
    )


def bounded(plan: Plan, settings: Settings, *, runtime_limits: bool) -> Plan:
    """The plan with the maximums lowered of what a runtime would let grow past the settings: memories of its own,
    and tables.  With `runtime_limits` it limits these itself, but for memories that are shared.
    """
    shared = any(memory.shared for memory in plan.memories if memory.imported is None)
    if plan.structure is None or (runtime_limits and not shared):
        return plan
    module = wasm.rewrite(
        wasm.parse(plan.module),
        most_bytes=None if plan.native is None else settings.largest_native_memory,
        most_elements=None if runtime_limits else settings.table_limit,
    )
    if module == plan.module:
        return plan
    return replace(plan, module=module, lowered=True)


def _native_reason(module: wasm.Module, *, import_memory: bool) -> str | None:
    """Why no slot can serve this module, whatever its data; None if one can."""
    defined = [memory for memory in module.memories if memory.imported is None]
    if import_memory:
        for table in module.tables:
            if table.imported is not None:
                return (
                    f"It imports the table {table.imported}, through which its functions could be called after it"
                    " ended; let the module define its table to get an image."
                )
    if import_memory and defined and len(module.memories) > 1:
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


def _imageless_reason(
    memory: wasm.Memory, segments: list[wasm.DataSegment], image_limit: int
) -> str | None:
    """Why this memory is initialised by the runtime and not by an image; None if it is."""
    if memory.imported is not None:
        return (
            f"It is imported as {memory.imported} and belongs to whoever provides it; let the"
            " module define its memory to get an image."
        )
    size = memory.type.minimum_bytes
    first, last = size, 0
    for segment in segments:
        offset = segment.offset
        if offset is None or offset.value is None:
            why = "is missing" if offset is None else offset.reason
            return (
                f"The offset of data segment {segment.index} {why}; place it at a constant to get"
                " an image."
            )
        if offset.type != memory.type.index_type:
            return (
                f"The offset of data segment {segment.index} is an {offset.type} and the memory's"
                f" addresses are {memory.type.index_type}, so the runtime refuses the module."
            )
        end = offset.value + len(segment.data)
        if end > size:
            return (
                f"Data segment {segment.index} ends at byte {end} and the memory starts with"
                f" {size}, so instantiation traps; raise the memory's minimum to get an image."
            )
        if segment.data:
            first, last = min(first, offset.value), max(last, end)
    if last - first > image_limit:
        return (
            f"The image would span {last - first} bytes and the limit is {image_limit}; raise the"
            " image limit to get one."
        )
    zeros = _zeros_between(segments)
    if zeros > MOST_ZEROS:
        return (
            f"Its data is so scattered that an image would hold {zeros} bytes of zeros between it, and the"
            f" limit is {MOST_ZEROS}; put the data together to get an image."
        )
    return None


def _zeros_between(segments: list[wasm.DataSegment]) -> int:
    """Bytes that an image would hold although no segment reaches their pages."""
    if len(segments) <= images.MAX_EXTENTS:
        return 0
    reached = []
    for segment in segments:
        if segment.data and segment.offset is not None and segment.offset.value is not None:
            start, end = segment.offset.value, segment.offset.value + len(segment.data)
            reached.append((start - start % PAGE_SIZE, align_up(end)))
    reached = images.joined(sorted(reached), 1)
    stored = images.few(reached)
    return sum(end - start for start, end in stored) - sum(end - start for start, end in reached)


def _free_name(module: wasm.Module) -> ImportName:
    """A name whose module part the guest does not import from, so that nothing can collide."""
    taken = {imported.name.module for imported in module.imports}
    names = itertools.chain(["memslot"], (f"memslot{number}" for number in itertools.count(1)))
    return ImportName(next(name for name in names if name not in taken), "memory")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _memory_report(memory: MemoryPlan) -> MemoryReport:
    return MemoryReport(
        index=memory.index,
        imported=None if memory.imported is None else str(memory.imported),
        exported_as=memory.exported_as,
        minimum_bytes=memory.minimum_bytes,
        maximum_bytes=memory.maximum_bytes,
        page_size=memory.page_size,
        shared=memory.shared,
        memory64=memory.memory64,
        segment_count=memory.segment_count,
        data_bytes=memory.data_bytes,
        image=memory.content is not None,
        reason=memory.reason,
    )
