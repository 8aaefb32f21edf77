"""Forks, workers, and interpreters that end with live objects: no deadlock, no leak, no foreign byte."""

from __future__ import annotations

import os

import pytest

import memslot_plugin as memslot
from memslot_plugin.cli.doctor import diagnose
from memslot_plugin.tests.slots import Fork, every_fork

from . import cells, javascript, toy
from .cells import Cell
from .children import run
from .processes import in_child, serve
from .toy import PAGE

NOBODY = 65534


@every_fork
def test_forked_child_uses_hosts_and_instances_of_its_parent(plain_cell: Cell, fork: Fork) -> None:
    with plain_cell.serving(slots=4) as host:
        guest = host.prepare(toy.A)
        serve(host, guest)
        held, dirty = guest.instantiate(), guest.instantiate()
        held.call("fill", 0, 2 * PAGE, 0x11)
        dirty.call("grow", 3)

        def child() -> None:
            assert held.call("different", 0, 2 * PAGE, 0x11) == 0
            held.call("fill", 0, 2 * PAGE, 0x22)
            with pytest.raises(memslot.GuestTrap):
                held.call("load", 2 * PAGE)
            held.reset()
            assert held.memory.read(0, 2 * PAGE) == toy.pristine(toy.A)
            dirty.reset()
            serve(host, guest)
            if host.name == "wasmer":
                for compiles in (lambda: host.prepare(toy.B), held.snapshot, held.fork):
                    with pytest.raises(memslot.Unsupported, match="prepare guests before the fork"):
                        compiles()
            else:
                with host.prepare(toy.B) as other, other.instantiate() as instance:
                    assert instance.memory.read(0, 2 * PAGE) == toy.pristine(toy.B)
                held.fork(1)[0].close()
                with plain_cell.open(slots=2) as own:
                    serve(own, own.prepare(toy.A))
            for each in (held, dirty, guest, host):
                each.close()

        for _ in range(2):
            assert in_child(child, fork) == ""
        assert held.call("different", 0, 2 * PAGE, 0x11) == 0, "the child wrote to its parent"
        assert dirty.call("size") == 5

        # A child of a child, and a child that closes its parent's host by force.
        def grandchild() -> None:
            assert in_child(child, fork) == ""

        assert in_child(grandchild, fork) == ""
        assert in_child(lambda: host.close(force=True), fork) == ""
        held.close()
        dirty.close()
        serve(host, guest)
        guest.close()


@pytest.mark.gate
def test_forked_child_with_wasi_answers_or_refuses(real_cell: Cell, quickjs: bytes) -> None:
    with real_cell.serving(slots=2, image_limit="1GiB") as host:
        guest = host.prepare(quickjs, imports=javascript.IMPORTS, wasi=memslot.Wasi())

        def draw() -> None:
            for _ in range(2):
                with guest.instantiate() as instance:
                    machine = javascript.Pooled(instance)
                    assert javascript.evaluate(machine, "typeof Math.random()") == "number"

        draw()
        assert in_child(draw) == ""
        guest.close()


@pytest.mark.parametrize("forked", [True, False], ids=["worker", "same process"])
def test_process_that_gives_up_root_drops_pages_and_reports_why(
    plain_cell: Cell, forked: bool
) -> None:
    """A process that changed its user cannot open its pagemap. One that it opened before still works."""
    if os.geteuid():
        pytest.skip("impossible: the tests do not run as root")
    if not memslot.probe().pagemap.works:
        pytest.skip(f"impossible: {memslot.probe().pagemap.detail}")
    with plain_cell.open(slots=2) as host:
        guest = host.prepare(toy.A)
        serve(host, guest)
        before = cells.pool(host).statistics()

        def child() -> None:
            if not forked:
                serve(host, guest)
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            serve(host, guest, 5, alone=False)
            now = cells.pool(host).statistics()
            assert now.failed_resets == 0
            if host.name != "wasmer":  # wasmer retires a memory that grew
                assert now.destroyed == 0
            dropped = now.resets_by.get("madvise: PAGEMAP_SCAN: Permission denied", 0)
            assert dropped == (now.resets - before.resets if forked else 0)
            if forked:
                found = diagnose(plain_cell.settings())["probe"].pagemap
                assert not found.works
                assert found.detail.startswith("opening /proc/self/pagemap: Permission denied")

        assert in_child(child) == ""
        guest.close()


@pytest.mark.parametrize(
    ("method", "ending"),
    [
        ("fork", "everything"),
        pytest.param("spawn", "everything", marks=pytest.mark.gate),
        pytest.param("forkserver", "threads", marks=pytest.mark.gate),
    ],
)
def test_process_with_workers_serves_and_ends_in_silence(
    plain_cell: Cell, method: str, ending: str
) -> None:
    done = run(
        *("-X", "dev", "-W", "ignore::DeprecationWarning", "-m", "integration_tests.processes"),
        *(method, ending, plain_cell.host, plain_cell.backend),
    )
    assert (done.returncode, done.stderr) == (0, "")


@every_fork
def test_forked_child_that_first_takes_a_snapshot_gets_its_own_pages(
    plain_cell: Cell, fork: Fork
) -> None:
    with plain_cell.serving(slots=4) as host, host.prepare(toy.A).instantiate() as instance:
        instance.call("grow", 1)  # so that the snapshot is another module, which has to be compiled

        def child() -> None:
            if host.name == "wasmer":
                with pytest.raises(memslot.Unsupported, match="prepare guests before the fork"):
                    instance.snapshot()
            else:
                with instance.snapshot() as taken, taken.instantiate() as again:
                    assert again.call("size") == 3

        assert in_child(child, fork) == ""
