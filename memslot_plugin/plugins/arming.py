"""Arming: what a host calls in a hot path holds the implementations themselves.

A hook call through pluggy costs a microsecond or more, also when nobody implements the hook; a
whole reset costs a few.  So the callables below are made anew whenever a plugin comes or goes, and
pluggy's own caller is used only where a plugin wraps a hook.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NoReturn

import pluggy

from memslot_hooks import (
    DECIDING,
    HEEDED,
    WATCHING,
    Image,
    InitialContent,
    LinearMemory,
    MemoryRequest,
    MemslotSpecs,
    ResetResult,
)
from memslot_plugin.errors import PluginError

Call = tuple[str, Callable[..., Any]]
"""The name of a plugin and its implementation, which takes the hook's arguments positionally."""

_ANSWERS: Mapping[str, type] = {
    "memslot_build_image": Image,
    "memslot_create_memory": LinearMemory,
    "memslot_warm_memory": int,
    "memslot_grow_memory": bool,
    "memslot_reset_memory": ResetResult,
    "memslot_release_memory": ResetResult,
}
"""What a deciding hook may answer besides None."""

_SILENCE: Mapping[str, bool | int | None] = {
    "memslot_build_image": None,
    "memslot_grow_memory": False,
    "memslot_warm_memory": 0,
}
"""What it means that nobody answered, where that is not an error: no image; the growth is refused;
nothing is warm.
"""


class Armed:
    """What hosts call in hot paths: an attribute per deciding and watching hook, without prefix.

    Keep this object and read the attribute at each call: it changes when a plugin comes or goes.
    Arguments are positional, in the order of the specification.  A deciding attribute never hands
    out an answer of a wrong type, and never None for a memory: a silence that passed for a reset
    would show one tenant the bytes of another.  A watching attribute is None while nobody watches;
    otherwise it never raises, for a watcher's mistake is logged and is not the guest's; but
    `instance_restored` does.
    """

    __slots__ = (
        "build_image",
        "create_memory",
        "grow_memory",
        "guest_prepared",
        "instance_restored",
        "memory_created",
        "memory_reset",
        "pool_exhausted",
        "release_memory",
        "reset_memory",
        "warm_memory",
    )

    build_image: Callable[[InitialContent], Image | None]
    create_memory: Callable[[MemoryRequest], LinearMemory]
    warm_memory: Callable[[MemoryRequest, int], int]
    grow_memory: Callable[[LinearMemory, int], bool]
    reset_memory: Callable[[LinearMemory], ResetResult]
    release_memory: Callable[[LinearMemory], ResetResult]
    guest_prepared: Callable[[str, Any], None] | None
    memory_created: Callable[[LinearMemory], None] | None
    pool_exhausted: Callable[[MemoryRequest, int, int], None] | None
    memory_reset: Callable[[LinearMemory, ResetResult], None] | None
    instance_restored: Callable[[Any], None] | None


def arm(
    armed: Armed,
    manager: pluggy.PluginManager,
    failed: Mapping[str, str],
    watcher_failed: Callable[[str, str, Exception], None],
) -> None:
    """Make every attribute of `armed` anew.

    `failed` tells what could not be loaded, for the error that nobody answered; `watcher_failed`
    is called with plugin, hook and exception when a watching hook raises.
    """
    for hook in DECIDING:
        setattr(armed, hook.removeprefix("memslot_"), _deciding(manager, hook, failed))
    for hook in WATCHING:
        heard = None if hook in HEEDED else watcher_failed
        setattr(armed, hook.removeprefix("memslot_"), _watching(manager, hook, heard))


def arguments_of(hook: str) -> tuple[str, ...]:
    """The names of the arguments of a hook, in the order of its specification."""
    return tuple(inspect.signature(getattr(MemslotSpecs, hook)).parameters)[1:]


def implementations(manager: pluggy.PluginManager, hook: str) -> list[Any]:
    """The records that pluggy holds of the implementations, in the order in which it asks them."""
    return _caller(manager, hook).get_hookimpls()[::-1]


def calls_of(manager: pluggy.PluginManager, hook: str) -> list[Call]:
    """Who is asked, in order.

    Where a plugin wraps the hook, pluggy's own caller stands for all of them together; for a hook
    that is not deciding it answers with the list of all answers.
    """
    arguments = arguments_of(hook)
    impls = implementations(manager, hook)
    if not any(impl.wrapper or impl.hookwrapper for impl in impls):
        return [(impl.plugin_name, _positional(impl, arguments)) for impl in impls]
    caller = _caller(manager, hook)

    def through_pluggy(*args: Any) -> Any:
        return caller(**dict(zip(arguments, args, strict=True)))

    return [(listed([impl.plugin_name for impl in impls]), through_pluggy)]


def calls_of_one(manager: pluggy.PluginManager, hook: str, plugin: str) -> list[Call]:
    """The implementation of one plugin, outside of all wrappers; nothing if it has none."""
    return [
        (plugin, _positional(impl, arguments_of(hook)))
        for impl in implementations(manager, hook)
        if impl.plugin_name == plugin and not (impl.wrapper or impl.hookwrapper)
    ]


def listed(names: Sequence[str]) -> str:
    """The names as a sentence has them."""
    return ", ".join(names) or "none"


def _deciding(
    manager: pluggy.PluginManager, hook: str, failed: Mapping[str, str]
) -> Callable[..., Any]:
    calls = calls_of(manager, hook)
    expected = _ANSWERS[hook]

    def silence(args: tuple[Any, ...]) -> Any:
        if hook in _SILENCE:
            return _SILENCE[hook]
        asked = listed([name for name, _ in calls])
        skipped = "".join(f"; {name} was skipped: {why}" for name, why in failed.items())
        raise PluginError(f"no plugin answered {hook} for {args[0]!r}; asked: {asked}{skipped}")

    def wrong(plugin: str, answer: object) -> NoReturn:
        raise PluginError(
            f"plugin {plugin} answered {hook} with {answer!r};"
            f" allowed are {expected.__name__} and None"
        )

    if not calls:
        return lambda *args: silence(args)
    (first_name, first), *others = calls

    def ask(*args: Any) -> Any:
        answer = first(*args)
        if isinstance(answer, expected):  # whoever is asked first answers nearly always
            return answer
        if answer is not None:
            wrong(first_name, answer)
        for name, call in others:
            answer = call(*args)
            if answer is not None:
                return answer if isinstance(answer, expected) else wrong(name, answer)
        return silence(args)

    return ask


def _watching(
    manager: pluggy.PluginManager,
    hook: str,
    failed: Callable[[str, str, Exception], None] | None,
) -> Callable[..., None] | None:
    calls = calls_of(manager, hook)
    if not calls:
        return None

    def tell(*args: Any) -> None:
        for name, call in calls:
            try:
                call(*args)
            except Exception as error:  # one watcher's mistake, not the guest's
                if failed is None:
                    raise
                failed(name, hook, error)

    return tell


def _caller(manager: pluggy.PluginManager, hook: str) -> pluggy.HookCaller:
    caller: pluggy.HookCaller = getattr(manager.hook, hook)
    return caller


def _positional(impl: Any, arguments: tuple[str, ...]) -> Callable[..., Any]:
    """The implementation itself if it takes all arguments in order, else through an adapter."""
    function: Callable[..., Any] = impl.function
    if impl.argnames == arguments:
        return function
    places = [arguments.index(name) for name in impl.argnames]
    if not places:
        return lambda *_: function()
    if len(places) == 1:
        (place,) = places
        return lambda *args: function(args[place])
    pick = itemgetter(*places)
    return lambda *args: function(*pick(args))
