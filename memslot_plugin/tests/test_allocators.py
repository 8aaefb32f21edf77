"""The built-in allocators, called as a host calls them: answers, refusals and released memories."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from memslot_hooks import InitialContent, LinearMemory, MemoryRequest, Segment
from memslot_plugin import BytesImage, MemfdImage, Settings, _core, allocators
from memslot_plugin._core import lib
from memslot_plugin.allocators import AnonymousAllocator, MemfdAllocator
from memslot_plugin.errors import MemoryTooLarge, SystemCallError, Unsupported, UsedAfterClose
from memslot_plugin.memory.probe import Finding, probe
from memslot_plugin.tests.faults import fail_next_reset
from memslot_plugin.tests.slots import Runtime

pytestmark = pytest.mark.usefixtures("no_leaks")

PAGE = 65536
RESERVED = 16 * PAGE
Allocator = MemfdAllocator | AnonymousAllocator
Make = Callable[..., Allocator]

CONTENT = InitialContent(2 * PAGE, (Segment(5, b"hello"), Segment(70_000, b"world")), "toy")
PRISTINE = bytes(5) + b"hello" + bytes(70_000 - 10) + b"world" + bytes(2 * PAGE - 70_005)


@pytest.fixture(params=[MemfdAllocator, AnonymousAllocator], ids=["memfd", "anonymous"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Return a function that opens an allocator with settings."""
    opened: list[Allocator] = []

    def opener(**settings: Any) -> Allocator:
        opened.append(request.param())
        chosen = {"slots": 2, "reserved": RESERVED, "guard": PAGE, "reset": "madvise"}
        opened[-1].memslot_open_host(Settings(**{**chosen, **settings}))
        return opened[-1]

    yield opener
    for allocator in opened:
        if allocator.pool is not None:
            allocator.pool.check()
        allocator.memslot_close_host()


def request_for(image: Any = None, **changes: Any) -> MemoryRequest:
    sizes = {"minimum": 2 * PAGE, "maximum": 8 * PAGE, "reserved": RESERVED, "guard": PAGE}
    guest: dict[str, Any] = {"guest_id": "toy#1", "memory_index": 0, "host": "fake"}
    return MemoryRequest(image=image, **{**sizes, **guest, **changes})


def bytes_of(memory: LinearMemory) -> bytes:
    return ctypes.string_at(memory.base, memory.byte_size)


def created(allocator: Allocator, request: MemoryRequest) -> LinearMemory:
    memory = allocator.memslot_create_memory(request)
    assert memory is not None
    return memory


def test_memory_led_through_every_hook_of_an_allocator_is_pristine_after_each_reset(
    make: Make,
) -> None:
    allocator = make()
    image = allocator.memslot_build_image(CONTENT)
    assert image is not None
    assert image.kind == ("memfd" if isinstance(allocator, MemfdAllocator) else "bytes")
    memory = created(allocator, request_for(image))
    plain = LinearMemory(memory.request, memory.base, 2 * PAGE, owner=allocator)
    fields = [name for name in LinearMemory.__slots__ if name not in ("__weakref__", "reset")]
    assert [getattr(memory, each) for each in fields] == [getattr(plain, each) for each in fields]
    assert bytes_of(memory) == PRISTINE
    ctypes.memset(memory.base, 7, PAGE)
    assert memory.reset is not None
    memory.reset()
    assert bytes_of(memory) == PRISTINE
    assert allocator.memslot_grow_memory(memory, 3 * PAGE) is True
    assert memory.byte_size == 3 * PAGE
    assert allocator.memslot_reset_memory(memory) is not None
    assert memory.byte_size == 2 * PAGE
    assert allocator.memslot_release_memory(memory) is not None
    image.close()
    allocator.memslot_forget_image(image)
    statistics = allocator.memslot_statistics()
    assert statistics is not None
    assert (statistics.plugin, statistics.warm, statistics.in_use) == (allocator.name, 0, 0)


def test_memory_after_a_failed_release_is_not_used_again(make: Make, inject: Any) -> None:
    allocator = make(slots=1)
    memory = created(allocator, request_for())
    fail_next_reset(inject, errno.EINVAL)
    with pytest.raises(SystemCallError):
        allocator.memslot_release_memory(memory)
    for hook in (
        allocator.memslot_release_memory,
        allocator.memslot_reset_memory,
        lambda memory: allocator.memslot_grow_memory(memory, 3 * PAGE),
    ):
        with pytest.raises(UsedAfterClose, match="memory of toy#1 was released before"):
            hook(memory)
    allocator.memslot_release_memory(created(allocator, request_for()))  # the only slot is not lost


def test_hook_given_a_memory_of_another_owner_answers_none(make: Make) -> None:
    allocator, other = make(), make()
    foreign = LinearMemory(request_for(), 0x1000, PAGE, owner=object())
    lent = created(other, request_for())
    impostor = LinearMemory(request_for(), 0x1000, PAGE, owner=allocator)
    for memory in (foreign, lent, impostor):
        assert allocator.memslot_release_memory(memory) is None
        assert allocator.memslot_reset_memory(memory) is None
        assert allocator.memslot_grow_memory(memory, 3 * PAGE) is None
    other.memslot_release_memory(lent)


