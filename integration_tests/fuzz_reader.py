"""Coverage-guided fuzzing of the module reader, the rewriting and the walk over code, with atheris.

usage: python -m integration_tests.fuzz_reader [CORPUS] [-max_total_time=SECONDS] [-runs=N] [...]

The options are libFuzzer's. atheris has builds for CPython 3.11 and later (pip install 'memslot[dev]'). A long run
needs a folder for its inputs: python -m integration_tests.fuzz_reader corpus -max_total_time=36000.
The checks are those of `memslot_plugin/tests/test_fuzz.py`. An input that fails them is written to a file.
"""

from __future__ import annotations

import inspect
import random
import sys
from functools import partial
from types import FunctionType, ModuleType

import atheris
import wasmtime

from memslot_plugin.tests import mutations, test_fuzz

from .generated import FEATURES, generate

WATCHED = ("memslot_plugin.wasm.", "memslot_plugin.guest.")
SEEDS = [*test_fuzz.CORPUS, *(generate(seed, FEATURES["wasmtime"]).binary for seed in range(60))]


def watch(watched: ModuleType) -> None:
    """Instrument the functions of a module: atheris's import hook does not see an editable installation."""
    for found in list(vars(watched).values()):
        if getattr(found, "__module__", None) == watched.__name__:
            for each in vars(found).values() if inspect.isclass(found) else [found]:
                if isinstance(each, FunctionType):
                    atheris.instrument_func(each)


def change(data: bytes, most: int, seed: int) -> bytes:
    """Return another input: a known module or this one, damaged."""
    rng = random.Random(seed)
    start = rng.choice(SEEDS) if rng.random() < 0.05 or len(data) < 16 else data
    return mutations.mutated(rng, start)[:most]


def main() -> None:
    check = partial(test_fuzz.check, wasmtime.Engine())
    for name, each in sys.modules.items():
        if name.startswith(WATCHED):
            watch(each)
    atheris.Setup([*sys.argv, "-max_len=20000", "-timeout=120"], check, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
