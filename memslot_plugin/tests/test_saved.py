"""Guests saved and loaded on a host without a runtime: what comes back, from where, and what is refused."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import memslot_plugin as memslot
from memslot_hooks import hookimpl
from memslot_plugin import container
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import lib
from memslot_plugin.backing import new_memfd, why_it_may_change
from memslot_plugin.container import Contents, Stored
from memslot_plugin.hosts.fake import FakeLive
from memslot_plugin.image import MAX_EXTENTS
from memslot_plugin.smaps import mappings
from memslot_plugin.tests.profiles import examples

WASM_PAGE = 65536
FS_IOC_SETFLAGS, FS_IMMUTABLE = 0x40086602, 0x10  # ioctl_iflags(2)
# (module (memory 3 9) (global (mut i32) (i32.const 5)) (data (i32.const 70000) "data"))
MODULE = (
    b"\0asm\1\0\0\0"
    b"\x05\x04\x01\x01\x03\x09"
    b"\x06\x06\x01\x7f\x01\x41\x05\x0b"
    b"\x0b\x0c\x01\x00\x41\xf0\xa2\x04\x0b\x04data"
)
TWO_MEMORIES = b"\0asm\1\0\0\0\x05\x05\x02\x00\x01\x00\x02"

pytestmark = pytest.mark.usefixtures("no_leaks")


def _put(live: FakeLive, at: int, value: int) -> None:
    live.write(0, at, bytes([value]))


Open = Callable[..., memslot.FakeHost]


@pytest.fixture(params=["memfd", "anonymous"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def open_host(backend: str) -> Iterator[Open]:
    opened: list[memslot.FakeHost] = []

    def make(**changes: Any) -> memslot.FakeHost:
        plugins = changes.pop("embedded", ())
        settings = memslot.Settings(
            **{"plugins": (backend,), "slots": 4, "reserved": "1MiB", "audit": 1.0, **changes}
        )
        opened.append(memslot.FakeHost(settings, plugins=plugins, functions={"put": _put}))
        return opened[-1]

    yield make
    for host in opened:
        host.close(force=True)


@pytest.fixture
def host(open_host: Open) -> memslot.FakeHost:
    return open_host()


def content(guest: memslot.Guest, memory: int = 0) -> bytes:
    with guest.instantiate() as instance:
        found = instance.memories[memory]
        before = found.read(0, found.byte_size)
        found.write(0, b"\xee" * found.byte_size)
        instance.reset()
        assert found.read(0, found.byte_size) == before
        return before


@pytest.fixture
def saved(host: memslot.FakeHost, tmp_path: Path) -> Path:
    path = tmp_path / "toy.memslot"
    with host.prepare(MODULE, name="toy").instantiate() as instance:
        instance.memory.write(5 * P, b"written")
        taken = instance.snapshot()
    taken.save(path)
    taken.close()
    return path


EXPECTED = bytearray(3 * WASM_PAGE)
EXPECTED[70000:70004] = b"data"
EXPECTED[5 * P : 5 * P + 7] = b"written"


# What comes back


def test_a_snapshot_comes_back(host: memslot.FakeHost, saved: Path, backend: str) -> None:
    guest = host.load(saved)
    assert (guest.name, guest.plan.is_snapshot) == ("toy", True)
    assert content(guest) == EXPECTED
    loaded = guest.loaded
    assert loaded is not None
    assert loaded.byte_size == saved.stat().st_size
    assert loaded.shares_file == (backend == "memfd")
    assert loaded.copied_because == (None if backend == "memfd" else "the plugin copies images")
    assert (loaded.compiled_because, loaded.authentic) == ("the file has no code", False)
    assert host.load(saved, name="other").name == "other"


def test_a_prepared_guest_comes_back_as_it_was(host: memslot.FakeHost, tmp_path: Path) -> None:
    guest = host.prepare(MODULE, name="prepared")
    size = guest.save(tmp_path / "guest")
    assert size == (tmp_path / "guest").stat().st_size
    again = host.load(tmp_path / "guest")
    assert not again.plan.is_snapshot
    assert content(again) == content(guest)
    ours, theirs = again.report, guest.report
    assert (ours.source_bytes, ours.segments) == (theirs.source_bytes, theirs.segments)
    assert (ours.changes, ours.verdict) == (theirs.changes, theirs.verdict)
    assert ours.saved_globals == theirs.saved_globals


def test_what_was_loaded_can_be_saved_again(host: memslot.FakeHost, saved: Path) -> None:
    guest = host.load(saved)
    again = saved.with_name("again")
    guest.save(again)
    assert content(host.load(again)) == EXPECTED
    with guest.instantiate() as instance:
        instance.memory.write(100, b"more")
        instance.snapshot().save(again)
    more = bytearray(EXPECTED)
    more[100:104] = b"more"
    found = host.load(again)
    assert content(found) == more
    assert found.report.changes == guest.report.changes
    assert found.plan.origin is not None
    assert found.plan.origin.source_sha256 == hashlib.sha256(MODULE).digest()


def test_a_layered_guest_is_saved_flat(host: memslot.FakeHost, tmp_path: Path) -> None:
    guest = host.prepare(MODULE)
    for step in range(6):
        with guest.instantiate() as instance:
            instance.call("put", step * 20 * P // 10 + 1, 7)
            expected = instance.memory.read(0, 3 * WASM_PAGE)
            guest = instance.snapshot()
    image = guest.images[0]
    assert isinstance(image, memslot.Image)
    assert image.inherited_bytes
    guest.save(tmp_path / "flat")
    loaded = host.load(tmp_path / "flat")
    flat = loaded.images[0]
    assert isinstance(flat, memslot.Image)
    assert (flat.inherited_bytes, len({*flat.backings})) == (0, 1)
    assert len(flat.extents) <= len(image.extents)
    assert content(loaded) == expected


def test_every_memory_comes_back(host: memslot.FakeHost, tmp_path: Path) -> None:
    guest = host.prepare(TWO_MEMORIES)
    with guest.instantiate() as instance:
        instance.memories[1].write(2 * WASM_PAGE - 2, b"ab")
        taken = instance.snapshot()
    taken.save(tmp_path / "two")
    loaded = host.load(tmp_path / "two")
    assert content(loaded, 0) == bytes(WASM_PAGE)
    assert content(loaded, 1) == bytes(2 * WASM_PAGE - 2) + b"ab"


def test_the_export_that_reseeds_is_kept(host: memslot.FakeHost, tmp_path: Path) -> None:
    host.functions["draw"] = lambda live: live.write(0, 9, b"d")
    host.prepare(MODULE, init=lambda _: None, reseed="draw").save(tmp_path / "guest")
    loaded = host.load(tmp_path / "guest")
    assert loaded.reseed == "draw"
    with loaded.instantiate() as instance:
        assert instance.memory.read(9, 1) == b"d"
    before = host.statistics().guests
    with pytest.raises(memslot.ExportNotFound, match="'another' to be called after each restore"):
        host.load(tmp_path / "guest", reseed="another")
    assert host.statistics().guests == before
    host.functions["another"] = host.functions["draw"]
    assert host.load(tmp_path / "guest", reseed="another").reseed == "another"


def test_a_memory_without_an_image_keeps_its_data(host: memslot.FakeHost, tmp_path: Path) -> None:
    module = MODULE.replace(
        b"\x41\xf0\xa2\x04\x0b", b"\x41\xff\xff\x0b\x0b"
    )  # ends behind the memory
    guest = host.prepare(module)
    assert guest.images == {}
    guest.save(tmp_path / "guest")
    loaded = host.load(tmp_path / "guest")
    assert (loaded.images, loaded.plan.module) == ({}, guest.plan.module)
    assert loaded.report.memories == guest.report.memories


def test_watchers_hear_of_a_loaded_guest(open_host: Open, saved: Path) -> None:
    heard: list[str] = []

    class Watcher:
        @hookimpl
        def memslot_guest_prepared(self, guest_id: str) -> None:
            heard.append(guest_id)

    host = open_host(embedded=(Watcher(),))
    assert heard == []
    guest = host.load(saved)
    assert heard == [guest.guest_id]
    assert host.statistics().guests == 1


# Mapped or copied


def test_only_a_file_that_others_cannot_write_to_is_mapped(
    host: memslot.FakeHost, saved: Path, backend: str
) -> None:
    def shares(option: Any) -> tuple[bool, str | None]:
        guest = host.load(saved, share_file=option)
        assert content(guest) == EXPECTED
        assert guest.loaded is not None
        guest.close()
        return guest.loaded.shares_file, guest.loaded.copied_because

    mapped = backend == "memfd"
    assert shares("auto")[0] == mapped
    assert shares("off") == (False, "share_file is off")
    saved.chmod(0o664)
    assert shares("auto") == (False, "others than its owner may write to it (mode 0664)")
    assert shares("on")[0] == mapped
    if os.geteuid() == 0:
        saved.chmod(0o644)
        os.chown(saved, 12345, 12345)
        assert shares("auto") == (False, "it belongs to the user 12345")
    with pytest.raises(memslot.SettingError, match="share_file must be one of auto, on, off"):
        host.load(saved, share_file="maybe")  # type: ignore[arg-type]


def test_what_lies_behind_a_descriptor_may_change_or_not(tmp_path: Path) -> None:
    fd = new_memfd("test", P, "a test")
    assert "others than its owner may write to it" in (why_it_may_change(fd) or "")
    lib.ms_seal(fd)
    assert why_it_may_change(fd) is None
    os.close(fd)
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "file").chmod(0o666)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    assert why_it_may_change(fd) == "others than its owner may write to it (mode 0666)"
    try:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", FS_IMMUTABLE))
    except OSError as error:
        pytest.skip(f"impossible: no file can be made immutable here: {error.strerror}")
    else:
        assert why_it_may_change(fd) is None
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", 0))
    finally:
        os.close(fd)


@pytest.mark.parametrize("option", ["on", "off"])
def test_a_file_that_is_changed_later_changes_guests_only_where_it_is_mapped(
    open_host: Open, saved: Path, backend: str, option: Any
) -> None:
    host = open_host()
    guest = host.load(saved, share_file=option)
    saved.chmod(0o644)
    with saved.open("r+b") as file:
        data = file.read()
        file.seek(data.index(b"written"))
        file.write(b"WRITTEN")
    with guest.instantiate() as instance:
        found = instance.memory.read(5 * P, 7)
    assert found == (b"WRITTEN" if option == "on" and backend == "memfd" else b"written")
    with pytest.raises(memslot.InvalidContainer, match="its digest is wrong"):
        host.load(saved)


@pytest.mark.parametrize("option", ["on", "off"])
def test_a_file_that_is_cut_later_ends_the_process_only_where_it_is_mapped(
    saved: Path, option: str, backend: str
) -> None:
    program = f"""
