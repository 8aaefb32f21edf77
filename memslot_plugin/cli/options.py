"""Options that several commands share: the host, the key, the settings, and --json."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from memslot_plugin.errors import SettingError
from memslot_plugin.settings import Settings

Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """Add `--json`, as the parameter `as_json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document and nothing else."
    )(command)


def host_option(command: Command) -> Command:
    """Add `--host NAME`, as the parameter `host_name`."""
    return click.option(
        "--host",
        "host_name",
        metavar="NAME",
        help="Use this runtime: auto (the default), wasmtime, wasmer, or one that a plugin adds.",
    )(command)


def read_host(host_name: str | None, settings: Settings) -> str:
    """Return the host of `--host`, else that of the settings, which must run a guest's code."""
    name = host_name or settings.host
    if name == "fake":
        raise SettingError(
            "the host fake runs Python functions instead of a guest's code; choose auto, wasmtime or wasmer"
        )
    return name


def key_option(command: Command) -> Command:
    """Add `--key-file FILE`, whose bytes are the parameter `key`, None without it."""
    return click.option(
        "--key-file",
        "key",
        metavar="FILE",
        type=click.File("rb"),
        callback=lambda _context, _option, file: file and file.read(),
        help="Read secret bytes that prove who wrote a saved guest; without, its machine code is not run.",
    )(command)


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--settings FILE` and `--set NAME=VALUE`, as the parameter `settings`.

    Settings are read from the options over the environment over the file.  A command may have an option `slots` of its
    own, which is over `--set`.
    """

    @click.option(
        "--settings",
        "settings_file",
        metavar="FILE",
        help="Read settings from the table [memslot] or [tool.memslot] of a TOML file.",
    )
    @click.option(
        "--set",
        "changes",
        metavar="NAME=VALUE",
        multiple=True,
        help="Change one setting, over file and environment; may be given several times.",
    )
    @functools.wraps(command)
    def with_settings(
        *,
        settings_file: str | None,
        changes: Sequence[str],
        slots: int | None = None,
        **others: Any,
    ) -> Any:
        values: dict[str, Any] = {}
        for change in changes:
            name, equals, value = change.partition("=")
            if not equals:
                raise SettingError(
                    f"--set {change} is not allowed: it must be NAME=VALUE, such as slots=16"
                )
            values[name.strip()] = value.strip()
        if slots is not None:
            values["slots"] = slots
        read = functools.partial(Settings.from_file, settings_file) if settings_file else Settings
        return command(settings=read(**values), **others)

    return with_settings
