"""`memslot bench`: what requests and resets cost here, as ratios to the floor and to the runtimes alone."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from memslot_plugin import bench as families
from memslot_plugin.bench import plot, snapshot
from memslot_plugin.bench.results import Claim, Run, claimed
from memslot_plugin.cli.interrupt import Interruptible
from memslot_plugin.cli.options import json_option
from memslot_plugin.cli.output import (
    FAILED,
    OK,
    Output,
    console,
    table,
    write_json,
    yes_or_no,
)
from memslot_plugin.cli.run import Steps
from memslot_plugin.errors import SettingError
from memslot_plugin.hosts.alone import KNOWN


@click.command()
@click.option(
    "--only",
    "only",
    metavar="FAMILY",
    multiple=True,
    type=click.Choice(list(families.FAMILIES)),
    help=f"Measure this family: {', '.join(families.FAMILIES)}; may be given several times.",
)
@click.option("--quick", is_flag=True, help="Fewer cases and rounds: a minute instead of three.")
@click.option(
    "--host",
    "host_name",
    metavar="NAME",
    help="Measure on this runtime alone: wasmtime or wasmer  [default: all that are here]",
)
@click.option(
    "--guests",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Real guests for the family snapshot; the first file of each name is taken: "
    f"{', '.join(snapshot.FILES.values())}.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Exit with 1 if something that must hold does not hold, or if nothing was judged.",
)
@click.option(
    "--plot", "picture", metavar="FILE", help="Draw the ratios, too: FILE.svg or FILE.png."
)
@json_option
def bench(
    *,
    only: tuple[str, ...],
    quick: bool,
    host_name: str | None,
    guests: Path | None,
    check: bool,
    picture: str | None,
    as_json: bool,
) -> int:
    """Measure resets and requests, and compare with the runtimes alone and with the least they can cost.

    Everything is told as a ratio, the median of rounds that take turns, with the quartiles where there is room.  What
    must hold follows at the end.  Other work on this machine spoils the results.  Settings are the
    defaults, for those are what the figures are about.

    \b
    memslot bench --quick
    memslot bench --only reset --only cycle
    memslot bench --check
    memslot bench --json > run.json
    """  # noqa: D301  # click keeps the lines below a real backspace
    if host_name not in (None, "auto", *KNOWN):
        allowed = ", ".join(("auto", *KNOWN))
        raise SettingError(f"--host {host_name} is not allowed: {allowed}")
    if picture is not None:
        plot.require(picture)
    with Interruptible() as interruptible, Steps(Output(sys.stderr)) as steps:
        asked = families.Bench(
            quick=quick,
            host=host_name,
            guests=guests,
            say=steps.say,
            check=interruptible.check,
        )
        found = families.run(asked, only)
    if picture is not None:
        plot.draw(found, picture)
    if as_json:
        write_json(found.document())
    else:
        show(console(), found)
    claims = [claim for family in found.families for claim in family.claims]
    holds = bool(claims) and all(claim.holds for claim in claims)
    return FAILED if check and not holds else OK


def show(output: Output, found: Run) -> None:
    """A run for people."""
    for family in found.families:
        for grid in families.grids(family):
            made = table(*grid.columns, numbers=grid.columns[1:])
            for row in grid.rows:
                made.add_row(*row)
            output.show_table(grid.title, made)
        for reason in family.skipped:
            output.print(f"Not measured: {reason}\n")
    claims = [claim for family in found.families for claim in family.claims]
    if claims:
        made = table("", "must be", "is", "holds", numbers=("must be", "is"))
        for claim in claims:
            made.add_row(claim.says, _limit(claim), claimed(claim), yes_or_no(claim.holds))
        output.show_table("What must hold", made)
    versions = [f"{name} {version}" for name, version in found.machine["versions"].items()]
    machine = found.machine
    output.print(
        f"{machine['processors']} processors ({machine['processor']}), {machine['kernel']}, {machine['python']};"
        f" {', '.join(versions)}"
    )


def _limit(claim: Claim) -> str:
    return f"{'at least' if claim.at_least else 'at most'} {claimed(claim, claim.limit)}"
