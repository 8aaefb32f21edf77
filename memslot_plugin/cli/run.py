"""`memslot run`: the same requests through memslot and on the runtime alone, side by side."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import click

from memslot_plugin.bench.results import times
from memslot_plugin.bench.runner import Bench
from memslot_plugin.cli.compare import REQUESTS, SECONDS, Measured, compare
from memslot_plugin.cli.interrupt import ended_by_ctrl_c
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
    duration,
    progress,
    report,
    show_printed,
)
from memslot_plugin.cli.source import choose_invocation, prepare_source, read_source
from memslot_plugin.hosts import open_host
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
    help=f"Serve at least so many requests on each side  [default: {REQUESTS}, or what fits {SECONDS:g} s]",
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
    with ended_by_ctrl_c(), progress() as say:
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
                bench=Bench(say=say),
            )
    if isinstance(found, str):
        complain(found)
        return FAILED
    found["conclusion"] = conclusion(found)
    report(found, show, as_json)
    return FAILED if found["differences"] else 0


def conclusion(found: dict[str, Any]) -> str:
    """Return the result in one sentence for a newcomer."""
    new, reset = (duration(found[key].median_us) for key in ("memslot", "reset"))
    if found["alone"] is None:
        return f"A request takes {new} with a fresh instance through memslot, and {reset} on one that is reset."
    alone = f"{duration(found['alone'].median_us)} on {found['host']} alone"
    faster, reset_faster = (times(found[key].median) for key in ("ratio", "reset_ratio"))
    said = (
        f"A request with a fresh, isolated instance takes {new} through memslot instead of {alone} ({faster} as fast),"
        f" and on one that is reset after each request {reset} ({reset_faster} as fast)"
    )
    if found["differences"]:
        differing = " and ".join(found["differences"])
        return f"{said}, but the {differing} differ: do not trust these numbers."
    return f"{said}{', and every answer was the same' if found['same_result'] else ''}."


ROWS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "median_us": ("time per request, median", duration),
    "p99_us": ("time per request, 99 % within", duration),
    "faults_per_request": ("page faults per request", lambda value: f"{value:.1f}"),
    "private_bytes_per_instance": ("private memory per live instance", byte_size),
}


def _less(ours: Measured, alone: Measured, cost: str) -> float | None:
    """Return the runtime's cost over ours, or None if it is unknown or ours is next to nothing."""
    mine, theirs = getattr(ours, cost), getattr(alone, cost)
    return theirs / mine if theirs is not None and mine is not None and mine >= 1 else None


def show(output: Output, found: dict[str, Any]) -> None:
    """Print the comparison for people."""
    call = f"{found['invoke']}({', '.join(map(str, found['arguments']))})"
    if found["result"]:
        call += f" -> {', '.join(found['result'])}"
    title = (
        f"{found['guest']}: {call}, {found['requests']} requests on each side"
        f" ({found['host']} {found['host_version'] or ''}, CPython {platform.python_version()})"
    )
    rows, alone = [], found["alone"]
    for name, (label, shown) in ROWS.items():
        row = {"": label}
        if alone is not None:
            row[f"{found['host']} alone"] = shown(getattr(alone, name))
        for column, key, less in (
            ("memslot", "memslot", "less"),
            ("memslot, reset", "reset", "less "),
        ):
            row[column] = shown(getattr(found[key], name))
            if alone is not None:
                row[less] = times(_less(found[key], alone, name))
        rows.append(row)
    output.show_table(title, rows)
    if alone is not None:
        new, reset = (
            f"{times(each.low)} to {times(each.high)}"
            for each in (found["ratio"], found["reset_ratio"])
        )
        output.print(f"Half of the rounds were {new} faster, and {reset} on reset instances.")
    show_printed(output, found["output"])
    for note in found["notes"]:
        output.print(f"Note: {note}")
    output.print(found["conclusion"])
