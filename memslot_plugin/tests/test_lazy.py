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
        """Everything."""
        self.computed += 1
        if self.computed == 1:
            self.began.set()
            self.go_on.wait()
        return [42]


def test_it_is_computed_once() -> None:
    slow = Slow()
    slow.go_on.set()
    assert slow.answer == [42]
    assert slow.answer is slow.answer
    assert slow.computed == 1


def test_nobody_waits_for_a_thread_that_computes_it() -> None:
    """It may have stayed behind in a fork."""
    slow, other, seen = Slow(), Slow(), []
    thread = threading.Thread(target=lambda: seen.append(slow.answer))
    thread.start()
    slow.began.wait()
    other.go_on.set()
    try:
        assert other.answer == [42]
        first = slow.answer
    finally:
        slow.go_on.set()
        thread.join()
    assert seen[0] is first is slow.answer


def test_the_class_has_the_attribute_itself() -> None:
    assert Slow.answer.__doc__ == "Everything."
