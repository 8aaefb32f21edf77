"""The plugin manager: loading, blocking, the mistakes it names, each hook, and the calls that arming saves."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, get_type_hints

import pytest

import memslot_hooks as hooks
from memslot_hooks import DECIDING, HEEDED, WATCHING, hookimpl
from memslot_plugin.errors import PluginError, SettingError
from memslot_plugin.hosts import FakeHost
from memslot_plugin.plugins import PluginInfo, Plugins, manager
from memslot_plugin.plugins.arming import arguments_of
from memslot_plugin.settings import Settings

SIZES: dict[str, Any] = {"minimum": 65536, "maximum": None, "reserved": 2**32, "guard": 2**25}
REQUEST = hooks.MemoryRequest(**SIZES, image=None, guest_id="echo", memory_index=0, host="fake")
MEMORY = hooks.LinearMemory(REQUEST, 0x7F00_0000_0000, 65536, owner=None)
RESULT = hooks.ResetResult(4096, 10, "copy")
IMAGE: Any = SimpleNamespace(kind="bytes", byte_size=0, extents=(), close=print)

Install = Callable[..., None]
UNMARKED = None


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution with entry points on sys.path, as pip leaves it there."""

    def install(distribution: str, module: str, code: str, **entries: str) -> None:
        folder = tmp_path / distribution
        metadata = folder / f"{distribution}-1.5.dist-info"
        metadata.mkdir(parents=True)
        (folder / f"{module}.py").write_text(code)
        (metadata / "METADATA").write_text(f"Name: {distribution}\nVersion: 1.5\n")
        lines = [f"{name} = {module}{value}\n" for name, value in entries.items()]
        (metadata / "entry_points.txt").write_text("[memslot]\n" + "".join(lines))
        monkeypatch.syspath_prepend(folder)

    yield install
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


GROWER = """
from memslot_hooks import hookimpl

class Grower:
    @hookimpl
    def memslot_grow_memory(self, memory, byte_size):
        return True
"""


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


def info(plugins: Plugins, name: str) -> PluginInfo:
    (found,) = [each for each in plugins.describe() if each.name == name]
    return found


# Loading.


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


def test_unknown_name_is_answered_with_the_nearest(install: Install, caplog: Any) -> None:
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


def test_second_plugin_of_one_name_is_refused(install: Install, plugins: Plugins) -> None:
    install("old", "first_module", GROWER, same=":Grower")
    install("first", "first_module", GROWER, same=":Grower")
    assert Plugins(only=["same"]).names == ("same",)  # one object, in the metadata twice
    install("second", "second_module", GROWER, same=":Grower")
    with pytest.raises(PluginError, match=r"two plugins are named 'same': .* 1\.5 and .* 1\.5"):
        Plugins(only=["same"])
    assert "same" not in Plugins(blocked=["same"], only=["same"]).names  # blocking resolves it

    owner = Owner()
    plugins.register(owner)
    with pytest.raises(PluginError, match=r"two plugins are named 'Owner'.*another name"):
        plugins.register(Owner())
    with pytest.raises(PluginError, match="already registered"):
        plugins.register(owner, name="b")
    assert plugins.register(Owner(), name="another") == "another"
    assert plugins.names == ("another", "Owner")


def test_hosts_of_one_process_scan_once(install: Install, monkeypatch: Any) -> None:
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
    installed = Path(sys.path[0]) / "two-1.5.dist-info" / "entry_points.txt"
    installed.write_text("[memslot]\nlater = two_module:Grower\n")
    assert "later" not in Plugins().names  # the next process sees it
    assert len(scans) == 2
    manager._installed.cache_clear()
    assert "later" in Plugins().names


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


def test_mistake_of_an_installed_plugin_names_its_distribution(install: Install) -> None:
    install("typo", "typo_module", GROWER.replace("grow_memory", "grow_memry"), typo=":Grower")
    with pytest.raises(PluginError, match=r"typo 1\.5.*'memslot_grow_memry'"):
        Plugins(only=["typo"])


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
"""Arguments, an answer, one of a wrong type, and the name of the right type."""

