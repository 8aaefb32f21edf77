"""What every command writes, and where: results on standard output, everything else on standard error.

With --json standard output holds one document and nothing else.  An error is one sentence on standard error, and then
standard output is empty.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping
from typing import Any, NoReturn, TextIO

import click
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
INTERRUPTED, READER_GONE = 130, 141  # 128 + SIGINT and 128 + SIGPIPE, as shells count
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

    def show_table(self, title: str, rows: Table, *, left_out: int = 0) -> None:
        """A title over a table, and how many rows it leaves out."""
        self.print(title, style="bold", soft_wrap=True)
        self.print(rows)
        if left_out > 0:
            self.print(f"... and {left_out} more (--json has them all)")

    def on_broken_pipe(self) -> NoReturn:
        """Leave it to the one place that handles it."""
        raise BrokenPipeError


def console() -> Output:
    """Standard output as it is now."""
    return Output(sys.stdout)


def write_json(document: Mapping[str, Any]) -> None:
    """The one document of a command."""
    click.echo(json.dumps(document, indent=2, default=_plain))


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} has no place in a JSON document")


def table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """An empty table; the columns named in `numbers` are aligned to the right."""
    made = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


def yes_or_no(value: bool) -> Text:
    """A verdict in words, and in colour where there is colour."""
    return Text("yes", style="green") if value else Text("no", style="red")


def byte_size(value: float | None) -> str:
    """Bytes for people: "1.5 MiB"; a dash for what is not known."""
    if value is None:
        return "-"
    units = ["TiB", "GiB", "MiB", "KiB", "B"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop()
    return f"{value:.0f} {units[-1]}" if value == int(value) else f"{value:.1f} {units[-1]}"


def times(ratio: float | None) -> str:
    """How many times as much, for people; a dash where it cannot be said."""
    if ratio is None:
        return "-"
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.2g}x" if ratio < 10 else f"{ratio:.3g}x"


def duration(microseconds: float) -> str:
    """Microseconds for people: "53.1 us", "1.77 ms", "2.4 s"."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} us"


def sentence(error: MemslotError) -> str:
    """What an error says, in one line."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split())


def exit_code(error: MemslotError) -> int:
    """What a script is told about an error."""
    if isinstance(error, HostUnavailable):
        return NO_RUNTIME
    return FAILED if isinstance(error, (GuestTrap, GuestExit)) else REFUSED


def complain(text: str) -> None:
    """One line on standard error."""
    click.echo(f"memslot: {printable(text)}", err=True)


class _OneLine(logging.Handler):
    """A warning of the library as one line, where Python would print a traceback of a skipped plugin."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}")


_WARNINGS = _OneLine(logging.WARNING)


def show_warnings() -> None:
    """Write the library's warnings to standard error; twice is a no-op."""
    logging.getLogger("memslot").addHandler(_WARNINGS)
