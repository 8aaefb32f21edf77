"""Results of commands on standard output, and all else on standard error.

With --json standard output holds one document and nothing else.  An error is one sentence on standard error, and then
standard output is empty.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import click
import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from memslot_plugin.errors import (
    GuestExit,
    GuestTrap,
    HostUnavailable,
    MemslotError,
    printable,
)

OK, FAILED, REFUSED, NO_RUNTIME = 0, 1, 2, 3
INTERRUPTED = 130  # 128 + SIGINT, as shells count
EXIT_CODES = f"""\b
Exit codes:
  {OK}    it worked
  {FAILED}    the guest trapped or failed, results differ, something does not work (doctor), or a limit does
       not hold (bench --check)
  {REFUSED}    wrong usage: an option, a setting, a file, or a limit of this machine
  {NO_RUNTIME}    no runtime, or no library of the command line, is installed
  {INTERRUPTED}  interrupted by Ctrl-C
"""

_PIPED_WIDTH = 120
"""Columns of a table that goes to a file or a pipe, which have no width of their own."""


class Output(Console):
    """A rich console that takes text literally: reasons and guests' names are full of brackets."""

    def __init__(self, file: TextIO) -> None:
        super().__init__(file=file, markup=False, highlight=False, emoji=False)
        if not self.is_terminal and "COLUMNS" not in self._environ:
            self.width = _PIPED_WIDTH

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape what a guest's names, a path or a guest's output would do to the terminal."""
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)

    def show_table(self, title: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Print rows under a title, with their keys as columns; columns of numbers are aligned to the right.

        Print nothing if there are no rows.
        """
        if not rows:
            return
        cells = [[_cell(value) for value in row.values()] for row in rows]
        made = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
        for column, values in zip(rows[0], zip(*cells, strict=True), strict=True):
            number = all(str(each)[:1].isdigit() or str(each) == "-" for each in values)
            made.add_column(column, justify="right" if number else "left", overflow="fold")
        for line in cells:
            made.add_row(*line)
        self.print(title, style="bold", soft_wrap=True)
        self.print(made)


def console() -> Output:
    """Return standard output as it is now."""
    return Output(sys.stdout)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a line about the step that begins, on standard error if that is a terminal.

    The line is drawn between the measurements, never by a thread during them.  The cursor stays visible, because a
    signal may end the process at any time.
    """
    output = Output(sys.stderr)

    def say(step: str) -> None:
        if output.is_terminal and not output.is_dumb_terminal:
            output.file.write(f"\r\x1b[2K{printable(step)[: output.width - 1]}")
            output.file.flush()

    try:
        yield say
    finally:
        say("")


SHOWN_OUTPUT = 2000
"""Characters of what a guest printed that people see; JSON has them all."""


def show_printed(output: Output, printed: str) -> None:
    """Show the beginning of what a guest printed."""
    if printed:
        output.print(f"The guest printed:\n{printed[:SHOWN_OUTPUT].rstrip()}")
    if len(printed) > SHOWN_OUTPUT:
        output.print(f"... and {len(printed) - SHOWN_OUTPUT} characters more")


def report(
    document: dict[str, Any], show: Callable[[Output, dict[str, Any]], None], as_json: bool
) -> None:
    """Write the one JSON document of a command, or show it to people."""
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(document, enc_hook=dict), indent=2))
    else:
        show(console(), document)


def some(words: Sequence[str], most: int = 20) -> str:
    """Return the first words as a list, and the number of the others."""
    more = len(words) - most
    listed = "; ".join(map(printable, words[:most])) or "none"
    return f"{listed}; and {more} more" if more > 0 else listed


def _cell(value: object) -> str | Text:
    if isinstance(value, bool):
        return Text("yes", style="green") if value else Text("no", style="red")
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def byte_size(value: float | None) -> str:
    """Write bytes for people: "1.5 MiB"; a dash for None."""
    if value is None:
        return "-"
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop()
    return f"{value:.0f} {units[-1]}" if value == int(value) else f"{value:.1f} {units[-1]}"


def duration(microseconds: float) -> str:
    """Write microseconds for people: "53.1 us", "1.77 ms", "2.4 s"."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} us"


def sentence(error: MemslotError) -> str:
    """Return an error's message as one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split())


def exit_code(error: MemslotError) -> int:
    """Return the exit code for an error."""
    if isinstance(error, HostUnavailable):
        return NO_RUNTIME
    return FAILED if isinstance(error, (GuestTrap, GuestExit)) else REFUSED


def complain(text: str) -> None:
    """Write one line to standard error."""
    click.echo(f"memslot: {printable(text)}", err=True)


class _OneLine(logging.Handler):
    """Writes warnings of the library as one line, where Python would print the traceback of a skipped plugin."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}")


_WARNINGS = _OneLine(logging.WARNING)


def show_warnings() -> None:
    """Write the library's warnings to standard error."""
    logging.getLogger("memslot").addHandler(_WARNINGS)
