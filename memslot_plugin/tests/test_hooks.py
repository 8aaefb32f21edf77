"""The specifications: typed, documented, executable, and importable with pluggy alone."""

from __future__ import annotations

import doctest
import inspect
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import memslot_hooks
from memslot_hooks import (
    DECIDING,
    HOOKS,
    LIFECYCLE,
    WATCHING,
    Answer,
    InitialContent,
    LinearMemory,
    MemoryRequest,
    MemslotSpecs,
    PoolStatistics,
    ResetResult,
    docs,
    hookimpl,
    specs,
)
from memslot_plugin.errors import PluginError
from memslot_plugin.plugins import Plugins

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = CHECKOUT / "docs" / "hooks.md"
in_checkout = pytest.mark.skipif(
    not PAGE.exists(), reason="impossible: docs/hooks.md is in the checkout alone"
)


@pytest.fixture
def plugins() -> Plugins:
    return Plugins(entry_points=False)


@pytest.fixture
def memory() -> LinearMemory:
    request = MemoryRequest(
        minimum=65536,
        maximum=None,
        reserved=2**32,
        guard=2**25,
        image=None,
        guest_id="echo",
        memory_index=0,
        host="fake",
    )
    return LinearMemory(request, 0x7F00_0000_0000, 65536, owner=None)


def plugin(**hooks: Callable[..., Any]) -> object:
    """An object that implements the hooks given as functions."""
    holder = types.SimpleNamespace()
    for name, function in hooks.items():
        function.__name__ = name
        setattr(holder, name, hookimpl(function))
    return holder


def register(plugins: Plugins, **hooks: Callable[..., Any]) -> None:
    plugins.register(plugin(**hooks), name=f"plugin{len(plugins.names)}")


# The package.


def test_all_is_everything_public() -> None:
    public = {
        name
        for name, value in vars(memslot_hooks).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(memslot_hooks.__all__)
    assert list(memslot_hooks.__all__) == sorted(
        memslot_hooks.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)
    )


def test_all_holds_every_type_that_travels_through_the_hooks() -> None:
    from memslot_hooks import types as travelling

    defined = {
        name
        for name, value in vars(travelling).items()
        if inspect.isclass(value) and value.__module__ == travelling.__name__
    }
    assert defined <= set(memslot_hooks.__all__)


def test_importable_with_pluggy_alone() -> None:
    program = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "pluggy", "memslot_hooks"}:
            raise ImportError(f"{name} is neither pluggy nor of the standard library")

sys.meta_path.insert(0, Refuse())
import memslot_hooks, memslot_hooks.docs
assert "memslot_plugin" not in sys.modules
print(len(memslot_hooks.HOOKS))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(HOOKS)


# The specifications.


def test_every_hook_is_of_one_kind() -> None:
    assert sorted(HOOKS) == sorted(LIFECYCLE + DECIDING + WATCHING)
    for name in HOOKS:
        first = getattr(MemslotSpecs, name).memslot_spec["firstresult"]
        assert first == (name in DECIDING)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_fully_typed(hook: str) -> None:
    function = getattr(MemslotSpecs, hook)
    hints = get_type_hints(function, {**vars(specs), **vars(memslot_hooks)})
    assert set(hints) == {*inspect.signature(function).parameters, "return"} - {"self"}


def test_watching_hooks_return_nothing() -> None:
    for hook in WATCHING:
        assert inspect.signature(getattr(MemslotSpecs, hook)).return_annotation == "None"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_one_sentence_and_an_example_that_runs(hook: str) -> None:
    text = inspect.getdoc(getattr(MemslotSpecs, hook)) or ""
    assert re.fullmatch(r"[A-Z].*\.", text.split("\n\n")[0], re.DOTALL)
    scope: dict[str, Any] = {}
    run_doctest(specs.__doc__ or "", "the shared lines", scope)
    assert run_doctest(text, hook, scope) > 1


