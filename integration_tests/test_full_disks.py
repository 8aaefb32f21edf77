"""Saving where it cannot succeed, for real: on a file system that is full, too small, or read-only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from . import cells
from .cells import Cell

CHILD = """
import ctypes, errno, os, sys
from pathlib import Path
import memslot_plugin as memslot
from integration_tests import toy

CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 16384, 1 << 18
libc = ctypes.CDLL(None, use_errno=True)


def need(result, what):
    if result:
        print(f"impossible: {what}: {os.strerror(ctypes.get_errno())}")
        sys.exit(77)


def held():
    links = []
    for each in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(each.readlink()))
        except FileNotFoundError:
            pass
    return sorted(links)


folder, name, backend, case = Path(sys.argv[1]), *sys.argv[2:]
need(libc.unshare(CLONE_NEWNS), "a mount namespace of its own")
need(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "keeping mounts to itself")
need(libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=1m"), "mounting a small tmpfs")
options = {"functions": toy.FUNCTIONS} if name == "fake" else {}
settings = memslot.Settings(plugins=(backend,), slots=2, image_limit="64MiB", audit=1.0)
with memslot.open_host(name, settings=settings, **options) as host:
    guest = host.prepare(toy.A, name="toy")
    with guest.instantiate() as instance:
        instance.call("store", 7, 77)
        small = instance.snapshot()
        instance.memory.write(0, os.urandom(instance.memory.byte_size))
        big = instance.snapshot()
    path = folder / "guest"
    small.save(path)
    before, descriptors = path.read_bytes(), held()
    if case == "full":
        free = os.statvfs(folder)
        (folder / "ballast").write_bytes(bytes((free.f_bavail - 8) * free.f_frsize))
        failing, expected = big, errno.ENOSPC
    elif case == "small":
        (folder / "ballast").write_bytes(b"")
        failing, expected = None, errno.ENOSPC
        with host.prepare(toy.WIDE).instantiate() as wide:
            wide.memory.write(0, os.urandom(wide.memory.byte_size))
            failing = wide.snapshot()
        descriptors = held()
    else:
        need(libc.mount(None, str(folder).encode(), None, MS_REMOUNT | MS_RDONLY, None), "a read-only remount")
        failing, expected = big, errno.EROFS
    for target in (path, folder / "new"):
        try:
            failing.save(target)
        except memslot.SystemCallError as error:
            assert error.errno == expected, error
            assert str(target) in str(error)
            print(error)
        else:
            raise AssertionError("saved")
    assert path.read_bytes() == before, "the old file is as it was"
    assert {each.name for each in folder.iterdir()} <= {"guest", "ballast"}, "no debris"
    assert held() == descriptors
    loaded = host.load(path)
    if case == "read-only":
        path.stat()
        assert loaded.loaded.shares_file == (backend == "memfd")
    for each in (loaded, failing):
        with each.instantiate() as instance:
            instance.memory.read(0, 8)
    if case != "read-only":
        (folder / "ballast").unlink()
        if case == "full":
            failing.save(path)
            host.load(path)
print("went on")
"""


@pytest.mark.parametrize("case", ["full", "small", "read-only"])
def test_a_guest_that_cannot_be_saved_leaves_everything_as_it_was(
    plain_cell: Cell, tmp_path: Path, case: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), plain_cell.host, plain_cell.backend, case],
        cwd=Path(cells.__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert last == "went on"
    for said in (first, second):
        if case == "read-only":
            assert "Read-only file system" in said
        else:
            assert "No space left on device" in said
            assert "to a file system with " in said
            assert " bytes left" in said