import os
import memslot_plugin as memslot
host = memslot.FakeHost(memslot.Settings(plugins=({backend!r},), slots=1, reserved="1MiB"))
guest = host.load({str(saved)!r}, share_file={option!r})
os.chmod({str(saved)!r}, 0o644)
os.truncate({str(saved)!r}, 0)
with guest.instantiate() as instance:
    print(instance.memory.read({5 * P}, 7))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    if option == "on" and backend == "memfd":
        assert done.returncode == -7, "SIGBUS, as the documentation says"
    else:
        assert (done.returncode, done.stdout) == (0, "b'written'\n"), done.stderr


def test_replacing_a_file_leaves_those_who_loaded_it_alone(
    host: memslot.FakeHost, saved: Path
) -> None:
    guest = host.load(saved)
    host.prepare(MODULE).save(saved)
    assert content(guest) == EXPECTED
    saved.unlink()
    assert content(guest) == EXPECTED


def test_without_proc_a_file_is_mapped_all_the_same(
    host: memslot.FakeHost, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: int) -> Iterator[Any]:
        raise FileNotFoundError(errno.ENOENT, "no /proc")

    monkeypatch.setattr("memslot_plugin.backing.mappings", missing)
    guest = host.load(saved)
    monkeypatch.undo()
    assert content(guest) == EXPECTED


