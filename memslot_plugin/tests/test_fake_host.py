"""The fake host end to end: guests, instances and plugins as anywhere, without a runtime."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from memslot_hooks import LinearMemory, MemoryRequest, ResetResult, hookimpl
from memslot_plugin import (
    AccessOutOfBounds,
    ExportNotFound,
    FakeHost,
    GrowthRefused,
    GuestNotFound,
    GuestTrap,
    InUse,
    InvalidModule,
    MemoryTooLarge,
    PluginError,
    PoolExhausted,
    PoolTimeout,
    SettingError,
    Settings,
    SystemCallError,
    UsedAfterClose,
    available_hosts,
    open_host,
    probe,
)
from memslot_plugin._core import PAGE_SIZE
from memslot_plugin.hosts.fake import FakeLive
from memslot_plugin.hosts.instance import Instance

pytestmark = pytest.mark.usefixtures("no_leaks")

WASM_PAGE = 65536
SMALL: dict[str, Any] = {"slots": 3, "reserved": 1 << 20, "guard": WASM_PAGE}


def leb(value: int) -> bytes:
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        out.append(byte | (0x80 if value else 0))
        if not value:
            return bytes(out)


def section(number: int, *items: bytes) -> bytes:
    body = leb(len(items)) + b"".join(items)
    return bytes([number]) + leb(len(body)) + body


def module(*segments: tuple[int, bytes], pages: int = 1, maximum: int | None = None) -> bytes:
    """A module with one memory and active data segments (core specification, 5.5)."""
    limits = b"\0" + leb(pages) if maximum is None else b"\1" + leb(pages) + leb(maximum)
    # Offsets are i32.const with a signed LEB128: one byte too many keeps the sign bit clear.
    data = [
        b"\0\x41" + signed(offset) + b"\x0b" + leb(len(content)) + content
        for offset, content in segments
    ]
    return b"\0asm\1\0\0\0" + section(5, limits) + (section(11, *data) if data else b"")


def signed(value: int) -> bytes:
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        if value == 0 and not byte & 0x40:
            return bytes([*out, byte])
        out.append(byte | 0x80)


GUEST = module((8, b"hello"), (60_000, b"later" * 10), pages=1, maximum=8)


class Watcher:
    """Notes every watching hook."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    @hookimpl
    def memslot_guest_prepared(self, guest_id: str, report: Any) -> None:
        self.seen.append(("prepared", guest_id))

    @hookimpl
    def memslot_memory_created(self, memory: LinearMemory) -> None:
        self.seen.append(("created", memory.request.tenant))

    @hookimpl
    def memslot_memory_reset(self, memory: LinearMemory, result: ResetResult) -> None:
        self.seen.append(("reset", result.strategy))

    @hookimpl
    def memslot_pool_exhausted(self, request: MemoryRequest, limit: int, in_use: int) -> None:
        self.seen.append(("exhausted", request.tenant, limit, in_use))


def store(live: FakeLive, offset: int, value: int) -> None:
    live.write(0, offset, bytes([value]))


def load(live: FakeLive, offset: int) -> int:
    return live.read(0, offset, 1)[0]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "store": store,
    "load": load,
    "grow": lambda live, pages: live.grow(0, pages),
}


@pytest.fixture(params=["memfd", "anonymous"])
def settings(request: pytest.FixtureRequest) -> Settings:
    return Settings(plugins=[request.param], **SMALL)


@pytest.fixture
def host(settings: Settings) -> Iterator[FakeHost]:
    with FakeHost(settings, functions=FUNCTIONS) as opened:
        yield opened


def pool_of(host: FakeHost) -> Any:
    (pool,) = host.statistics().pools
    return pool


# Lives


def test_each_instance_is_pristine(host: FakeHost) -> None:
    guest = host.prepare(GUEST)
    assert [memory.reason for memory in guest.report.memories] == [None]
    for tenant in range(5):
        with guest.instantiate() as instance:
            assert instance.memory.read(8, 5) == b"hello"
            assert instance.memory.read(60_000, 50) == b"later" * 10
            assert instance.memory.read(100, 50) == bytes(50)
            instance.call("store", 100, tenant + 1)
            instance.memory.write(8, b"taken")
            assert instance.call("load", 100) == tenant + 1
    assert pool_of(host).in_use == 0
    assert pool_of(host).leases == 5


