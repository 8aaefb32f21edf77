"""Picture of a run: a panel per table, a bar per ratio, its quartiles as a line.  Needs matplotlib."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from memslot_plugin.bench.results import Row, Run
from memslot_plugin.errors import SettingError, Unsupported

FORMATS = (".svg", ".png")

_BAR_HEIGHT = 0.22
"""Inches of a bar and the space around it."""


def require(path: str) -> None:
    """Raise SettingError or Unsupported if `draw` could not write to this path."""
    if Path(path).suffix not in FORMATS:
        raise SettingError(f"a plot is {' or '.join(FORMATS)}, not {path}")
    _matplotlib()


def draw(run: Run, path: str) -> None:
    """Write the picture of a run to a path that `require` allows; raises SettingError if that fails."""
    figure_module = _matplotlib()
    families = [family for family in run.families if family.rows]
    heights = [len(family.rows) + 3 for family in families]
    figure = figure_module.Figure(
        figsize=(10, max(sum(heights) * _BAR_HEIGHT, 2)), layout="constrained"
    )
    panels = figure.subplots(len(families) or 1, 1, squeeze=False, height_ratios=heights or [1])
    for (panel,), family in zip(panels, families, strict=False):
        _bars(panel, family.name, family.rows)
    try:
        figure.savefig(path)
    except OSError as error:
        raise SettingError(f"the plot cannot be written to {path}: {error.strerror}") from None


def _bars(panel: Any, name: str, rows: tuple[Row, ...]) -> None:
    labels = [
        ", ".join(str(value) for value in row.labels.values()) + f" / {row.baseline}"
        for row in rows
    ]
    medians = [row.ratio.median for row in rows]
    below = [row.ratio.median - row.ratio.low for row in rows]
    above = [row.ratio.high - row.ratio.median for row in rows]
    places = list(range(len(rows)))
    panel.barh(places, medians, xerr=(below, above), color="#4c78a8", ecolor="#333333", height=0.7)
    panel.set_yticks(places, labels, fontsize=7)
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_title(f"{name}: ratio", fontsize=9, loc="left")


def _matplotlib() -> Any:
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise Unsupported(
            f"a plot needs matplotlib ({error}); install memslot[plot], or use --json"
        ) from None
