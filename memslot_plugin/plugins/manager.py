"""The plugin manager: finds, registers, blocks and describes plugins, and calls their lifecycle hooks."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, Literal

import pluggy

from memslot_hooks import HOOKS, PROJECT, Answer, Image, MemslotSpecs, PoolStatistics
from memslot_plugin.errors import PluginError, SettingError
from memslot_plugin.plugins.arming import (
    Armed,
    Call,
    arm,
    calls_of,
    implementations,
    listed,
)
from memslot_plugin.plugins.validation import find_mistake, nearest

_log = logging.getLogger("memslot.plugins")


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """One plugin, as `memslot plugins` prints it.

    `hooks` maps each hook that the plugin implements to its place in the order (1 is asked first).
    `origin` is the value of the entry point, or the type of the object that was registered.
    """

    name: str
    state: Literal["loaded", "registered", "not selected", "blocked", "failed"]
    origin: str
    distribution: str | None = None
    version: str | None = None
    hooks: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None

    @property
    def source(self) -> str:
        """The origin with its distribution, for errors."""
        of = "" if self.distribution is None else f" of {self.distribution} {self.version}"
        return f"{self.origin}{of}"


Installed = tuple[importlib.metadata.EntryPoint, PluginInfo]


class _Manager(pluggy.PluginManager):
    """A manager that ignores special methods, which are half of a plugin's attributes and no hooks."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        return None if name.startswith("__") else super().parse_hookimpl_opts(plugin, name)