def test_a_reset_keeps_the_handle_and_gives_up_what_was_grown(host: FakeHost) -> None:
    instance = host.prepare(GUEST).instantiate()
    instance.memory.write(8, b"taken")
    assert instance.call("grow", 2) == 1
    assert len(instance.memory) == instance.memory.byte_size == 3 * WASM_PAGE
    instance.memory.write(3 * WASM_PAGE - 4, b"tail")
    instance.reset()
    assert instance.memory.byte_size == WASM_PAGE
    assert instance.memory.read(8, 5) == b"hello"
    instance.memory.grow(2)
    assert instance.memory.read(WASM_PAGE, 2 * WASM_PAGE) == bytes(2 * WASM_PAGE)
    assert host.statistics().resets == 1
    instance.close()


def test_two_guests_never_see_each_other(host: FakeHost) -> None:
    guests = [host.prepare(module((0, bytes([65 + n]) * 100), pages=n + 1)) for n in range(3)]
    for turn in range(12):
        with guests[turn % 3].instantiate() as instance:
            expected = bytes([65 + turn % 3]) * 100
            assert instance.memory.read(0, 100) == expected
            size = instance.memory.byte_size
            assert size == (turn % 3 + 1) * WASM_PAGE
            assert instance.memory.read(100, size - 100) == bytes(size - 100)
            instance.memory.write(0, b"\xff" * size)


def test_everything_is_bounds_checked(host: FakeHost) -> None:
    instance = host.prepare(GUEST).instantiate()
    for offset, length in [(WASM_PAGE, 1), (WASM_PAGE - 1, 2), (-1, 1), (0, -1), (2**40, 1)]:
        with pytest.raises(AccessOutOfBounds, match=f"outside memory 0 of {WASM_PAGE} bytes"):
            instance.memory.read(offset, length)
    with pytest.raises(AccessOutOfBounds):
        instance.memory.write(WASM_PAGE - 1, b"ab")
    assert instance.memory.read(WASM_PAGE - 1, 1) == b"\0"
    assert instance.memory.read(WASM_PAGE, 0) == b""
    with pytest.raises(GuestTrap, match="out of bounds memory access"):
        instance.call("load", WASM_PAGE)
    with pytest.raises(ExportNotFound, match="it has grow, load, store"):
        instance.call("nothing")
    with pytest.raises(ExportNotFound):
        instance.global_value("g")
    instance.close()


# Growth


def test_growth_ends_at_the_memorys_maximum(host: FakeHost) -> None:
    instance = host.prepare(GUEST).instantiate()
    assert instance.memory.grow(7) == 1
    for pages in (1, 10**9, -1):
        with pytest.raises(GrowthRefused, match=f"may not grow by {pages} pages"):
            instance.memory.grow(pages)
    assert instance.memory.grow(0) == 8
    instance.close()


def test_a_setting_limits_growth_and_size(settings: Settings) -> None:
    with FakeHost(settings.replace(memory_limit=3 * WASM_PAGE)) as host:
        with host.prepare(module(pages=1)).instantiate() as instance:
            assert instance.memory.grow(2) == 1
            with pytest.raises(GrowthRefused):
                instance.memory.grow(1)
        with pytest.raises(MemoryTooLarge, match=r"module needs 262144 bytes .* allow 196608"):
            host.prepare(module(pages=4))
        with pytest.raises(MemoryTooLarge):
            host.prepare(module(pages=17))


def test_a_plugin_refuses_a_tenants_growth(settings: Settings) -> None:
    class Limit:
        @hookimpl(tryfirst=True)
        def memslot_grow_memory(self, memory: LinearMemory, byte_size: int) -> bool | None:
            greedy = memory.request.tenant == "greedy"
            return False if greedy and byte_size > 2 * WASM_PAGE else None

    with FakeHost(settings, plugins=[Limit()]) as host:
        guest = host.prepare(GUEST)
        with guest.instantiate(tenant="greedy") as instance:
            assert instance.memory.grow(1) == 1
            with pytest.raises(GrowthRefused):
                instance.memory.grow(1)
            assert instance.memory.byte_size == 2 * WASM_PAGE
        with guest.instantiate(tenant="modest") as instance:
            assert instance.memory.grow(5) == 1


