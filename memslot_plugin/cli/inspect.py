"""`memslot inspect`: the contents of a module, and what each kind of host makes of it; a .wasm needs no runtime."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from memslot_hooks.types import InitialContent
from memslot_plugin.cli.options import json_option, key_option, settings_options
from memslot_plugin.cli.output import Output, byte_size, report, some
from memslot_plugin.cli.source import Source, read_source
from memslot_plugin.errors import Unsupported
from memslot_plugin.files.guests import contents_in
from memslot_plugin.guest import plan as guests
from memslot_plugin.guest.portable import saved_plan
from memslot_plugin.guest.report import report_on
from memslot_plugin.guest.target import MOST_GLOBALS, Target
from memslot_plugin.memory.image import extents_of
from memslot_plugin.settings import Settings

KINDS = {"wasmtime": False, "wasmer": True}
"""True for hosts that reach memslot's memory only through an import, by the host that is an example."""


@click.command()
@click.argument("file", required=False)
@key_option
@settings_options
@json_option
def inspect(*, file: str | None, key: bytes | None, settings: Settings, as_json: bool) -> None:
    """Show the memories and image extents of FILE, and what is rewritten or refused and why.

    FILE is a .wasm file, a .wat file where a runtime can assemble it, or a guest that `memslot snapshot` wrote; without
    it, or with the word `example`, the bundled guest is shown.
    """
    source = read_source(file, key)
    verdicts = {
        kind: _judge(source, settings, import_memory) for kind, import_memory in KINDS.items()
    }
    document = {
        "guest": source.name,
        "byte_size": len(source.data),
        "saved": _saved(source),
        "wasi": source.module is not None and source.uses_wasi,
        "functions": source.functions,
        "imports": [
            {"name": str(each.name), "kind": each.kind.name.lower()} for each in source.imports
        ],
        "hosts": verdicts,
    }
    report(document, _show, as_json)


def _judge(source: Source, settings: Settings, import_memory: bool) -> dict[str, Any]:
    """Return the guest that one kind of host makes of a module.

    `report` is the host's, `images` are those of memories; `refused` is the reason if the settings do not allow it.
    """
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
                origin=saved.about.origin,
                is_snapshot=saved.about.is_snapshot,
            )
        except Unsupported as error:
            plan = guests.plan(source.data, target)
            plan = replace(plan, native=f"It cannot be loaded there: {error}")
    too_large = guests.reason_too_large(plan)
    return {
        "report": report_on(plan),
        "images": [
            {"memory": index, "extents": _extents(content)}
            for index, content in plan.contents.items()
        ],
        "refused": None if too_large is None else f"It {too_large}.",
    }


def _extents(content: InitialContent) -> list[dict[str, int]]:
    """Return the ranges of a memory that its image stores."""
    return [
        {"offset": each.offset, "length": each.length, "file_offset": each.file_offset}
        for each in extents_of(content)
    ]


def _saved(source: Source) -> dict[str, Any] | None:
    """Return what the file of a saved guest holds beside the module."""
    saved = source.saved
    if saved is None:
        return None
    return {
        "name": saved.about.name,
        "writer": saved.about.writer,
        "snapshot": saved.about.is_snapshot,
        "reseed": saved.about.reseed,
        "byte_size": saved.byte_size,
        "source_bytes": saved.about.origin.source_bytes,
        "source_sha256": saved.about.origin.source_sha256,
        "code": {key: len(code) for key, code in saved.code.items()},
    }


def _show(output: Output, document: dict[str, Any]) -> None:
    output.print(f"{document['guest']}: {byte_size(document['byte_size'])}", style="bold")
    _show_saved(output, document["saved"])
    functions = [f"{name}{signature or ''}" for name, signature in document["functions"].items()]
    if functions:
        output.print(f"functions: {some(functions)}")
    if document["imports"]:
        output.print(f"imports: {some([each['name'] for each in document['imports']])}")
    verdicts = document["hosts"]
    first, *others = verdicts.values()
    if all(each == first for each in others):
        verdicts = {" or ".join(verdicts): first}
    shared = all(each["report"].memories == first["report"].memories for each in others)
    if shared:
        _show_memories(output, first)
    for kind, verdict in verdicts.items():
        output.print(f"\nOn a host like {kind}", style="bold")
        if not shared:
            _show_memories(output, verdict)
        _show_plan(output, verdict)


def _show_saved(output: Output, saved: dict[str, Any] | None) -> None:
    if saved is None:
        return
    kind = "a snapshot" if saved["snapshot"] else "as it was prepared"
    size, source = byte_size(saved["byte_size"]), byte_size(saved["source_bytes"])
    output.print(f"saved guest {saved['name']}: {kind}, {size} in all, by {saved['writer']}")
    output.print(f"from a module of {source}, SHA-256 {saved['source_sha256']}")
    for key, length in saved["code"].items():
        output.print(f"machine code: {byte_size(length)} for {key}")
    if saved["reseed"] is not None:
        output.print(f"each instance calls {saved['reseed']} when it starts")


def _show_memories(output: Output, verdict: dict[str, Any]) -> None:
    output.print()
    memories = [
        {
            "memory": str(memory.index),
            "at first": byte_size(memory.minimum_bytes),
            "at most": byte_size(memory.maximum_bytes),
            "data segments": memory.segment_count,
            "data": byte_size(memory.data_bytes),
            "image": memory.image,
            "addresses": "64 bits" if memory.memory64 else "32 bits",
        }
        for memory in verdict["report"].memories
    ]
    output.show_table("Memories", memories)
    for image in verdict["images"]:
        title, extents = f"Image of memory {image['memory']}: ", image["extents"]
        if not extents:
            output.print(f"{title}only zeros, nothing is mapped", style="bold")
            continue
        stored = byte_size(sum(each["length"] for each in extents))
        end = extents[-1]["offset"] + extents[-1]["length"]
        rows = [
            {
                "at": f"{each['offset']:#x}",
                "bytes": each["length"],
                "in the file at": f"{each['file_offset']:#x}",
            }
            for each in extents
        ]
        span = byte_size(end - extents[0]["offset"])
        output.show_table(f"{title}{stored} stored, which span {span}", rows)


def _show_plan(output: Output, verdict: dict[str, Any]) -> None:
    """Show how the module is rewritten and its instances are reset, with the reasons."""
    report = verdict["report"]
    if verdict["refused"] is not None:
        output.print(f"  cannot be prepared: {verdict['refused']}")
    if report.native is not None:
        output.print(f"  left to the runtime as it is: {report.native}")
    else:
        for memory in report.memories:
            if memory.reason is not None:
                output.print(f"  memory {memory.index} has no image: {memory.reason}")
        for change in report.changes:
            output.print(f"  rewritten: {change}")
        if not report.changes:
            output.print("  nothing had to be rewritten")
    in_place = report.verdict.in_place
    if in_place:
        output.print("  reset in place: memories and globals are put back")
    else:
        where = "" if report.native is not None else " in the same slot"
        output.print(f"  reset by a new instance{where}")
    for label, sentences in (
        ("because", report.verdict.reasons),
        ("to watch", report.verdict.conditions if in_place else ()),
        ("not reset", report.verdict.foreign),
    ):
        for sentence in sentences:
            output.print(f"    {label}: {sentence}")
