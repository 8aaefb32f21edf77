"""Images: what is in the file, that nobody can change it, and that it is given back once and not too early."""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import gc
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memslot_hooks.types import Extent, InitialContent, Segment
from memslot_plugin import BytesImage, Image, MemfdImage, Slot, UsedAfterClose, _core
from memslot_plugin import image as images
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import lib
from memslot_plugin.errors import SystemCallError
from memslot_plugin.reset import madvise
from memslot_plugin.tests.profiles import examples

pytestmark = pytest.mark.usefixtures("no_leaks")

KINDS = [MemfdImage, BytesImage]
Kind = type[MemfdImage] | type[BytesImage]


def sparse(length: int, *runs: tuple[int, bytes]) -> bytearray:
    content = bytearray(length)
    for offset, data in runs:
        content[offset : offset + len(data)] = data
    return content


def bytes_of(image: Image, length: int) -> bytes:
    """What a memory of `length` bytes holds after the image was laid."""
    slot = Slot.create(length)
    slot.instantiate(image, length)
    seen = ctypes.string_at(slot.base, length)
    slot.destroy()
    return seen


@pytest.fixture(params=KINDS, ids=lambda kind: kind.kind)
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    yield request.param
    gc.collect()


# 1. Contents


def test_later_segments_lie_over_earlier_ones() -> None:
    content = InitialContent(
        65536, (Segment(2, b"aaaa"), Segment(4, b"bb"), Segment(1, b"c"), Segment(9, b""))
    )
    assert images.flatten(content) == b"\0caabb\0\0\0"
    assert images.flatten(InitialContent(65536)) == b""


@pytest.mark.parametrize("length", [1, P - 1, P, P + 1, 3 * P - 7])
def test_contents_need_not_be_a_multiple_of_the_page(kind: Kind, length: int) -> None:
    data = os.urandom(length - 1) + b"\1"
    with kind("odd", data) as image:
        assert image.byte_size == _core.align_up(length)
        assert bytes_of(image, 4 * P) == data + bytes(4 * P - length)


def test_leading_and_trailing_zero_pages_are_trimmed(kind: Kind) -> None:
    with kind("trimmed", sparse(100 * P, (40 * P + 5, b"x"), (43 * P - 1, b"y"))) as image:
        assert image.extents == (Extent(40 * P, 3 * P, 0),)
        assert (image.byte_size, image.stored_bytes) == (43 * P, 3 * P)


def test_long_interior_zero_runs_are_not_in_the_file(kind: Kind) -> None:
    gap = images.MIN_GAP
    with kind("runs", sparse(P + gap + P, (0, b"x"), (P + gap, b"y"))) as image:
        assert image.extents == (Extent(0, P, 0), Extent(P + gap, P, P))
        if isinstance(image, MemfdImage):
            assert os.fstat(image.fd).st_size == 2 * P
    with kind("joined", sparse(P + gap, (0, b"x"), (gap, b"y"))) as image:
        assert image.extents == (Extent(0, gap + P, 0),)


@pytest.mark.parametrize("runs", [images.MAX_EXTENTS, images.MAX_EXTENTS + 1, 60])
def test_more_runs_than_max_extents_are_joined(kind: Kind, runs: int) -> None:
    stride = P + images.MIN_GAP
    content = sparse(runs * stride, *((run * stride, b"%d" % (run + 1)) for run in range(runs)))
    with kind("many", content) as image:
        assert len(image.extents) == (runs if runs <= images.MAX_EXTENTS else 1)
        assert bytes_of(image, _core.align_up(len(content))) == content


def test_the_widest_gaps_survive_the_joining(kind: Kind) -> None:
    stride = P + images.MIN_GAP
    near = [run * stride for run in range(20)]
    far = [near[-1] + 8 * stride, near[-1] + 16 * stride]
    with kind("clusters", sparse(40 * stride, *((at, b"x") for at in [*near, *far]))) as image:
        assert [extent.offset for extent in image.extents] == [0, *far]


def test_an_image_of_only_zeros_maps_nothing_and_is_still_an_image(kind: Kind, calls: Any) -> None:
    with calls() as made:
        zeros = kind("zeros", bytes(7 * P))
    assert made == {}
    assert (zeros.byte_size, zeros.stored_bytes, zeros.extents) == (0, 0, ())
    if isinstance(zeros, MemfdImage):
        assert zeros.fd == -1
    slot = Slot.create(4 * P, P)
    with calls() as made:
        slot.instantiate(zeros, P)
    assert made == {}
    assert slot.image is zeros
    slot.check()
    slot.destroy()
    zeros.close()
    with pytest.raises(UsedAfterClose):
        zeros.require_open()


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
def test_contents_may_be_any_buffer_of_bytes(kind: Kind, make: Any) -> None:
    data = os.urandom(2 * P)
    with kind("buffer", make(data)) as image:
        assert bytes_of(image, 2 * P) == data