def test_slots_know_the_file_that_they_map(open_host: Open, saved: Path, backend: str) -> None:
    host = open_host()
    guest = host.load(saved)
    with guest.instantiate() as instance:
        live = instance._live()
        found = {
            each.inode for each in mappings(live.memories[0].base, live.memories[0].base + 6 * P)
        }
        for _, plugin in host.plugins.manager.list_name_plugin():
            if (pool := getattr(plugin, "pool", None)) is not None:
                pool.check()
    image = guest.images[0]
    assert isinstance(image, memslot.Image)
    if backend == "memfd":
        assert {each.inode for each in image.backings} | {0} == found
        assert image.kind == "memfd"
        assert image.stored_bytes == 2 * P


# What is refused


def test_what_is_not_there_or_no_file_is_refused(host: memslot.FakeHost, tmp_path: Path) -> None:
    with pytest.raises(memslot.GuestNotFound, match="there is no saved guest at"):
        host.load(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(memslot.InvalidContainer, match="is no file"):
            host.load(path)
    assert host.statistics().guests == 0


def test_what_may_not_be_read_is_refused(host: memslot.FakeHost, saved: Path) -> None:
    saved.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(12345)  # root may read everything
        with pytest.raises(memslot.InvalidContainer, match="cannot be read: Permission denied"):
            host.load(saved)
    finally:
        os.seteuid(user)


def test_a_closed_guest_and_a_closed_host_save_nothing(
    host: memslot.FakeHost, tmp_path: Path
) -> None:
    guest = host.prepare(MODULE)
    guest.close()
    with pytest.raises(memslot.UsedAfterClose):
        guest.save(tmp_path / "guest")
    other = host.prepare(MODULE)
    host.close()
    for call in (other.save, host.load):
        with pytest.raises(memslot.UsedAfterClose):
            call(tmp_path / "guest")
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_long_and_secret(host: memslot.FakeHost, saved: Path) -> None:
    guest = host.load(saved)
    for key in (b"", b"short", "k" * 32):
        with pytest.raises(memslot.SettingError, match="a key is at least 16 secret bytes"):
            guest.save(saved, key=key)  # type: ignore[arg-type]
    guest.save(saved, key=b"k" * 16)
    with pytest.raises(memslot.InvalidContainer, match="was saved with a key"):
        host.load(saved)
    loaded = host.load(saved, key=b"k" * 16)
    assert loaded.loaded is not None
    assert loaded.loaded.authentic


def test_images_of_another_kind_are_refused(open_host: Open, tmp_path: Path) -> None:
    class Theirs:
        kind, byte_size, extents = "theirs", 0, ()

        def close(self) -> None:
            """Nothing is held."""

    class Builder:
        @hookimpl(tryfirst=True)
        def memslot_build_image(self) -> Theirs:
            return Theirs()

    guest = open_host(embedded=(Builder(),)).prepare(MODULE)
    for call in (lambda: guest.save(tmp_path / "guest"), guest.share):
        with pytest.raises(memslot.Unsupported, match="images of the kind theirs"):
            call()


def test_a_host_whose_plugins_build_no_images_refuses(saved: Path) -> None:
    with (
        memslot.FakeHost(memslot.Settings(plugins=())) as host,
        pytest.raises(
            memslot.SnapshotRefused, match="nothing else holds a snapshot or a saved guest"
        ),
    ):
        host.load(saved)


def test_an_image_beyond_the_limit_is_refused(open_host: Open, saved: Path) -> None:
    host = open_host(image_limit=P)
    with pytest.raises(memslot.MemoryTooLarge, match="raise the setting image_limit"):
        host.load(saved)
    assert host.statistics().guests == 0


ABOUT: dict[str, Any] = {
    "writer": "somebody",
    "name": "x",
    "snapshot": True,
    "reseed": None,
    "source_bytes": 1,
    "segments": [],
    "changes": [],
}
EMPTIED = MODULE.replace(
    b"\x0b\x0c\x01\x00\x41\xf0\xa2\x04\x0b\x04data", b"\x0b\x08\x01\x00\x41\xf0\xa2\x04\x0b\x00"
)


def write(path: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "about": ABOUT,
        "source_sha256": bytes(32),
        "module": EMPTIED,
        "code": {},
        "images": {0: [Stored(0, P, 0, 0)]},
        "pieces": [memoryview(b"x" * P)],
    }
    container.write(path, Contents(**{**values, **changes}))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": {1: [Stored(0, P, 0, 0)]}}, "contents for memory 1, which is not the module's"),
        ({"module": MODULE}, "contents for memory 0, and data of its own in the module"),
        ({"images": {0: [Stored(48 * P, P, 0, 0)]}}, "end at byte .*, and it starts with 196608"),
        ({"images": {0: [Stored(0, P, 1, 0)]}}, "in file 1, which did not come with it"),
        (
            {"images": {0: [Stored(2 * n * P, P, 0, 0) for n in range(MAX_EXTENTS + 1)]}},
            f"has {MAX_EXTENTS + 1} extents for memory 0",
        ),
        ({"about": {**ABOUT, "name": 7}}, "makes no sense"),
        ({"about": {**ABOUT, "snapshot": 1}}, "makes no sense"),
        ({"about": {**ABOUT, "reseed": []}}, "makes no sense"),
        ({"about": {**ABOUT, "segments": [7]}}, "makes no sense"),
        ({"about": {**ABOUT, "segments": [{"index": 0}]}}, "makes no sense"),
        ({"about": {**ABOUT, "changes": [None]}}, "makes no sense"),
        ({"about": {}}, "makes no sense"),
    ],
)
def test_what_fits_no_module_is_refused_although_every_digest_is_right(
    host: memslot.FakeHost, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with host.load(write(tmp_path / "good")) as good:
        assert content(good)[:P] == b"x" * P
        with pytest.raises(memslot.InvalidContainer, match=said):
            host.load(write(tmp_path / "bad", **change))
        assert host.statistics().guests == 1


def test_a_module_that_no_slot_serves_has_no_contents(
    host: memslot.FakeHost, tmp_path: Path
) -> None:
    shared = EMPTIED.replace(b"\x01\x01\x03\x09", b"\x01\x03\x03\x09")
    with pytest.raises(memslot.Unsupported, match=r"Memory 0 is shared"):
        host.load(write(tmp_path / "bad", module=shared))
    with pytest.raises(memslot.InvalidModule):
        host.load(write(tmp_path / "bad", module=b"no module"))


def test_the_verdict_is_found_out_again_and_not_believed(
    host: memslot.FakeHost, tmp_path: Path
) -> None:
    # (module (table 1 funcref) (memory 3 9) (func (table.set (i32.const 0) (ref.null func))))
    module = (
        b"\0asm\1\0\0\0\x01\x04\x01\x60\x00\x00\x03\x02\x01\x00\x04\x04\x01\x70\x00\x01\x05\x04\x01\x01\x03\x09"
        b"\x0a\x0a\x01\x08\x00\x41\x00\xd0\x70\x26\x00\x0b"
    )
    guest = host.load(write(tmp_path / "guest", module=module))
    assert not guest.report.verdict.in_place
    assert not guest.in_place


# Whatever fails


@pytest.mark.parametrize("option", ["on", "off"])
@pytest.mark.parametrize("skip", range(3))
@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("mmap", errno.ENOMEM),
        ("memfd_create", errno.EMFILE),
        ("pwrite", errno.ENOSPC),
        ("fcntl", errno.EINVAL),
    ],
)
def test_whatever_the_kernel_refuses_while_loading_leaves_nothing(
    host: memslot.FakeHost,
    saved: Path,
    inject: Callable[..., None],
    *,
    option: Any,
    call: str,
    error: int,
    skip: int,
) -> None:
    inject(call, skip=skip, error=error)
    seen: int | None = error
    try:
        guest = host.load(saved, share_file=option)
    except memslot.SystemCallError as failure:
        seen = failure.errno
        assert host.statistics().guests == 0
    else:
        inject(call, error=0)
        assert content(guest) == EXPECTED
        guest.close()
    inject(call, error=0)
    assert seen == error
    assert content(host.load(saved)) == EXPECTED


