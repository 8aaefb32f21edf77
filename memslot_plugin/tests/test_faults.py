"""Each system call of a pool fails once, at each point: a clear error, nothing lost, each lease pristine."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from memslot_plugin import BytesImage, Image, MemfdImage, Pool, Slot, State, _core
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import ffi, lib
from memslot_plugin.errors import MemslotError, PoolExhausted, SlotError, SystemCallError
from memslot_plugin.memory.prices import prices
from memslot_plugin.memory.probe import probe
from memslot_plugin.memory.reset import choose
from memslot_plugin.tests import faults
from memslot_plugin.tests.faults import Fault, injected
from memslot_plugin.tests.profiles import LONG
from memslot_plugin.tests.slots import Holder, content, fill, needs_pagemap, sparse

RESERVED = 128 * P

Result = TypeVar("Result")


class Life:
    """The life of a pool in steps, with a check of the pool after each. Any step may fail once."""

    def __init__(self, kind: Any, allocation: str, growth: str, reset: str) -> None:
        self.kind = kind
        self.failures: list[SystemCallError] = []
        self.failed_resets = 0
        self.pictures: dict[Image | None, bytes] = {None: b""}
        self.pool = Pool(
            slots=2,
            reserved=RESERVED,
            guard=P,
            reset=choose(reset, 2 * P),
            allocation=allocation,
            growth=growth,
        )

    def attempt(self, step: Callable[[], Result]) -> Result | None:
        """Return the step's result, or None if it raised a SystemCallError."""
        try:
            return step()
        except SystemCallError as error:
            self.failures.append(error.with_traceback(None))  # its frames would hold a lease
            return None
        finally:
            if self.failures:
                self.pool.check()

    def build(self, name: str, *runs: tuple[int, bytes]) -> Image:
        picture = sparse(64 * P, *((page * P, data) for page, data in runs))
        image = self.attempt(lambda: self.kind(name, picture)) or self.kind(name, picture)
        self.pictures[image] = bytes(picture[: image.byte_size])
        return image  # type: ignore[no-any-return]

    def lease(
        self, image: Image | None, pages: int, guest: str, holder: Holder | None = None
    ) -> Slot:
        def lease() -> Slot:
            return self.pool.lease(image, pages * P, affinity=guest, maximum=100 * P, holder=holder)

        slot = self.attempt(lease) or lease()
        assert slot.state is State.DIRTY
        self.expect_pristine(slot, image)
        return slot

    def expect_pristine(self, slot: Slot, image: Image | None) -> None:
        start = self.pictures[image]
        assert content(slot) == start + bytes(slot.accessible - len(start)), "not pristine"

    def grow(self, slot: Slot, pages: int) -> None:
        before = slot.accessible
        self.attempt(lambda: slot.grow(pages * P))
        if slot.accessible == before:  # refused: the slot keeps its size, and is usable
            fill(slot)
            slot.grow(pages * P)
        assert content(slot)[before:] == bytes(slot.accessible - before)
        fill(slot)

    def release(self, slot: Slot, *, retire: bool = False) -> None:
        failures, known = len(self.failures), slot.state is not State.UNKNOWN
        result = self.attempt(lambda: self.pool.release(slot, retire=retire))
        if len(self.failures) > failures:
            assert slot.state is not State.CLEAN
        elif retire or not known:
            assert result is not None
            assert result.strategy == "retired"
        with pytest.raises(SlotError):
            self.pool.release(slot)

    def run(self) -> None:
        one = self.build("one", (0, b"1" * 2 * P), (40, b"1"))
        other = self.build("other", (1, b"2" * P))
        slot = self.lease(one, 64, "a")
        fill(slot)
        self.grow(slot, 80)
        if self.attempt(lambda: self.pool.reset(slot)) is not None:
            self.expect_pristine(slot, one)
            assert slot.accessible == 64 * P
            fill(slot)
        self.release(slot)
        self.attempt(lambda: self.pool.warm(one, 64 * P, affinity="a", count=2, maximum=100 * P))
        for image, pages, guest in [(one, 64, "a"), (other, 8, "b"), (None, 16, "c")]:
            slot = self.lease(image, pages, guest)
            fill(slot)
            self.release(slot)
        holder = Holder()
        slot = self.lease(other, 8, "b", holder)
        fill(slot)
        self.grow(slot, 9)
        del holder
        self.attempt(self.pool.statistics)
        slot = self.lease(one, 64, "a")
        second = self.lease(other, 8, "b")
        with pytest.raises(PoolExhausted):
            self.pool.lease(None, P, affinity="c")
        fill(slot)
        self.release(slot)
        fill(second)
        self.release(second, retire=True)
        self.attempt(one.close)
        self.attempt(lambda: self.pool.purge(one))
        slot = self.lease(None, 64, "c")
        self.pool.after_fork()
        self.pool.check()
        self.release(slot)
        slot = self.lease(other, 8, "b")
        assert self.pool.statistics().limit == 2
        self.release(slot)
        for close in (one.close, other.close, self.pool.close, other.close):
            self.attempt(close)
        self.failed_resets = self.pool.statistics().failed_resets
        for close in (self.pool.close, one.close, other.close):
            close()


