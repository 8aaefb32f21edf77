"""Images: the contents of the file, its seals, and its end."""

from __future__ import annotations

import array
import errno
import fcntl
import gc
import mmap
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memslot_hooks.types import Extent, InitialContent, Segment
from memslot_plugin import BytesImage, Image, MemfdImage, Slot, UsedAfterClose, _core
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import lib
from memslot_plugin.memory import image as images
from memslot_plugin.memory.backing import HeapBacking, Memfd
from memslot_plugin.memory.reset import madvise
from memslot_plugin.tests.profiles import examples
from memslot_plugin.tests.slots import content, sparse, use

pytestmark = pytest.mark.usefixtures("no_leaks")

KINDS = [MemfdImage, BytesImage]
Kind = type[MemfdImage] | type[BytesImage]
GAP = images.MIN_GAP


def bytes_of(image: Image, length: int) -> bytes:
    """Return the bytes of a memory of this length with the image mapped."""
    slot = Slot.create(length)
    slot.instantiate(image, length)
    seen = content(slot)
    slot.destroy()
    return seen


@pytest.fixture
def slot() -> Iterator[Slot]:
    made = Slot.create(4 * P, P)
    yield made
    made.destroy()


written = st.lists(
    st.tuples(
        st.one_of(
            st.integers(0, 60 * P),
            st.builds(lambda p, d: max(p * P + d, 0), st.integers(0, 60), st.integers(-3, 3)),
        ),
        st.one_of(
            st.binary(max_size=50),
            st.builds(lambda b, n: b * n, st.sampled_from([b"\0", b"\7"]), st.integers(0, 3 * P)),
        ),
    ),
    max_size=10,
)


@settings(max_examples=examples(20))
@given(segments=written)
def test_image_of_any_segments_holds_them_in_whole_pages(segments: list[tuple[int, bytes]]) -> None:
    size = 64 * P
    model = sparse(size, *((offset, data) for offset, data in segments if data))
    initial = InitialContent(size, tuple(Segment(offset, data) for offset, data in segments))
    for kind in KINDS:
        with kind("model", initial) as image:
            ends = [extent.offset + extent.length for extent in image.extents]
            starts = [extent.offset for extent in image.extents]
            assert all(a + GAP <= b for a, b in zip(ends, starts[1:], strict=False))
            assert all(at % P == 0 for at in [*starts, *ends])
            assert bytes_of(image, size) == model
            stored = sum(extent.length for extent in image.extents)
            assert (image.byte_size, image.stored_bytes) == (ends[-1] if ends else 0, stored)
            packed = image.c_extents[0 : image.c_count]  # shared with the core
            found = tuple(Extent(e.offset, e.length, e.file_offset) for e in packed)
            assert found == image.extents
            assert {image.fd if isinstance(image, MemfdImage) else -1} >= {e.fd for e in packed}
            if isinstance(image, MemfdImage) and stored:
                assert os.fstat(image.fd).st_size == stored


@pytest.mark.parametrize("length", [1, P - 1, P, P + 1, 3 * P - 7])
def test_image_keeps_the_bytes_of_any_buffer_when_the_source_changes(
    kind: Kind, length: int
) -> None:
    source = bytearray(os.urandom(length - 1) + b"\1")
    before, items = bytes(source), memoryview(array.array("I", list(source)))  # of four bytes each
    with kind("source", source) as image, kind("items", items) as wide:
        source[:1] = b"!"
        source.append(0)  # raises BufferError if a buffer of it is still exported
        for made, stored in ((image, before), (wide, items.tobytes())):
            assert made.byte_size == _core.align_up(len(stored))
            assert bytes_of(made, 16 * P) == stored + bytes(16 * P - len(stored))


STRIDE = P + GAP
MANY = [run * STRIDE for run in range(images.MAX_EXTENTS)]
FAR = [MANY[-1] + 8 * STRIDE, MANY[-1] + 16 * STRIDE]


@pytest.mark.parametrize(
    ("runs", "starts"),
    [(MANY, MANY), ([*MANY, FAR[0]], [0, FAR[0]]), ([*MANY, *FAR], [0, *FAR])],
    ids=["max_extents", "one more", "the widest gaps survive"],
)
def test_more_runs_than_max_extents_are_joined(kind: Kind, runs: Any, starts: Any) -> None:
    data = sparse(runs[-1] + P, *((at, b"x") for at in runs))
    with kind("many", data) as image:
        assert [extent.offset for extent in image.extents] == starts
        assert bytes_of(image, len(data)) == data


