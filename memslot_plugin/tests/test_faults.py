"""Each system call of a pool's life fails once, at each point: a clear error, nothing lost, no byte of a stranger."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from memslot_plugin import BytesImage, Image, MemfdImage, Pool, Slot, State, _core
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin._core import ffi, lib
from memslot_plugin.errors import MemslotError, PoolExhausted, SystemCallError
from memslot_plugin.probe import pagemap_descriptor, prices, probe
from memslot_plugin.reset import choose
from memslot_plugin.tests import faults
from memslot_plugin.tests.faults import Fault, injected
from memslot_plugin.tests.profiles import LONG
from memslot_plugin.tests.slots import Holder

RESERVED = 128 * P

Result = TypeVar("Result")


class Life:
    """A pool's whole life, in steps of which any may fail once; everything is looked at after each."""

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
        """The step's result, or None if it raised what may be raised."""
        try:
            return step()
        except SystemCallError as error:
            self.failures.append(error.with_traceback(None))  # whose frames would hold a lease
            return None
        finally:
            if self.failures:
                self.pool.check()

    def build(self, name: str, *runs: tuple[int, bytes]) -> Image:
        content = bytearray(64 * P)
        for page, data in runs:
            content[page * P : page * P + len(data)] = data
        image = self.attempt(lambda: self.kind(name, content)) or self.kind(name, content)
        self.pictures[image] = bytes(content[: image.byte_size])
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
        seen = ctypes.string_at(slot.base, slot.accessible)
        assert seen == start + bytes(slot.accessible - len(start)), "a byte of a stranger"

    def fill(self, slot: Slot) -> None:
        ctypes.memset(slot.base, 0xEE, slot.accessible)

    def grow(self, slot: Slot, pages: int) -> None:
        before = slot.accessible
        self.attempt(lambda: slot.grow(pages * P))
        if slot.accessible == before:  # refused: as large as it was, and usable
            self.fill(slot)
            slot.grow(pages * P)
        assert ctypes.string_at(slot.base + before, slot.accessible - before) == bytes(
            slot.accessible - before
        )
        self.fill(slot)

    def release(self, slot: Slot, *, retire: bool = False) -> None:
        failures = len(self.failures)
        self.attempt(lambda: self.pool.release(slot, retire=retire))
        if len(self.failures) > failures:
            assert slot.state is not State.CLEAN
        assert slot not in self.pool._leased

    def run(self) -> None:
        one = self.build("one", (0, b"1" * 2 * P), (40, b"1"))
        other = self.build("other", (1, b"2" * P))
        slot = self.lease(one, 64, "a")
        self.fill(slot)
        self.grow(slot, 80)
        if self.attempt(lambda: self.pool.reset(slot)) is not None:
            self.expect_pristine(slot, one)
            assert slot.accessible == 64 * P
            self.fill(slot)
        self.release(slot)
        self.attempt(lambda: self.pool.warm(one, 64 * P, affinity="a", count=2, maximum=100 * P))
        for image, pages, guest in [(one, 64, "a"), (other, 8, "b"), (None, 16, "c")]:
            slot = self.lease(image, pages, guest)
            self.fill(slot)
            self.release(slot)
        holder = Holder()
        slot = self.lease(other, 8, "b", holder)
        self.fill(slot)
        self.grow(slot, 9)
        del holder
        self.attempt(self.pool.statistics)
        slot = self.lease(one, 64, "a")
        second = self.lease(other, 8, "b")
        with pytest.raises(PoolExhausted):
            self.pool.lease(None, P, affinity="c")
        self.fill(slot)
        self.release(slot)
        self.fill(second)
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
EVERY = list(itertools.product(KINDS, ALLOCATIONS, GROWTHS, RESETS))
SOME = [  # each pair of values at least once
    (MemfdImage, "pooling", "mprotect", "madvise"),
    (MemfdImage, "pooling", "ftruncate", "pagemap"),
    (MemfdImage, "on-demand", "ftruncate", "madvise"),
    (MemfdImage, "on-demand", "mprotect", "copy"),
    (BytesImage, "pooling", "ftruncate", "copy"),
    (BytesImage, "pooling", "ftruncate", "madvise"),
    (BytesImage, "on-demand", "mprotect", "pagemap"),
]


@pytest.mark.parametrize(
    "about",
    EVERY if LONG else SOME,
    ids=lambda about: "-".join(getattr(value, "kind", value) for value in about),
)
def test_every_system_call_may_fail_once(
    about: tuple[Any, ...], resources: Any, request: pytest.FixtureRequest
) -> None:
    if about[-1] == "pagemap" and not probe().pagemap.works:
        pytest.skip(f"impossible: PAGEMAP_SCAN: {probe().pagemap.detail}")
    made = faults.calls_of(lambda: Life(*about).run())
    before = resources()
    count = 0
    for fault in faults.every(made):
        count += 1
        with injected(fault) as injection:
            life = Life(*about)
            life.run()
            for failure in life.failures:
                what, _, reason = str(failure).partition(": ")
                assert what
                assert os.strerror(fault.error) in reason
            assert len(life.failures) <= 1, life.failures
        assert injection.hit, fault
        told = life.failures or injection.logged or life.failed_resets
        assert told or fault.is_made_again, f"nobody heard that {fault}"
    request.node.user_properties.append(("faults", count))
    resources().assert_left_nothing(before)


def test_every_system_call_of_the_core_was_injected() -> None:
    """One that is new has to say what it may fail with, and has to be part of a life."""
    names = [name for _, name in sorted(ffi.typeof("enum ms_call").elements.items())]
    assert [f"MS_{call.upper()}" for call in _core.CALLS] == names[: lib.MS_CALLS]
    assert set(faults.PLAUSIBLE) == set(_core.CALLS)
    missing = set(_core.CALLS)
    for about in SOME:
        made = faults.calls_of(lambda about=about: Life(*about).run())  # type: ignore[misc]
        for call in [call for call in missing if made[call]]:
            with injected(Fault(call, 0, faults.PLAUSIBLE[call][0])) as injection:
                Life(*about).run()
            assert injection.hit
            missing.discard(call)
    assert missing == set()
    assert pagemap_descriptor() > 2


def test_the_probe_concludes_or_says_what_failed_and_is_right_the_next_time(resources: Any) -> None:
    def look() -> None:
        probe.cache_clear()
        prices.cache_clear()
        probe()
        prices()

    right = probe()
    made = faults.calls_of(look)
    before = resources()
    for fault in faults.every(made, thorough=True):
        with injected(fault) as injection:
            try:
                look()
            except MemslotError as error:
                what, _, reason = str(error).partition(": ")
                assert what
                assert os.strerror(fault.error) in reason
        assert injection.hit, fault
        look()
        assert findings(probe()) == findings(right), fault
    resources().assert_left_nothing(before)


def findings(found: Any) -> list[bool]:
    return [each.works for each in (found.memfd, found.seals, found.dontneed, found.pagemap)]