# Plugins


def test_watching_hooks_are_armed_and_told(settings: Settings) -> None:
    with FakeHost(settings) as host:
        assert host.plugins.armed.memory_created is None
    watcher = Watcher()
    with FakeHost(settings.replace(slots=1, reset="copy"), plugins=[watcher]) as host:
        guest = host.prepare(GUEST, name="toy")
        with guest.instantiate(tenant="ann") as instance:
            instance.reset()
            with pytest.raises(PoolExhausted) as caught:
                guest.instantiate(tenant="bob")
            assert (caught.value.limit, caught.value.in_use) == (1, 1)
            with pytest.raises(PoolTimeout):
                guest.instantiate(tenant="eve", wait_timeout=0.05)
    assert watcher.seen == [
        ("prepared", guest.guest_id),
        ("created", "ann"),
        ("reset", "copy"),
        ("exhausted", "bob", 1, 1),
        ("exhausted", "eve", 1, 1),
        ("reset", "copy"),
    ]


def test_a_memory_that_is_destroyed_was_not_reset() -> None:
    watcher = Watcher()
    small = Settings(**SMALL, allocation="on-demand", reset="copy")
    with FakeHost(small, plugins=[watcher]) as host:
        guest = host.prepare(GUEST)
        with guest.instantiate(tenant="ann") as instance:
            instance.reset()
    assert watcher.seen == [
        ("prepared", guest.guest_id),
        ("created", "ann"),
        ("reset", "copy"),
    ]