def test_image_of_zeros_maps_nothing_and_serves_slots(kind: Kind, slot: Slot, calls: Any) -> None:
    with calls() as made:
        zeros = kind("zeros", bytes(7 * P))
        slot.instantiate(zeros, P)
        slot.reset(madvise)
        assert not slot.instantiate(zeros, P)
    assert set(made) == {"madvise"}
    assert (zeros.byte_size, zeros.stored_bytes, zeros.extents) == (0, 0, ())
    assert slot.image is zeros
    assert not isinstance(zeros, MemfdImage) or zeros.fd == -1
    slot.check()
    zeros.close()


@pytest.mark.parametrize(
    "name",
    ["", "a" * 500, "ä€\U0001f600" * 60, "nul\0\n", "\udcff"],
    ids=["empty", "long", "long in bytes", "control characters", "surrogate"],
)
def test_image_of_any_name_is_built(kind: Kind, name: str) -> None:
    with kind(name, b"x") as image:
        assert bytes_of(image, P)[:1] == b"x"
        assert f"of {name}: {P} bytes in 1 extents" in repr(image)


def test_copied_image_needs_no_call_to_build_and_no_madvise_to_unmap(
    slot: Slot, calls: Any
) -> None:
    """Old user-mode qemu ignores MADV_DONTNEED: the next guest would see this image."""
    with calls() as made:
        image = BytesImage("lifted", b"x" * P)
    assert made == {}
    slot.instantiate(image, P)
    with calls() as made:
        assert image.unmap(slot.base) == 0
    assert "madvise" not in made
    assert content(slot) == bytes(P)


def reopened_and_written(fd: int) -> None:
    with Path(f"/proc/self/fd/{fd}").open("r+b", buffering=0) as again:
        again.write(b"!")


