"""Guests saved and loaded on a host without a runtime: equal bytes, mapped or copied files, and refusals."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import memslot_plugin as memslot
from memslot_hooks import hookimpl
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import lib
from memslot_plugin.memory.backing import new_memfd, why_it_may_change
from memslot_plugin.tests import faults
from memslot_plugin.tests.saved import (
    MODULE,
    TWO_MEMORIES,
    WASM_PAGE,
    content,
    opened,
)

FS_IOC_SETFLAGS, FS_IMMUTABLE = 0x40086602, 0x10  # ioctl_iflags(2)

pytestmark = pytest.mark.usefixtures("no_leaks")


BACKENDS = ["memfd", "anonymous"]
BOTH = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def backend() -> str:
    """Return the plugin that builds images; a test with BOTH overrides it."""
    return "memfd"


@pytest.fixture
def host(backend: str) -> Iterator[memslot.FakeHost]:
    with opened(backend) as host:
        yield host


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


# Saved and loaded


def test_guest_whose_path_is_not_utf_8_is_saved_and_loaded(
    host: memslot.FakeHost, tmp_path: Path
) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    Path(path).write_bytes(MODULE)
    guest = host.prepare(path, reseed=None)
    guest.save(path + ".memslot")
    with host.load(path + ".memslot") as loaded, host.attach(guest.share()) as attached:
        assert loaded.name == guest.name == "\\udcff"
        assert content(loaded) == content(attached) == content(guest)


@BOTH
def test_snapshot_saved_and_loaded_has_equal_bytes(
    host: memslot.FakeHost, saved: Path, backend: str
) -> None:
    guest = host.load(saved)
    assert (guest.name, guest.plan.is_snapshot) == ("toy", True)
    assert content(guest) == EXPECTED
    loaded = guest.loaded
    assert loaded is not None
    assert loaded.shares_file == (backend == "memfd")
    assert loaded.copied_because == (None if backend == "memfd" else "the plugin copies images")
    assert loaded.compiled_because == "the file has no code"
    assert host.load(saved, name="other").name == "other"


def test_prepared_guest_saved_and_loaded_is_equal(host: memslot.FakeHost, tmp_path: Path) -> None:
    heard: list[str] = []

    @hookimpl
    def prepared(guest_id: str) -> None:
        heard.append(guest_id)

    host.plugins.register(SimpleNamespace(memslot_guest_prepared=prepared), name="watcher")
    guest = host.prepare(MODULE, name="prepared")
    size = guest.save(tmp_path / "guest")
    assert size == (tmp_path / "guest").stat().st_size
    again = host.load(tmp_path / "guest")
    assert heard == [guest.guest_id, again.guest_id]
    assert not again.plan.is_snapshot
    assert content(again) == content(guest)
    for field in ("source_bytes", "verdict", "saved_globals"):
        assert getattr(again.report, field) == getattr(guest.report, field), field


@BOTH
def test_loaded_guest_when_layered_on_and_saved_again_has_equal_bytes(
    host: memslot.FakeHost, saved: Path, backend: str
) -> None:
    guest = host.load(saved)
    again = saved.with_name("again")
    guest.save(again)
    assert content(host.load(again)) == EXPECTED
    with guest.instantiate() as instance:
        instance.memory.write(100, b"more")
        more = instance.memory.read(0, 3 * WASM_PAGE)
        layer = instance.snapshot()
    image = layer.images[0]
    assert isinstance(image, memslot.Image)
    assert image.stored_bytes == P
    assert image.inherited_bytes
    changes = guest.report.changes
    guest.close()
    saved.unlink()
    assert content(layer) == more
    layer.save(again)
    found = host.load(again)
    assert content(found) == more
    flat = found.images[0]
    assert isinstance(flat, memslot.Image)
    assert (flat.inherited_bytes, len({each.backing for each in flat.extents})) == (0, 1)
    assert found.report.changes == changes
    assert found.plan.origin is not None
    assert found.plan.origin.source_sha256 == hashlib.sha256(MODULE).hexdigest()


def test_guest_of_several_memories_saved_and_loaded_has_each(
    host: memslot.FakeHost, tmp_path: Path
) -> None:
    with host.prepare(TWO_MEMORIES).instantiate() as instance:
        instance.memories[1].write(2 * WASM_PAGE - 2, b"ab")
        instance.snapshot().save(tmp_path / "two")
    loaded = host.load(tmp_path / "two")
    assert content(loaded, 0) == bytes(WASM_PAGE)
    assert content(loaded, 1) == bytes(2 * WASM_PAGE - 2) + b"ab"


def test_reseed_export_of_a_saved_guest_is_kept_unless_another_is_named(
    host: memslot.FakeHost, tmp_path: Path
) -> None:
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


def test_memory_without_an_image_saved_and_loaded_keeps_its_data(
    host: memslot.FakeHost, tmp_path: Path
) -> None:
    # The data ends behind the memory.
    guest = host.prepare(MODULE.replace(b"\x41\xf0\xa2\x04\x0b", b"\x41\xff\xff\x0b\x0b"))
    assert guest.images == {}
    guest.save(tmp_path / "guest")
    loaded = host.load(tmp_path / "guest")
    assert (loaded.images, loaded.plan.module) == ({}, guest.plan.module)
    assert loaded.report.memories == guest.report.memories


# Mapped or copied


@BOTH
def test_file_that_others_can_write_to_is_copied_and_any_other_is_mapped(
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


def test_file_that_an_acl_lets_others_write_is_not_mapped(tmp_path: Path) -> None:
    # acl(5): owner rw, user 65534 rw, group r, mask rw, others r.
    entries = ((1, 6, -1), (2, 6, 65534), (4, 4, -1), (0x10, 6, -1), (0x20, 4, -1))
    rights = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *each) for each in entries)
    file = tmp_path / "file"
    file.touch(0o644)
    try:
        os.setxattr(file, "system.posix_acl_access", rights)
    except OSError as error:
        pytest.skip(f"impossible: the file system has no access lists: {error.strerror}")
    with file.open("rb") as opened:
        assert "others than its owner may write" in (why_it_may_change(opened.fileno()) or "")
        file.chmod(0o644)  # the mask
        assert why_it_may_change(opened.fileno()) is None


def test_file_behind_a_descriptor_may_change_unless_sealed_immutable_or_private(
    tmp_path: Path,
) -> None:
    fd = new_memfd("test", P, "a test")
    assert "others than its owner may write to it" in (why_it_may_change(fd) or "")
    lib.ms_seal(fd)
    assert why_it_may_change(fd) is None
    os.close(fd)
    (tmp_path / "file").touch(0o666)
    (tmp_path / "file").chmod(0o666)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    assert why_it_may_change(fd) is not None
    try:
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", FS_IMMUTABLE))
    except OSError as error:
        pytest.skip(f"impossible: no file can be made immutable here: {error.strerror}")
    else:
        assert why_it_may_change(fd) is None
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", 0))
    finally:
        os.close(fd)


def test_file_that_is_changed_or_cut_later_harms_only_guests_that_map_it(saved: Path) -> None:
    program = f"""
