"""Saving on a real file system that is full, too small, or read-only. test_container.py has a sample for T0."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import children
from .cells import Cell

CHILD = """
import ctypes, errno, os, sys
from pathlib import Path
import memslot_plugin as memslot
from integration_tests import toy
from integration_tests.cells import Cell
from memslot_plugin.tests.leaks import Footprint

CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 16384, 1 << 18
libc = ctypes.CDLL(None, use_errno=True)


def need(result, what):
    if result:
        print(f"impossible: {what}: {os.strerror(ctypes.get_errno())}")
        sys.exit(77)


folder, cell = Path(sys.argv[1]), Cell(*sys.argv[2:])
path, ballast = folder / "guest", folder / "ballast"
need(libc.unshare(CLONE_NEWNS), "a mount namespace of its own")
need(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "keeping mounts to itself")
need(libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=1m"), "mounting a small tmpfs")
with cell.open(image_limit="64MiB") as host:
    with host.prepare(toy.A, name="toy").instantiate() as instance:
        instance.call("store", 7, 77)
        fits = instance.snapshot()
        instance.memory.write(0, os.urandom(instance.memory.byte_size))
        big = instance.snapshot()
    with host.prepare(toy.WIDE).instantiate() as instance:
        instance.memory.write(0, os.urandom(instance.memory.byte_size))
        too_big = instance.snapshot()
    fits.save(path)
    before, held = path.read_bytes(), Footprint.now().descriptors

    def refused(guest, expected, said):
        for target in (path, folder / "new"):
            try:
                guest.save(target)
            except memslot.SystemCallError as error:
                assert error.errno == expected, error
                assert str(target) in str(error) and said in str(error), error
            else:
                raise AssertionError("saved")
        assert path.read_bytes() == before, "the old file is as it was"
        assert {each.name for each in folder.iterdir()} <= {"guest", "ballast"}, "no debris"
        assert Footprint.now().descriptors == held
        with host.load(path) as loaded:
            for each in (loaded, guest):
                with each.instantiate() as instance:
                    instance.memory.read(0, 8)
            return loaded.loaded

    refused(too_big, errno.ENOSPC, "No space left on device")
    free = os.statvfs(folder)
    ballast.write_bytes(bytes((free.f_bavail - 8) * free.f_frsize))
    refused(big, errno.ENOSPC, "No space left on device")
    ballast.unlink()
    big.save(path)
    before = path.read_bytes()
    need(libc.mount(None, str(folder).encode(), None, MS_REMOUNT | MS_RDONLY, None), "a read-only remount")
    loaded = refused(big, errno.EROFS, "Read-only file system")
    assert loaded.shares_file == (cell.backend == "memfd")
print("went on")
"""


@pytest.mark.gate
@pytest.mark.parametrize(
    "saving_cell", [Cell("fake", "anonymous"), Cell("wasmtime", "memfd")], ids=str
)
def test_save_on_a_full_or_read_only_disk_leaves_everything_as_it_was(
    saving_cell: Cell, tmp_path: Path
) -> None:
    if saving_cell.missing:
        pytest.skip(saving_cell.missing)
    done = children.run("-c", CHILD, str(tmp_path), saving_cell.host, saving_cell.backend)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