SILENCE = {"memslot_build_image": None, "memslot_warm_memory": 0, "memslot_grow_memory": False}
"""The answer if no plugin has one; elsewhere that is an error, for it must never pass for a reset."""


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

    assert_silent("none")
    register(plugins, "mute", **{hook: lambda: None})
    assert_silent("mute")
    register(plugins, "owner", **{hook: lambda: answer})
    assert ask() is answer
    register(plugins, "wrong", **{hook: lambda: wrong})
    with pytest.raises(PluginError) as caught:
        ask()
    message = f"plugin wrong answered {hook} with {wrong!r}; allowed are {kind} and None"
    assert str(caught.value) == message
    register(plugins, "broken", **{hook: lambda: 1 // 0})
    with pytest.raises(ZeroDivisionError):
        ask()


WATCHED: dict[str, tuple[object, ...]] = {
    "memslot_guest_prepared": ("echo", "a report"),
    "memslot_memory_created": (MEMORY,),
    "memslot_pool_exhausted": (REQUEST, 8, 7),
    "memslot_memory_reset": (MEMORY, RESULT),
    "memslot_instance_restored": ("an instance",),
}


@pytest.mark.parametrize("hook", WATCHING)
def test_watching_hook_costs_no_call_unless_it_is_implemented(plugins: Plugins, hook: str) -> None:
    attribute = hook.removeprefix("memslot_")
    heard: list[object] = []
    names = ", ".join(arguments_of(hook))
    watcher = eval(f"lambda {names}: heard.append(({names},))", {"heard": heard})
    armed = plugins.armed
    for _ in range(2):
        assert getattr(armed, attribute) is None
        register(plugins, "watcher", **{hook: watcher})
        getattr(armed, attribute)(*WATCHED[hook])
        plugins.unregister("watcher")
    assert getattr(armed, attribute) is None
    assert heard == [WATCHED[hook]] * 2
    assert plugins.describe() == []


@pytest.mark.parametrize("hook", WATCHING)
def test_watching_hook_that_raises_is_logged_once(plugins: Plugins, caplog: Any, hook: str) -> None:
    heard: list[int] = []
    register(plugins, "sound", **{hook: lambda: heard.append(1)})
    register(plugins, "failing", **{hook: lambda: 1 // 0})
    tell = partial(getattr(plugins.armed, hook.removeprefix("memslot_")), *WATCHED[hook])
    if hook in HEEDED:
        with pytest.raises(ZeroDivisionError):
            tell()
        return
    for _ in range(3):
        tell()
    assert len(heard) == 3
    assert caplog.text.count(f"plugin failing failed in {hook}") == 1
    assert "ZeroDivisionError" in caplog.text
    failures = {each.name: each.watch_failures for each in plugins.describe()}
    assert failures == {"sound": 0, "failing": 3}


def test_arguments_may_be_left_out_and_reordered(plugins: Plugins) -> None:
    heard: list[object] = []
    register(
        plugins, "two", memslot_pool_exhausted=lambda in_use, limit: heard.append(in_use / limit)
    )
    register(plugins, "none", memslot_pool_exhausted=lambda: heard.append("nothing"))
    register(plugins, "one", memslot_pool_exhausted=lambda limit: heard.append(-limit))
    assert plugins.armed.pool_exhausted is not None
    plugins.armed.pool_exhausted(REQUEST, 64, 32)
    assert heard == [-64, "nothing", 0.5]


# Calls that arming saves.


def entered_by(call: Callable[[], object]) -> list[str]:
    """The Python functions that `call` enters, in order, each with the folder of its file."""
    entered: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            folder = Path(frame.f_code.co_filename).parent.name
            entered.append(f"{folder}/{frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return entered


def of_pluggy(entered: list[str]) -> list[str]:
    return [each for each in entered if each.startswith("pluggy/")]


def test_armed_call_of_one_implementation_enters_no_function_of_pluggy(plugins: Plugins) -> None:
    plugins.register(Owner())
    entered = entered_by(partial(plugins.armed.reset_memory, MEMORY))
    assert entered == ["plugins/ask", "tests/memslot_reset_memory"]
    hook = plugins.manager.hook.memslot_reset_memory
    assert of_pluggy(entered_by(partial(hook, memory=MEMORY))) != []


def test_several_implementations_are_asked_in_the_order_of_pluggy(plugins: Plugins) -> None:
    asked: list[str] = []

    def add(name: str, **options: bool) -> None:
        register(plugins, name, options=options, memslot_grow_memory=lambda: asked.append(name))

    add("last", trylast=True)
    add("early")
    add("first", tryfirst=True)
    add("late")
    plugins.manager.hook.memslot_grow_memory(memory=MEMORY, byte_size=0)
    order, asked[:] = asked.copy(), []
    entered = entered_by(partial(plugins.armed.grow_memory, MEMORY, 0))
    assert asked == order == ["first", "late", "early", "last"]
    assert of_pluggy(entered) == []


def test_request_on_a_host_enters_no_function_of_pluggy_and_tells_no_plugin() -> None:
    def request() -> None:
        with guest.instantiate() as instance:
            instance.memory.write(0, b"x")
            instance.reset()

    with FakeHost(Settings(slots=1)) as host:
        guest = host.prepare(bytes.fromhex("0061736d 01000000 05 03 01 00 01"))  # memory of a page
        request()
        entered = entered_by(request)
        assert of_pluggy(entered) == []
        assert "plugins/ask" in entered
        assert "plugins/tell" not in entered
        register(host.plugins, "watcher", memslot_memory_reset=lambda: None)
        assert "plugins/tell" in entered_by(request)


def test_wrapper_is_heard_and_its_answer_checked(plugins: Plugins) -> None:
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
    class Wrapper:
        @hookimpl(wrapper=True)
        def memslot_register_hosts(self):
            return (yield)

    assert plugins.hosts() == {}
    register(plugins, "a", memslot_register_hosts=lambda: {"tiny": str})
    register(plugins, "b", memslot_register_hosts=lambda: {"large": int})
    assert plugins.hosts() == {"tiny": str, "large": int}
    plugins.register(Wrapper)
    assert plugins.hosts() == {"tiny": str, "large": int}
    plugins.unregister("Wrapper")
    register(plugins, "c", memslot_register_hosts=lambda: {"tiny": bytes})
    with pytest.raises(PluginError, match="'c' and 'a' both register a host 'tiny'"):
        plugins.hosts()


def test_describe_reports_what_is_no_answer_as_an_answer(plugins: Plugins) -> None:
    good = hooks.Answer("good", True, "probed")
    register(plugins, "good", memslot_describe=lambda: good)
    register(plugins, "raises", memslot_describe=lambda: 1 // 0)
    register(plugins, "wrong", memslot_describe=lambda: "yes")
    reasons = {"wrong": "answered 'yes', which is no Answer", "raises": "raised ZeroDivisionError"}
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
def test_end_is_told_to_all_and_the_first_exception_raised(plugins: Plugins, hook: str) -> None:
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
    """Writes down which hosts open and close, and raises at the events given, each time once."""

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


def test_closing_again_asks_only_the_plugins_that_could_not_close(plugins: Plugins) -> None:
    sound, stuck = Listener(), Listener("close", "close")
    plugins.register(sound, name="sound")
    plugins.register(stuck, name="stuck")
    plugins.open_host("a", 1)
    for _ in range(2):
        with pytest.raises(OSError, match="busy"):
            plugins.close_host("a")
    plugins.close_host("a")
    plugins.close_host("a")
    assert sound.heard == ["open a 1", "close a"]
    assert stuck.heard == ["open a 1", *["close a"] * 3]
