"""The plugin manager: named mistakes, each hook, and the calls that arming saves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, get_type_hints

import pytest

import memslot_hooks as hooks
from memslot_hooks import DECIDING, RAISING, WATCHING, hookimpl
from memslot_plugin.errors import PluginError
from memslot_plugin.hosts import FakeHost
from memslot_plugin.hosts.live import Live
from memslot_plugin.plugins import Plugins
from memslot_plugin.plugins.arming import arguments_of
from memslot_plugin.settings import Settings

SIZES: dict[str, Any] = {"minimum": 65536, "maximum": None, "reserved": 2**32, "guard": 2**25}
REQUEST = hooks.MemoryRequest(**SIZES, image=None, guest_id="echo", memory_index=0, host="fake")
MEMORY = hooks.LinearMemory(REQUEST, 0x7F00_0000_0000, 65536, owner=None)
RESULT = hooks.ResetResult(4096, 10, "copy")
IMAGE: Any = SimpleNamespace(kind="bytes", byte_size=0, extents=(), close=print)

UNMARKED = None


@pytest.fixture
def plugins() -> Plugins:
    return Plugins(entry_points=False)


def register(plugins: Plugins, name: str, *, options: Any = (), **functions: Any) -> None:
    """Register an object that implements these hooks, each marked with these options of hookimpl."""
    for hook, function in functions.items():
        function.__name__ = hook
        if options is not UNMARKED:
            hookimpl(**dict(options))(function)
    plugins.register(SimpleNamespace(**functions), name=name)


class Owner:
    @hookimpl
    def memslot_reset_memory(self, memory):
        return RESULT


# Mistakes of authors.


@pytest.mark.parametrize(
    ("hook", "function", "options", "words"),
    [
        ("memslot_grow_memmory", lambda memory: 0, {}, ["memmory'", "'memslot_grow_memory'"]),
        ("memslot_memory_reset", lambda results: 0, {}, ["(results)", "mean 'result'"]),
        ("memslot_reset_memory", lambda: 0, UNMARKED, ["reset_memory lacks the marker @hookimpl"]),
        ("memslot_reset_memory", lambda *, memory: 0, {}, ["'memory' by keyword alone"]),
        ("memslot_reset_memory", lambda *memory: 0, {}, ["*memory", "by their names"]),
        ("memslot_grow_memory", lambda byte_size=0: 0, {}, ["a default", "(memory, byte_size)"]),
        ("mine", lambda: 0, {"specname": "memslot_reset"}, ["'memslot_reset'", "did you mean"]),
        ("memslot_reset_memory", lambda: 0, {"wrapper": True}, ["_memory", "not a generator"]),
    ],
    ids=["name", "argument", "marker", "keyword", "star", "default", "specname", "generator"],
)
def test_mistake_of_an_author_is_named_and_leaves_nothing_behind(
    plugins: Plugins, hook: str, function: Any, options: Any, words: list[str]
) -> None:
    plugins.register(Owner())
    with pytest.raises(PluginError) as caught:
        register(plugins, "wrong", options=options, **{hook: function})
    message = str(caught.value)
    assert [word for word in ("plugin 'wrong'", *words) if word not in message] == []
    assert "\n" not in message
    assert plugins.armed.reset_memory(MEMORY) is RESULT
    assert [each.name for each in plugins.describe()] == ["Owner"]


def test_plugin_without_a_mistake_is_accepted(plugins: Plugins) -> None:
    class Fine(hooks.MemslotSpecs):  # inherits the specifications, for completion in an editor
        memslot_note = "not a function"

        @hookimpl
        def memslot_reset_memory(self, memory, _cache=None):
            return RESULT

        @hookimpl(optionalhook=True)
        def memslot_of_next_year(self): ...

        def memslot_helper(self): ...

    plugins.register(Fine)
    assert plugins.armed.reset_memory(MEMORY) is RESULT
    assert dict(plugins.describe()[0].hooks) == {"memslot_reset_memory": 1}


# Each deciding and watching hook.

DECIDED: dict[str, tuple[Any, ...]] = {
    "memslot_build_image": (hooks.InitialContent(65536), IMAGE, SimpleNamespace(), "Image"),
    "memslot_create_memory": (REQUEST, MEMORY, 0x7F00, "LinearMemory"),
    "memslot_warm_memory": (REQUEST, 3, 2, "warm", "int"),
    "memslot_grow_memory": (MEMORY, 131072, True, 1, "bool"),
    "memslot_reset_memory": (MEMORY, RESULT, "clean", "ResetResult"),
    "memslot_release_memory": (MEMORY, RESULT, True, "ResetResult"),
}
"""Arguments, an answer, an answer of a wrong type, and the name of the right type."""

SILENCE = {"memslot_build_image": None, "memslot_warm_memory": 0, "memslot_grow_memory": False}
"""Answers of hooks if no plugin answers. Elsewhere a missing answer is an error: it must never pass for a reset."""


@pytest.mark.parametrize("hook", DECIDING)
def test_deciding_hook_answers_or_names_the_plugins_asked(plugins: Plugins, hook: str) -> None:
    *arguments, answer, wrong, kind = DECIDED[hook]

    def ask() -> object:
        return getattr(plugins.armed, hook.removeprefix("memslot_"))(*arguments)

    def assert_silent(asked: str) -> None:
        if hook in SILENCE:
            assert ask() is SILENCE[hook]
            return
        with pytest.raises(PluginError, match=rf"answered {hook} for .*echo.*asked: {asked}$"):
            ask()

    def assert_refused() -> None:
        with pytest.raises(PluginError) as caught:
            ask()
        message = f"plugin wrong answered {hook} with {wrong!r}; allowed are {kind} and None"
        assert str(caught.value) == message

    assert_silent("none")
    register(plugins, "mute", **{hook: lambda: None})
    assert_silent("mute")
    register(plugins, "owner", **{hook: lambda: answer})
    assert ask() is answer
    register(plugins, "wrong", **{hook: lambda: wrong})
    assert_refused()
    register(plugins, "asked before", **{hook: lambda: None})
    assert_refused()
    register(plugins, "broken", **{hook: lambda: 1 // 0})
    with pytest.raises(ZeroDivisionError):
        ask()


WATCHED: dict[str, tuple[object, ...]] = {
    "memslot_guest_prepared": ("echo", "a report"),
    "memslot_memory_created": (MEMORY,),
    "memslot_pool_exhausted": (REQUEST, 8, 7),
    "memslot_memory_grown": (MEMORY, 131072),
    "memslot_memory_reset": (MEMORY, RESULT),
    "memslot_instance_restored": ("an instance",),
}


@pytest.mark.parametrize("hook", WATCHING)
def test_watching_hook_is_armed_while_implemented_and_its_failures_logged_once(
    plugins: Plugins, caplog: Any, hook: str
) -> None:
    attribute = hook.removeprefix("memslot_")
    heard: list[object] = []
    names = ", ".join(arguments_of(hook))
    watcher = eval(f"lambda {names}: heard.append(({names},))", {"heard": heard})
    for _ in range(2):
        assert getattr(plugins.armed, attribute) is None
        register(plugins, "sound", **{hook: watcher})
        getattr(plugins.armed, attribute)(*WATCHED[hook])
        plugins.unregister("sound")
    assert plugins.describe() == []
    register(plugins, "sound", **{hook: watcher})
    register(plugins, "failing", **{hook: lambda: 1 // 0})
    tell = partial(getattr(plugins.armed, attribute), *WATCHED[hook])
    if hook in RAISING:
        with pytest.raises(ZeroDivisionError):
            tell()
        return
    for _ in range(3):
        tell()
    assert heard == [WATCHED[hook]] * 5
    assert caplog.text.count(f"plugin failing failed in {hook}") == 1
    assert "ZeroDivisionError" in caplog.text


def test_hook_implementation_with_fewer_or_reordered_arguments_gets_the_right_ones(
    plugins: Plugins,
) -> None:
    heard: list[object] = []
    functions: dict[str, Any] = {
        "two": lambda in_use, limit: heard.append(in_use / limit),
        "none": lambda: heard.append("nothing"),
        "one": lambda limit: heard.append(-limit),
    }
    for name, function in functions.items():
        register(plugins, name, memslot_pool_exhausted=function)
    assert plugins.armed.pool_exhausted is not None
    plugins.armed.pool_exhausted(REQUEST, 64, 32)
    assert heard == [-64, "nothing", 0.5]


# Calls that arming saves.


def entered_by(call: Callable[[], object]) -> list[str]:
    """Return the Python functions that `call` enters, in order, each with the folder of its file."""
    entered: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            code = frame.f_code
            entered.append(f"{Path(code.co_filename).parent.name}/{code.co_name}")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def of_pluggy(entered: list[str]) -> list[str]:
    return [each for each in entered if each.startswith("pluggy/")]


def test_several_implementations_are_asked_in_the_order_of_pluggy(plugins: Plugins) -> None:
    asked: list[str] = []

    def add(name: str, **options: bool) -> None:
        register(plugins, name, options=options, memslot_grow_memory=lambda: asked.append(name))

    add("last", trylast=True)
    add("early")
    add("first", tryfirst=True)
    add("late")
    hook = plugins.manager.hook.memslot_grow_memory
    assert of_pluggy(entered_by(partial(hook, memory=MEMORY, byte_size=0)))
    order, asked[:] = asked.copy(), []
    entered = entered_by(partial(plugins.armed.grow_memory, MEMORY, 0))
    assert asked == order == ["first", "late", "early", "last"]
    assert of_pluggy(entered) == []


def test_request_without_plugins_enters_no_function_of_pluggy() -> None:
    def request() -> None:
        with guest.instantiate() as instance:
            instance.memory.write(0, b"x")
            instance.reset()

    with FakeHost(Settings(slots=1)) as host:
        guest = host.prepare(bytes.fromhex("0061736d 01000000 05 03 01 00 01"))  # memory of a page
        request()
        entered = entered_by(request)
        assert of_pluggy(entered) == []
        assert "plugins/ask_about_one" in entered
        assert "plugins/notify" not in entered
        register(host.plugins, "watcher", memslot_memory_reset=lambda: None)
        assert "plugins/notify" in entered_by(request)


def test_wrapper_around_a_hook_is_called_and_its_answer_checked(plugins: Plugins) -> None:
    heard: list[object] = []

    class Wrapper:
        answer: object = RESULT

        @hookimpl(wrapper=True)
        def memslot_reset_memory(self, memory):
            heard.append((yield))
            return self.answer

        @hookimpl(wrapper=True)
        def memslot_memory_reset(self, result):
            heard.append(result)
            return (yield)

    wrapper = Wrapper()
    plugins.register(Owner())
    plugins.register(wrapper)
    assert plugins.armed.reset_memory(MEMORY) is RESULT
    assert plugins.armed.memory_reset is not None
    plugins.armed.memory_reset(MEMORY, RESULT)
    assert heard == [RESULT, RESULT]
    wrapper.answer = "clean"
    with pytest.raises(PluginError, match=r"Wrapper, Owner answered .* 'clean'"):
        plugins.armed.reset_memory(MEMORY)
    plugins.unregister(wrapper)
    assert plugins.armed.reset_memory(MEMORY) is RESULT


# Each lifecycle hook.


def test_register_hosts_collects_and_refuses_a_second_host_of_one_name(plugins: Plugins) -> None:
    assert plugins.hosts() == {}
    register(plugins, "a", memslot_register_hosts=lambda: {"tiny": str})
    register(plugins, "b", memslot_register_hosts=lambda: {"large": int})
    wrapper = {"memslot_register_hosts": lambda: (yield)}
    register(plugins, "wrapper", options={"wrapper": True}, **wrapper)
    assert plugins.hosts() == {"tiny": str, "large": int}
    plugins.unregister("wrapper")
    register(plugins, "c", memslot_register_hosts=lambda: {"tiny": bytes})
    with pytest.raises(PluginError, match="'c' and 'a' both register a host 'tiny'"):
        plugins.hosts()


def test_describe_of_a_plugin_that_gives_no_answer_reports_that(plugins: Plugins) -> None:
    good = hooks.Answer("good", True, "probed")
    register(plugins, "good", memslot_describe=lambda: good)
    register(plugins, "raises", memslot_describe=lambda: 1 // 0)
    register(plugins, "wrong", memslot_describe=lambda: "yes")
    reasons = {"wrong": "with 'yes'; allowed are Answer", "raises": "failed: ZeroDivisionError"}
    *broken, last = plugins.answers()
    assert last is good
    assert [(each.plugin, each.answers) for each in broken] == [(name, False) for name in reasons]
    assert [each.reason for each in broken if reasons[each.plugin] not in each.reason] == []


def test_statistics_are_collected_and_nonsense_refused(plugins: Plugins) -> None:
    counters: dict[str, Any] = dict.fromkeys(get_type_hints(hooks.PoolStatistics), 0)
    pool = hooks.PoolStatistics(**counters)
    register(plugins, "pool", memslot_statistics=lambda: pool)
    register(plugins, "silent", memslot_statistics=lambda: None)
    assert plugins.statistics() == [pool]
    register(plugins, "wrong", memslot_statistics=lambda: {"leases": 1})
    with pytest.raises(PluginError, match="wrong answered memslot_statistics"):
        plugins.statistics()


@pytest.mark.parametrize("hook", ["memslot_forget_image", "memslot_close_host"])
def test_end_hook_that_raises_still_calls_the_others_and_raises_the_first_exception(
    plugins: Plugins, hook: str
) -> None:
    told: list[int] = []

    def listen(number: int) -> None:
        told.append(number)
        if number > 1:
            raise OSError(f"exception {number}")

    for number in (1, 2, 3):
        register(plugins, str(number), **{hook: lambda _number=number: listen(_number)})
    plugins.open_host("fake", None)
    with pytest.raises(OSError, match="exception 3"):
        plugins.forget_image(IMAGE) if "image" in hook else plugins.close_host("fake")
    assert told == [3, 2, 1]


class Listener:
    """A plugin that records hosts as they open and close, and raises once at each of the given events."""

    def __init__(self, *failing: str) -> None:
        self.heard: list[str] = []
        self.failing = list(failing)

    def _hear(self, event: str, host: str) -> None:
        self.heard.append(f"{event} {host}")
        if event in self.failing:
            self.failing.remove(event)
            raise OSError("busy")

    @hookimpl
    def memslot_open_host(self, host, settings):
        self._hear("open", f"{host} {settings}")

    @hookimpl
    def memslot_close_host(self, host):
        self._hear("close", host)


def test_host_is_opened_and_closed_once_also_for_a_late_plugin(plugins: Plugins) -> None:
    early, late = Listener(), Listener()
    plugins.register(early)
    plugins.open_host("a", 1)
    plugins.open_host("b", 2)
    with pytest.raises(PluginError, match="'a' is open"):
        plugins.open_host("a", 3)
    plugins.close_host("b")
    plugins.register(late, name="late")
    plugins.unregister(late)
    plugins.close_host("a")
    plugins.close_host("a")
    assert early.heard == ["open a 1", "open b 2", "close b", "close a"]
    assert late.heard == ["open a 1", "close a"]
    for unknown in ("lat", late):
        with pytest.raises(PluginError, match="is not registered; registered are: Listener"):
            plugins.unregister(unknown)


def test_host_or_late_plugin_that_cannot_open_is_closed_again(plugins: Plugins) -> None:
    sound, refusing = Listener(), Listener("open", "open")
    plugins.register(sound, name="sound")
    plugins.register(refusing, name="refusing")
    with pytest.raises(OSError, match="busy"):
        plugins.open_host("a", 1)
    plugins.close_host("a")
    assert (sound.heard, refusing.heard) == (["close a"], ["open a 1", "close a"])
    plugins.unregister(refusing)
    plugins.open_host("a", 2)
    with pytest.raises(OSError, match="busy"):
        plugins.register(refusing)
    assert [each.name for each in plugins.describe()] == ["sound"]


def test_plugin_that_cannot_close_is_reported_once_and_the_others_close(plugins: Plugins) -> None:
    sound, stuck = Listener(), Listener("close")
    plugins.register(sound, name="sound")
    plugins.register(stuck, name="stuck")
    plugins.open_host("a", 1)
    with pytest.raises(OSError, match="busy"):
        plugins.close_host("a")
    plugins.close_host("a")
    assert sound.heard == stuck.heard == ["open a 1", "close a"]
    plugins.open_host("a", 2)


def test_resets_are_bound_again_if_a_plugin_comes_while_they_are_bound(plugins: Plugins) -> None:
    live: Any = SimpleNamespace()

    class Bound:
        """A memory that another thread registers a plugin beside, as its reset is bound."""

        owner = None

        @property
        def reset(self) -> None:
            register(plugins, "late", memslot_memory_reset=lambda memory, result: None)

    live.memories = (Bound(),)
    Live.bind_resets(live, plugins.armed)
    assert live.bound_to is not plugins.armed.epoch