import os
from pathlib import Path
import memslot_plugin as memslot
path = Path({str(saved)!r})
host = memslot.FakeHost(memslot.Settings(plugins=("memfd",), slots=2, reserved="1MiB"))
guests = [host.load(path, share_file=option) for option in ("off", "on")]

def read():
    for guest in guests:
        with guest.instantiate() as instance:
            print(instance.memory.read({5 * P}, 7).decode(), flush=True)

path.chmod(0o644)
with path.open("r+b") as file:
    at = file.read().index(b"written")
    file.seek(at)
    file.write(b"WRITTEN")
read()
try:
    host.load(path)
except memslot.InvalidContainer as error:
    print("its digest is wrong" in str(error))
os.truncate(path, 0)
read()
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["written", "WRITTEN", "True", "written"], done.stderr
    assert done.returncode == -7, "SIGBUS, as the documentation says"


def test_file_that_is_replaced_or_deleted_leaves_its_guests_alone_even_without_proc(
    host: memslot.FakeHost, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: int) -> Iterator[Any]:
        raise FileNotFoundError(errno.ENOENT, "no /proc")

    with monkeypatch.context() as patched:
        patched.setattr("memslot_plugin.memory.backing.mappings", missing)
        guests = [host.load(saved)]
    guests.append(host.load(saved))
    host.prepare(MODULE).save(saved)
    assert content(guests[0]) == EXPECTED
    saved.unlink()
    assert [content(guest) for guest in guests] == [EXPECTED, EXPECTED]


# Refusals


