"""The command line `memslot`, one file per command."""

from __future__ import annotations

import click

import memslot_plugin
from memslot_plugin.cli.bench import bench as _bench
from memslot_plugin.cli.doctor import doctor as _doctor
from memslot_plugin.cli.inspect import inspect as _inspect
from memslot_plugin.cli.output import (
    EXIT_CODES,
    INTERRUPTED,
    complain,
    exit_code,
    sentence,
    show_warnings,
)
from memslot_plugin.cli.plugins import plugins as _plugins
from memslot_plugin.cli.run import run as _run
from memslot_plugin.cli.snapshot import snapshot as _snapshot
from memslot_plugin.errors import MemslotError

__all__ = ["main"]

_EPILOG = f"""\b
Examples:
  memslot run                        compare with the runtime alone, on a bundled guest
  memslot run guest.wasm --json      compare on a guest of yours, for scripts
  memslot snapshot guest.wasm --init boot -o guest.memslot
                                     initialise a guest once; run and inspect take the result
  memslot inspect guest.wasm         show how a guest is rewritten and reset, and why
  memslot doctor                     show what this machine supports
  memslot bench --quick              measure resets and requests on this machine

{EXIT_CODES}
"""


class Commands(click.Group):
    """Commands whose expected errors are one sentence and an exit code; any other is a bug and shows its traceback."""

    def invoke(self, ctx: click.Context) -> None:
        """Run the command, and exit with the code that it returns."""
        try:
            code = super().invoke(ctx)
        except MemslotError as error:
            complain(sentence(error))
            code = exit_code(error)
        except KeyboardInterrupt:
            complain("interrupted")
            code = INTERRUPTED
        ctx.exit(code or 0)


@click.group(cls=Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(memslot_plugin.__version__, prog_name="memslot")
def main() -> None:
    """Serve fresh WebAssembly instances in microseconds, from pooled, copy-on-write linear memories."""
    show_warnings()


for _command in (_run, _snapshot, _doctor, _inspect, _bench, _plugins):
    main.add_command(_command)
