"""Family `hooks`: a call of a hook that a pool or host has armed, against the same call through pluggy.

An armed hook is a plain function, or None if no plugin implements the hook.  Every reset asks for two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from memslot_hooks import LinearMemory, MemoryRequest, ResetResult, hookimpl
from memslot_plugin.bench.results import Grid, Limit, Row, listed
from memslot_plugin.bench.runner import Bench, timed
from memslot_plugin.plugins import Plugins

NAME = "hooks"

CALLS = 2000
"""Calls of one way before it is the other's turn."""

_REQUEST = MemoryRequest(
    minimum=65536, maximum=None, reserved=2**32, guard=2**25,
    image=None, guest_id="bench", memory_index=0, host="fake",
)  # fmt: skip
_MEMORY = LinearMemory(_REQUEST, 0x7F00_0000_0000, 65536, owner=None)
_RESULT = ResetResult(4096, 10, "copy")

CASES: dict[str, tuple[ResetResult | None, ...]] = {
    "no plugin": (),
    "one plugin": (_RESULT,),
    "two plugins": (_RESULT, None),
}
"""The answers of the plugins that implement the hook."""

LIMITS = [
    Limit(
        "An armed hook, implemented by {implemented by}: faster than through pluggy",
        {"implemented by": case},
        2.5 if answers else 5.0,
    )
    for case, answers in CASES.items()
]


class _Owner:
    """A plugin that answers one hook, or leaves it to the next plugin."""

    def __init__(self, result: ResetResult | None) -> None:
        self._result = result

    @hookimpl
    def memslot_reset_memory(
        self,
        memory: LinearMemory,  # noqa: ARG002 - as the specification has it
    ) -> ResetResult | None:
        return self._result


def measure(bench: Bench, seconds: float = 0.5) -> Iterator[Row]:
    """Measure a hook that no plugin, one plugin, and two plugins implement."""
    for case, answers in CASES.items():
        bench.say(f"hooks: {case}")
        plugins = Plugins(entry_points=False)
        for number, answer in enumerate(answers):
            plugins.register(_Owner(answer), name=f"owner{number}")
        ways = {name: timed(call, CALLS) for name, call in _ways(plugins, bool(answers)).items()}
        samples = bench.rounds(ways, seconds)
        labels = {"implemented by": case}
        yield Row.compare(labels, samples["armed"], "pluggy", samples["pluggy"], gain=True)


def _ways(plugins: Plugins, reset: bool) -> dict[str, Callable[[], object]]:
    """Return both calls of the hook that resets a memory, or of one that no plugin implements."""
    hook, armed = plugins.manager.hook, plugins.armed
    if reset:
        return {
            "armed": lambda: armed.reset_memory(_MEMORY),
            "pluggy": lambda: hook.memslot_reset_memory(memory=_MEMORY),
        }
    return {
        "armed": lambda: armed.memory_reset is not None and armed.memory_reset(_MEMORY, _RESULT),
        "pluggy": lambda: hook.memslot_memory_reset(memory=_MEMORY, result=_RESULT),
    }


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """Show one line per case."""
    return listed("A hook: times faster than through pluggy", rows, "implemented by", "faster")
