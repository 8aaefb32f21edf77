"""Rent or buy for pages: when a history says that dropping them is cheaper, on prices that are made up."""

from __future__ import annotations

import pytest

from memslot_plugin.adaptive import COMPARE_EVERY, FEW_PAGES, LESSONS, History
from memslot_plugin.probe import Prices

PRICES = Prices(
    scan=1000.0,
    scan_page=25.0,
    scan_plain_page=10.0,
    compare_page=50.0,
    drop_page=100.0,
    write_fault=2000.0,
    read_fault_page=200.0,
)


def resets_until_a_flush(history: History, idle: int, *, dirty: int = 4, spare: int = 0) -> int:
    for number in range(1, 10_000):
        if history.observe(idle + dirty, dirty, spare):
            return number
    return 0


@pytest.mark.parametrize("idle", [FEW_PAGES, FEW_PAGES + 1, 100, 2000])
def test_idle_pages_are_dropped_when_their_rent_has_reached_the_price(idle: int) -> None:
    rent = idle * (PRICES.scan_page + PRICES.compare_page)
    price = (idle + 4) * (PRICES.drop_page + PRICES.write_fault)
    assert resets_until_a_flush(History(PRICES, 1 << 20), idle) == -(-price // rent)


@pytest.mark.parametrize("idle", [0, 1, FEW_PAGES - 1])
def test_a_few_idle_pages_are_kept(idle: int) -> None:
    history = History(PRICES, 1 << 20)
    assert resets_until_a_flush(history, idle) == 0
    assert history.limits.idle_pages == FEW_PAGES
    assert history.limits.compare_every == COMPARE_EVERY


def test_a_set_that_is_written_now_and_then_is_not_idle() -> None:
    history = History(PRICES, 1 << 20)
    for _ in range(5000):
        assert not history.observe(2000, 4, 0)
        assert not history.observe(2000, 2000, 0)


def test_pages_that_are_only_read_show_in_the_time_of_two_scans() -> None:
    history = History(PRICES, 1 << 20)
    slow = int(16_384 * PRICES.scan_page)
    assert not history.observe(4, 4, slow)  # one is noise
    number = resets_until_a_flush(history, 0, spare=slow)
    assert 0 < number <= 32
    for _ in range(LESSONS):
        assert not history.observe(4, 4, int(300 * PRICES.scan_page))
    # What came back after the flush is what the guest needs, until that lesson is old.
    assert resets_until_a_flush(history, 0, spare=int(300 * PRICES.scan_page)) > 50


def test_pages_that_are_written_and_left_as_they_were_are_needed() -> None:
    history = History(PRICES, 1 << 20)
    first = resets_until_a_flush(history, 60, dirty=40)
    for _ in range(LESSONS):
        assert not history.observe(100, 40, 0)
    assert resets_until_a_flush(history, 60, dirty=40) > first + 50


def test_a_lesson_about_pages_that_nobody_writes_any_more_is_forgotten() -> None:
    history = History(PRICES, 1 << 20)
    assert resets_until_a_flush(history, 1000)
    for _ in range(LESSONS):
        assert not history.observe(1004, 4, 0)
    assert 0 < resets_until_a_flush(history, 1000) < 200
    for _ in range(LESSONS):
        assert not history.observe(4, 4, 0)
    assert resets_until_a_flush(history, 0) == 0


def test_what_only_the_first_request_after_a_flush_wrote_is_not_needed() -> None:
    history, fresh = History(PRICES, 1 << 20), History(PRICES, 1 << 20)
    resets_until_a_flush(history, 1000)
    assert not history.observe(2000, 2000, 0)
    assert not history.observe(2000, 4, 0)
    assert resets_until_a_flush(history, 1996) == resets_until_a_flush(fresh, 1996)


def test_the_first_resets_after_a_flush_are_compared() -> None:
    """Or else what was left as it was would count as written."""
    history = History(PRICES, 1 << 20)
    assert resets_until_a_flush(history, 0, spare=int(16_384 * PRICES.scan_page))
    assert history.limits.compare_every == 1


def test_everything_is_compared_while_rent_is_due() -> None:
    history = History(PRICES, 1 << 20)
    assert (history.limits.idle_pages, history.limits.compare_every) == (0, 1)
    history.observe(4, 4, 0)
    assert (history.limits.idle_pages, history.limits.compare_every) == (FEW_PAGES, COMPARE_EVERY)
    history.observe(104, 4, 0)
    assert (history.limits.idle_pages, history.limits.compare_every) == (0, 1)


def test_who_reads_much_is_observed_each_time_and_compared_now_and_then() -> None:
    history = History(PRICES, 1 << 20)
    for _ in range(2):
        history.observe(4, 4, int(500 * PRICES.scan_page))
    assert (history.limits.idle_pages, history.limits.compare_every) == (0, COMPARE_EVERY)


def test_a_scan_of_many_private_pages_may_take_a_little_longer() -> None:
    history = History(PRICES, 1 << 20)
    for _ in range(1000):
        assert not history.observe(2048, 2048, int(200 * PRICES.scan_page))
    assert history.limits.compare_every == COMPARE_EVERY
    assert history.limits.spare_nanoseconds == int(256 * PRICES.scan_page)
