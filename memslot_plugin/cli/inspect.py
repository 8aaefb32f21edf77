"""`memslot inspect`: what a module holds, and what becomes of it on each kind of host; a .wasm needs no runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import click

from memslot_hooks.types import Extent, InitialContent
from memslot_plugin._core import PAGE_SIZE
from memslot_plugin.cli.options import (
    json_option,
    key_option,
    read_key,
    read_settings,
    settings_options,
)
from memslot_plugin.cli.output import Output, byte_size, console, table, write_json
from memslot_plugin.cli.source import Source, read_source
from memslot_plugin.errors import Unsupported, printable
from memslot_plugin.files.container import Container
from memslot_plugin.guest import plan as guests
from memslot_plugin.guest.analysis import find_sites
from memslot_plugin.guest.plan import MemoryReport
from memslot_plugin.guest.portable import saved_plan
from memslot_plugin.guest.report import GuestReport, report_on
from memslot_plugin.guest.target import MOST_GLOBALS, Target
from memslot_plugin.hosts.saved import contents_in
from memslot_plugin.memory.image import extents_of
from memslot_plugin.settings import Settings

KINDS = {"wasmtime": False, "wasmer": True}
"""Whether a memory of ours reaches a module only as an import, by the host that is an example of it."""

SHOWN = 20
"""A table for people stops after so many rows; JSON has them all."""


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """The image of one memory: where it starts and ends, what of that it holds, and in which extents."""

    memory: int
    start: int
    end: int
    stored_bytes: int
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a module on one kind of host; `refused` is why these settings do not let it be prepared."""

    report: GuestReport
    images: tuple[ImageLayout, ...]
    refused: str | None


