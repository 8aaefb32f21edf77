"""`memslot bench`: requests and resets on this machine, as ratios to the floor and to the peers."""

from __future__ import annotations

from pathlib import Path

import click

from memslot_plugin import bench as families
from memslot_plugin.bench import plot, snapshot
from memslot_plugin.bench.baseline import RUNTIMES
from memslot_plugin.bench.results import Run, claimed
from memslot_plugin.cli.interrupt import ended_by_ctrl_c
from memslot_plugin.cli.options import json_option
from memslot_plugin.cli.output import (
    FAILED,
    OK,
    Output,
    progress,
    report,
)


@click.command()
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(families.FAMILIES)),
    help="Measure this family; may be given several times.",
)
@click.option("--quick", is_flag=True, help="Measure fewer cases and rounds: a minute, not three.")
@click.option(
    "--host",
    "host_name",
    type=click.Choice(list(RUNTIMES)),
    help="Measure on this runtime alone  [default: all that are here]",
)
@click.option(
    "--guests",
    metavar="FOLDER",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Take real guests for the family snapshot from this folder, the first file of each name: "
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

    Every price is shown as a ratio, the median of rounds that take turns, with the quartiles where there is room.  The
    limits follow at the end.  Other work on this machine spoils the results.  Settings are the defaults, for those are
    what the figures are about.

    \b
    memslot bench --quick
    memslot bench --only reset --only cycle
    memslot bench --check
    memslot bench --json > run.json
    """  # noqa: D301  # click keeps the lines below a real backspace
    if picture is not None:
        plot.require(picture)
    with ended_by_ctrl_c(), progress() as say:
        found = families.run(families.Bench(quick, host_name, guests, say), only)
    if picture is not None:
        plot.draw(found, picture)
    report(found.document(), lambda output, _: show(output, found), as_json)
    holds = bool(found.claims) and all(claim.holds for claim in found.claims)
    return FAILED if check and not holds else OK


def show(output: Output, found: Run) -> None:
    """Print a run for people."""
    for family in found.families:
        for grid in families.grids(family):
            rows = [dict(zip(grid.columns, row, strict=True)) for row in grid.rows]
            output.show_table(grid.title, rows)
        for reason in family.skipped:
            output.print(f"Not measured: {reason}\n")
    claims = [
        {
            "": claim.says,
            "must be": f"{'at least' if claim.at_least else 'at most'} {claimed(claim, claim.limit)}",
            "is": claimed(claim, claim.measured),
            "holds": claim.holds,
        }
        for claim in found.claims
    ]
    output.show_table("What must hold", claims)
    machine = found.machine
    versions = [f"{name} {version}" for name, version in machine["versions"].items()]
    output.print(
        f"{machine['processors']} processors ({machine['processor']}), {machine['kernel']}, {machine['python']};"
        f" {', '.join(versions)}"
    )
