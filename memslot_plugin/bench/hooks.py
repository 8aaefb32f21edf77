"""Family `hooks`: a call of a hook that a pool or host has armed, against the same call through pluggy.

An armed hook is a plain function, or None if no plugin implements the hook.  Every reset asks for two of them.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator, Sequence

from memslot_hooks import LinearMemory, MemoryRequest, ResetResult, hookimpl
from memslot_plugin.bench.results import Claim, Family, Grid, Row, spread
from memslot_plugin.bench.runner import Bench, Subject
from memslot_plugin.plugins import Plugins

NAME = "hooks"
TITLE = "A hook: times faster than through pluggy"

CALLS = 2000
"""Calls of one way before it is the other's turn."""

LEAST = {"no plugin": 5.0, "one plugin": 2.5, "two plugins": 2.5}
"""Limits: times faster than pluggy, by the number of plugins that implement the hook."""

_REQUEST = MemoryRequest(
    minimum=65536, maximum=None, reserved=2**32, guard=2**25,
    image=None, guest_id="bench", memory_index=0, host="fake",
)  # fmt: skip
_MEMORY = LinearMemory(_REQUEST, 0x7F00_0000_0000, 65536, owner=None)
_RESULT = ResetResult(4096, 10, "copy")


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


def measure(bench: Bench, seconds: float = 0.5) -> Family:
    """A hook that no plugin, one plugin, and two plugins implement."""
    rows = []
    for who, results in (
        ("no plugin", ()),
        ("one plugin", (_RESULT,)),
        ("two plugins", (_RESULT, None)),
    ):
        bench.say(f"hooks: {who}")
        plugins = Plugins(entry_points=False)
        for number, result in enumerate(results):
            plugins.register(_Owner(result), name=f"owner{number}")
        samples = bench.rounds(_ways(plugins, reset=bool(results)), seconds)
        case = {"implemented by": who}
        rows.append(Row.compare(case, samples["armed"], "pluggy", samples["pluggy"], gain=True))
    return Family(NAME, tuple(rows), tuple(claims(rows)))


def _ways(plugins: Plugins, *, reset: bool) -> dict[str, Subject]:
    """The hook that resets a memory, or the one that no plugin implements, called both ways."""
    hook, armed = plugins.manager.hook, plugins.armed
    if reset:
        return {
            "armed": _timed(lambda: armed.reset_memory(_MEMORY)),
            "pluggy": _timed(lambda: hook.memslot_reset_memory(memory=_MEMORY)),
        }
    return {
        "armed": _timed(
            lambda: armed.memory_reset is not None and armed.memory_reset(_MEMORY, _RESULT)
        ),
        "pluggy": _timed(lambda: hook.memslot_memory_reset(memory=_MEMORY, result=_RESULT)),
    }


def _timed(call: Callable[[], object]) -> Subject:
    timer = timeit.Timer(call)
    return lambda: timer.timeit(CALLS) * 1e9 / CALLS


def claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """One limit per row."""
    for row in rows:
        who = str(row.labels["implemented by"])
        says = f"An armed hook, implemented by {who}: faster than through pluggy"
        yield Claim(says, row.ratio.median, LEAST[who], at_least=True)


def grids(rows: Sequence[Row]) -> Iterator[Grid]:
    """One line per case."""
    lines = tuple((str(row.labels["implemented by"]), spread(row)) for row in rows)
    yield Grid(TITLE, ("implemented by", "faster"), lines)
