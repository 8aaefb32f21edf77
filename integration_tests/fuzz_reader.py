"""Coverage-guided fuzzing of the module reader, the rewriting and the walk over code, with atheris.

usage: python -m integration_tests.fuzz_reader [CORPUS] [-max_total_time=SECONDS] [-runs=N] [...]

takes libFuzzer's options; atheris has builds for CPython 3.11 and later (pip install 'memslot[dev]').  For hours, give
it a folder for what it finds worth keeping: python -m integration_tests.fuzz_reader corpus -max_total_time=36000.
What must hold is what `memslot_plugin/tests/test_fuzz.py` says; an input for which it does not is written to a file.
"""

from __future__ import annotations

import inspect
import random
import sys
from types import FunctionType, ModuleType

import atheris
import wasmtime

from memslot_plugin.tests import mutations, test_fuzz

from .generated import FEATURES, generate

WATCHED = ("memslot_plugin.wasm.", "memslot_plugin.guest", "memslot_plugin.analysis")
ENGINE = wasmtime.Engine()
SEEDS = [*test_fuzz.CORPUS, *(generate(seed, FEATURES["wasmtime"]).binary for seed in range(60))]


def watch(watched: ModuleType) -> None:
    """Instrument what a module defines; atheris's import hook does not see an editable installation."""
    for found in list(vars(watched).values()):
        if getattr(found, "__module__", None) == watched.__name__:
            for each in vars(found).values() if inspect.isclass(found) else [found]:
                if isinstance(each, FunctionType):
                    atheris.instrument_func(each)


def change(data: bytes, most: int, seed: int) -> bytes:
    """One more input: a known module or this one, with something wrong in it."""
    rng = random.Random(seed)
    start = rng.choice(SEEDS) if rng.random() < 0.05 or len(data) < 16 else data
    return mutations.mutated(rng, start)[:most]


def try_one(data: bytes) -> None:
    valid, found = test_fuzz.is_valid(ENGINE, data), test_fuzz.plans(data)
    assert found or not valid, "valid, and refused"
    for plan in found:
        assert test_fuzz.is_valid(ENGINE, plan.module) is valid, "rewritten, it is something else"
        if plan.structure is not None and plan.module is not plan.source:
            test_fuzz.assert_same_meaning(plan)
        if valid and plan.structure is not None:
            assert plan.code is not None
            assert plan.code.not_understood is None, plan.code.not_understood
            taken = test_fuzz.snapshot_of(plan)
            assert taken is None or test_fuzz.is_valid(ENGINE, taken.module), "its snapshot is none"


def main() -> None:
    for name, each in sys.modules.items():
        if name.startswith(WATCHED):
            watch(each)
    atheris.Setup([*sys.argv, "-max_len=20000", "-timeout=120"], try_one, custom_mutator=change)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
