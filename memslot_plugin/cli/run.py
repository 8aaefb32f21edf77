"""`memslot run`: the same requests through memslot and on the runtime alone, side by side."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from typing import Any

import click

from memslot_plugin.bench.results import times
from memslot_plugin.bench.runner import Bench
from memslot_plugin.cli.compare import REQUESTS, SECONDS, Comparison, compare
from memslot_plugin.cli.interrupt import interruptible
from memslot_plugin.cli.options import (
    host_option,
    json_option,
    key_option,
    read_host,
    settings_options,
)
from memslot_plugin.cli.output import (
    FAILED,
    Output,
    byte_size,
    complain,
    console,
    duration,
    progress,
    show_printed,
    write_json,
)
from memslot_plugin.cli.source import choose_invocation, prepare_source, read_source
from memslot_plugin.hosts import open_host
from memslot_plugin.hosts.versions import installed_version
from memslot_plugin.settings import Settings


@click.command()
@click.argument("file", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@host_option
@click.option(
    "--invoke", "function", metavar="NAME", help="Call this exported function in each request."
)
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    help=f"Serve so many requests on each side  [default: {REQUESTS}, or what fits {SECONDS:g} s]",
)
@click.option(
    "--concurrency-of-slots",
    "slots",
    type=int,
    metavar="N",
    help="Let at most so many linear memories live at once (the setting slots).",
)
@key_option
@settings_options
@json_option
def run(
    *,
    file: str | None,
    arguments: tuple[str, ...],
    host_name: str | None,
    function: str | None,
    requests: int | None,
    key: bytes | None,
    settings: Settings,
    as_json: bool,
) -> int:
    """Serve isolated requests through memslot and on the runtime alone, and compare.

    FILE is a .wasm or .wat file, or a guest that `memslot snapshot` wrote; without it, or with the word `example`, a
    bundled guest runs.  Each request gets a fresh instance, or one that was reset, and calls one function: that of
    --invoke, else _start, else the first export without parameters.  ARGUMENTS are those of the function (as numbers),
    or of the WASI program; put -- before negative ones.  What the guest prints is shown once and discarded during the
    measurement.

    \b
    memslot run
    memslot run guest.wasm --host wasmer --requests 5000
    memslot run example --invoke factorise 360360 12
    memslot run guest.wasm --invoke add -- -1 2
    """  # noqa: D301  # click keeps the lines below a real backspace
    with interruptible() as check, progress() as say:
        source = read_source(file, key)
        invocation = choose_invocation(source, function, arguments)
        wasi = source.wasi(invocation.program_arguments)
        say(f"preparing {source.name}")
        with open_host(read_host(host_name, settings), settings=settings) as host:
            found = compare(
                host,
                prepare_source(source, host, wasi, key=key),
                source,
                invocation,
                wasi=wasi,
                requests=requests,
                bench=Bench(say=say, check=check),
            )
    if isinstance(found, str):
        complain(found)
        return FAILED
    if as_json:
        write_json(document(found))
    else:
        show(console(), found)
    return FAILED if found.differences else 0


def conclusion(found: Comparison) -> str:
    """Return the result in one sentence for a newcomer."""
    new, reset = (duration(found.sides[key].median_us) for key in ("memslot", "reset"))
    if "alone" not in found.sides:
        return f"A request takes {new} with a fresh instance through memslot, and {reset} on one that is reset."
    alone, name = duration(found.sides["alone"].median_us), f"{found.host.name} alone"
    faster, reset_faster = found.times["memslot"].median, found.times["reset"].median
    said = f"A request with a fresh, isolated instance takes {new} through memslot"
    if faster >= 1.1:
        said += f" instead of {alone} on {name}, {faster:.3g} times faster"
    else:
        gain = ", about the same" if faster > 0.9 else ": this guest gains no time"
        said += f" and {alone} on {name}{gain}"
    memory = found.ratios["memslot"]["private_bytes_per_instance"]
    if memory is not None and memory >= 1.1:
        said += f", with {memory:.3g} times less private memory for each live instance"
    if reset_faster >= 1.1:
        said += (
            f"; on one that is reset after each request it takes {reset}, {reset_faster:.3g}"
            " times faster"
        )
    if found.differences:
        differing = " and ".join(found.differences)
        return f"{said}, but the {differing} differ: do not trust these numbers."
    return f"{said}{', and every answer was the same' if found.same_result else ''}."


def document(found: Comparison) -> dict[str, Any]:
    """Return the comparison for scripts."""
    return {
        "guest": found.source.name,
        "invoke": found.invocation.function,
        "arguments": list(found.invocation.program_arguments or found.invocation.arguments),
        "host": found.host.name,
        "host_version": installed_version(found.host.name),
        "plugin": found.plugin,
        "slots": found.host.settings.slots,
        "requests": found.requests,
        "result": [_number(value) for value in found.outcome.result],
        "output": found.outcome.output.decode(errors="replace"),
        "same_result": found.same_result,
        "differences": list(found.differences),
        "alone": None,
        **found.sides,
        "ratio": found.ratios.get("memslot"),
        "reset_ratio": found.ratios.get("reset"),
        "ratio_spread": found.times.get("memslot"),
        "reset_ratio_spread": found.times.get("reset"),
        "notes": list(found.notes),
        "conclusion": conclusion(found),
    }


def _number(text: str) -> int | float | str:
    """Return a value as JSON has it; NaN and the infinities, which it has not, as text."""
    try:
        return int(text)
    except ValueError:
        return float(text) if math.isfinite(float(text)) else text


ROWS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "median_us": ("time per request, median", duration),
    "p99_us": ("time per request, 99 % within", duration),
    "faults_per_request": ("page faults per request", lambda value: f"{value:.1f}"),
    "private_bytes_per_instance": ("private memory per live instance", byte_size),
}


def show(output: Output, found: Comparison) -> None:
    """Print the comparison for people."""
    host = found.host.name
    answered = f" -> {', '.join(found.outcome.result)}" if found.outcome.result else ""
    title = (
        f"{found.source.name}: {found.invocation}{answered}, {found.requests} requests on each side"
        f" ({host} {installed_version(host) or ''}, CPython {platform.python_version()})"
    )
    rows = []
    for name, (label, shown) in ROWS.items():
        row = {"": label}
        if "alone" in found.sides:
            row[f"{host} alone"] = shown(getattr(found.sides["alone"], name))
        for key, column in (("memslot", "memslot"), ("reset", "memslot, reset")):
            row[column] = shown(getattr(found.sides[key], name))
            if key in found.ratios:
                row["less" if key == "memslot" else "less "] = times(found.ratios[key][name])
        rows.append(row)
    output.show_table(title, rows)
    for key, spread in found.times.items():
        output.print(
            f"Half of the rounds were {times(spread.low)} to {times(spread.high)} faster ({key})."
        )
    show_printed(output, found.outcome.output)
    for note in found.notes:
        output.print(f"Note: {note}")
    output.print(conclusion(found))
