"""Checks of a plugin's hooks before pluggy sees them, each with one sentence for its author.

pluggy finds some mistakes later and in its own words (an unknown hook or argument) and others not
at all (a missing marker, arguments that it would never pass).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from difflib import get_close_matches

import pluggy

from memslot_hooks import HOOKS, PROJECT
from memslot_plugin.plugins.arming import arguments_of


def find_mistake(manager: pluggy.PluginManager, plugin: object) -> str | None:
    """Return the first mistake in the hooks of `plugin`, or None."""
    for attribute in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is None:
            if attribute in HOOKS:
                function = getattr(plugin, attribute)
                # A plugin may inherit the specifications, so that an editor completes them.
                if callable(function) and not hasattr(function, f"{PROJECT}_spec"):
                    return f"{attribute} lacks the marker @hookimpl"
            continue
        hook = options.get("specname") or attribute
        if hook in HOOKS:
            signature = inspect.signature(getattr(plugin, attribute))
            for parameter in signature.parameters.values():
                mistake = _mistake(parameter, arguments_of(hook))
                if mistake is not None:
                    spec = f"{hook}({', '.join(arguments_of(hook))})"
                    return f"{attribute}{signature} {mistake}; the hook is {spec}"
        elif not options.get("optionalhook"):
            return f"there is no hook {hook!r}{nearest(hook, HOOKS)}"
    return None


def nearest(name: str, known: Sequence[str]) -> str:
    """Return " (did you mean 'x'?)" for the known name that is most like `name`, or ""."""
    matches = get_close_matches(name, known, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _mistake(parameter: inspect.Parameter, allowed: tuple[str, ...]) -> str | None:
    """Return the mistake in one parameter of an implementation as a verb phrase, or None."""
    name = parameter.name
    if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
        return f"takes {parameter}, and pluggy passes arguments by their names alone"
    if parameter.kind is parameter.KEYWORD_ONLY:
        if parameter.default is parameter.empty:
            return (
                f"takes {name!r} by keyword alone, and hooks are called with positional arguments"
            )
        return None
    if parameter.default is not parameter.empty:
        if name in allowed:
            return f"gives the argument {name!r} a default, which pluggy may take for the value"
        return None
    if name not in allowed:
        return f"takes an argument {name!r} that the hook does not have{nearest(name, allowed)}"
    return None
