"""Sets of objects with other owners: a listing survives a collection in the middle."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from memslot_plugin.hosts.live import Living


class Owned:
    """An object that refers to itself, so that only a collection ends it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def collections() -> Iterator[None]:
    """Restore the threshold and the state of the collector afterwards."""
    threshold = gc.get_threshold()
    yield
    gc.set_threshold(*threshold)
    gc.enable()


@pytest.mark.usefixtures("collections")
def test_collection_at_any_allocation_of_a_listing_leaves_it_right() -> None:
    """CPython 3.10 and 3.11 collect in the middle of an allocation."""
    kept = Owned()
    for allocation in range(20):
        gc.collect()
        gc.disable()
        living: Living[Owned] = Living()
        living.add(kept)
        for _ in range(50):
            living.add(Owned())
        gc.set_threshold(gc.get_count()[0] + allocation, *gc.get_threshold()[1:])
        gc.enable()
        assert kept in living.listed()
        gc.collect()
        assert living.listed() == [kept]
