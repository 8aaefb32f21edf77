"""Decisions of the adaptive reset about idle pages, from histories and made-up prices."""

from __future__ import annotations

import pytest

from memslot_plugin.memory.adaptive import COMPARE_EVERY, FEW_PAGES, LESSONS, History
from memslot_plugin.memory.prices import Prices

PRICES = Prices(
    scan=1000.0,
    scan_page=25.0,
    scan_anonymous_page=10.0,
    compare_page=50.0,
    drop_page=100.0,
    write_fault=2000.0,
    read_fault_page=200.0,
)


@pytest.fixture
def history() -> History:
    return History(PRICES, 1 << 20)


def scan_of(pages: int) -> int:
    return int(pages * PRICES.scan_page)


def resets_until_a_flush(history: History, idle: int, *, dirty: int = 4, spare: int = 0) -> int:
    for number in range(1, 10_000):
        if history.observe(idle + dirty, dirty, spare):
            return number
    return 0


def learn(history: History, private: int, dirty: int, spare: int = 0) -> None:
    for _ in range(LESSONS):
        assert not history.observe(private, dirty, spare)


@pytest.mark.parametrize("idle", [0, 1, FEW_PAGES - 1, FEW_PAGES, FEW_PAGES + 1, 100, 2000])
def test_idle_pages_are_dropped_when_their_rent_has_reached_the_price_unless_they_are_few(
    history: History, idle: int
) -> None:
    rent = idle * (PRICES.scan_page + PRICES.compare_page)
    price = (idle + 4) * (PRICES.drop_page + PRICES.write_fault)
    number = -(-price // rent) if idle >= FEW_PAGES else 0
    assert resets_until_a_flush(history, idle) == number


def test_pages_that_are_written_now_and_then_are_not_idle(history: History) -> None:
    for _ in range(5000):
        assert not history.observe(2000, 4, 0)
        assert not history.observe(2000, 2000, 0)


def test_pages_that_are_only_read_show_in_the_time_of_two_scans(history: History) -> None:
    assert not history.observe(4, 4, scan_of(16_384))  # one is noise
    assert 0 < resets_until_a_flush(history, 0, spare=scan_of(16_384)) <= 32
    assert history.limits.compare_every == 1  # otherwise unchanged pages would count as written
    learn(history, 4, 4, scan_of(300))
    # The guest needs the pages that came back after the flush, until that lesson is old.
    assert resets_until_a_flush(history, 0, spare=scan_of(300)) > 50


def test_pages_that_are_written_and_left_as_they_were_are_needed(history: History) -> None:
    first = resets_until_a_flush(history, 60, dirty=40)
    learn(history, 100, 40)
    assert resets_until_a_flush(history, 60, dirty=40) > first + 50


def test_lesson_about_pages_that_are_written_no_more_is_forgotten(history: History) -> None:
    assert resets_until_a_flush(history, 1000)
    learn(history, 1004, 4)
    assert 0 < resets_until_a_flush(history, 1000) < 200
    learn(history, 4, 4)
    assert resets_until_a_flush(history, 0) == 0


def test_pages_of_only_the_first_request_after_a_flush_are_not_needed(history: History) -> None:
    resets_until_a_flush(history, 1000)
    assert not history.observe(2000, 2000, 0)
    assert not history.observe(2000, 4, 0)
    fresh = History(PRICES, 1 << 20)
    assert resets_until_a_flush(history, 1996) == resets_until_a_flush(fresh, 1996)


def test_resets_are_compared_if_rent_is_due_and_observed_if_much_is_read(history: History) -> None:
    found = []
    for private, spare in ((4, 0), (104, 0), (4, scan_of(500)), (4, scan_of(500)), (4, 0)):
        found.append((history.limits.idle_pages, history.limits.compare_every))
        history.observe(private, 4, spare)
    rarely = (FEW_PAGES, COMPARE_EVERY)
    assert found == [(0, 1), rarely, (0, 1), rarely, (0, COMPARE_EVERY)]


def test_scan_of_many_private_pages_that_takes_longer_finds_no_read_pages(history: History) -> None:
    for _ in range(1000):
        assert not history.observe(2048, 2048, scan_of(200))
    assert history.limits.compare_every == COMPARE_EVERY
    assert history.limits.unexplained_ns == scan_of(256)