def test_allocator_answers_nothing_before_a_host_is_open() -> None:
    for allocator in (MemfdAllocator(), AnonymousAllocator()):
        assert allocator.memslot_create_memory(request_for()) is None
        assert allocator.memslot_statistics() is None
        allocator.memslot_forget_image(BytesImage("never laid", b""))
        allocator.memslot_close_host()
        assert allocator.memslot_describe().answers


def test_allocator_takes_images_of_its_kind_and_anonymous_those_of_both() -> None:
    memfd, anonymous = MemfdAllocator(), AnonymousAllocator()
    unknown = SimpleNamespace(kind="unknown", byte_size=0, extents=(), close=print)
    with MemfdImage("m", PRISTINE) as mapped, BytesImage("b", PRISTINE) as copied:
        for allocator in (memfd, anonymous):
            allocator.memslot_open_host(Settings(slots=2, reserved=RESERVED, guard=PAGE))
            assert allocator.memslot_create_memory(request_for(unknown)) is None
            allocator.memslot_forget_image(unknown)
        assert memfd.memslot_create_memory(request_for(copied)) is None
        for image in (mapped, copied):
            memory = created(anonymous, request_for(image))
            assert bytes_of(memory) == PRISTINE
            anonymous.memslot_release_memory(memory)
        for allocator in (memfd, anonymous):
            allocator.memslot_close_host()


# Refusals


def test_growth_that_is_impossible_is_refused_without_an_error(make: Make, inject: Any) -> None:
    allocator = make()
    memory = created(allocator, request_for())
    assert allocator.memslot_grow_memory(memory, RESERVED + PAGE) is False
    inject("mprotect", error=errno.ENOMEM)
    assert allocator.memslot_grow_memory(memory, 3 * PAGE) is False
    assert memory.byte_size == 2 * PAGE
    assert allocator.memslot_grow_memory(memory, 3 * PAGE) is True
    allocator.memslot_release_memory(memory)


ROOM = "open the host with the same settings as its plugins"


@pytest.mark.parametrize(
    ("settings", "changes", "error", "message"),
    [
        ({}, {"minimum": 17 * PAGE}, MemoryTooLarge, r"toy#1 needs 1114112 .* setting reserved"),
        ({}, {"reserved": 2 * RESERVED}, Unsupported, ROOM),
        ({}, {"guard": 2 * PAGE}, Unsupported, ROOM),
        ({"growth": "ftruncate"}, {}, Unsupported, r"fake relies on .*SIGBUS.*allowed here: mprot"),
    ],
    ids=["minimum", "reserved", "guard", "ftruncate"],
)
def test_memory_without_the_room_that_its_code_counts_on_is_refused(
    make: Make, settings: Any, changes: Any, error: type[Exception], message: str
) -> None:
    allocator = make(**settings)
    with pytest.raises(error, match=message):
        allocator.memslot_create_memory(request_for(**changes))
    if error is Unsupported:
        memory = created(allocator, request_for(**changes, bounds_checks="code"))
        assert allocator.memslot_grow_memory(memory, 8 * PAGE) is True
        allocator.memslot_release_memory(memory)


# Mappings of a runtime


def test_memory_grown_by_a_runtime_without_a_report_is_retired(make: Make) -> None:
    allocator = make(slots=1)
    runtime = Runtime(2 * PAGE, RESERVED, shape="shape")
    request = request_for(growth="report", map_host_memory=runtime, host_shape="shape")
    for reported in (True, False):
        memory = created(allocator, request)
        if reported:
            _core.check(lib.ms_allow(memory.base, 4 * PAGE), "growing as a runtime does")
            memory.record_growth(4 * PAGE)
            assert isinstance(memory, allocators.SlotMemory)
            assert memory.slot is not None
            assert memory.slot.accessible == 4 * PAGE
        memory.byte_size = 4 * PAGE
        result = allocator.memslot_release_memory(memory)
        assert result is not None
        assert result.strategy == "retired"
        assert runtime.live == []
    allocator.memslot_release_memory(created(allocator, request))
    assert len(runtime.live) == 1
    allocator.memslot_close_host()
    assert runtime.live == []


# Machines and settings without memfd


@pytest.mark.parametrize("broken", ["memfd", "seals", "setting"])
def test_memfd_allocator_without_sealed_memfds_is_silent(monkeypatch: Any, broken: Any) -> None:
    setting, reason = Settings(memfd="off"), "the setting memfd is off"
    if broken != "setting":
        setting, reason = Settings(), "Operation not permitted"
        found = replace(probe(), **dict[str, Any]({broken: Finding(False, reason)}))
        monkeypatch.setattr(allocators, "probe", lambda: found)
        with pytest.raises(Unsupported, match=rf"memfd = on .* {reason}; allowed: auto, off"):
            MemfdAllocator().memslot_open_host(Settings(memfd="on"))
    memfd = MemfdAllocator()
    memfd.memslot_open_host(setting)
    assert memfd.memslot_create_memory(request_for()) is None
    assert memfd.memslot_build_image(CONTENT) is None
    assert memfd.memslot_statistics() is None
    answer = memfd.memslot_describe()
    assert (answer.answers, answer.reason) == (False, reason)
    assert AnonymousAllocator().memslot_describe().answers