KINDS, ALLOCATIONS = (MemfdImage, BytesImage), ("pooling", "on-demand")
GROWTHS, RESETS = ("mprotect", "ftruncate"), ("madvise", "pagemap", "copy")
SOME = [  # each pair of values once or more
    (MemfdImage, "pooling", "mprotect", "madvise"),
    (MemfdImage, "pooling", "ftruncate", "pagemap"),
    (MemfdImage, "on-demand", "mprotect", "copy"),
    (BytesImage, "pooling", "ftruncate", "copy"),
    (BytesImage, "on-demand", "mprotect", "pagemap"),
    (BytesImage, "on-demand", "ftruncate", "madvise"),
]


LOGGED = (
    r"a slot could not be destroyed: "
    r"|a slot that was dropped could not be reset: "
    r"|a slot could not be made private after a fork: "
)
ATTEMPTED = {
    "mmap": r"reserving \d+ bytes of|mapping (\d+ bytes|a slot's|the image of)|laying the image of"
    r"|removing an image from a slot|covering a slot",
    "mprotect": r"growing a slot to \d+|making (\d+|all but \d+) bytes of a slot (in)?accessible",
    "madvise": r"populating a slot",
    "memfd_create": r"creating a memfd of \d+ bytes for (a slot's|the image of)",
    "ftruncate": r"creating a memfd of \d+ bytes for|growing a slot to \d+|(emptying|sizing) a slot's",
    "pwrite": r"writing the image of",
    "fcntl": r"sealing the image of",
}
"""Beginnings of the sentences that report a failed call."""
LEAKED = r"leaked (\d+ bytes of address space|the (view of the )?image of .+|the extension of a slot|\d+ pages .+)"
"""Sentences about a munmap or close that failed."""


def leaks(fault: Fault) -> bool:
    """Return True if a mapping or a descriptor leaks after this fault."""
    return fault.call in faults.LEAKING


@pytest.mark.parametrize(
    "about",
    [
        pytest.param(
            about,
            marks=[pytest.mark.long] * (LONG or about not in SOME)
            + [needs_pagemap] * (about[-1] == "pagemap"),
        )
        for about in itertools.product(KINDS, ALLOCATIONS, GROWTHS, RESETS)
    ],
    ids=lambda about: "-".join(getattr(value, "kind", value) for value in about),
)
def test_pool_survives_each_system_call_failing_once(
    about: tuple[Any, ...], resources: Any, request: pytest.FixtureRequest
) -> None:
    made = faults.calls_of(lambda: Life(*about).run())
    before = resources()
    count, checked = 0, False
    for fault in sorted(faults.every(made), key=leaks):
        if leaks(fault) and not checked:  # the last faults: from here on something stays mapped
            assert resources().lost_since(before) == []
            checked = True
        leaked, count = _core.leaks.total(), count + 1
        with injected(fault) as injection:
            life = Life(*about)
            life.run()
        for told in (*map(str, life.failures), *injection.logged):
            sentence = LEAKED + ": "
            if not leaks(fault):
                sentence = rf"({LOGGED})?\[Errno {fault.error}\] ({ATTEMPTED[fault.call]}).*: "
            assert re.match(sentence + re.escape(os.strerror(fault.error)), told)
        assert len(life.failures) <= 1, life.failures
        assert injection.hit, fault
        heard = bool(life.failures or injection.logged or life.failed_resets)
        assert heard or fault.may_be_silent, fault
        if leaks(fault):
            assert _core.leaks.total() == leaked + 1
        # The core repeats the ftruncate of a new memfd, and not that of a growing memory.
        assert not (heard and fault.is_made_again) or fault.call == "ftruncate", fault
    assert checked
    request.node.user_properties.append(("faults", count))


def test_every_system_call_of_the_core_belongs_to_a_life_and_says_how_it_may_fail() -> None:
    names = sorted(ffi.typeof("enum ms_call").elements.items())
    assert [f"MS_{call.upper()}" for call in _core.CALLS] == [name for _, name in names][:-1]
    assert lib.MS_CALLS == len(_core.CALLS) == len(names) - 1
    assert set(faults.PLAUSIBLE) == set(_core.CALLS) == set(_core.counters())
    lives = [faults.calls_of(lambda about=about: Life(*about).run()) for about in SOME]  # type: ignore[misc]
    # A process opens its pagemap once, which test_reset.py lets fail in a child.
    assert [call for call in _core.CALLS if not any(made[call] for made in lives)] == ["open"]


@pytest.mark.scales
def test_probe_concludes_or_says_what_failed_and_is_right_the_next_time(resources: Any) -> None:
    def look() -> list[bool]:
        probe.cache_clear()
        prices.cache_clear()
        found = probe()
        prices()
        return [each.works for each in (found.memfd, found.seals, found.dontneed, found.pagemap)]

    right = look()
    made = faults.calls_of(look)
    before = resources()
    checked = False
    for fault in sorted(faults.every(made), key=leaks):
        if leaks(fault) and not checked:  # as above
            assert resources().lost_since(before) == []
            checked = True
        leaked = _core.leaks.total()
        with injected(fault) as injection:
            try:
                look()
            except MemslotError as error:
                said = str(error)
            else:
                said = f"nothing: {os.strerror(fault.error)}"
        assert re.match(f".+: {re.escape(os.strerror(fault.error))}", said)
        assert injection.hit, fault
        assert look() == right, fault
        if leaks(fault):
            assert _core.leaks.total() == leaked + 1
    assert checked
