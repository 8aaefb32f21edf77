"""Our own allocators, called as a host calls them: who answers, what is refused, and who gets a memory back."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from memslot_hooks import HostMapping, InitialContent, LinearMemory, MemoryRequest, Segment
from memslot_plugin import BytesImage, MemfdImage, Settings, _core, allocators
from memslot_plugin._core import ffi, lib
from memslot_plugin.allocators import AnonymousAllocator, MemfdAllocator
from memslot_plugin.errors import (
    MemoryTooLarge,
    SystemCallError,
    Unsupported,
    UsedAfterClose,
)
from memslot_plugin.probe import Finding, probe

pytestmark = pytest.mark.usefixtures("no_leaks")

WASM_PAGE = 65536
RESERVED = 1 << 20
Allocator = MemfdAllocator | AnonymousAllocator

CONTENT = InitialContent(2 * WASM_PAGE, (Segment(5, b"hello"), Segment(70_000, b"world")), "toy")


@pytest.fixture(params=[MemfdAllocator, AnonymousAllocator], ids=["memfd", "anonymous"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Allocator]]:
    """Opens an allocator with settings."""
    opened: list[Allocator] = []

    def opener(**settings: Any) -> Allocator:
        allocator: Allocator = request.param()
        chosen = {"slots": 2, "reserved": RESERVED, "guard": WASM_PAGE, "reset": "madvise"}
        allocator.memslot_open_host(Settings(**{**chosen, **settings}))
        opened.append(allocator)
        return allocator

    yield opener
    for allocator in opened:
        if allocator.pool is not None:
            allocator.pool.check()
        allocator.memslot_close_host()


def request_for(image: Any = None, **changes: Any) -> MemoryRequest:
    request = MemoryRequest(
        minimum=2 * WASM_PAGE,
        maximum=8 * WASM_PAGE,
        reserved=RESERVED,
        guard=WASM_PAGE,
        image=image,
        guest_id="toy#1",
        memory_index=0,
        host="fake",
    )
    return replace(request, **changes)


def bytes_of(memory: LinearMemory) -> bytes:
    return ctypes.string_at(memory.base, memory.byte_size)


PRISTINE = bytearray(2 * WASM_PAGE)
PRISTINE[5:10] = b"hello"
PRISTINE[70_000:70_005] = b"world"


def created(allocator: Allocator, request: MemoryRequest) -> LinearMemory:
    memory = allocator.memslot_create_memory(request)
    assert memory is not None
    assert allocator.memslot_release_memory is not None
    return memory


def test_memory_lives_through_its_hooks(make: Callable[..., Allocator]) -> None:
    allocator = make()
    image = allocator.memslot_build_image(CONTENT)
    assert image is not None
    assert image.kind == ("memfd" if isinstance(allocator, MemfdAllocator) else "bytes")
    memory = created(allocator, request_for(image))
    plain = LinearMemory(memory.request, memory.base, 2 * WASM_PAGE, owner=allocator)
    fields = [name for name in LinearMemory.__slots__ if name != "__weakref__"]
    assert [getattr(memory, each) for each in fields] == [getattr(plain, each) for each in fields]
    assert bytes_of(memory) == PRISTINE
    assert allocator.memslot_grow_memory(memory, 3 * WASM_PAGE) is True
    assert memory.byte_size == 3 * WASM_PAGE
    ctypes.memset(memory.base, 0xFF, memory.byte_size)
    result = allocator.memslot_reset_memory(memory)
    assert result is not None
    assert result.nanoseconds > 0
    assert memory.byte_size == 2 * WASM_PAGE
    assert bytes_of(memory) == PRISTINE
    assert allocator.memslot_release_memory(memory) is not None
    image.close()
    allocator.memslot_forget_image(image)
    statistics = allocator.memslot_statistics()
    assert statistics is not None
    assert (statistics.plugin, statistics.warm, statistics.in_use) == (allocator.name, 0, 0)


@pytest.mark.parametrize("failed", [False, True])
def test_released_memory_is_used_no_more_also_where_its_reset_failed(
    make: Callable[..., Allocator], inject: Any, failed: bool
) -> None:
    allocator = make(slots=1)
    memory = created(allocator, request_for())
    if failed:
        inject("madvise", error=errno.EINVAL)
    with pytest.raises(SystemCallError) if failed else nullcontext():
        allocator.memslot_release_memory(memory)
    for hook in (
        allocator.memslot_release_memory,
        allocator.memslot_reset_memory,
        lambda memory: allocator.memslot_grow_memory(memory, 3 * WASM_PAGE),
    ):
        with pytest.raises(UsedAfterClose, match="memory of toy#1 was released before"):
            hook(memory)


def test_memory_of_another_owner_is_left_to_it(make: Callable[..., Allocator]) -> None:
    allocator, other = make(), make()
    foreign = LinearMemory(request_for(), 0x1000, WASM_PAGE, owner=object())
    lent = created(other, request_for())
    impostor = LinearMemory(request_for(), 0x1000, WASM_PAGE, owner=allocator)
    for memory in (foreign, lent, impostor):
        assert allocator.memslot_release_memory(memory) is None
        assert allocator.memslot_reset_memory(memory) is None
        assert allocator.memslot_grow_memory(memory, 3 * WASM_PAGE) is None
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
            allocator.memslot_open_host(Settings(slots=2, reserved=RESERVED, guard=WASM_PAGE))
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


def test_growth_that_cannot_be_is_a_refusal_and_no_error(
    make: Callable[..., Allocator], inject: Any
) -> None:
    allocator = make()
    memory = created(allocator, request_for())
    assert allocator.memslot_grow_memory(memory, RESERVED + WASM_PAGE) is False
    inject("mprotect", error=errno.ENOMEM)
    assert allocator.memslot_grow_memory(memory, 3 * WASM_PAGE) is False
    assert memory.byte_size == 2 * WASM_PAGE
    assert allocator.memslot_grow_memory(memory, 3 * WASM_PAGE) is True
    allocator.memslot_release_memory(memory)


def test_memory_larger_than_a_slot_is_refused(make: Callable[..., Allocator]) -> None:
    allocator = make()
    with pytest.raises(MemoryTooLarge, match=r"toy#1 needs 1114112 .* raise the setting reserved"):
        allocator.memslot_create_memory(request_for(minimum=RESERVED + WASM_PAGE))


@pytest.mark.parametrize("missing", ["reserved", "guard"])
def test_compiled_code_gets_the_room_that_it_counts_on(
    make: Callable[..., Allocator], missing: str
) -> None:
    allocator = make()
    with pytest.raises(Unsupported, match="open the host with the same settings as its plugins"):
        allocator.memslot_create_memory(request_for(**{missing: 2 * RESERVED}))
    memory = created(allocator, request_for(**{missing: 2 * RESERVED}, bounds_checks="code"))
    allocator.memslot_release_memory(memory)


def test_growth_by_ftruncate_is_for_hosts_that_check_bounds_in_code(
    make: Callable[..., Allocator],
) -> None:
    allocator = make(growth="ftruncate")
    with pytest.raises(
        Unsupported, match=r"fake relies on guard pages.*SIGBUS.*allowed here: mprot"
    ):
        allocator.memslot_create_memory(request_for())
    memory = created(allocator, request_for(bounds_checks="code"))
    assert allocator.memslot_grow_memory(memory, 8 * WASM_PAGE) is True
    assert allocator.memslot_grow_memory(memory, 9 * WASM_PAGE) is False
    allocator.memslot_release_memory(memory)


# Mappings of a runtime


def test_growth_by_a_runtime_retires_the_memory_also_if_another_plugin_kept_the_report(
    make: Callable[..., Allocator],
) -> None:
    """A plugin that limits is asked first and answers: ours never hears, but the memory has grown."""
    allocator = make(slots=1)
    live: list[int] = []

    def map_host_memory() -> HostMapping:
        base = ffi.new("uintptr_t *")
        _core.check(lib.ms_reserve(RESERVED, base), "reserving")
        _core.check(lib.ms_allow(base[0], 2 * WASM_PAGE), "allowing")
        address = int(base[0])
        live.append(address)

        def forget() -> None:
            live.remove(address)
            _core.check(lib.ms_unmap(address, RESERVED), "unmapping")

        return HostMapping(address, 2 * WASM_PAGE, RESERVED, object(), forget, "shape")

    request = request_for(growth="report", map_host_memory=map_host_memory, host_shape="shape")
    for told in (True, False):
        memory = created(allocator, request)
        assert bytes_of(memory) == bytes(2 * WASM_PAGE)
        _core.check(lib.ms_allow(memory.base, 4 * WASM_PAGE), "growing as a runtime does")
        if told:
            assert allocator.memslot_grow_memory(memory, 4 * WASM_PAGE) is True
        memory.byte_size = 4 * WASM_PAGE  # as the host notes it
        ctypes.memset(memory.base, 0x5E, 4 * WASM_PAGE)
        result = allocator.memslot_release_memory(memory)
        assert result is not None
        assert result.strategy == "retired"
        assert live == []
    kept = created(allocator, request)
    allocator.memslot_release_memory(kept)
    assert len(live) == 1
    allocator.memslot_close_host()
    assert live == []


# What answers, and why


def test_memfd_off_leaves_the_answer_to_the_fallback() -> None:
    memfd = MemfdAllocator()
    memfd.memslot_open_host(Settings(memfd="off"))
    assert memfd.memslot_create_memory(request_for()) is None
    assert memfd.memslot_build_image(CONTENT) is None
    assert memfd.memslot_statistics() is None
    answer = memfd.memslot_describe()
    assert (answer.answers, answer.reason) == (False, "the setting memfd is off")


@pytest.mark.parametrize("broken", ["memfd", "seals"])
def test_machine_without_sealed_memfds_degrades_or_refuses(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    changes: dict[str, Any] = {broken: Finding(False, "Operation not permitted")}
    found = replace(probe(), **changes)
    monkeypatch.setattr(allocators, "probe", lambda: found)
    memfd = MemfdAllocator()
    memfd.memslot_open_host(Settings())
    assert memfd.memslot_create_memory(request_for()) is None
    assert memfd.memslot_describe().reason == "Operation not permitted"
    with pytest.raises(
        Unsupported, match=r"memfd = on .* Operation not permitted; allowed: auto, off"
    ):
        MemfdAllocator().memslot_open_host(Settings(memfd="on"))
    assert AnonymousAllocator().memslot_describe().answers