def run_doctest(text: str, name: str, scope: dict[str, Any]) -> int:
    report: list[str] = []
    parsed = doctest.DocTestParser().get_doctest(text, scope, name, None, None)
    result = doctest.DocTestRunner().run(parsed, out=report.append, clear_globs=False)
    scope.update(parsed.globs)
    assert not result.failed, "".join(report)
    return result.attempted


def test_every_hook_has_a_test_named_after_it() -> None:
    tests = set(globals())
    assert [hook for hook in HOOKS if f"test_{hook}" not in tests] == []


# The page.


@in_checkout
@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented(hook: str) -> None:
    assert f"### {hook}\n" in PAGE.read_text(encoding="utf-8")


@in_checkout
def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == docs.hooks_page(), "run python docs/generate.py"


def test_the_page_fences_every_example() -> None:
    fenced = False
    for line in docs.hooks_page().splitlines():
        if line.startswith("```"):
            fenced = not fenced
        assert fenced or not line.startswith((">>>", "... ")), line
    assert not fenced


@in_checkout
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("docs/hooks.md", "### memslot_reset_memory"),
        ("README.md", "bare loops: what the machine gives"),
    ],
)
def test_a_stale_page_fails_the_check_with_a_diff(tmp_path: Path, name: str, said: str) -> None:
    def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(CHECKOUT / "docs" / "generate.py"), *arguments]
        return subprocess.run(
            [*command, "--root", str(tmp_path)], capture_output=True, text=True, check=False
        )

    (tmp_path / "docs").mkdir()
    for copied in ("README.md", "docs/benchmark.json"):
        (tmp_path / copied).write_bytes((CHECKOUT / copied).read_bytes())
    page = tmp_path / name
    assert generate("--check").returncode == 1  # hooks.md is missing
    assert generate().returncode == 0
    assert page.read_bytes() == (CHECKOUT / name).read_bytes()
    assert generate("--check").returncode == 0
    page.write_text(page.read_text().replace(said, "gone"))
    stale = generate("--check")
    assert stale.returncode == 1
    assert "(stored)" in stale.stdout
    assert said in stale.stdout
    assert said not in page.read_text()  # a check writes nothing


# Each hook by name.


def test_memslot_register_hosts(plugins: Plugins) -> None:
    assert plugins.hosts() == {}
    register(plugins, memslot_register_hosts=lambda: {"tiny": str})
    register(plugins, memslot_register_hosts=lambda: {"large": int})
    assert plugins.hosts() == {"tiny": str, "large": int}
    register(plugins, memslot_register_hosts=lambda: {"tiny": bytes})
    with pytest.raises(PluginError, match=r"'plugin2' and 'plugin0' both register a host 'tiny'"):
        plugins.hosts()


def test_memslot_describe(plugins: Plugins) -> None:
    def fail() -> Answer:
        raise OSError("no /proc")

    register(plugins, memslot_describe=lambda: Answer("good", True, "probed"))
    register(plugins, memslot_describe=fail)
    register(plugins, memslot_describe=lambda: "yes")
    answers = plugins.answers()
    assert [(answer.plugin, answer.answers) for answer in answers] == [
        ("plugin2", False),
        ("plugin1", False),
        ("good", True),
    ]
    assert "'yes'" in answers[0].reason
    assert "OSError('no /proc')" in answers[1].reason


def test_memslot_open_host(plugins: Plugins) -> None:
    heard: list[tuple[str, object]] = []
    register(plugins, memslot_open_host=lambda host, settings: heard.append((host, settings)))
    plugins.open_host("fake", 7)
    assert heard == [("fake", 7)]
    with pytest.raises(PluginError, match="'fake' is open"):
        plugins.open_host("fake", 7)


def test_memslot_open_host_that_raises_closes_again(plugins: Plugins) -> None:
    def refuse(host: str) -> None:
        raise LookupError(host)

    closed: list[str] = []
    register(plugins, memslot_open_host=refuse)
    register(plugins, memslot_close_host=lambda host: closed.extend([host]))
    with pytest.raises(LookupError, match="fake"):
        plugins.open_host("fake", None)
    assert closed == ["fake"]
    plugins.close_host("fake")
    assert closed == ["fake"]


