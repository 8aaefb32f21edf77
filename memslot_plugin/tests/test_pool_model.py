"""A state machine: after any steps on a pool each memory holds exactly the bytes of a bytearray model."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from memslot_plugin import BytesImage, Image, MemfdImage, Pool, Slot
from memslot_plugin._core import PAGE_SIZE as P
from memslot_plugin.errors import MemoryTooLarge, PoolExhausted
from memslot_plugin.memory import image as images
from memslot_plugin.memory.reset import choose
from memslot_plugin.tests.profiles import examples
from memslot_plugin.tests.slots import EVERY_RESET, content

pytestmark = pytest.mark.usefixtures("no_leaks")

SLOTS = 3
PAGES = 40
STEPS = examples(150)
"""Least number of steps of each of the eight models: 600 in the gate, 36,000 at length."""

sizes = st.integers(0, 20)
places = st.builds(
    lambda page, delta: max(page * P + delta, 0),
    st.integers(0, PAGES),
    st.sampled_from([0, -1, 1, P // 2]),
)
which = st.integers(0, 11)


class Lease:
    """A leased slot with the bytes that its memory must hold."""

    slot: Slot

    def __init__(self, picture: bytes, size: int) -> None:
        self.pristine = picture[:size] + bytes(size - len(picture[:size]))
        self.bytes = bytearray(self.pristine)


class PoolMachine(RuleBasedStateMachine):
    """A pool of drawn settings, its images and leases. Subclasses set the kind of image and the reset."""

    kind: type[MemfdImage | BytesImage] = MemfdImage
    reset_name = "auto"
    steps = 0

    @initialize(
        allocation=st.sampled_from(["pooling", "pooling", "on-demand"]),
        growth=st.sampled_from(["mprotect", "ftruncate"]),
        strategy=st.sampled_from(["affinity", "next-available", "random"]),
        max_unused_warm_slots=st.integers(0, SLOTS),
        keep=st.sampled_from([0, 3 * P, 1 << 30]),
    )
    def open(self, keep: int, **drawn: Any) -> None:
        self.leased: list[Lease] = []
        self.guests: list[tuple[Image | None, bytes]] = [(None, b"")]
        self.pool = Pool(
            slots=SLOTS,
            reserved=PAGES * P,
            guard=P,
            reset=choose(self.reset_name, keep),
            audit=1.0,
            **drawn,
        )

    @rule(
        runs=st.lists(
            st.tuples(st.integers(0, 15), st.integers(1, 3), st.integers(0, 255)), max_size=4
        )
    )
    @precondition(lambda self: len(self.guests) < 5)
    def prepare(self, runs: list[tuple[int, int, int]]) -> None:
        picture = bytearray(18 * P)
        for page, length, value in runs:
            picture[page * P : (page + length) * P] = bytes([value]) * (length * P)
        image = self.kind(f"image {len(self.guests)}", picture)
        self.guests.append((image, bytes(picture[: image.byte_size])))

    @rule(guest=which)
    @precondition(lambda self: len(self.guests) > 2)
    def close_guest(self, guest: int) -> None:
        image, _ = self.guests.pop(1 + guest % (len(self.guests) - 1))
        assert image is not None
        image.close()
        self.pool.purge(image)

    @rule(guest=which)
    def purge(self, guest: int) -> None:
        image, _ = self.guests[guest % len(self.guests)]
        if image is not None:
            self.pool.purge(image)

    @rule(guest=which, size=sizes, more=st.none() | sizes)
    @precondition(lambda self: len(self.leased) < SLOTS)
    def lease(self, guest: int, size: int, more: int | None) -> None:
        image, picture = self.guests[guest % len(self.guests)]
        maximum = None if more is None else (size + more) * P
        if image is not None and image.byte_size > size * P:
            with pytest.raises(MemoryTooLarge):
                self.pool.lease(image, size * P, affinity=guest, maximum=maximum)
            size = image.byte_size // P
        lease = Lease(picture, size * P)
        lease.slot = self.pool.lease(image, size * P, affinity=guest, maximum=maximum, holder=lease)
        self.leased.append(lease)

    @rule(guest=which)
    @precondition(lambda self: len(self.leased) == SLOTS)
    def lease_one_too_many(self, guest: int) -> None:
        with pytest.raises(PoolExhausted):
            self.pool.lease(None, P, affinity=guest)

    @rule(guest=which, size=sizes, count=st.integers(0, SLOTS))
    def warm(self, guest: int, size: int, count: int) -> None:
        image, _ = self.guests[guest % len(self.guests)]
        if image is None or image.byte_size <= size * P:
            ready = self.pool.warm(image, size * P, affinity=guest, count=count)
            assert ready <= min(count, SLOTS - len(self.leased))

    def one_of(self, lease: int) -> Lease:
        return self.leased[lease % len(self.leased)]

    @rule(lease=which, at=places, length=st.integers(1, 3 * P), value=st.integers(0, 255))
    @precondition(lambda self: self.leased)
    def write(self, lease: int, at: int, length: int, value: int) -> None:
        chosen = self.one_of(lease)
        if chosen.bytes:
            at %= len(chosen.bytes)
            length = min(length, len(chosen.bytes) - at)
            ctypes.memset(chosen.slot.base + at, value, length)
            chosen.bytes[at : at + length] = bytes([value]) * length

    @rule(lease=which, more=sizes, value=st.integers(0, 255))
    @precondition(lambda self: self.leased)
    def grow_and_write(self, lease: int, more: int, value: int) -> None:
        chosen = self.one_of(lease)
        wanted = len(chosen.bytes) + more * P
        try:
            chosen.slot.grow(wanted)
        except MemoryTooLarge:
            assert more
            return
        chosen.bytes += bytes(more * P)
        assert content(chosen.slot) == chosen.bytes
        if wanted:
            ctypes.memset(chosen.slot.base + wanted - 1, value, 1)
            chosen.bytes[-1] = value

    @rule(lease=which)
    @precondition(lambda self: self.leased)
    def reset(self, lease: int) -> None:
        chosen = self.one_of(lease)
        self.pool.reset(chosen.slot)
        chosen.bytes = bytearray(chosen.pristine)

    @rule(lease=which, how=st.sampled_from(["release", "release", "retire", "abandon"]))
    @precondition(lambda self: self.leased)
    def give_back(self, lease: int, how: str) -> None:
        given = self.leased.pop(lease % len(self.leased))
        if how != "abandon":  # which is what happens when `given` goes
            self.pool.release(given.slot, retire=how == "retire")

    @invariant()
    def memories_hold_what_the_model_holds(self) -> None:
        type(self).steps += 1
        for lease in getattr(self, "leased", ()):
            assert content(lease.slot) == lease.bytes
        if hasattr(self, "pool"):
            assert self.pool.statistics().in_use == len(self.leased)
            self.pool.check()

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for lease in self.leased:
                self.pool.release(lease.slot)
            self.pool.check()
            self.pool.close()
            for image, _ in self.guests[1:]:
                assert image is not None
                image.close()


@pytest.mark.scales
@pytest.mark.parametrize("reset", EVERY_RESET)
def test_pool_holds_the_bytes_of_its_model_after_any_steps(
    kind: Any, reset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Memories of forty pages get interior zero runs that are not in the file.
    monkeypatch.setattr(images, "MIN_GAP", 2 * P)

    class Machine(PoolMachine):
        steps = 0

    Machine.kind, Machine.reset_name = kind, reset
    limits = settings(
        max_examples=examples(5),
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=limits)
    assert Machine.steps >= STEPS
