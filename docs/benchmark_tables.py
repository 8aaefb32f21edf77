"""The README's section about a stored run: ratios, and the machine that they are from; never bare times."""

from __future__ import annotations

from collections.abc import Iterator

from memslot_plugin.bench import grids
from memslot_plugin.bench.results import Grid, Run

BEGIN, END = "<!-- benchmark -->", "<!-- /benchmark -->"

SHOWN = {"reset": ": auto", "cycle": "", "request": "", "density": "", "scaling": ""}
"""Families of the README, each with a part of the titles of the tables that it shows."""


def section(run: Run) -> str:
    """Return the section with its markers."""
    lines = [BEGIN, ""]
    for family in run.families:
        for grid in grids(family):
            if family.name in SHOWN and SHOWN[family.name] in grid.title:
                lines += [f"**{grid.title}**", "", *markdown(grid), ""]
    return "\n".join([*lines, measured_on(run), "", END])


def markdown(grid: Grid) -> Iterator[str]:
    """Yield the lines of a grid as a table; columns of numbers are aligned to the right."""
    columns = zip(*grid.rows, strict=True)
    numbers = [all(cell[:1].isdigit() or cell == "-" for cell in column) for column in columns]
    yield f"| {' | '.join(grid.columns)} |"
    yield f"|{'|'.join('--:' if number else '---' for number in numbers)}|"
    for row in grid.rows:
        yield f"| {' | '.join(row)} |"


def measured_on(run: Run) -> str:
    """Return a sentence about the machine and the method."""
    machine = run.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Ratios are medians of rounds that take turns{', in a quick run' if run.quick else ''}, with their quartiles"
        f" where there is room. Measured {machine['date']} on {machine['processors']} processors"
        f" ({machine['processor']}) under {machine['kernel']} with {machine['python']}, {versions}."
        " `memslot bench` measures the same on your machine."
    )


def insert(page: str, run: Run) -> str:
    """Return the page with its section replaced; raises ValueError if it has no markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + section(run) + after
