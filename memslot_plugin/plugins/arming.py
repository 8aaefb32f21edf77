"""Arming: the callables that hosts call in hot paths, made anew when a plugin comes or goes.

A hook call through pluggy costs 1-2 us even without an implementation, and a whole reset costs a few.
So an armed hook calls the implementations directly, and pluggy's caller only if a plugin wraps it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from operator import itemgetter
from typing import Any, get_args, get_type_hints

import pluggy

import memslot_hooks
from memslot_hooks import (
    DECIDING,
    RAISING,
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
"""The name of a plugin and its implementation, which takes the hook's arguments by position."""


class Armed:
    """The deciding and watching hooks of one `Plugins`, an attribute per hook without its prefix.

    Keep this object and read the attribute at each call, because attributes change when a plugin
    comes or goes.  Arguments are passed by position, in the order of the specification.  A deciding
    attribute raises PluginError instead of returning an answer of a wrong type, and instead of
    passing silence off as a reset, which would show one tenant's bytes to another.  A watching
    attribute is None without a watcher.  Otherwise it logs what watchers raise, except
    `instance_restored`, which raises it.
    """

    __slots__ = (
        *(name.removeprefix("memslot_") for name in (*DECIDING, *WATCHING)),
        "direct_resets",
        "epoch",
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
    memory_grown: Callable[[LinearMemory, int], None] | None
    memory_reset: Callable[[LinearMemory, ResetResult], None] | None
    instance_restored: Callable[[Any], None] | None
    direct_resets: tuple[object, ...]
    """Plugins whose memories are reset by `LinearMemory.reset`, because the hook would only ask them."""
    epoch: object
    """Another object after each plugin that comes or goes; compare it to keep what was bound."""

    def bound_reset(self, memory: LinearMemory) -> Callable[[], object]:
        """Return the call that resets a leased memory and notifies watchers, valid for this `epoch`."""
        if memory.reset is not None and any(memory.owner is each for each in self.direct_resets):
            return memory.reset
        return partial(self.reset_and_notify, memory)

    def reset_and_notify(self, memory: LinearMemory) -> None:
        """Reset a leased memory through the hook, and notify watchers."""
        result = self.reset_memory(memory)
        if self.memory_reset is not None:
            self.memory_reset(memory, result)


def arm(
    armed: Armed,
    manager: pluggy.PluginManager,
    failed: Mapping[str, str],
    watcher_failed: Callable[[str, str, Exception], None],
) -> None:
    """Make every attribute of `armed` anew.

    `failed` has the reason for each plugin that was skipped, for the error about silence.
    `watcher_failed` is called with plugin, hook and exception when a watcher raises.
    """
    for hook in DECIDING:
        setattr(armed, hook.removeprefix("memslot_"), _deciding(manager, hook, failed))
    for hook in WATCHING:
        on_error = None if hook in RAISING else watcher_failed
        setattr(armed, hook.removeprefix("memslot_"), _watching(manager, hook, on_error))
    armed.direct_resets = () if armed.memory_reset else tuple(_asked_alone(manager))
    # Last: an instance that binds meanwhile reads the epoch first, and must find the old one, so that it binds again.
    armed.epoch = object()


def _asked_alone(manager: pluggy.PluginManager) -> Iterator[object]:
    """Yield the plugins whose own memories no other plugin is asked about in `memslot_reset_memory`."""
    impls = implementations(manager, "memslot_reset_memory")
    if any(impl.wrapper or impl.hookwrapper for impl in impls):
        return
    for impl in impls:
        yield impl.plugin
        if not getattr(impl.plugin, "resets_own_memories_only", False):
            return  # it might answer for the memories of those that are asked later


@cache
def arguments_of(hook: str) -> tuple[str, ...]:
    """Return the names of a hook's arguments, in the order of its specification."""
    return tuple(inspect.signature(getattr(MemslotSpecs, hook)).parameters)[1:]


def implementations(manager: pluggy.PluginManager, hook: str) -> list[Any]:
    """Return pluggy's records of the implementations, in the order in which it asks them."""
    caller: pluggy.HookCaller = getattr(manager.hook, hook)
    return caller.get_hookimpls()[::-1]


def calls_of(manager: pluggy.PluginManager, hook: str, plugin: str | None = None) -> list[Call]:
    """Return the implementations of a hook in the order in which they are asked.

    With `plugin` only its own is returned, outside of all wrappers.  Otherwise, if a plugin wraps the
    hook, pluggy's caller stands for all of them; for a hook that is not deciding it returns the list
    of all answers.
    """
    arguments = arguments_of(hook)
    impls = implementations(manager, hook)
    plain = [impl for impl in impls if not (impl.wrapper or impl.hookwrapper)]
    if plugin is not None or len(plain) == len(impls):
        return [
            (impl.plugin_name, _positional(impl, arguments))
            for impl in plain
            if plugin in (None, impl.plugin_name)
        ]
    caller = getattr(manager.hook, hook)

    def through_pluggy(*args: Any) -> Any:
        return caller(**dict(zip(arguments, args, strict=True)))

    return [(listed([impl.plugin_name for impl in impls]), through_pluggy)]


def listed(names: Sequence[str]) -> str:
    """Return the names as a sentence has them."""
    return ", ".join(names) or "none"


@cache
def _answer_type(hook: str) -> Any:
    """Return the type of a hook's answers besides None, from the specification's annotation."""
    hints = get_type_hints(getattr(MemslotSpecs, hook), localns=vars(memslot_hooks))
    return get_args(hints["return"])[0]


def _deciding(
    manager: pluggy.PluginManager, hook: str, failed: Mapping[str, str]
) -> Callable[..., Any]:
    """Return the call of a deciding hook: the first answer counts, and None passes to the next plugin.

    If all pass, the body of the specification answers; if that has no answer the call raises PluginError.
    """
    calls = calls_of(manager, hook)
    expected = _answer_type(hook)

    def silence(args: tuple[Any, ...]) -> Any:
        try:
            return getattr(MemslotSpecs, hook)(None, *args)
        except NotImplementedError:
            asked = listed([name for name, _ in calls])
            skipped = "".join(f"; {name} was skipped: {why}" for name, why in failed.items())
            raise PluginError(
                f"no plugin answered {hook} for {args[0]!r}; asked: {asked}{skipped}"
            ) from None

    if not calls:
        return lambda *args: silence(args)
    (first_name, first), *others = calls

    def settled(answer: Any, *args: Any) -> Any:
        """Return the first plugin's answer, or that of the others if it is None."""
        name = first_name
        if answer is None:
            for name, call in others:  # noqa: B007 - the error names it
                answer = call(*args)
                if answer is not None:
                    break
            else:
                return silence(args)
        if isinstance(answer, expected):
            return answer
        raise PluginError(
            f"plugin {name} answered {hook} with {answer!r};"
            f" allowed are {expected.__name__} and None"
        )

    # Nearly always the first answer counts: `isinstance` stands here, too, because a call of `settled` costs 80 ns.
    def ask(*args: Any) -> Any:
        answer = first(*args)
        return answer if isinstance(answer, expected) else settled(answer, *args)

    def ask_about_one(argument: Any) -> Any:
        answer = first(argument)
        return answer if isinstance(answer, expected) else settled(answer, argument)

    return ask_about_one if len(arguments_of(hook)) == 1 else ask


def _watching(
    manager: pluggy.PluginManager,
    hook: str,
    on_error: Callable[[str, str, Exception], None] | None,
) -> Callable[..., None] | None:
    calls = calls_of(manager, hook)
    if not calls:
        return None

    def notify(*args: Any) -> None:
        for name, call in calls:
            try:
                call(*args)
            except Exception as error:  # a watcher must not fail the guest's request
                if on_error is None:
                    raise
                on_error(name, hook, error)

    return notify


def _positional(impl: Any, arguments: tuple[str, ...]) -> Callable[..., Any]:
    """Return the implementation itself if it takes all arguments in order, else an adapter."""
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