class Plugins:
    """The plugins of one host (or of several of different names), asked through `armed`.

    `only` names the installed plugins to load (None: all of them).  `blocked` names plugins that are
    never imported nor asked, also when the embedder registers one of that name.  `built_in` are
    loaded unless blocked, whatever `only` names.  With `entry_points=False` no installed plugin is
    loaded.  An installed plugin that cannot be imported is logged and skipped; `failed` has the reason.

    Entry points are scanned once per process and `sys.path`; plugins are instantiated once per object
    of this class.  A distribution that is installed later is found by the next process.  Iterating
    yields the plugins that the embedder registered.

    Raises:
        SettingError: `only` names a plugin that is not installed.
        PluginError: two plugins have one name, or a plugin has a hook that does not exist.
    """

    def __init__(
        self,
        *,
        only: Sequence[str] | None = None,
        blocked: Sequence[str] = (),
        entry_points: bool = True,
        built_in: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self.armed = Armed()
        self.manager = _Manager(PROJECT)
        self.manager.add_hookspecs(MemslotSpecs)
        self._lock = threading.RLock()
        self._blocked = frozenset(blocked)
        self._info: dict[str, PluginInfo] = {}
        self._open: dict[str, Any] = {}
        """The settings of each open host, by the host's name."""
        self._failed_watchers: set[tuple[str, str]] = set()
        if entry_points:
            installed = _installed(tuple(sys.path))
            known = sorted({*built_in, *(info.name for _, info in installed)})
            for name in self._blocked.difference(known):
                _log.warning("blocked plugin %r is not installed%s", name, nearest(name, known))
            for name in only or ():
                if name not in known:
                    raise SettingError(
                        f"plugins: no plugin {name!r} is installed{nearest(name, known)};"
                        f" installed are: {listed(known)}"
                    )
            for entry, info in installed:
                self._load(entry, info, selected=only is None or info.name in only)
        for name, plugin in reversed(list(built_in.items())):  # the first is asked first
            info = PluginInfo(name=name, state="loaded", origin=_type_name(plugin))
            if name in self._blocked:
                self._info.setdefault(name, replace(info, state="blocked"))
            else:
                self._admit(plugin, info)
        self._arm()

    def __repr__(self) -> str:
        return f"<Plugins {', '.join(self.names)}>"

    def __iter__(self) -> Iterator[object]:
        infos = self._info.copy().values()
        own = [each.name for each in infos if each.state == "registered"]
        return map(self.manager.get_plugin, own)

    @property
    def names(self) -> tuple[str, ...]:
        """The plugins that are asked, the one that came last first, as pluggy asks them."""
        return tuple(name for name, _ in reversed(self.manager.list_name_plugin()))

    @property
    def failed(self) -> Mapping[str, str]:
        """The reason for each installed plugin that was skipped."""
        infos = self._info.copy().values()  # other threads may register plugins meanwhile
        return {each.name: each.reason for each in infos if each.reason is not None}

    def register(self, plugin: object, name: str | None = None) -> str | None:
        """Add a plugin of the embedder's own and return its name; None if that name is blocked.

        `plugin` is a module, an object, or a class, which is instantiated without arguments.  The
        name defaults to that of the module or class.  Later plugins are asked first.  The plugin's
        `memslot_open_host` is called for each open host; if it raises, the plugin is unregistered.

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
        with self._lock:
            info = PluginInfo(name=name, state="registered", origin=_type_name(plugin))
            self._admit(plugin, info)
            try:
                for _, call in calls_of(self.manager, "memslot_open_host", name):
                    for host, settings in self._open.items():
                        call(host, settings)
            except Exception:
                self.unregister(name)
                raise
            self._arm()
        return name

    def unregister(self, plugin: str | object) -> None:
        """Remove a plugin, by its name or itself, and call its `memslot_close_host` for open hosts.

        Memories that it leased are neither reset nor released any more.

        Raises:
            PluginError: no such plugin is registered.
        """
        with self._lock:
            name = plugin if isinstance(plugin, str) else self.manager.get_name(plugin)
            if name is None or not self.manager.has_plugin(name):
                raise PluginError(
                    f"plugin {plugin!r} is not registered; registered are: {listed(self.names)}"
                )
            closing = [
                (name, partial(call, host))
                for _, call in calls_of(self.manager, "memslot_close_host", name)
                for host in self._open
            ]
            self.manager.unregister(name=name)
            del self._info[name]
            self._arm()
            _call_all("memslot_close_host", closing)

    def describe(self) -> list[PluginInfo]:
        """Return a record of each plugin: those that are asked, in their order, then the others."""
        order: dict[str, dict[str, int]] = {}
        for hook in HOOKS:
            for place, impl in enumerate(implementations(self.manager, hook), start=1):
                order.setdefault(impl.plugin_name, {})[hook] = place
        asked = self.names
        rest = sorted(name for name in self._info.copy() if name not in asked)
        return [replace(self._info[name], hooks=order.get(name, {})) for name in (*asked, *rest)]

    # -- lifecycle hooks

    def hosts(self) -> dict[str, Callable[..., Any]]:
        """Return the factories of the hosts that plugins register, by name.

        Raises:
            PluginError: two plugins register one name, one registers "auto", or answers no mapping.
        """
        factories: dict[str, Callable[..., Any]] = {}
        source = {"auto": PROJECT}
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
        """Call `memslot_open_host` on every plugin; if one raises, close the host on all of them.

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
            except Exception:
                try:
                    self.close_host(host)
                except Exception:  # noqa: BLE001 - the exception of opening is the one to raise
                    _log.error("closing host %r failed too: %s", host, traceback.format_exc())
                raise

    def close_host(self, host: str) -> None:
        """Call `memslot_close_host` on every plugin, once; raise the first exception at the end."""
        with self._lock:
            if host in self._open:
                del self._open[host]
                hook = "memslot_close_host"
                _call_all(hook, calls_of(self.manager, hook), host)

    def forget_image(self, image: Image) -> None:
        """Call `memslot_forget_image` on every plugin; raise the first exception at the end."""
        hook = "memslot_forget_image"
        _call_all(hook, calls_of(self.manager, hook), image)

    def answers(self) -> list[Answer]:
        """Return the plugins' answers to `memslot doctor`; an exception becomes an answer too."""
        answers: list[Answer] = []
        for name, call in calls_of(self.manager, "memslot_describe"):
            try:
                answers += _checked("memslot_describe", name, call(), Answer)
            except Exception as error:  # noqa: BLE001 - doctor reports what is broken and goes on
                reason = f"memslot_describe failed: {error!r}"
                answers.append(Answer(name, answers=False, reason=reason))
        return answers

    def statistics(self) -> list[PoolStatistics]:
        """Return the counters of each plugin's pool.

        Raises:
            PluginError: a plugin answers with another type than `PoolStatistics`.
        """
        return [pool for _, pool in self._ask_all("memslot_statistics", PoolStatistics)]

    def _ask_all(self, hook: str, expected: type) -> list[tuple[str, Any]]:
        """Return every answer except None, each with its plugin's name."""
        return [
            (name, answer)
            for name, call in calls_of(self.manager, hook)
            for answer in _checked(hook, name, call(), expected)
        ]

    # -- loading

    def _load(
        self, entry: importlib.metadata.EntryPoint, info: PluginInfo, *, selected: bool
    ) -> None:
        """Import, instantiate and admit an installed plugin, unless it is blocked or not selected."""
        name = info.name
        if not selected or name in self._blocked:
            state: Any = "blocked" if name in self._blocked else "not selected"
            self._info.setdefault(name, replace(info, state=state))
            return
        try:
            plugin = entry.load()
            if inspect.isclass(plugin):
                plugin = plugin()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - code of another distribution
            reason = f"{type(error).__name__}: {error}"
            _log.warning(
                "plugin %r (%s %s) is skipped: %s",
                *(name, info.distribution, info.version, reason),
                exc_info=error,
            )
            self._require_free(info)
            self._info[name] = replace(info, state="failed", reason=reason)
        else:
            self._admit(plugin, info)

    def _require_free(self, info: PluginInfo) -> None:
        """Raise PluginError if the name is taken, because settings select plugins by name."""
        first = self._info.get(info.name)
        if first is not None and first.state != "not selected":
            raise PluginError(
                f"two plugins are named {info.name!r}: {first.source} and {info.source}"
                + ("; pass another name to register()" if info.state == "registered" else "")
            )

    def _admit(self, plugin: object, info: PluginInfo) -> None:
        """Register a plugin after checking it; if it is refused, the manager stays as it was."""
        self._require_free(info)
        mistake = find_mistake(self.manager, plugin)
        if mistake is None:
            try:
                self.manager.register(plugin, name=info.name)
                self.manager.check_pending()
            except (pluggy.PluginValidationError, ValueError) as error:
                if self.manager.has_plugin(info.name):
                    self.manager.unregister(name=info.name)
                mistake = " ".join(str(error).split())
        if mistake is not None:
            raise PluginError(f"plugin {info.name!r} ({info.source}): {mistake}")
        self._info[info.name] = info

    def _arm(self) -> None:
        arm(self.armed, self.manager, self.failed, self._watcher_failed)

    def _watcher_failed(self, plugin: str, hook: str, error: Exception) -> None:
        """Log a watcher's first failure in a hook; if all were logged, a busy host would fill a disk."""
        if (plugin, hook) not in self._failed_watchers:
            self._failed_watchers.add((plugin, hook))
            # Log text: a record with the exception would keep its frames, and with them the memory.
            _log.error(
                "plugin %s failed in %s; further failures are not logged: %s",
                *(plugin, hook, "".join(traceback.format_exception(error))),
            )


def _checked(hook: str, plugin: str, said: Any, expected: type) -> list[Any]:
    """Return the answers in `said` except None; it is a list if pluggy asked several plugins."""
    answers = [each for each in (said if isinstance(said, list) else [said]) if each is not None]
    for answer in answers:
        if not isinstance(answer, expected):
            raise PluginError(
                f"plugin {plugin} answered {hook} with {answer!r};"
                f" allowed are {expected.__name__} and None"
            )
    return answers


def _call_all(hook: str, calls: Sequence[Call], *args: Any) -> None:
    """Call each, also after one raised; then raise the first exception.  The others are logged."""
    first: Exception | None = None
    for name, call in calls:
        try:
            call(*args)
        except Exception as error:  # noqa: BLE001 - every plugin is called
            if first is not None:
                _log.error("plugin %s failed in %s too: %s", name, hook, traceback.format_exc())
            first = first or error
    if first is not None:
        raise first


@lru_cache(maxsize=8)  # bounded, because a program may change its sys.path any number of times
def _installed(_path: tuple[str, ...]) -> tuple[Installed, ...]:
    """Return the entry points found on this `sys.path`, in the order of loading.

    Cached, because a scan reads files of every distribution: 2 ms for 79 of them (CPython 3.11).
    """
    # A distribution that is being reinstalled is in the metadata twice: keep one entry per object.
    once = {
        (entry.name, entry.value): entry for entry in importlib.metadata.entry_points(group=PROJECT)
    }
    own: list[Installed] = []
    others: list[Installed] = []
    for _, entry in sorted(once.items()):
        metadata: Any = {} if entry.dist is None else entry.dist.metadata
        info = PluginInfo(
            name=entry.name,
            state="loaded",
            origin=entry.value,
            distribution=metadata.get("Name"),
            version=metadata.get("Version"),
        )
        (own if info.distribution == PROJECT else others).append((entry, info))
    # The plugin loaded last is asked first: others' plugins by name, then memfd, then anonymous.
    # memfd comes before anonymous also for resets, because most memories are its own.
    return (*own, *reversed(others))


def _type_name(plugin: object) -> str:
    if inspect.ismodule(plugin):
        return plugin.__name__
    return f"{type(plugin).__module__}.{type(plugin).__qualname__}"
