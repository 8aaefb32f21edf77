"""`memslot plugins`: which plugins are installed, what they implement, and in which order they are asked."""

from __future__ import annotations

from dataclasses import asdict

import click

from memslot_plugin.cli.options import json_option, read_settings, settings_options
from memslot_plugin.cli.output import console, table, write_json
from memslot_plugin.hosts.builtin import load_plugins
from memslot_plugin.plugins import PluginInfo


@click.command()
@settings_options
@json_option
def plugins(settings_file: str | None, changes: tuple[str, ...], as_json: bool) -> None:
    """List the plugins: those that are asked, in their order, then those that are not, and why.

    The number after a hook is the place at which the plugin is asked; 1 is first.
    """
    settings = read_settings(settings_file, changes)
    found = load_plugins(settings).describe()
    if as_json:
        write_json({"plugins": [{**asdict(info), "hooks": dict(info.hooks)} for info in found]})
        return
    made = table("name", "state", "from", "hooks and places")
    for info in found:
        made.add_row(info.name, info.state, _origin(info), info.reason or _hooks(info))
    console().show_table("Plugins", made)


def _origin(info: PluginInfo) -> str:
    if info.distribution is None:
        return info.origin
    return f"{info.distribution} {info.version}\n{info.origin}"


def _hooks(info: PluginInfo) -> str:
    return ", ".join(
        f"{hook.removeprefix('memslot_')} {place}" for hook, place in info.hooks.items()
    )