@click.command()
@click.argument("file", required=False)
@key_option
@settings_options
@json_option
def inspect(
    file: str | None,
    key_file: str | None,
    settings_file: str | None,
    changes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show the memories, data segments and image extents of FILE, and what is rewritten or refused and why.

    FILE is a .wasm file, a .wat file where a runtime can assemble it, or a guest that `memslot snapshot` wrote; without
    it, or with the word `example`, the bundled guest is shown.
    """
    settings = read_settings(settings_file, changes)
    source = read_source(file, read_key(key_file))
    verdicts = {
        kind: _judge(source, settings, import_memory) for kind, import_memory in KINDS.items()
    }
    if as_json:
        write_json(_document(source, verdicts))
    else:
        _show(console(), source, verdicts)


def _judge(source: Source, settings: Settings, import_memory: bool) -> Verdict:
    saved = source.saved
    target = Target(
        settings,
        import_memory=import_memory,
        most_globals=None if import_memory else MOST_GLOBALS,
        limits_growth=not import_memory,
    )
    if saved is None:
        plan = guests.plan(source.data, target)
    else:
        try:
            plan = saved_plan(
                saved.module,
                target,
                contents=contents_in(saved, {}, source.name),
                origin=saved.origin,
                is_snapshot=saved.about.is_snapshot,
            )
        except Unsupported as error:
            plan = guests.plan(source.data, target)
            plan = replace(plan, native=f"It cannot be loaded there: {error}")
    images = tuple(_layout(index, content) for index, content in plan.contents.items())
    too_large = guests.reason_too_large(plan)
    return Verdict(report_on(plan), images, None if too_large is None else f"It {too_large}.")


def _layout(memory: int, content: InitialContent) -> ImageLayout:
    extents = extents_of(content)
    start = extents[0].offset if extents else 0
    end = extents[-1].offset + extents[-1].length if extents else 0
    return ImageLayout(memory, start, end, sum(extent.length for extent in extents), extents)


def _document(source: Source, verdicts: dict[str, Verdict]) -> dict[str, Any]:
    return {
        "guest": source.name,
        "byte_size": len(source.data),
        "saved": None if source.saved is None else _saved_document(source.saved),
        "wasi": source.module is not None and source.uses_wasi,
        "functions": {
            name: None if signature is None else asdict(signature)
            for name, signature in source.functions.items()
        },
        "imports": []
        if source.module is None
        else [
            {"name": str(each.name), "kind": each.kind.name.lower()}
            for each in source.module.imports
        ],
        "irreversible": []
        if source.module is None
        else [asdict(site) for site in find_sites(source.module)],
        "hosts": {kind: asdict(verdict) for kind, verdict in verdicts.items()},
    }


def _saved_document(saved: Container) -> dict[str, Any]:
    """What stands in the file beside the module."""
    about = saved.about
    return {
        "name": about.name,
        "writer": about.writer,
        "snapshot": about.is_snapshot,
        "reseed": about.reseed,
        "byte_size": saved.byte_size,
        "page_size": PAGE_SIZE,
        "source_bytes": about.source_bytes,
        "source_sha256": saved.source_sha256.hex(),
        "authentic": saved.keyed,
        "code": {key: len(code) for key, code in saved.code.items()},
    }


def _show_saved(output: Output, saved: Container) -> None:
    about = saved.about
    kind = "a snapshot" if about.is_snapshot else "as it was prepared"
    output.print(
        f"saved guest {about.name}: {kind}, {byte_size(saved.byte_size)} in all, by {about.writer}"
    )
    output.print(
        f"from a module of {byte_size(about.source_bytes)}, SHA-256 {saved.source_sha256.hex()}"
    )
    for key, code in saved.code.items():
        output.print(f"machine code: {byte_size(len(code))} for {key}")
    if about.reseed is not None:
        output.print(f"each instance calls {about.reseed} when it starts")


def _show(output: Output, source: Source, verdicts: dict[str, Verdict]) -> None:
    output.print(f"{source.name}: {byte_size(len(source.data))}", style="bold")
    if source.saved is not None:
        _show_saved(output, source.saved)
    if source.module is not None:
        _show_functions(output, source)
    groups: list[tuple[list[str], Verdict]] = []
    for kind, verdict in verdicts.items():
        for kinds, same in groups:
            if same == verdict:
                kinds.append(kind)
                break
        else:
            groups.append(([kind], verdict))
    shared = len(groups) == 1 or all(
        verdict.report.memories == groups[0][1].report.memories for _, verdict in groups
    )
    if shared:
        _show_memories(output, groups[0][1])
    for kinds, verdict in groups:
        output.print(f"\nOn a host like {' or '.join(kinds)}", style="bold")
        if not shared:
            _show_memories(output, verdict)
        if verdict.refused is not None:
            output.print(f"  cannot be prepared: {verdict.refused}")
        _show_changes(output, verdict.report)
        _show_reset(output, verdict.report)


def _show_functions(output: Output, source: Source) -> None:
    functions = [f"{name}{signature or ''}" for name, signature in source.functions.items()]
    output.print(f"functions: {_some(functions)}")
    if source.module is not None and source.module.imports:
        output.print(f"imports: {_some([str(each.name) for each in source.module.imports])}")


def _some(words: Sequence[str]) -> str:
    more = len(words) - SHOWN
    return ("; ".join(map(printable, words[:SHOWN])) or "none") + (
        f"; and {more} more" if more > 0 else ""
    )


def _show_memories(output: Output, verdict: Verdict) -> None:
    report = verdict.report
    numbers = ("at first", "at most", "data segments", "data")
    memories = table("memory", *numbers, "image", numbers=numbers)
    for memory in report.memories:
        memories.add_row(
            str(memory.index),
            byte_size(memory.minimum_bytes),
            byte_size(memory.maximum_bytes),
            str(memory.segment_count),
            byte_size(memory.data_bytes),
            _image(memory),
        )
    if report.memories:
        output.print()
        output.show_table("Memories", memories)
    if report.segments:
        segments = table("segment", "kind", "at", "bytes", numbers=("at", "bytes"))
        for segment in report.segments[:SHOWN]:
            segments.add_row(
                str(segment.index),
                "passive" if segment.memory is None else f"active, memory {segment.memory}",
                "-" if segment.offset is None else f"{segment.offset:#x}",
                str(segment.byte_size),
            )
        output.print()
        output.show_table("Data segments", segments, left_out=len(report.segments) - SHOWN)
    for image in verdict.images:
        columns = ("at", "bytes", "in the file at")
        extents = table(*columns, numbers=columns)
        for extent in image.extents[:SHOWN]:
            extents.add_row(f"{extent.offset:#x}", str(extent.length), f"{extent.file_offset:#x}")
        output.print()
        title = f"Image of memory {image.memory}: "
        if image.extents:
            span = image.end - image.start
            title += f"{byte_size(image.stored_bytes)} stored, which span {byte_size(span)}"
            output.show_table(title, extents, left_out=len(image.extents) - SHOWN)
        else:
            output.print(f"{title}only zeros, nothing is mapped", style="bold")


def _image(memory: MemoryReport) -> str:
    """Whether it has one; the reason stands below the tables, in full."""
    return f"{'yes' if memory.image else 'no'}{' (64-bit addresses)' if memory.memory64 else ''}"


def _show_changes(output: Output, report: GuestReport) -> None:
    if report.native is not None:
        output.print(f"  left to the runtime as it is: {report.native}")
        return
    for memory in report.memories:
        if memory.reason is not None:
            output.print(f"  memory {memory.index} has no image: {memory.reason}")
    for change in report.changes:
        output.print(f"  rewritten: {change}")
    if not report.changes:
        output.print("  nothing had to be rewritten")


def _show_reset(output: Output, report: GuestReport) -> None:
    """How an instance is reset, and because of what."""
    verdict = report.verdict
    if verdict.in_place:
        output.print("  reset in place: memories and globals are put back")
    else:
        where = "" if report.native is not None else " in the same slot"
        output.print(f"  reset by a new instance{where}")
    for label, sentences in (
        ("because", verdict.reasons),
        ("to watch", verdict.conditions if verdict.in_place else ()),
        ("not reset", verdict.foreign),
    ):
        for sentence in sentences:
            output.print(f"    {label}: {sentence}")