def test_memslot_build_image(plugins: Plugins) -> None:
    content = InitialContent(65536)
    assert plugins.armed.build_image(content) is None
    register(plugins, memslot_build_image=lambda content: None)
    assert plugins.armed.build_image(content) is None
    image = types.SimpleNamespace(kind="bytes", byte_size=0, extents=(), close=print)
    register(plugins, memslot_build_image=lambda content: image)
    assert plugins.armed.build_image(content) is image
    register(plugins, memslot_build_image=lambda content: types.SimpleNamespace(kind="half"))
    with pytest.raises(
        PluginError, match=r"plugin2 answered memslot_build_image .* Image and None"
    ):
        plugins.armed.build_image(content)


def test_memslot_guest_prepared(plugins: Plugins) -> None:
    heard: list[tuple[object, ...]] = []
    register(
        plugins, memslot_guest_prepared=lambda report, guest_id: heard.append((report, guest_id))
    )
    assert plugins.armed.guest_prepared is not None
    plugins.armed.guest_prepared("echo", "fine")
    assert heard == [("fine", "echo")]


def test_memslot_create_memory(plugins: Plugins, memory: LinearMemory) -> None:
    with pytest.raises(
        PluginError, match=r"no plugin answered memslot_create_memory .*asked: none"
    ):
        plugins.armed.create_memory(memory.request)
    register(plugins, memslot_create_memory=lambda: None)
    with pytest.raises(PluginError, match=r"guest_id='echo'.*asked: plugin0"):
        plugins.armed.create_memory(memory.request)
    register(plugins, memslot_create_memory=lambda request: memory)
    assert plugins.armed.create_memory(memory.request) is memory
    register(plugins, memslot_create_memory=lambda: 0x7F00)
    with pytest.raises(PluginError, match="plugin2 answered memslot_create_memory with 32512"):
        plugins.armed.create_memory(memory.request)


def test_memslot_warm_memory(plugins: Plugins, memory: LinearMemory) -> None:
    request = memory.request
    assert plugins.armed.warm_memory(request, 3) == 0  # nobody answers

    class Stove:
        @hookimpl
        def memslot_warm_memory(self, count: int) -> int:
            return count - 1

    plugins.register(Stove())
    assert plugins.armed.warm_memory(request, 3) == 2


def test_memslot_memory_created(plugins: Plugins, memory: LinearMemory) -> None:
    heard: list[LinearMemory] = []
    register(plugins, memslot_memory_created=lambda memory: heard.extend([memory]))
    assert plugins.armed.memory_created is not None
    plugins.armed.memory_created(memory)
    assert heard == [memory]


def test_memslot_pool_exhausted(plugins: Plugins, memory: LinearMemory) -> None:
    heard: list[tuple[int, int]] = []
    register(plugins, memslot_pool_exhausted=lambda in_use, limit: heard.append((in_use, limit)))
    assert plugins.armed.pool_exhausted is not None
    plugins.armed.pool_exhausted(memory.request, 8, 7)
    assert heard == [(7, 8)]


def test_memslot_grow_memory(plugins: Plugins, memory: LinearMemory) -> None:
    assert plugins.armed.grow_memory(memory, 131072) is False  # nobody's growth is refused
    register(plugins, memslot_grow_memory=lambda memory: None)
    assert plugins.armed.grow_memory(memory, 131072) is False
    register(plugins, memslot_grow_memory=lambda memory, byte_size: byte_size == 131072)
    assert plugins.armed.grow_memory(memory, 131072) is True
    assert plugins.armed.grow_memory(memory, 196608) is False
    register(plugins, memslot_grow_memory=lambda: 1)
    with pytest.raises(PluginError, match="plugin2 answered memslot_grow_memory with 1"):
        plugins.armed.grow_memory(memory, 131072)


