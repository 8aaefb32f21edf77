"""Attributes that are computed at their first use, on several threads too."""

from __future__ import annotations

import threading

from memslot_plugin.hosts.lazy import Lazy


class Slow:
    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        self.computed = 0

    @Lazy
    def answer(self) -> list[int]:
        """The answer."""
        self.computed += 1
        if self.computed == 1:
            self.began.set()
            self.go_on.wait()
        return [42]


def test_lazy_attribute_is_computed_once_and_waits_for_no_thread_that_computes_it() -> None:
    """That thread may have stayed behind in a fork."""
    slow, seen = Slow(), []
    thread = threading.Thread(target=lambda: seen.append(slow.answer))
    thread.start()
    slow.began.wait()
    try:
        first = slow.answer
    finally:
        slow.go_on.set()
        thread.join()
    assert seen[0] is first is slow.answer
    assert first == [42]
    assert slow.computed == 2
    assert Slow.answer.__doc__ == "The answer."
