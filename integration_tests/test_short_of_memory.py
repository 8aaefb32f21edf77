"""Machines short of memory: control groups, swapped pages, and a worker that the kernel kills."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import memslot_plugin as memslot

from . import cells
from .cells import Cell
from .children import memory_group, output, run

MIB = 1 << 20

pytestmark = pytest.mark.gate

LARGE = """
import json, os, signal, sys
from pathlib import Path
from integration_tests import cells, expect, toy
from memslot_plugin.settings import MIB
from memslot_plugin.tests.leaks import Footprint
from memslot_plugin._core.proc import private_bytes
data = f'(data (i32.const 0) "{"x" * 70000}")'
module = toy.assemble(f'(module (memory (export "memory") 3200) {data} {toy.CODE})')
cell = cells.Cell(*sys.argv[1:3])
"""
"""A guest with 200 MiB of memory."""

GREEDY = """
with cell.serving(slots=4, keep_resident=sys.argv[3], audit=0.0) as host:
    guests = [host.prepare(module, name=name) for name in "abcd"]
    for turn in range(12):
        with guests[turn % 4].instantiate() as instance:
            assert instance.memory.read(0, 70001) == b"x" * 70000 + bytes(1)
            for start in range(0, 48 * MIB, MIB):
                instance.memory.write(start, b"y" * MIB)
    print(json.dumps({"created": host.statistics().pools[0].created, "private": private_bytes()}))
"""
"""Program that writes all 48 MiB of four slots in turn."""


def joining(group: Path) -> tuple[str, ...]:
    """Return a prefix that puts a child into a control group."""
    return ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")


def test_slots_that_wait_give_their_memory_back_under_a_limit(plain_cell: Cell) -> None:
    """Four dirty slots of 48 MiB would not fit; one in use does."""
    command = ("-c", LARGE + GREEDY, plain_cell.host, plain_cell.backend)
    with memory_group(150 * MIB) as group:
        told = json.loads(output(*command, "1MiB", inside=joining(group)))
        assert told["created"] == 4
        assert told["private"] < 120 * MIB
        if plain_cell.host == "fake" and memslot.probe().pagemap.works:
            kept = run(*command, "64MiB", inside=joining(group))
            assert kept.returncode != 0, "the limit limits nothing"


WORKER = """
with cell.serving(slots=2) as host:
    guest = host.prepare(module)
    with guest.instantiate() as instance:
        instance.memory.write(100, b"the parent's")
        before = Footprint.now()
        worker = os.fork()
        if worker == 0:
            Path(sys.argv[3], "cgroup.procs").write_text(str(os.getpid()))
            for start in range(0, 200 * MIB, MIB):
                instance.memory.write(start, b"y" * MIB)
            os._exit(0)
        _, status = os.waitpid(worker, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        assert not Footprint.now().lost_since(before, mappings=8)
        assert instance.memory.read(100, 12) == b"the parent's"
        assert instance.memory.read(200, 1000) == b"x" * 1000
        instance.reset()
        assert instance.memory.read(0, 70001) == b"x" * 70000 + bytes(1)
    guest.close()
    expect.still_serves(host)
"""


def test_worker_that_the_kernel_kills_for_memory_takes_nothing_along(plain_cell: Cell) -> None:
    with memory_group(64 * MIB) as group:
        output("-c", LARGE + WORKER, plain_cell.host, plain_cell.backend, str(group))


@pytest.fixture(scope="module")
def _swap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Swap to a small file of these tests: an existing swap may go away in the middle of a test."""
    file = tmp_path_factory.mktemp("swap") / "swap"
    with file.open("wb") as opened:
        os.posix_fallocate(opened.fileno(), 0, 16 * MIB)
    file.chmod(0o600)
    for tool in ("mkswap", "swapon"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
        done = subprocess.run([tool, str(file)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"impossible: {tool}: {done.stderr.strip()}")
    yield
    subprocess.run(["swapoff", str(file)], check=True)


SWAPPED = """
import ctypes, os, struct, sys
import memslot_plugin as memslot
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin.memory.reset import choose
C = ctypes.CDLL(None, use_errno=True)
pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
RUNS = [(0, 2), (3, 1), (5, 2), (15, 1)]
WRITTEN = {0, 1, 3, 5, 6, 15}

def swapped(slot):
    words = struct.unpack(f"={16}Q", os.pread(pagemap, 8 * 16, slot.base // P * 8))
    return {page for page, word in enumerate(words) if word >> 62 & 1}

for kind in (memslot.MemfdImage, memslot.BytesImage):
    pool = memslot.Pool(slots=1, reserved=16 * P, guard=P, reset=choose(sys.argv[1], 16 * P))
    image = kind("guest", b"x" * (4 * P))
    pristine = b"x" * (4 * P) + bytes(12 * P)
    for turn in range(4):
        slot = pool.lease(image, 16 * P, affinity="a")
        assert ctypes.string_at(slot.base, 16 * P) == pristine
        for page in WRITTEN:
            ctypes.memset(slot.base + page * P, 0xEE, P)
        assert C.madvise(ctypes.c_void_p(slot.base), ctypes.c_size_t(16 * P), 21) == 0, ctypes.get_errno()
        out = swapped(slot)
        assert out >= WRITTEN, f"impossible: the kernel swapped out {out} alone"
        if turn == 3 and kind is memslot.MemfdImage and memslot.probe().pagemap.works:
            # What warming learns from: a page that is swapped out counts as written.
            runs = [(start // P, length // P) for start, length in slot.private_runs()]
            assert runs == RUNS, runs
        pool.release(slot)
        pool.check()
    pool.close()
    image.close()
"""


@pytest.mark.parametrize("reset", cells.RESETS)
@pytest.mark.usefixtures("_swap")
def test_pages_that_were_swapped_out_are_put_back_and_count_as_written(reset: str) -> None:
    if reset == "pagemap" and not memslot.probe().pagemap.works:
        pytest.skip(f"impossible: {memslot.probe().pagemap.detail}")
    done = run("-c", SWAPPED, reset)
    if "impossible: " in done.stderr:
        # Read the end: the traceback above shows the same words in a line of code.
        pytest.skip(done.stderr[done.stderr.rindex("impossible: ") :].strip())
    assert done.returncode == 0, done.stderr