def test_a_buffer_of_larger_items_is_read_byte_by_byte(kind: Kind) -> None:
    data = array.array("I", range(1, P))
    with kind("numbers", memoryview(data)) as image:
        assert image.byte_size == 4 * P
        assert bytes_of(image, 4 * P) == data.tobytes() + bytes(4)


def test_an_image_keeps_its_bytes_when_the_source_changes(kind: Kind) -> None:
    data = bytearray(b"before" * P)
    with kind("source", data) as image:
        data[:6] = b"after!"
        assert bytes_of(image, 6 * P)[:6] == b"before"
        data.append(0)  # no buffer of it is held any more, or this would raise BufferError


@pytest.mark.parametrize(
    "name",
    ["", "a" * 500, "ä€\U0001f600" * 60, "with\nnewline", "nul\0inside", "\udcff from a path"],
    ids=["empty", "long", "wide", "newline", "nul", "surrogate"],
)
def test_any_name_will_do(kind: Kind, name: str) -> None:
    with kind(name, b"x") as image:
        assert bytes_of(image, P)[:1] == b"x"
        repr(image)


def test_an_image_is_found_by_name_in_the_maps_of_the_process() -> None:
    with MemfdImage("my guest", b"x"):
        assert "/memfd:memslot:my guest (deleted)" in Path("/proc/self/maps").read_text()


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


@settings(max_examples=examples(60))
@given(segments=written)
def test_flattened_and_laid_is_what_the_segments_say(segments: list[tuple[int, bytes]]) -> None:
    size = 64 * P
    model = sparse(size, *((offset, data) for offset, data in segments if data))
    content = InitialContent(size, tuple(Segment(offset, data) for offset, data in segments))
    for kind in KINDS:
        with kind("model", images.flatten(content)) as image:
            ends = [extent.offset + extent.length for extent in image.extents]
            starts = [extent.offset for extent in image.extents]
            assert all(a + images.MIN_GAP <= b for a, b in zip(ends, starts[1:], strict=False))
            assert all(at % P == 0 for at in [*starts, *ends])
            assert bytes_of(image, size) == model


# 3. Seals


@pytest.fixture
def sealed() -> Iterator[MemfdImage]:
    with MemfdImage("sealed", b"x" * 2 * P) as image:
        yield image


def reopened_and_written(fd: int) -> None:
    with Path(f"/proc/self/fd/{fd}").open("r+b", buffering=0) as again:
        again.write(b"!")


