"""The decision when a slot's kept pages have become too dear: rent or buy, for pages.

A reset by pagemap keeps private pages resident, so that the next request does not fault them in
again.  Keeping has a rent: each later reset scans and compares every kept page, also those that are
not touched any more, and scans pages that were only read. Dropping them all has a price: the drop
itself, and the faults of the pages that are needed again.  As in the ski-rental problem (Karlin,
Manasse, Rudolph, Sleator 1988), paying rent until it equals the price costs at most twice the
cheaper choice.  Nothing here touches memory: numbers in, a decision out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memslot_plugin._core import ffi

if TYPE_CHECKING:
    from memslot_plugin.memory.prices import Prices

FEW_PAGES = 16
"""Fewer idle pages than this are never worth a decision."""

FORGET = 0.99
"""The part of a lesson's number of needed pages that each reset keeps: after a hundred or more it is checked again."""

MARGIN = 1.25
"""The factor on a lesson's pages up to which pages count as needed: requests differ a little."""

FEW_OF_PRIVATE = 1 / 8
"""Read pages below this share of the private ones are ignored; scan times are not precise enough to see them."""

COMPARE_EVERY = 7
"""Resets per comparison while no page is idle: restoring a page blindly costs less than comparing it.

Odd, so that a workload of two alternating requests shows both.
"""

LESSONS = 2
"""Resets after a flush whose read pages count as needed.

Of the pages that were written and are as they were, only those of the first such reset count: later ones add what
only their own request wrote.
"""


class History:
    """The resets of one region so far; `observe` is called after each reset by pagemap on the slow path."""

    __slots__ = (
        "_floor",
        "_idle_rent",
        "_lessons",
        "_needed_idle",
        "_needed_reads",
        "_prices",
        "_read_rent",
        "_reads",
        "limits",
    )

    def __init__(self, prices: Prices, keep_pages: int) -> None:
        self._prices = prices
        self.limits = ffi.new(
            "ms_reset_limits *",
            {
                "keep_pages": keep_pages,
                "compare_every": 1,
                "scan_price": int(1000 * prices.scan),
                "file_page_price": int(1000 * prices.scan_page),
                "anonymous_page_price": int(1000 * prices.scan_anonymous_page),
            },
        )
        """The limits within which the core need not ask: no rent is due."""
        self._forget()

    def _forget(self) -> None:
        self._floor = 0.0
        self._idle_rent = 0.0
        self._read_rent = 0.0
        self._reads = 0.0
        self._needed_idle = 0.0
        self._needed_reads = 0.0
        self._lessons = 0

    def observe(self, private: int, dirty: int, unexplained_ns: int) -> str:
        """Note a reset that kept `private` pages, of which `dirty` had been written.

        Return the reason to flush the region now, or "".

        Pages that were only read are not listed by the scan, but they slow it down: the time that
        private pages do not explain, `unexplained_ns`, tells how many there are.  A page that each
        request writes and leaves as it was, such as a count that goes up and down again, looks idle; a
        flush shows that it is needed.
        """
        prices = self._prices
        idle = private - dirty
        seen = unexplained_ns / prices.scan_page
        reads = min(seen, self._reads)  # one slow scan is noise, two are pages
        self._reads = seen
        self.limits.idle_pages = 0
        self.limits.compare_every = COMPARE_EVERY if idle < FEW_PAGES else 1
        if self._lessons:
            if self._lessons == LESSONS:
                self._needed_idle = idle
            self._lessons -= 1
            self._needed_reads = max(self._needed_reads, seen)
            return ""
        unneeded = max(0.0, idle - MARGIN * self._needed_idle)
        unneeded_reads = reads - MARGIN * self._needed_reads
        self._needed_idle *= FORGET
        self._needed_reads *= FORGET
        few_reads = max(FEW_PAGES, FEW_OF_PRIVATE * private)
        if unneeded < FEW_PAGES and unneeded_reads < few_reads:
            self._floor = unneeded
            self._idle_rent = self._read_rent = 0.0
            self.limits.idle_pages = FEW_PAGES
            self.limits.unexplained_ns = int(
                prices.scan_page * (MARGIN * self._needed_reads + few_reads)
            )
            return ""
        # A set that shrinks or grows a lot is another set: its rent starts anew.
        if unneeded < self._floor / 2 or unneeded >= 2 * self._floor + FEW_PAGES:
            self._floor = unneeded
            self._idle_rent = 0.0
        self._floor = min(self._floor, unneeded)
        self._idle_rent += self._floor * (prices.scan_page + prices.compare_page)
        if unneeded_reads < few_reads:
            unneeded_reads = self._read_rent = 0.0
        self._read_rent += unneeded_reads * prices.scan_page
        price = (
            (private + reads) * prices.drop_page
            + (dirty + self._needed_idle + self._floor) * prices.write_fault
            + (unneeded_reads + self._needed_reads) * prices.read_fault_page
        )
        if self._idle_rent + self._read_rent < price:
            return ""
        reason = (
            "pages not written lately"
            if self._idle_rent >= self._read_rent
            else "pages not read lately"
        )
        self._forget()
        self._lessons = LESSONS
        self.limits.compare_every = 1
        return reason
