"""Attributes that are computed at their first use, on several threads too."""

from __future__ import annotations

import threading

from memslot_plugin.hosts.lazy import Lazy


class Slow:
    computed = 0
    others: list[int]

    @Lazy
    def answer(self) -> list[int]:
        """The answer."""
        self.computed += 1
        if self.computed == 1:
            other = threading.Thread(target=lambda: setattr(self, "others", self.answer))
            other.daemon = True
            other.start()
            other.join(30)
        return [42]


def test_lazy_attribute_is_computed_once_and_waits_for_no_thread_that_computes_it() -> None:
    """That thread may have stayed behind in a fork."""
    slow = Slow()
    assert slow.answer is slow.others is slow.answer
    assert slow.others == [42]
    assert slow.computed == 2
    assert Slow.answer.__doc__ == "The answer."