@pytest.mark.parametrize(
    "attack",
    [
        lambda fd: os.pwrite(fd, b"!", 0),
        lambda fd: os.pwrite(fd, b"!", 2 * P),
        lambda fd: os.ftruncate(fd, 3 * P),
        lambda fd: os.ftruncate(fd, P),
        lambda fd: os.posix_fallocate(fd, 0, 3 * P),
        lambda fd: mmap.mmap(fd, P, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        lambda fd: fcntl.fcntl(fd, 1033, 0x10),  # F_ADD_SEALS, F_SEAL_FUTURE_WRITE
        reopened_and_written,
        lambda fd: os.truncate(f"/proc/self/fd/{fd}", 0),
    ],
    ids=["write", "append", "grow", "shrink", "allocate", "map", "seal", "reopen", "truncate"],
)
def test_seals_refuse_every_change(sealed: MemfdImage, attack: Callable[[int], object]) -> None:
    with pytest.raises(PermissionError):
        attack(sealed.fd)
    assert os.pread(sealed.fd, 3 * P, 0) == b"x" * 2 * P


def test_descriptors_are_closed_on_exec_and_not_executable(sealed: MemfdImage) -> None:
    assert not os.get_inheritable(sealed.fd)
    assert not os.fstat(sealed.fd).st_mode & 0o111


def test_a_guests_write_never_reaches_the_image(sealed: MemfdImage) -> None:
    slots = [Slot.create(2 * P) for _ in range(2)]
    for slot in slots:
        slot.instantiate(sealed, 2 * P)
    ctypes.memset(slots[0].base, 0, 2 * P)
    assert ctypes.string_at(slots[1].base, 2 * P) == b"x" * 2 * P
    slots[0].reset(madvise)
    slots[0].check()
    assert ctypes.string_at(slots[0].base, 2 * P) == b"x" * 2 * P
    for slot in slots:
        slot.destroy()


# Giving back


def test_one_descriptor_and_one_view_per_image_and_none_per_slot(resources: Any) -> None:
    before = resources()
    image = MemfdImage("counted", b"x" * P)
    slots = [Slot.create(4 * P) for _ in range(5)]
    for slot in slots:
        slot.instantiate(image, 2 * P)
    now = resources()
    assert sum(now.descriptors.values()) == sum(before.descriptors.values()) + 1
    assert now.image_mappings == before.image_mappings + 1 + len(slots)
    for slot in slots:
        slot.destroy()
    image.close()


def test_a_closed_image_is_kept_for_as_long_as_it_lies_in_a_slot(
    kind: Kind, resources: Any
) -> None:
    before = resources()
    image = kind("kept", b"x" * P)
    slot = Slot.create(4 * P, 4 * P)
    slot.instantiate(image, 4 * P)
    image.close()
    image.close()
    for _ in range(2):
        ctypes.memset(slot.base, 0x55, 2 * P)
        slot.reset(madvise)
        assert slot.first_difference() is None
        assert ctypes.string_at(slot.base, P) == b"x" * P
        slot.check()
        slot.state = slot.state.DIRTY
    slot.reset(madvise)
    slot.purge()
    assert resources().image_mappings == before.image_mappings
    assert resources().descriptors == before.descriptors
    with pytest.raises(UsedAfterClose, match="kept was closed; prepare the guest again"):
        slot.instantiate(image, 4 * P)
    slot.check()
    slot.destroy()


def test_a_closed_image_is_not_laid_whatever_lies_there(kind: Kind) -> None:
    image = kind("lies already", b"x" * P)
    slot = Slot.create(4 * P)
    slot.instantiate(image, P)
    slot.reset(madvise)
    image.close()
    with pytest.raises(UsedAfterClose):
        slot.instantiate(image, P)
    slot.check()
    slot.destroy()


def test_an_image_that_nobody_holds_gives_back_what_it_has(kind: Kind) -> None:
    image = kind("forgotten", b"x" * P)
    del image
    gc.collect()  # and no_leaks looks


def test_images_are_compared_by_identity(kind: Kind) -> None:
    one, other = kind("one", b"x" * P), kind("one", b"x" * P)
    assert one != other
    assert len({one, other}) == 2
    one.close()
    other.close()


def test_closing_from_many_threads_closes_once(kind: Kind, resources: Any) -> None:
    """A second close of the same number would close a descriptor that somebody opened in between."""
    for _ in range(30):
        image = kind("contended", b"x" * P)
        slots = [Slot.create(2 * P) for _ in range(4)]
        for slot in slots:
            slot.instantiate(image, P)
        image.close()
        before = _core.counters()
        start = threading.Barrier(len(slots))

        def destroy(slot: Slot, start: threading.Barrier = start) -> None:
            start.wait()
            slot.destroy()

        threads = [threading.Thread(target=destroy, args=(slot,)) for slot in slots]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = _core.counters()
        assert after["close"] - before["close"] == (kind is MemfdImage)


def test_an_image_that_is_closed_while_it_is_being_laid_is_refused(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest is closed by another thread between the question whether it is open and its mapping."""
    image = kind("raced", b"x" * P)
    slot = Slot.create(4 * P)
    require_open = type(image).require_open

    def then_close(self: Image) -> None:
        require_open(self)
        monkeypatch.undo()
        self.close()

    monkeypatch.setattr(Image, "require_open", then_close)
    try:
        slot.instantiate(image, P)
    except UsedAfterClose:
        pass
    else:
        assert ctypes.string_at(slot.base, P) == b"x" * P
    slot.check()
    slot.destroy()


# Failures


@pytest.fixture
def memfd_of_a_page() -> Iterator[int]:
    fd = os.memfd_create("a page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, b"x" * P)
    yield fd
    os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


STEPS = [
    ("memfd_create", 0, "creating a memfd of 8192 bytes for the image of broken"),
    ("ftruncate", 0, "creating a memfd"),
    ("pwrite", 0, "writing the image of broken"),
    ("fcntl", 0, "sealing the image of broken"),
    ("mmap", 0, "mapping the image of broken"),
]


@pytest.mark.parametrize(("call", "skip", "what"), STEPS, ids=[step[0] for step in STEPS])
@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EPERM, errno.ENOSPC, errno.EMFILE])
def test_building_fails_cleanly_at_each_system_call(
    inject: Any, call: str, skip: int, what: str, error: int
) -> None:
    inject(call, skip=skip, error=error)
    with pytest.raises(SystemCallError) as caught:
        MemfdImage("broken", b"x" * P + b"y")
    assert what.replace("8192", str(2 * P)) in str(caught.value)
    assert caught.value.errno == error


def test_sealing_waits_for_whoever_still_holds_a_page(
    memfd_of_a_page: int, pipe: tuple[int, int], calls: Any
) -> None:
    """The kernel gives up after 0.15 s (memfd_wait_for_pins() in mm/memfd.c)."""
    reader, writer = pipe
    assert os.splice(memfd_of_a_page, writer, P, offset_src=0) == P  # the page itself, not a copy
    before = _core.counters()["fcntl"]

    def drain() -> None:
        while _core.counters()["fcntl"] < before + 2:
            time.sleep(0.001)
        os.read(reader, P)

    draining = threading.Thread(target=drain)
    draining.start()
    with calls() as made:
        assert lib.ms_seal(memfd_of_a_page) == 0
    draining.join()
    assert 2 <= made["fcntl"] < 16


def test_sealing_gives_up_where_somebody_can_write(memfd_of_a_page: int, calls: Any) -> None:
    with mmap.mmap(memfd_of_a_page, P), calls() as made:
        assert lib.ms_seal(memfd_of_a_page) == -errno.EBUSY
    assert made["fcntl"] == 16


def test_a_kernel_that_does_not_know_noexec_is_asked_again_without(inject: Any, calls: Any) -> None:
    inject("memfd_create", error=errno.EINVAL)
    with calls() as made, MemfdImage("older kernel", b"x") as image:
        assert bytes_of(image, P)[:1] == b"x"
    assert made["memfd_create"] == 2


@pytest.mark.parametrize("call", ["munmap", "close"])
def test_giving_back_that_fails_is_told_and_can_be_repeated(inject: Any, call: str) -> None:
    image = MemfdImage("stubborn", b"x")
    inject(call, error=errno.ENOMEM)
    with pytest.raises(SystemCallError, match=r"(unmapping|closing) the image of stubborn"):
        image.close()
    image.close()
    image.close()  # and no_leaks looks


def test_under_memfd_noexec_2_images_and_extensions_can_be_made(child: Any) -> None:
    """sysctl vm.memfd_noexec=2 refuses every memfd that does not ask for MFD_NOEXEC_SEAL."""
    prefix = ["unshare", "--pid", "--fork", "--mount-proc"]
    setting = "/proc/sys/vm/memfd_noexec"
    try:
        child(f"with open('{setting}', 'w') as f: f.write('2')", *prefix)
    except (AssertionError, FileNotFoundError) as error:
        pytest.skip(f"impossible: no namespace with a setting of its own: {error!s:.80}")
    child(
        f"""
with open({setting!r}, "w") as f:
    f.write("2")
from memslot_plugin import MemfdImage, Slot, _core
P = _core.PAGE_SIZE
with MemfdImage("strict", b"x") as image:
    slot = Slot.create(4 * P, growth="ftruncate")
    slot.instantiate(image, P, maximum=4 * P)
    slot.grow(2 * P)
    slot.check()
    slot.destroy()
""",
        *prefix,
    )


def test_too_few_descriptors_name_the_knob(child: Any) -> None:
    child(
        """
import resource
from memslot_plugin import MemfdImage, SystemCallError
from memslot_plugin.tests.profiles import examples
resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
kept = []
try:
    for number in range(20):
        kept.append(MemfdImage(f"image {number}", b"x"))
except SystemCallError as error:
    assert "creating a memfd" in str(error) and "RLIMIT_NOFILE (ulimit -n) is 16" in str(error)
else:
    raise AssertionError("made")
kept.pop().close()
MemfdImage("after", b"x").close()
"""
    )


def test_the_fallback_makes_no_system_call_to_build(calls: Any) -> None:
    with calls() as made:
        BytesImage("copied", b"x" * 5 * P).close()
    assert made == {}


def test_lifting_the_fallback_does_not_rely_on_madvise(calls: Any) -> None:
    # Where MADV_DONTNEED is ignored (old user-mode qemu) the next guest would see this one's image.
    with BytesImage("lifted", b"x" * P) as image:
        slot = Slot.create(2 * P, P)
        slot.instantiate(image, P)
        with calls() as made:
            assert image.lift(slot.base) == 0
        assert "madvise" not in made
        assert ctypes.string_at(slot.base, P) == bytes(P)
        slot.destroy()


def test_extents_are_shared_with_the_core(kind: Kind) -> None:
    with kind("shared", sparse(60 * P, (0, b"x"), (50 * P, b"y"))) as image:
        packed = image.c_extents[0 : image.c_count]
        assert [(e.offset, e.length, e.file_offset) for e in packed] == [
            (e.offset, e.length, e.file_offset) for e in image.extents
        ]
        assert [e.bytes[0] for e in packed] == [ord("x"), ord("y")]
        assert {e.fd for e in packed} == {image.fd if isinstance(image, MemfdImage) else -1}