def test_path_that_is_missing_no_file_or_unreadable_is_refused(
    host: memslot.FakeHost, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(memslot.GuestNotFound, match="there is no saved guest at"):
        host.load(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(memslot.InvalidContainer, match="is no file"):
            host.load(path)
    saved.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(12345)  # root may read everything
        with pytest.raises(memslot.InvalidContainer, match="cannot be read: Permission denied"):
            host.load(saved)
    finally:
        os.seteuid(user)
    assert host.statistics().guests == 0


def test_save_with_a_wrong_key_or_after_a_close_writes_nothing(
    host: memslot.FakeHost, tmp_path: Path
) -> None:
    guest = host.prepare(MODULE)
    for key in (b"", b"short", "k" * 32):
        with pytest.raises(memslot.SettingError, match="a key is at least 16 secret bytes"):
            guest.save(tmp_path / "guest", key=key)  # type: ignore[arg-type]
    guest.close()
    with pytest.raises(memslot.UsedAfterClose):
        guest.save(tmp_path / "guest")
    other = host.prepare(MODULE)
    host.close()
    for call in (other.save, host.load):
        with pytest.raises(memslot.UsedAfterClose):
            call(tmp_path / "guest")
    assert list(tmp_path.iterdir()) == []


def test_guest_with_images_of_another_kind_is_neither_saved_nor_shared(tmp_path: Path) -> None:
    theirs = SimpleNamespace(kind="theirs", byte_size=0, extents=(), close=lambda: None)
    builder = SimpleNamespace(memslot_build_image=hookimpl(tryfirst=True)(lambda: theirs))
    with opened("memfd", builder) as host, host.prepare(MODULE) as guest:
        for call in (lambda: guest.save(tmp_path / "guest"), guest.share):
            with pytest.raises(memslot.Unsupported, match="images of the kind theirs"):
                call()


def test_file_that_the_settings_leave_no_image_for_is_refused(saved: Path) -> None:
    for settings, expected, said in (
        ({"plugins": ()}, memslot.SnapshotRefused, "nothing else holds a snapshot or a saved"),
        ({"image_limit": P}, memslot.MemoryTooLarge, "raise the setting image_limit"),
    ):
        with memslot.FakeHost(memslot.Settings(**settings)) as host:
            with pytest.raises(expected, match=said):
                host.load(saved)
            assert host.statistics().guests == 0


def test_module_in_a_file_of_holes_is_refused_and_in_a_pipe_it_is_read(
    host: memslot.FakeHost, tmp_path: Path
) -> None:
    file = tmp_path / "guest.wasm"
    file.write_bytes(MODULE)
    assert host.prepare(file).name == "guest"
    os.truncate(file, 3 << 30)
    with pytest.raises(memslot.InvalidModule, match="claims 3221225472 bytes, and"):
        host.prepare(file)
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as stream:
        stream.write(MODULE)
    assert host.prepare(f"/dev/fd/{reader}").report.source_bytes == len(MODULE)
    os.close(reader)


# System calls that fail


def shared_and_attached(guest: memslot.Guest) -> memslot.Guest:
    with guest.share() as shared:
        attached: memslot.Guest = guest.host.attach(shared)
        return attached


STEPS: dict[str, Callable[[memslot.Instance, Path], memslot.Guest]] = {
    "mapping": lambda instance, path: instance.guest.host.load(path, share_file="on"),
    "copying": lambda instance, path: instance.guest.host.load(path, share_file="off"),
    "layering": lambda instance, _: instance.snapshot(),
    "sharing": lambda instance, _: shared_and_attached(instance.guest),
}


@BOTH
@pytest.mark.parametrize("step", STEPS)
def test_system_call_that_fails_is_named_and_leaves_nothing(
    host: memslot.FakeHost, saved: Path, backend: str, step: str
) -> None:
    hit = 0
    with host.load(saved) as guest, guest.instantiate() as instance:
        instance.memory.write(100, b"more")
        expected = instance.memory.read(0, 3 * WASM_PAGE) if step == "layering" else EXPECTED
        with STEPS[step](instance, saved) as made:
            assert content(made) == expected
        for fault in faults.every(faults.calls_of(lambda: STEPS[step](instance, saved).close())):
            found, failed = None, None
            with faults.injected(fault) as injection:
                try:
                    found = STEPS[step](instance, saved)
                except memslot.SystemCallError as error:
                    failed = error.errno
            hit += injection.hit
            assert failed in (None, fault.error)
            if found is not None:
                assert content(found) == expected
                found.close()
            assert host.statistics().guests == 1
    assert hit or backend == "anonymous", "it makes no system call of the core's"