def test_memslot_reset_memory(plugins: Plugins, memory: LinearMemory) -> None:
    register(plugins, memslot_reset_memory=lambda memory: None)
    with pytest.raises(PluginError, match=r"no plugin answered memslot_reset_memory .*plugin0"):
        plugins.armed.reset_memory(memory)  # silence must never pass for a reset
    result = ResetResult(4096, 10, "copy")
    register(plugins, memslot_reset_memory=lambda memory: result)
    assert plugins.armed.reset_memory(memory) is result


def test_memslot_memory_reset(plugins: Plugins, memory: LinearMemory) -> None:
    heard: list[tuple[object, ...]] = []
    register(plugins, memslot_memory_reset=lambda memory, result: heard.append((memory, result)))
    assert plugins.armed.memory_reset is not None
    result = ResetResult(None, 10, "madvise")
    plugins.armed.memory_reset(memory, result)
    assert heard == [(memory, result)]


def test_memslot_instance_restored(plugins: Plugins) -> None:
    heard: list[object] = []
    register(plugins, memslot_instance_restored=lambda instance: heard.append((instance,)))
    assert plugins.armed.instance_restored is not None
    plugins.armed.instance_restored("an instance")
    assert heard == [("an instance",)]


def test_memslot_release_memory(plugins: Plugins, memory: LinearMemory) -> None:
    with pytest.raises(PluginError, match="no plugin answered memslot_release_memory"):
        plugins.armed.release_memory(memory)
    result = ResetResult(0, 10, "destroyed")
    register(plugins, memslot_release_memory=lambda memory: result)
    assert plugins.armed.release_memory(memory) is result
    register(plugins, memslot_release_memory=lambda: True)
    with pytest.raises(PluginError, match="allowed are ResetResult and None"):
        plugins.armed.release_memory(memory)


def test_memslot_statistics(plugins: Plugins) -> None:
    counters: dict[str, Any] = dict.fromkeys(get_type_hints(PoolStatistics), 0)
    pool = PoolStatistics(**{**counters, "plugin": "a", "resets_by": {}})
    register(plugins, memslot_statistics=lambda: pool)
    register(plugins, memslot_statistics=lambda: None)
    assert plugins.statistics() == [pool]
    register(plugins, memslot_statistics=lambda: {"leases": 1})
    with pytest.raises(PluginError, match="plugin2 answered memslot_statistics"):
        plugins.statistics()


@pytest.mark.parametrize("wrapped", [False, True])
def test_lifecycle_answers_pass_through_a_wrapper(plugins: Plugins, wrapped: bool) -> None:
    class Wrapper:
        @hookimpl(wrapper=True)
        def memslot_register_hosts(self) -> Iterator[None]:
            answers = yield
            return answers

    register(plugins, memslot_register_hosts=lambda: {"a": str})
    register(plugins, memslot_register_hosts=lambda: {"b": int})
    if wrapped:
        plugins.register(Wrapper())
    assert plugins.hosts() == {"a": str, "b": int}


def test_memslot_forget_image(plugins: Plugins) -> None:
    all_are_told(plugins, "memslot_forget_image", lambda: plugins.forget_image("image"))  # type: ignore[arg-type]


def test_memslot_close_host(plugins: Plugins) -> None:
    plugins.open_host("fake", None)
    all_are_told(plugins, "memslot_close_host", lambda: plugins.close_host("fake"))


def all_are_told(plugins: Plugins, hook: str, fire: Callable[[], None]) -> None:
    """Also those who come after one that raised; the first exception reaches the caller."""
    told: list[str] = []

    def listener(name: str, error: Exception | None) -> Mapping[str, Callable[..., None]]:
        def listen() -> None:
            told.append(name)
            if error is not None:
                raise error

        return {hook: listen}

    register(plugins, **listener("last", None))
    register(plugins, **listener("second", KeyError("second")))
    register(plugins, **listener("first", OSError("first")))
    with pytest.raises(OSError, match="first"):
        fire()
    assert told == ["first", "second", "last"]
