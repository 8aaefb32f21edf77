"""Installed plugins: found by their entry points once per process, selected, blocked, and skipped if broken."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memslot_plugin.errors import PluginError, SettingError
from memslot_plugin.hosts import FakeHost
from memslot_plugin.plugins import PluginInfo, Plugins
from memslot_plugin.settings import Settings
from memslot_plugin.tests import installed
from memslot_plugin.tests.test_plugins import MEMORY, REQUEST, Owner

Install = Callable[..., None]

GROWER = """
from memslot_hooks import hookimpl

class Grower:
    @hookimpl
    def memslot_grow_memory(self, memory, byte_size):
        return True
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution with entry points on sys.path, as pip leaves it there."""

    def install(name: str, module: str, code: str, **entries: str) -> None:
        installed.install(tmp_path / name, name, module, code, **entries)
        monkeypatch.syspath_prepend(tmp_path / name)

    yield install
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def info(plugins: Plugins, name: str) -> PluginInfo:
    (found,) = [each for each in plugins.describe() if each.name == name]
    return found


def test_entry_point_of_a_class_an_object_or_a_module_is_loaded(install: Install) -> None:
    code = GROWER + "\ngrower = Grower()\n\n@hookimpl\ndef memslot_memory_created(): ...\n"
    install("three", "three", code, a_class=":Grower", an_object=":grower", a_module="")
    plugins = Plugins(only=["a_class", "an_object", "a_module"])
    made = {name: plugins.manager.get_plugin(name) for name in plugins.names}
    module: Any = made["a_module"]
    assert type(made["a_class"]) is module.Grower
    assert made["an_object"] is module.grower
    assert plugins.armed.grow_memory(MEMORY, 131072) is True
    assert plugins.armed.memory_created is not None


def test_plugins_of_each_origin_are_asked_in_order(install: Install) -> None:
    code = GROWER.replace("return True", "...")
    install("memslot", "ours", code, memfd=":Grower", anonymous=":Grower")  # hides a real one
    install("another", "another", code, zebra=":Grower", ant=":Grower")
    plugins = Plugins()
    plugins.register(sys.modules["ours"].Grower(), name="embedder")
    order = {each.name: each.hooks["memslot_grow_memory"] for each in plugins.describe()}
    assert sorted(order, key=order.__getitem__) == list(plugins.names)
    assert plugins.names == ("embedder", "ant", "zebra", "memfd", "anonymous")


def test_plugin_not_selected_is_not_imported_and_leaves_its_name(install: Install) -> None:
    install("one", "only_one", GROWER, one=":Grower")
    install("two", "only_two", GROWER, two=":Grower")
    plugins = Plugins(only=["one"])
    assert plugins.names == ("one",)
    assert "only_two" not in sys.modules
    source: Any = {"origin": "only_two:Grower", "distribution": "two", "version": "1.5"}
    assert info(plugins, "two") == PluginInfo(name="two", state="not selected", **source)
    assert plugins.register(Owner(), name="two") == "two"
    assert info(plugins, "two").state == "registered"


def test_plugin_of_an_unknown_name_is_refused_with_the_nearest(
    install: Install, caplog: Any
) -> None:
    install("one", "one", GROWER, limits=":Grower")
    with pytest.raises(SettingError, match=r"'limit' .*mean 'limits'.*installed are: .*limits"):
        Plugins(only=["limit"])
    Plugins(blocked=["limit"], only=[])
    assert "blocked plugin 'limit' is not installed (did you mean 'limits'?)" in caplog.text


def test_blocked_plugin_is_never_imported_nor_asked(install: Install) -> None:
    install("one", "blocked_module", "raise SystemExit('imported')", one="")
    plugins = Plugins(blocked=["one"], only=["one"])
    assert "blocked_module" not in sys.modules
    assert plugins.register(Owner(), name="one") is None
    assert plugins.names == ()
    assert info(plugins, "one").state == "blocked"


@pytest.mark.parametrize(
    ("code", "entry", "reason"),
    [
        ("raise OSError('no licence')", "", "OSError: no licence"),
        ("import a_module_that_is_not_there", "", "ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)", "", "SystemExit: 3"),
        ("x = 1", ":missing", "AttributeError: "),
        ("class P:\n    def __init__(self, needed): ...", ":P", "TypeError: "),
    ],
)
def test_broken_plugin_is_logged_and_skipped(
    install: Install, caplog: pytest.LogCaptureFixture, code: str, entry: str, reason: str
) -> None:
    install("broken", "broken_module", code, broken=entry)
    install("sound", "sound_module", GROWER, sound=":Grower")
    plugins = Plugins(only=["broken", "sound"])
    assert plugins.names == ("sound",)
    assert plugins.failed["broken"].startswith(reason)
    assert f"plugin 'broken' (broken 1.5) is skipped: {reason}" in caplog.text
    found = info(plugins, "broken")
    assert (found.state, found.reason) == ("failed", plugins.failed["broken"])
    with pytest.raises(PluginError, match="broken was skipped: "):
        plugins.armed.create_memory(REQUEST)


def test_second_plugin_of_one_name_and_a_misspelt_hook_are_refused(install: Install) -> None:
    install("old", "first_module", GROWER, same=":Grower")
    install("first", "first_module", GROWER, same=":Grower")
    assert Plugins(only=["same"]).names == ("same",)  # one object, in the metadata twice
    install("second", "second_module", GROWER, same=":Grower")
    with pytest.raises(PluginError, match=r"two plugins are named 'same': .* 1\.5 and .* 1\.5"):
        Plugins(only=["same"])
    assert "same" not in Plugins(blocked=["same"], only=["same"]).names  # blocking resolves it
    install("typo", "typo_module", GROWER.replace("grow_memory", "grow_memry"), typo=":Grower")
    with pytest.raises(PluginError, match=r"typo 1\.5.*'memslot_grow_memry'"):
        Plugins(only=["typo"])

    owner, plugins = Owner(), Plugins(entry_points=False)
    plugins.register(owner)
    with pytest.raises(PluginError, match=r"two plugins are named 'Owner'.*another name"):
        plugins.register(Owner())
    with pytest.raises(PluginError, match="already registered"):
        plugins.register(owner, name="b")
    assert plugins.register(Owner(), name="another") == "another"
    assert plugins.names == ("another", "Owner")


def test_entry_points_of_one_process_are_scanned_once(install: Install, monkeypatch: Any) -> None:
    scans = []
    scan = importlib.metadata.entry_points

    def counted(**selection: str) -> Any:
        scans.append(sys.path[0])
        return scan(**selection)

    monkeypatch.setattr(importlib.metadata, "entry_points", counted)
    install("one", "one_module", GROWER, one=":Grower")
    with FakeHost(Settings()) as first, FakeHost(Settings()) as second:
        held = [host.plugins.manager.get_plugin("one") for host in (first, second)]
    assert len({*held, None}) == 3
    assert Plugins(blocked=["one"], only=["memfd"]).names == ("memfd",)
    assert len(scans) == 1

    install("two", "two_module", GROWER, two=":Grower")  # in a folder that is new on sys.path
    assert "two" in Plugins().names
    entries = Path(sys.path[0]) / "two-1.5.dist-info" / "entry_points.txt"
    entries.write_text("[memslot]\nlater = two_module:Grower\n")
    assert "later" not in Plugins().names  # the next process sees it
    assert len(scans) == 2