@pytest.mark.parametrize(
    "attack",
    [
        lambda fd: os.pwrite(fd, b"!", 0),
        lambda fd: os.ftruncate(fd, 3 * P),
        lambda fd: os.ftruncate(fd, P),
        lambda fd: os.posix_fallocate(fd, 0, 3 * P),
        lambda fd: mmap.mmap(fd, P, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        lambda fd: fcntl.fcntl(fd, 1033, 0x10),  # F_ADD_SEALS, F_SEAL_FUTURE_WRITE
        reopened_and_written,
        lambda fd: os.truncate(f"/proc/self/fd/{fd}", 0),
    ],
    ids=["write", "grow", "shrink", "allocate", "map", "seal", "reopen", "truncate"],
)
def test_sealed_image_refuses_every_change(attack: Callable[[int], object]) -> None:
    sealed = MemfdImage("sealed", b"x" * 2 * P)
    assert not os.get_inheritable(sealed.fd)
    assert not os.fstat(sealed.fd).st_mode & 0o111  # MFD_NOEXEC_SEAL, see test_slot
    with pytest.raises(PermissionError):
        attack(sealed.fd)
    assert os.pread(sealed.fd, 3 * P, 0) == b"x" * 2 * P
    sealed.close()


def test_closed_image_is_kept_while_a_slot_maps_it_and_is_never_mapped_again(
    image: Image, slot: Slot, resources: Any
) -> None:
    laid = resources()
    slot.instantiate(image, 4 * P)
    assert resources().descriptors == laid.descriptors  # none per slot
    image.close()
    image.close()
    use(slot)
    assert content(slot)[:P] == b"x" * P
    with pytest.raises(UsedAfterClose, match="guest was closed; prepare the guest again"):
        slot.instantiate(image, 4 * P)
    assert resources().descriptors == laid.descriptors
    slot.purge()
    assert resources().image_mappings == laid.image_mappings - (image.kind == "memfd")
    with pytest.raises(UsedAfterClose):
        slot.instantiate(image, 4 * P)
    slot.check()


def test_image_that_is_dropped_gives_back_its_descriptor(kind: Kind) -> None:
    kind("forgotten", b"x" * P)
    gc.collect()  # no_leaks looks afterwards


def test_image_closed_by_many_threads_at_once_closes_once(kind: Kind, calls: Any) -> None:
    """A second close would hit another owner that got the descriptor's number in between."""
    with ThreadPoolExecutor(4) as threads:
        for _ in range(30):
            image = kind("contended", b"x" * P)
            slots = [Slot.create(2 * P) for _ in range(4)]
            for slot in slots:
                slot.instantiate(image, P)
            image.close()
            with calls() as made:
                list(threads.map(Slot.destroy, slots))
            assert made.get("close", 0) == (kind is MemfdImage)


def test_image_closed_while_a_slot_maps_it_is_refused(
    image: Image, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread closes the guest between the check and the mapping."""
    require_open = type(image).require_open

    def then_close(self: Image) -> None:
        require_open(self)
        monkeypatch.undo()
        self.close()

    monkeypatch.setattr(Image, "require_open", then_close)
    with pytest.raises(UsedAfterClose):
        slot.instantiate(image, 2 * P)


@pytest.mark.parametrize("held", ["a page for a moment", "a writable mapping"])
def test_sealing_waits_while_the_file_is_held_and_gives_up(held: str, calls: Any) -> None:
    """The kernel gives up after 0.15 s (memfd_wait_for_pins() in mm/memfd.c)."""
    fd = os.memfd_create("a page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, b"x" * P)
    reader, writer = os.pipe()
    before = _core.counters()["fcntl"]

    def drain() -> None:
        while _core.counters()["fcntl"] < before + 2:
            time.sleep(0.001)
        os.read(reader, P)

    draining = threading.Thread(target=drain)
    if held == "a writable mapping":
        with mmap.mmap(fd, P), calls() as made:
            assert lib.ms_seal(fd) == -errno.EBUSY
        assert made["fcntl"] == 16
    else:
        assert os.splice(fd, writer, P, offset_src=0) == P  # the page itself, not a copy
        draining.start()
        with calls() as made:
            assert lib.ms_seal(fd) == 0
        draining.join()
        assert 2 <= made["fcntl"] < 16
    for each in (fd, reader, writer):
        os.close(each)


@pytest.mark.parametrize("kind", KINDS)
def test_image_of_one_byte_far_away_needs_no_more_memory_than_its_page(kind: Kind) -> None:
    far = InitialContent(2**32, (Segment(2**32 - P, b"x"),))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * P + (256 << 20), before[1]))
    try:
        with kind("far", far) as image:
            assert image.extents == (Extent(2**32 - P, P, 0),)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


LARGE = b"x" * (64 << 20)
COPIES: dict[str, Callable[[], object]] = {
    "segments": lambda: images.flat_runs(
        InitialContent(2**30, (Segment(1, LARGE), Segment(2, b"y")))
    ),
    "ordinary memory": lambda: HeapBacking(len(LARGE), [(0, memoryview(LARGE))]),
    "memfd": lambda: Memfd.of_pieces("large", len(LARGE), [(0, memoryview(LARGE))]),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
def test_image_that_is_copied_lets_another_thread_run(copy: Callable[[], object]) -> None:
    turns, ended, ready = 0, False, threading.Event()

    def turn() -> None:
        nonlocal turns
        while not ended:
            turns += 1
            ready.set()
            time.sleep(0)

    other = threading.Thread(target=turn)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # the interpreter does not switch by itself
    try:
        other.start()
        ready.wait()
        before = turns
        copy()
        assert turns - before > 100
    finally:
        ended = True
        sys.setswitchinterval(interval)
        other.join()


def test_span_of_any_content_reaches_from_its_first_to_its_last_written_page() -> None:
    chunk = 1 << 20
    for at, length in ((0, 1), (P, P), (chunk - 1, 2), (3 * chunk, chunk), (5, 7 * chunk)):
        data = bytes(at) + b"x" + bytes(max(length - 2, 0)) + b"y" * (length > 1) + bytes(chunk)
        start, end = at // P * P, -(-(at + length) // P) * P
        found = images.span_of(InitialContent(2**32, (Segment(2**24, data),)))
        assert found == end - start
    assert images.span_of(InitialContent(2**32, (Segment(0, bytes(3 * chunk)),))) == 0
    assert images.span_of(InitialContent(2**32)) == 0
    apart = InitialContent(2**32, (Segment(P, b"x" * P), Segment(2**30, b"y" * P)))
    assert images.span_of(apart) == 2**30
