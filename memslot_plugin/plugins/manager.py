"""The plugin manager: finds, registers, blocks and describes plugins, and calls them in turn."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import sys
import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

import pluggy

from memslot_hooks import HOOKS, PROJECT, Answer, Image, MemslotSpecs, PoolStatistics
from memslot_plugin._core import after_fork
from memslot_plugin.errors import PluginError, SettingError
from memslot_plugin.plugins.arming import (
    Armed,
    arm,
    calls_of,
    calls_of_one,
    implementations,
    listed,
)
from memslot_plugin.plugins.validation import find_mistake, nearest

_log = logging.getLogger("memslot.plugins")


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """What is known about one plugin; `memslot plugins` prints these.

    `hooks` maps each hook that it implements to the place at which it is asked (1 is first).
    `origin` is the entry point's value, or the type of an object that the embedder registered.
    """

    name: str
    state: Literal["loaded", "registered", "not selected", "blocked", "failed"]
    origin: str
    distribution: str | None = None
    version: str | None = None
    hooks: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None
    watch_failures: int = 0


class Plugins:
    """The plugins of one host (or of several of different names), asked through `armed`.

    `only` names the installed plugins to load (None: all of them) and `blocked` those that are
    never imported nor asked, not even when the embedder registers one of that name.  With
    `entry_points=False` no installed plugin is looked for.  An installed plugin that cannot be
    imported is logged and skipped, and `failed` says why.

    Installed plugins are looked for once per process and `sys.path`, and instantiated once per
    object of this class.  A distribution that is installed later is seen by the next process.

    Raises:
        SettingError: `only` names a plugin that is not installed.
        PluginError: two plugins have one name, or one has a hook that the specifications lack.
    """

    def __init__(
        self,
        *,
        only: Sequence[str] | None = None,
        blocked: Sequence[str] = (),
        entry_points: bool = True,
    ) -> None:
        _EVERY.add(self)
        self.armed = Armed()
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(MemslotSpecs)
        self._lock = threading.RLock()
        self._blocked = frozenset(blocked)
        self._info: dict[str, PluginInfo] = {}
        self._open: dict[str, Any] = {}
        self._unclosed: dict[str, list[Call]] = {}
        """What to call again where closing failed, by host."""
        self._watch_failures: Counter[tuple[str, str]] = Counter()
        for name in self._blocked:
            self.manager.set_blocked(name)
        if entry_points:
            self._load_entry_points(only)
        self._arm()

    def __repr__(self) -> str:
        return f"<Plugins {', '.join(self.names)}>"

    @property
    def names(self) -> tuple[str, ...]:
        """The plugins that are asked, the one that came last first, as pluggy asks them."""
        return tuple(name for name, _ in reversed(self.manager.list_name_plugin()) if _ is not None)

    @property
    def failed(self) -> Mapping[str, str]:
        """Why each installed plugin that was skipped could not be loaded."""
        return MappingProxyType(
            {
                name: info.reason or ""
                for name, info in self._info.copy().items()
                if info.state == "failed"
            }
        )

    def register(self, plugin: object, name: str | None = None) -> str | None:
        """Add a plugin of the embedder's own and return its name; None if that name is blocked.

        `plugin` is a module, an object, or a class, which is instantiated without arguments.  The
        name defaults to that of the module or class.  It is asked before those that came earlier,
        and hears `memslot_open_host` for each host that is open already; an exception of that
        leaves it unregistered.

        Raises:
            PluginError: the name is taken, or a hook is misspelt or has a wrong signature.
        """
        named = plugin if inspect.isclass(plugin) or inspect.ismodule(plugin) else type(plugin)
        name = name or named.__name__
        if name in self._blocked:
            _log.info("plugin %r is blocked: not registered", name)
            return None
        if inspect.isclass(plugin):
            plugin = plugin()
        info = PluginInfo(name=name, state="registered", origin=_type_name(plugin))
        with self._lock:
            self._admit(plugin, info)
            try:
                for host, settings in self._open.items():
                    for _, call in calls_of_one(self.manager, "memslot_open_host", name):
                        call(host, settings)
            except BaseException:
                self.unregister(name)
                raise
            self._arm()
        return name

    def unregister(self, plugin: str | object) -> None:
        """Take out a plugin, by its name or itself; it hears `memslot_close_host` for open hosts.

        Nobody resets or releases the memories that it handed out and that are still leased.

        Raises:
            PluginError: no such plugin is registered.
        """
        with self._lock:
            name = plugin if isinstance(plugin, str) else self.manager.get_name(plugin)
            if name is None or not self.manager.has_plugin(name):
                raise PluginError(
                    f"plugin {plugin!r} is not registered; registered are: {listed(self.names)}"
                )
            closing = self._closing(name)
            self.manager.unregister(name=name)
            del self._info[name]
            self._arm()
            _call_all("memslot_close_host", closing)

    def describe(self) -> list[PluginInfo]:
        """Everything known about every plugin: those that are asked first, then the others."""
        order: dict[str, dict[str, int]] = {}
        for hook in HOOKS:
            for place, impl in enumerate(implementations(self.manager, hook), start=1):
                order.setdefault(impl.plugin_name, {})[hook] = place
        failures: Counter[str] = Counter()
        # Copies, because other threads may call watchers and register plugins meanwhile.
        for (name, _), count in dict(self._watch_failures).items():
            failures[name] += count
        asked = self.names
        rest = sorted(name for name in self._info.copy() if name not in asked)
        return [
            replace(self._info[name], hooks=order.get(name, {}), watch_failures=failures[name])
            for name in (*asked, *rest)
        ]

    # The lifecycle hooks, each with its types.

    def hosts(self) -> dict[str, Callable[..., Any]]:
        """The factories of the hosts that plugins add, by name.

        Raises:
            PluginError: two plugins register one name, or one answers something else than a mapping.
        """
        factories: dict[str, Callable[..., Any]] = {}
        source: dict[str, str] = {}
        for plugin, answer in self._ask_all("memslot_register_hosts", Mapping):
            for host, factory in answer.items():
                if host in source:
                    raise PluginError(
                        f"plugins {source[host]!r} and {plugin!r} both register a host {host!r}"
                    )
                source[host] = plugin
                factories[host] = factory
        return factories

    def open_host(self, host: str, settings: Any) -> None:
        """Tell every plugin to get ready for `host`; if one raises, all hear that it closed.

        Raises:
            PluginError: a host of that name is open on these plugins already.
        """
        with self._lock:
            if host in self._open:
                raise PluginError(f"host {host!r} is open on these plugins already")
            self._open[host] = settings
            try:
                for _, call in calls_of(self.manager, "memslot_open_host"):
                    call(host, settings)
            except BaseException:
                try:
                    self.close_host(host)
                except Exception:  # noqa: BLE001 - the exception of opening is the one to raise
                    _log.error(
                        "closing host %r, which could not be opened, failed too: %s",
                        host,
                        traceback.format_exc(),
                    )
                raise

    def close_host(self, host: str) -> None:
        """Tell every plugin that `host` is closed; the first exception of theirs is raised last, and closing again
        asks those that raised, or were not asked because it was cut short.
        """
        with self._lock:
            hook = "memslot_close_host"
            left = list(self._unclosed.get(host, ()))
            if host in self._open:
                left += self._calls(hook, host)
            self._unclosed[host] = left
            self._open.pop(host, None)
            _call_all(hook, tuple(left), left)
            del self._unclosed[host]

    def forget_image(self, image: Image) -> None:
        """Have every plugin purge `image`; the first exception of theirs is raised last."""
        hook = "memslot_forget_image"
        _call_all(hook, self._calls(hook, image))

    def answers(self) -> list[Answer]:
        """What each plugin says of itself, for `memslot doctor`; an exception is an answer too."""
        answers: list[Answer] = []
        for name, call in calls_of(self.manager, "memslot_describe"):
            try:
                said = call()
            except Exception as error:  # noqa: BLE001 - doctor reports what is broken and goes on
                said = Answer(name, answers=False, reason=f"memslot_describe raised {error!r}")
            for answer in said if isinstance(said, list) else [said]:
                if isinstance(answer, Answer):
                    answers.append(answer)
                else:
                    reason = f"memslot_describe answered {answer!r}, which is no Answer"
                    answers.append(Answer(name, answers=False, reason=reason))
        return answers

    def statistics(self) -> list[PoolStatistics]:
        """The counters of each plugin's pool.

        Raises:
            PluginError: a plugin answers something else than `PoolStatistics`.
        """
        return [pool for _, pool in self._ask_all("memslot_statistics", PoolStatistics)]

    # Loading.

    def _load_entry_points(self, only: Sequence[str] | None) -> None:
        """Load the installed plugins: ours first, so that all others are asked before them."""
        found = _installed(tuple(sys.path))
        known = sorted({entry.name for entry, _, _ in found})
        for name in only or ():
            if name not in known:
                raise SettingError(
                    f"plugins: no plugin {name!r} is installed{nearest(name, known)};"
                    f" installed are: {listed(known)}"
                )
        for name in sorted(self._blocked.difference(known)):
            _log.warning("blocked plugin %r is not installed%s", name, nearest(name, known))

        for entry, distribution, version in found:
            state: Literal["loaded", "not selected", "blocked", "failed"] = "loaded"
            reason: str | None = None
            plugin: object = None
            if entry.name in self._blocked:
                state = "blocked"
            elif only is not None and entry.name not in only:
                state = "not selected"
            else:
                try:
                    plugin = entry.load()
                    if inspect.isclass(plugin):
                        plugin = plugin()
                except (Exception, SystemExit) as error:  # noqa: BLE001 - a stranger's code
                    state, reason = "failed", f"{type(error).__name__}: {error}"
                    _log.warning(
                        "plugin %r (%s %s) is skipped: %s",
                        *(entry.name, distribution, version, reason),
                        exc_info=error,
                    )
            info = PluginInfo(
                name=entry.name,
                state=state,
                origin=entry.value,
                distribution=distribution,
                version=version,
                reason=reason,
            )
            if state == "loaded":
                self._admit(plugin, info)
            elif state == "failed":
                self._refuse_second(info)
                self._info[entry.name] = info
            else:
                self._info.setdefault(entry.name, info)

    def _refuse_second(self, info: PluginInfo) -> None:
        """Refuse a second plugin of one name: nobody could say which of them a setting means."""
        first = self._info.get(info.name)
        if first is not None and not (info.state == "registered" and first.state == "not selected"):
            raise PluginError(
                f"two plugins are named {info.name!r}: {_source(first)} and {_source(info)}"
                + ("; pass another name to register()" if info.state == "registered" else "")
            )

    def _admit(self, plugin: object, info: PluginInfo) -> None:
        """Register a plugin that makes no mistake, and leave the manager as it was otherwise."""
        self._refuse_second(info)
        who = f"plugin {info.name!r} ({_source(info)})"
        mistake = find_mistake(self.manager, plugin)
        if mistake is not None:
            raise PluginError(f"{who}: {mistake}")
        try:
            self.manager.register(plugin, name=info.name)
            self.manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            if self.manager.has_plugin(info.name):
                self.manager.unregister(name=info.name)
            message = " ".join(str(error).split())
            raise PluginError(f"{who}: {message}") from error
        self._info[info.name] = info

    def _arm(self) -> None:
        arm(self.armed, self.manager, self.failed, self._watcher_failed)

    def _watcher_failed(self, plugin: str, hook: str, error: Exception) -> None:
        """Log the first failure of its kind, so that a busy host does not fill a disk."""
        self._watch_failures[plugin, hook] += 1
        if self._watch_failures[plugin, hook] == 1:
            _log.error(
                "plugin %s failed in %s; further failures are only counted: %s",
                *(plugin, hook),
                "".join(
                    traceback.format_exception(error)
                ),  # as text: a record would keep the memory
            )

    def _ask_all(self, hook: str, expected: type) -> list[tuple[str, Any]]:
        """The answers of all plugins that have one, each with the plugin's name."""
        answers: list[tuple[str, Any]] = []
        for name, call in calls_of(self.manager, hook):
            said = call()
            for answer in said if isinstance(said, list) else [said]:  # a list: through pluggy
                if answer is None:
                    continue
                if not isinstance(answer, expected):
                    raise PluginError(
                        f"plugin {name} answered {hook} with {answer!r};"
                        f" allowed are {expected.__name__} and None"
                    )
                answers.append((name, answer))
        return answers

    # Not within a with block, as in the pool.

    def _closing(self, plugin: str) -> list[Call]:
        """What one plugin is asked when it goes."""
        return [
            (plugin, call, (host,))
            for host in self._open
            for _, call in calls_of_one(self.manager, "memslot_close_host", plugin)
        ]

    def _calls(self, hook: str, *arguments: Any) -> list[Call]:
        return [(name, call, arguments) for name, call in calls_of(self.manager, hook)]

    def after_fork(self) -> None:
        """In a child: the lock may be held by a thread that does not exist here."""
        self._lock = threading.RLock()


