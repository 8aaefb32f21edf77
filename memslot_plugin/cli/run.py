"""`memslot run`: the same requests through memslot and on the runtime alone, side by side."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, final

import click
from rich.progress import Progress, SpinnerColumn, TextColumn

from memslot_plugin.cli.compare import REQUESTS, SECONDS, Comparison, compare
from memslot_plugin.cli.interrupt import Interruptible
from memslot_plugin.cli.options import (
    json_option,
    key_option,
    read_key,
    read_settings,
    settings_options,
)
from memslot_plugin.cli.output import (
    FAILED,
    Output,
    byte_size,
    complain,
    console,
    duration,
    table,
    times,
    write_json,
)
from memslot_plugin.cli.source import (
    choose_invocation,
    prepare_source,
    read_source,
    require_no_foreign_imports,
)
from memslot_plugin.errors import SettingError, printable
from memslot_plugin.hosts import Wasi, open_host
from memslot_plugin.hosts.alone import runtime_version

SHOWN_OUTPUT = 2000
"""Bytes of what the guest printed that people see; JSON has them all."""


@final
class Steps:
    """A line on standard error that says what is being done; nothing where that is no terminal.

    It is drawn between the measurements, never by a thread during them.
    """

    def __init__(self, output: Output) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            console=output,
            transient=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not output.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)

    def say(self, what: str) -> None:
        """What is being done now."""
        self._progress.update(self._task, description=printable(what))
        self._progress.refresh()

    def __enter__(self) -> Steps:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


@click.command()
@click.argument("file", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--host",
    "host_name",
    metavar="NAME",
    help="The runtime: auto (the default), wasmtime, wasmer, or one that a plugin adds.",
)
@click.option(
    "--invoke", "function", metavar="NAME", help="The exported function that a request calls."
)
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    help=f"Requests on each side  [default: {REQUESTS}, or what fits {SECONDS:g} s]",
)
@click.option(
    "--concurrency-of-slots",
    "slots",
    type=int,
    metavar="N",
    help="How many linear memories can live at once (the setting slots).",
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
    slots: int | None,
    key_file: str | None,
    settings_file: str | None,
    changes: tuple[str, ...],
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
    with Interruptible() as interruptible, Steps(Output(sys.stderr)) as steps:
        settings = read_settings(settings_file, changes, slots=slots)
        key = read_key(key_file)
        source = read_source(file, key)
        require_no_foreign_imports(source)
        invocation = choose_invocation(source, function, arguments)
        host_name = host_name or settings.host
        if host_name == "fake":
            raise SettingError(
                "the host fake runs Python functions instead of a guest's code; choose auto, wasmtime or wasmer"
            )
        steps.say(f"preparing {source.name}")
        with open_host(host_name, settings=settings) as host:
            wasi = (
                Wasi(
                    arguments=invocation.program_arguments,
                    program=source.name,
                    stdout="inherit",
                    stderr="inherit",
                )
                if source.uses_wasi
                else None
            )
            guest = prepare_source(source, host, wasi, key=key)
            found = compare(
                host=host,
                guest=guest,
                source=source,
                invocation=invocation,
                wasi=wasi,
                requests=requests,
                say=steps.say,
                check=interruptible.check,
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
    """What a newcomer should take home, in one sentence."""
    ours = duration(found.memslot.median_us)
    if found.alone is None:
        reset = duration(found.reset.median_us)
        return f"A request takes {ours} with a fresh instance through memslot, and {reset} on one that is reset."
    theirs = duration(found.alone.median_us)
    faster = found.ratio("median_us") or 1.0
    if faster >= 1.1:
        said = (
            f"takes {ours} through memslot instead of {theirs} on {found.host} alone,"
            f" {faster:.3g} times faster"
        )
    elif faster > 0.9:
        said = f"takes {ours} through memslot and {theirs} on {found.host} alone, about the same"
    else:
        said = f"takes {ours} through memslot and {theirs} on {found.host} alone: this guest gains no time"
    memory = found.ratio("private_bytes_per_instance")
    if memory is not None and memory >= 1.1:
        said += f", with {memory:.3g} times less private memory for each live instance"
    said = f"A request with a fresh, isolated instance {said}"
    faster = found.ratio("median_us", reset=True) or 1.0
    if faster >= 1.1:
        reset = duration(found.reset.median_us)
        said += (
            f"; on one that is reset after each request it takes {reset}, {faster:.3g} times faster"
        )
    if found.same_result:
        return f"{said}, and every answer was the same."
    if found.same_result is False:
        return (
            f"{said}, but the {' and '.join(found.differences)} differ: do not trust these numbers."
        )
    return f"{said}."


def document(found: Comparison) -> dict[str, Any]:
    """The comparison for scripts."""
    whats = ("median_us", "p99_us", "faults_per_request", "private_bytes_per_instance")
    return {
        "guest": found.source.name,
        "invoke": found.invocation.function,
        "arguments": list(found.invocation.program_arguments or found.invocation.arguments),
        "host": found.host,
        "host_version": runtime_version(found.host),
        "plugin": found.plugin,
        "slots": found.settings.slots,
        "requests": found.requests,
        "result": [_number(value) for value in found.outcome.result],
        "output": found.outcome.output.decode(errors="replace"),
        "same_result": found.same_result,
        "differences": list(found.differences),
        "memslot": asdict(found.memslot),
        "reset": asdict(found.reset),
        "alone": None if found.alone is None else asdict(found.alone),
        "ratio": None if found.alone is None else {what: found.ratio(what) for what in whats},
        "reset_ratio": None
        if found.alone is None
        else {what: found.ratio(what, reset=True) for what in whats},
        "notes": list(found.notes),
        "conclusion": conclusion(found),
    }


def _number(text: str) -> int | float | str:
    """A value as JSON has it; NaN and the infinities, which it has not, as text."""
    try:
        return int(text)
    except ValueError:
        return float(text) if math.isfinite(float(text)) else text


def show(output: Output, found: Comparison) -> None:
    """The comparison for people."""
    alone = found.alone
    answered = f" -> {', '.join(found.outcome.result)}" if found.outcome.result else ""
    version = runtime_version(found.host)
    title = (
        f"{found.source.name}: {found.invocation}{answered}, {found.requests} requests on each side"
        f" ({found.host}{f' {version}' if version else ''}, CPython {platform.python_version()})"
    )
    columns = ["memslot", "memslot, reset"]
    if alone is not None:
        columns = [f"{found.host} alone", "memslot", "less", "memslot, reset", "less "]
    made = table("", *columns, numbers=tuple(columns))
    rows: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("time per request, median", "median_us", duration),
        ("time per request, 99 % within", "p99_us", duration),
        ("page faults per request", "faults_per_request", lambda value: f"{value:.1f}"),
        ("private memory per live instance", "private_bytes_per_instance", byte_size),
    )
    for label, what, shown in rows:
        new, reset = shown(getattr(found.memslot, what)), shown(getattr(found.reset, what))
        cells = [new, reset]
        if alone is not None:
            less = [times(found.ratio(what)), times(found.ratio(what, reset=True))]
            cells = [shown(getattr(alone, what)), new, less[0], reset, less[1]]
        made.add_row(label, *cells)
    output.show_table(title, made)
    if found.outcome.output:
        text = found.outcome.output[:SHOWN_OUTPUT].decode(errors="replace").rstrip()
        more = len(found.outcome.output) - SHOWN_OUTPUT
        output.print(
            f"The guest printed:\n{text}" + (f"\n... and {more} bytes more" if more > 0 else "")
        )
    for note in found.notes:
        output.print(f"Note: {note}")
    output.print(conclusion(found))