class Reasons:
    """Notes how memories were reset and why."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    @hookimpl
    def memslot_memory_reset(self, result: ResetResult) -> None:
        self.seen.add(f"{result.strategy}: {result.reason}".removesuffix(": "))


@pytest.mark.skipif(
    not probe().pagemap.works, reason=f"impossible: PAGEMAP_SCAN: {probe().pagemap.detail}"
)
@pytest.mark.parametrize(
    ("keep_resident", "how"),
    [(1 << 30, "madvise: pages not written lately"), (10 * PAGE_SIZE, "pagemap: keep_resident")],
)
def test_statistics_and_watchers_learn_how_a_reset_was_done_and_why(
    keep_resident: int, how: str
) -> None:
    watcher = Reasons()
    chosen = Settings(**SMALL, plugins=["memfd"], reset="auto", keep_resident=keep_resident)
    with FakeHost(chosen, plugins=[watcher]) as host:
        pages = 8 * WASM_PAGE // PAGE_SIZE
        with host.prepare(module(pages=8)).instantiate() as instance:
            for request in range(1000):
                for page in range(1 if request else pages):  # all pages at first, and then one
                    instance.memory.write(page * PAGE_SIZE, b"x")
                instance.reset()
                if how in watcher.seen:
                    break
        pool = pool_of(host)
    assert how in watcher.seen
    assert pool.resets_by[how] >= 1
    assert set(pool.resets_by) == watcher.seen
    assert sum(pool.resets_by.values()) == pool.resets


def test_without_an_allocator_there_is_no_memory() -> None:
    """Nobody builds images, nobody creates memories: the guest is prepared, and instantiating says who was asked."""
    with FakeHost(Settings(plugins=(), **SMALL), plugins=[Watcher()]) as host:
        guest = host.prepare(module(pages=1))
        with pytest.raises(PluginError, match="no plugin answered memslot_create_memory"):
            guest.instantiate()
        assert host.statistics().live_instances == 0


def test_all_memories_or_none(settings: Settings) -> None:
    """A module of two memories that finds one slot leases none."""
    two = b"\0asm\1\0\0\0" + section(5, b"\0" + leb(1), b"\0" + leb(2))
    with FakeHost(settings.replace(slots=2)) as host:
        guest = host.prepare(two)
        with guest.instantiate() as instance:
            assert [memory.byte_size for memory in instance.memories] == [WASM_PAGE, 2 * WASM_PAGE]
            instance.memories[0].write(0, b"first")
            assert instance.memories[1].read(0, 5) == bytes(5)
        small = host.prepare(module()).instantiate()
        with pytest.raises(PoolExhausted):
            guest.instantiate()
        assert pool_of(host).in_use == 1
        small.close()
        guest.instantiate().close()


# Ends


def test_closing_with_live_instances_is_refused_unless_forced(settings: Settings) -> None:
    host = FakeHost(settings)
    guest = host.prepare(GUEST)
    instances = [guest.instantiate() for _ in range(2)]
    with pytest.raises(
        InUse, match=r"the fake host has 2 live instances; close them first, or use"
    ):
        host.close()
    assert instances[0].memory.read(8, 5) == b"hello"
    host.close(force=True)
    host.close()
    assert all(instance.closed for instance in instances)
    for use in (
        lambda: instances[0].memory.read(0, 1),
        instances[0].reset,
        guest.instantiate,
        host.statistics,
        lambda: host.prepare(GUEST),
    ):
        with pytest.raises(UsedAfterClose):
            use()
    instances[0].close()


def test_an_instance_is_closed_once_and_used_no_more(host: FakeHost) -> None:
    instance = host.prepare(GUEST).instantiate()
    function = instance.function("load")
    assert function(8) == ord("h")
    instance.close()
    instance.close()
    for use in (
        lambda: instance.call("load", 0),
        instance.reset,
        lambda: instance.memory.byte_size,
    ):
        with pytest.raises(UsedAfterClose, match="instance of module was closed"):
            use()
    assert pool_of(host).in_use == 0
    assert "closed" in repr(instance)


def test_dropped_handles_come_back(host: FakeHost) -> None:
    guest = host.prepare(GUEST)
    for _ in range(4):
        for _ in range(3):  # as many as there are slots
            guest.instantiate().memory.write(0, b"dirty")
        gc.collect()
        with guest.instantiate() as instance:
            assert instance.memory.read(0, 5) == bytes(5)
    assert host.statistics().live_instances == 0
    assert pool_of(host).in_use == 0


def test_a_handle_that_is_cut_short_while_it_is_made_goes_in_silence(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted_at(line: int) -> bool:
        """Make a handle, and be interrupted at this line of its making; whether there was one."""
        lines = [0]

        def trace(frame: FrameType, event: str, _: object) -> Any:
            if frame.f_code is not Instance.__init__.__code__:
                return None
            lines[0] += event == "line"
            if lines[0] == line:
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        try:
            sys.settrace(trace)
            Instance(guest, live, guest.binding)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    guest = host.prepare(module((0, b"x")))
    noise: list[object] = []
    with guest.instantiate() as instance:
        live = instance._live()
        monkeypatch.setattr(sys, "unraisablehook", noise.append)
        assert [interrupted_at(line) for line in range(1, 5)] == [True, True, True, False]
        assert noise == []
        host._dropped.clear()


def test_a_handle_that_is_dropped_in_another_thread_comes_back(host: FakeHost) -> None:
    guest = host.prepare(GUEST)
    held = [guest.instantiate() for _ in range(3)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    gc.collect()
    assert host.statistics().live_instances == 0


def test_a_closed_guest_gives_its_memory_back(host: FakeHost, resources: Any) -> None:
    host.prepare(GUEST).instantiate().close()
    before = resources()
    guest = host.prepare(module((0, b"x" * 5000)))
    with guest.instantiate() as live:
        guest.instantiate().close()
        guest.close()
        guest.close()
        assert live.memory.read(0, 3) == b"xxx"  # live instances go on
        live.memory.write(0, b"yyy")
        with pytest.raises(UsedAfterClose, match="cannot be reset; prepare it again"):
            live.reset()
        assert live.memory.read(0, 3) == b"yyy"
        with pytest.raises(UsedAfterClose, match="the guest module was closed; prepare it again"):
            guest.instantiate()
    now = resources()
    assert now.image_mappings == before.image_mappings
    assert now.descriptors == before.descriptors


def test_a_failed_reset_closes_the_instance_and_loses_no_slot(
    settings: Settings, inject: Any
) -> None:
    with FakeHost(settings.replace(reset="madvise")) as host:
        guest = host.prepare(GUEST)
        instance = guest.instantiate()
        inject("madvise", error=12)
        with pytest.raises(SystemCallError, match="MADV_DONTNEED in a reset"):
            instance.reset()
        assert instance.closed
        instance = guest.instantiate()
        inject("madvise", error=12)
        with pytest.raises(SystemCallError):
            instance.close()
        assert instance.closed
        assert (pool_of(host).in_use, pool_of(host).limit) == (0, 3)
        assert host.statistics().live_instances == 0


@pytest.mark.parametrize("forced", [False, True])
def test_closing_again_gives_back_what_could_not_be_unmapped(
    settings: Settings, inject: Any, forced: bool, no_leaks: None
) -> None:
    host = FakeHost(settings)
    guest = host.prepare(GUEST)
    guest.instantiate().close()
    guest.close()
    inject("munmap", error=12)
    with pytest.raises(SystemCallError, match="unmapping the pool's reservation"):
        host.close(force=forced)
    with pytest.raises(UsedAfterClose):
        host.prepare(GUEST)
    host.close(force=forced)
    host.close()


def test_a_guest_whose_image_could_not_be_unmapped_is_closed_again(
    inject: Any, resources: Any
) -> None:
    before = resources()
    with FakeHost(Settings(plugins=["memfd"], **SMALL)) as host:
        guest = host.prepare(GUEST)
        inject("munmap", error=12)
        with pytest.raises(SystemCallError, match="unmapping the image of"):
            guest.close()
        assert guest.closed
        guest.close()
        assert resources().image_mappings == before.image_mappings
        guest.close()


# Opening and preparing


def test_it_is_opened_by_name_with_settings_as_keywords() -> None:
    with open_host("fake", slots=2, functions=FUNCTIONS) as host:
        assert isinstance(host, FakeHost)
        assert host.settings.slots == 2
        assert host.functions == FUNCTIONS
    with open_host(settings=Settings(host="fake", slots=5), slots=4) as host:
        assert (host.name, host.settings.slots) == ("fake", 4)
    assert available_hosts()["fake"] is None
    with pytest.raises(
        SettingError,
        match="setting host = 'mine' is not allowed: it is one of auto, wasmtime, wasm",
    ):
        open_host("mine")
    with pytest.raises(SettingError, match="slots = 0 is not allowed"):
        open_host("fake", slots=0)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (b"", InvalidModule),
        (b"not wasm", InvalidModule),
        (GUEST[:20], InvalidModule),
        (b"\0asm\x0d\0\1\0", InvalidModule),
        ("(module)", InvalidModule),
        ("nowhere.wasm", GuestNotFound),
        ("/", InvalidModule),
    ],
    ids=["empty", "text", "truncated", "component", "wat", "missing", "folder"],
)
def test_what_is_no_guest_is_a_clear_error(host: FakeHost, source: Any, error: Any) -> None:
    with pytest.raises(error) as caught:
        host.prepare(source)
    assert str(caught.value)
    assert host.statistics().guests == 0
    host.prepare(GUEST).instantiate().close()


def test_threads_share_a_host(host: FakeHost) -> None:
    guest = host.prepare(GUEST)
    wrong: list[Any] = []

    def work(number: int) -> None:
        for _ in range(30):
            with guest.instantiate(wait_timeout=60) as instance:
                if instance.memory.read(0, 8) != bytes(8):
                    wrong.append(number)
                instance.memory.write(0, bytes([number]) * 8)
                if number % 2:
                    instance.reset()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (pool_of(host).in_use, host.statistics().live_instances) == (0, 0)


class Broken:
    """Every reset fails, as a kernel may refuse it."""

    failing = True

    @hookimpl(wrapper=True)
    def memslot_release_memory(self) -> Any:
        result = yield
        if self.failing:
            raise SystemCallError(12, "the kernel refuses")
        return result


def test_a_forced_close_goes_on_after_a_failed_reset(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    host = FakeHost(settings, plugins=[Broken()])
    guest = host.prepare(module())
    handles = [guest.instantiate() for _ in range(3)]
    host.close(force=True)
    assert all(handle.closed for handle in handles)
    assert caplog.text.count("the kernel refuses") == 3


def test_a_dropped_instance_whose_reset_fails_is_no_error_of_the_next_caller(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken()
    with FakeHost(settings, plugins=[broken]) as host:
        guest = host.prepare(module())
        dropped = guest.instantiate()
        del dropped
        gc.collect()
        next_one = guest.instantiate()
        assert "the kernel refuses" in caplog.text
        broken.failing = False
        next_one.close()
