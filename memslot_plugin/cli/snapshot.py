"""`memslot snapshot`: a guest initialised once, and written to a file from which every instance starts there."""

from __future__ import annotations

import warnings
from typing import Any

import click

from memslot_plugin.cli.compare import written_values
from memslot_plugin.cli.options import (
    host_option,
    json_option,
    key_option,
    read_host,
    settings_options,
)
from memslot_plugin.cli.output import (
    Output,
    byte_size,
    progress,
    report,
    show_printed,
)
from memslot_plugin.cli.source import (
    START,
    Call,
    Source,
    choose_invocation,
    initialized,
    prepare_source,
    read_source,
)
from memslot_plugin.errors import ArgumentError, RepeatedRandomness
from memslot_plugin.hosts import open_host
from memslot_plugin.memory.image import Image
from memslot_plugin.settings import Settings


@click.command()
@click.argument("file")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("-o", "--output", "out", metavar="OUT", required=True, help="Write this file.")
@host_option
@click.option(
    "--init", metavar="NAME", help="Call this export without parameters to initialise it."
)
@click.option("--call", "call", metavar="NAME", help="Call this export then, with the ARGUMENTS.")
@click.option(
    "--reseed", metavar="NAME", help="Let each instance call this export to draw randomness anew."
)
@click.option(
    "--code/--no-code", default=True, help="Write the machine code, too, or leave it out."
)
@key_option
@settings_options
@json_option
def snapshot(
    *,
    file: str,
    arguments: tuple[str, ...],
    out: str,
    host_name: str | None,
    init: str | None,
    call: str | None,
    reseed: str | None,
    code: bool,
    key: bytes | None,
    settings: Settings,
    as_json: bool,
) -> None:
    """Initialise FILE once and write the result to OUT, so that every instance of OUT starts there.

    FILE is a .wasm or .wat file, or another snapshot.  Called are _initialize, if a WASI reactor exports it, then
    --init, then --call with the ARGUMENTS (as numbers; put -- before negative ones).  `memslot run OUT` and `memslot
    inspect OUT` take the result, and so does `Host.load`.

    \b
    memslot snapshot guest.wasm --init boot -o guest.memslot
    memslot snapshot guest.wasm --init boot --call load 42 -o guest.memslot
    """  # noqa: D301  # click keeps the lines below a real backspace
    host_name = read_host(host_name, settings)
    if call is None and arguments:
        raise ArgumentError(f"{' '.join(arguments)}: arguments are for --call, which is not given")
    source = read_source(file, key)
    calls = _calls(source, init, call, arguments)
    wasi = source.wasi(stdout="capture")
    with (
        progress() as say,
        open_host(host_name, settings=settings) as host,
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always", RepeatedRandomness)
        say(f"preparing {source.name}")
        guest = prepare_source(source, host, wasi, key=key, reseed=reseed)
        called = []
        with guest.instantiate() as instance:
            for name, values in calls:
                say(f"calling {name}")
                result = list(written_values(instance.call(name, *values)))
                called.append({"function": name, "arguments": list(values), "result": result})
            printed = instance.stdout
            taken = instance.snapshot()
        say(f"writing {out}")
        document = {
            "guest": source.name,
            "host": host.name,
            "file": out,
            "byte_size": taken.save(out, key=key, code=code),
            "calls": called,
            "output": printed.decode(errors="replace"),
            "images": [
                {
                    "memory": index,
                    "memory_bytes": taken.report.memories[index].minimum_bytes,
                    "stored_bytes": image.stored_bytes + image.inherited_bytes,
                }
                for index, image in taken.images.items()
                if isinstance(image, Image)
            ],
            "reset_in_place": taken.report.verdict.in_place,
            "notes": [str(each.message) for each in warned],
        }
    report(document, _show, as_json)


def _calls(
    source: Source, init: str | None, call: str | None, words: tuple[str, ...]
) -> list[Call]:
    """Return the calls before the snapshot, in order."""
    calls: list[Call] = []
    for function, its_words in ((init, ()), (call, words)):
        if function is None:
            continue
        if function == START:
            raise ArgumentError(
                f"{START} runs a program to its end, so that there is nothing to take a snapshot of;"
                " name an export that initialises the guest"
            )
        chosen = choose_invocation(source, function, its_words)
        calls.append((chosen.function, chosen.arguments))
    return initialized(source, calls)


def _show(output: Output, document: dict[str, Any]) -> None:
    for each in document["calls"]:
        answered = f" -> {', '.join(each['result'])}" if each["result"] else ""
        output.print(
            f"called {each['function']}({', '.join(map(str, each['arguments']))}){answered}"
        )
    show_printed(output, document["output"])
    for image in document["images"]:
        output.print(
            f"memory {image['memory']}: {byte_size(image['memory_bytes'])},"
            f" of which {byte_size(image['stored_bytes'])} are stored"
        )
    for note in document["notes"]:
        output.print(f"Note: {note}")
    output.print(f"wrote {document['file']}: {byte_size(document['byte_size'])}")