@pytest.mark.parametrize("skip", range(3))
@pytest.mark.parametrize("call", ["mmap", "memfd_create", "pwrite", "fcntl", "pagemap_scan"])
def test_whatever_the_kernel_refuses_while_a_layer_is_made_leaves_nothing(
    host: memslot.FakeHost, saved: Path, inject: Callable[..., None], call: str, skip: int
) -> None:
    guest = host.load(saved)
    with guest.instantiate() as instance:
        instance.memory.write(100, b"more")
        inject(call, skip=skip, error=errno.ENOMEM)
        seen: int | None = errno.ENOMEM
        try:
            instance.snapshot().close()
        except memslot.SystemCallError as failure:
            seen = failure.errno
        inject(call, error=0)
        assert seen == errno.ENOMEM
        with instance.snapshot() as taken:
            more = bytearray(EXPECTED)
            more[100:104] = b"more"
            assert content(taken) == more


@pytest.mark.parametrize("skip", range(4))
@pytest.mark.parametrize("call", ["mmap", "memfd_create", "fcntl", "ftruncate"])
def test_whatever_the_kernel_refuses_while_sharing_leaves_nothing(
    host: memslot.FakeHost, saved: Path, inject: Callable[..., None], call: str, skip: int
) -> None:
    guest = host.load(saved)
    inject(call, skip=skip, error=errno.ENOMEM)
    seen: int | None = errno.ENOMEM
    try:
        with guest.share() as shared, host.attach(shared) as attached:
            inject(call, error=0)
            assert content(attached) == EXPECTED
    except memslot.SystemCallError as failure:
        seen = failure.errno
    inject(call, error=0)
    assert seen == errno.ENOMEM
    with guest.share() as shared, host.attach(shared) as attached:
        assert content(attached) == EXPECTED


