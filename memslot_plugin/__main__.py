"""The command `memslot`, and `python -m memslot_plugin`: the command line, if its libraries are installed."""

from __future__ import annotations

import signal
import sys

MISSING = 3
"""The exit code for a library that is not installed, as the command line has it."""


def main() -> None:
    """Run the command line, or say in one sentence how to install it."""
    try:
        import click  # noqa: F401, PLC0415
        import rich  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"memslot: the command needs {error.name}, which is not installed;"
            " install it with: pip install 'memslot[cli]'\n"
        )
        raise SystemExit(MISSING) from None
    from memslot_plugin.cli import main as command_line  # noqa: PLC0415

    # A reader that goes away ends the command without a traceback, as it ends other commands.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    command_line(prog_name="memslot")


if __name__ == "__main__":
    main()
