"""Hosts by name: plugins of memslot, of the embedder and of other distributions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import hookimpl
from memslot_plugin.hosts.builtin import BUILT_IN, load_plugins
from memslot_plugin.plugins import Plugins
from memslot_plugin.settings import Settings

OWN = ["wasmtime", "wasmer", "fake"]


class Adds:
    """A plugin that registers hosts and counts its instances."""

    made = 0

    def __init__(self, **hosts: Callable[..., Any]) -> None:
        type(self).made += 1
        self.hosts = hosts

    @hookimpl
    def memslot_register_hosts(self) -> dict[str, Callable[..., Any]]:
        return self.hosts


def test_own_hosts_with_any_plugins_selected_are_registered_by_the_hook() -> None:
    assert list(load_plugins(Settings()).hosts()) == OWN
    assert list(memslot.available_hosts()) == OWN
    for selected in ([], ["memfd"], ["memfd", "wasmtime"]):
        plugins = load_plugins(Settings(plugins=selected))
        assert list(plugins.hosts()) == OWN
        assert {each.name: each.state for each in plugins.describe()}["fake"] == "loaded"
    with memslot.open_host("fake", plugins=(), blocked=["wasmtime"]) as host:
        assert isinstance(host, memslot.FakeHost)
        assert set(host.plugins.names) == {"wasmer", "fake", "memfd", "anonymous"}


def test_blocked_host_is_refused_by_name_and_skipped_by_auto(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = Settings(blocked=["wasmtime", "wasmer"])
    assert list(memslot.available_hosts(settings)) == ["fake"]
    with pytest.raises(
        memslot.SettingError, match=r"host: expected one of auto, fake, got 'wasmer'"
    ):
        memslot.open_host("wasmer", settings=settings)
    with pytest.raises(memslot.HostUnavailable, match=r"wasmtime is blocked .*; wasmer is blocked"):
        memslot.open_host("auto", settings=settings)
    assert caplog.text == ""


def test_runtime_is_imported_only_with_its_host() -> None:
    code = """
import sys
import memslot_plugin as memslot
from memslot_plugin.hosts.builtin import load_plugins
memslot.open_host("fake").close()
load_plugins(memslot.Settings()).hosts()
assert not {"wasmtime", "wasmer"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_host_of_an_embedders_plugin_gets_settings_options_and_the_plugins() -> None:
    def factory(settings: Settings, *, plugins: Any, **options: Any) -> memslot.FakeHost:
        assert (settings.slots, options) == (3, {"colour": "blue"})
        assert list(plugins) == [adds]
        return memslot.FakeHost(settings, plugins=plugins)

    adds = Adds(tiny=factory)
    with memslot.open_host("tiny", plugins=[adds], slots=3, colour="blue") as host:
        assert host.plugins.manager.get_plugin("Adds") is adds
    with pytest.raises(memslot.SettingError, match="of auto, other, wasmtime, wasmer, fake, got"):
        memslot.open_host("tiny", plugins=[Adds(other=factory)])


def test_plugin_class_is_instantiated_once_for_an_opened_host() -> None:
    Adds.made = 0
    with memslot.open_host("fake", plugins=[Adds]):
        assert Adds.made == 1


@pytest.mark.parametrize(("name", "other"), [("fake", "fake"), ("auto", "memslot")])
def test_host_of_a_plugin_with_the_name_of_an_own_one_is_refused(name: str, other: str) -> None:
    with pytest.raises(memslot.PluginError, match=f"'{other}'.* both register a host '{name}'"):
        memslot.open_host("fake", plugins=[Adds(**{name: memslot.FakeHost})])


def test_available_hosts_with_a_factory_that_can_refuse_give_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Factory:
        def unavailable(self) -> str:
            return "its licence has ended"

    asked: list[Plugins] = []

    def hosts(plugins: Plugins) -> dict[str, Any]:
        asked.append(plugins)
        return {"one": object, "other": Factory(), **BUILT_IN}

    monkeypatch.setattr(Plugins, "hosts", hosts)
    found = memslot.available_hosts()
    assert found.pop("one") is None
    assert found.pop("other") == "its licence has ended"
    assert found.pop("fake") is None
    for name, reason in found.items():
        assert reason is None or f"memslot[{name}]" in reason
    assert len(asked) == 1