# Whatever the bytes are


@hypothesis_settings(max_examples=examples(40))
@given(seed=st.integers(0, 2**32))
def test_mutated_files_never_load_and_never_leak(seed: int) -> None:
    rng = random.Random(seed)
    plugin = rng.choice(["memfd", "anonymous"])
    with memslot.FakeHost(memslot.Settings(plugins=(plugin,), slots=1, reserved="1MiB")) as host:
        path = Path(f"/proc/self/fd/{_SAVED}")
        good = bytearray(_GOOD)
        for _ in range(rng.randrange(1, 4)):
            what = rng.randrange(4)
            if what == 0:
                del good[rng.randrange(len(good) + 1) :]
            elif what == 1:
                good += rng.randbytes(rng.randrange(1, 2 * P))
            elif good:
                good[rng.randrange(len(good))] ^= rng.randrange(1, 256)
        evil = rng.random() < 0.5
        if evil and len(good) >= 112:  # somebody who knows the format
            struct.pack_into("<Q", good, 24, len(good))
            plain = bytes(good[:80]) + bytes(32) + bytes(good[112:])
            good[80:112] = hashlib.sha256(plain).digest()
        os.ftruncate(_SAVED, 0)
        os.pwrite(_SAVED, bytes(good), 0)
        try:
            guest = host.load(path, share_file=rng.choice(["on", "off", "auto"]))
        except memslot.MemslotError:
            assert host.statistics().guests == 0
            return
        assert evil or bytes(good) == _GOOD
        with guest.instantiate() as instance:
            instance.memory.read(0, instance.memory.byte_size)
            instance.reset()


_SAVED = os.memfd_create("mutated")


def _good() -> bytes:
    fd = os.memfd_create("good")
    container.write_to(
        fd,
        Contents(
            ABOUT,
            bytes(32),
            EMPTIED,
            {"k": b"code"},
            {0: [Stored(P, P, 0, 0)]},
            [memoryview(b"x" * P)],
        ),
    )
    data = os.pread(fd, 1 << 20, 0)
    os.close(fd)
    return data


_GOOD = _good()


def test_the_file_says_what_stands_in_it(saved: Path) -> None:
    fd = os.open(saved, os.O_RDONLY)
    found = container.read(fd, "it")
    os.close(fd)
    assert found.about["source_bytes"] == len(MODULE)
    assert found.source_sha256 == hashlib.sha256(MODULE).digest()
    assert found.module == EMPTIED
    assert json.dumps(found.about)
    assert [(each.offset // P, each.length // P) for each in found.images[0]] == [(5, 1), (17, 1)]
    assert all(each.file == 0 and not each.file_offset % P for each in found.images[0])
