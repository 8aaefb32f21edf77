"""`memslot plugins`: the installed plugins, the hooks that they implement, and the order in which they are asked."""

from __future__ import annotations

from typing import Any

import click

from memslot_plugin.cli.options import json_option, settings_options
from memslot_plugin.cli.output import Output, report
from memslot_plugin.hosts.builtin import load_plugins
from memslot_plugin.plugins import PluginInfo
from memslot_plugin.settings import Settings


@click.command()
@settings_options
@json_option
def plugins(*, settings: Settings, as_json: bool) -> None:
    """List the plugins: those that are asked, in their order, then those that are not, and why.

    The number after a hook is the place at which the plugin is asked; 1 is first.
    """
    found = load_plugins(settings).describe()
    report({"plugins": found}, _show, as_json)


def _show(output: Output, document: dict[str, Any]) -> None:
    rows = [
        {
            "name": info.name,
            "state": info.state,
            "from": _origin(info),
            "hooks and places": info.reason or _hooks(info),
        }
        for info in document["plugins"]
    ]
    output.show_table("Plugins", rows)


def _origin(info: PluginInfo) -> str:
    if info.distribution is None:
        return info.origin
    return f"{info.distribution} {info.version}\n{info.origin}"


def _hooks(info: PluginInfo) -> str:
    return ", ".join(
        f"{hook.removeprefix('memslot_')} {place}" for hook, place in info.hooks.items()
    )