Call = tuple[str, Callable[..., Any], tuple[Any, ...]]
"""A plugin's name, its implementation of a hook, and the arguments."""


def _call_all(hook: str, calls: Sequence[Call], left: list[Call] | None = None) -> None:
    """Call each, also after one raised; raise the first exception then, log the others, and take out of `left` who has
    answered.
    """
    first: Exception | None = None
    for made in calls:
        name, call, args = made
        try:
            call(*args)
            if left is not None:
                left.remove(made)
        except Exception as error:  # noqa: BLE001 - every plugin must be told
            if first is None:
                first = error
            else:
                _log.error(
                    "plugin %s failed in %s, and not as the first: %s",
                    name,
                    hook,
                    traceback.format_exc(),
                )
    if first is not None:
        raise first


# Bounded, because a program may change its sys.path as often as it likes.
@lru_cache(maxsize=8)
def _installed(
    _path: tuple[str, ...],
) -> tuple[tuple[importlib.metadata.EntryPoint, str | None, str | None], ...]:
    """The entry points found on this `sys.path` in the order of loading, each with the name and
    version of its distribution.

    Cached, because a scan reads the files of every installed distribution: 3 ms for 78 of them
    (CPython 3.11, Xeon), as much as all else that opens a host.  `_installed.cache_clear()` forgets
    every scan.
    """
    # A distribution that is just being reinstalled stands in the metadata twice: one name for one
    # and the same object is one plugin.
    once = {
        (entry.name, entry.value): entry for entry in importlib.metadata.entry_points(group=PROJECT)
    }
    # Parse the metadata of each distribution once: two of our entry points share one.
    parsed: dict[int, tuple[str | None, str | None]] = {id(None): (None, None)}
    for distribution in (entry.dist for entry in once.values()):
        if distribution is not None and id(distribution) not in parsed:
            metadata = distribution.metadata
            parsed[id(distribution)] = metadata["Name"], metadata["Version"]
    found = [
        (entry, *parsed[id(entry.dist)])
        for entry in sorted(once.values(), key=lambda entry: entry.name)
    ]
    ours = [each for each in found if each[1] == PROJECT]
    strangers = [each for each in found if each[1] != PROJECT]
    # What is loaded last is asked first: strangers in the order of their names, and then
    # `memfd` before `anonymous`, about resets too, because most memories are its own.
    return (*ours, *reversed(strangers))


def _source(info: PluginInfo) -> str:
    if info.distribution is None:
        return info.origin
    return f"{info.origin} of {info.distribution} {info.version}"


def _type_name(plugin: object) -> str:
    if inspect.ismodule(plugin):
        return plugin.__name__
    return f"{type(plugin).__module__}.{type(plugin).__qualname__}"


_EVERY: weakref.WeakSet[Plugins] = weakref.WeakSet()


def _after_fork() -> None:
    for plugins in list(_EVERY):
        plugins.after_fork()


after_fork(_after_fork)
