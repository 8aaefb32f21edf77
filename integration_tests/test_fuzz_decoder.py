"""The walk over code, compiled with sanitizers and fed with damaged code."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from memslot_plugin import _core, wasm
from memslot_plugin.tests.profiles import examples

from . import modules, toy
from .generated import FEATURES, generate

CORE = Path(_core.__file__).parent
SOURCE = CORE / "analyse.c"
TARGET = Path(__file__).with_name("fuzz_decoder.c")
FLAGS = ("-g", "-O1", "-std=c11", "-D_GNU_SOURCE", "-DALONE=1", "-Wall", "-Wextra", "-Werror")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

if not SOURCE.exists():
    pytest.skip("impossible: a wheel has no sources of the core", allow_module_level=True)

Fuzz = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def fuzz(tmp_path: Path) -> Fuzz:
    """Return a function that compiles a decoder and runs it with a seed and rounds.

    The corpus is contents of code sections, each behind a byte with the number of items of each kind.
    """
    constants = ("f32.const 1", "f64.const 1", "v128.const i64x2 1 1")
    sources = [toy.assemble(f"(module (func {f'(drop ({each}))' * 3}))") for each in constants]
    sources += [toy.A, *(each.binary for each in modules.MODULES.values())]
    sources += [generate(seed, FEATURES["wasmtime"]).binary for seed in range(60)]
    corpus = []
    for number, source in enumerate(sources):
        section = wasm.parse(source).section(wasm.SectionId.CODE)
        if section is not None:
            corpus.append(tmp_path / str(number))
            corpus[-1].write_bytes(bytes([number]) + source[section.payload : section.end])

    def run(decoder: Path, *options: int) -> subprocess.CompletedProcess[str]:
        program = tmp_path / "fuzz"
        compiler = ["cc", *FLAGS, *SANITIZERS, f"-I{CORE}", TARGET, decoder, "-o", program]
        subprocess.run(compiler, check=True)
        command = [program, *map(str, options), *corpus]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)

    return run


@pytest.mark.scales
def test_decoder_under_sanitizers_reads_and_marks_nothing_outside(fuzz: Fuzz) -> None:
    done = fuzz(SOURCE, 0, examples(250))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("rounds of 64 executions\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(in->end - in->at) < length", "(in->end - in->at) + 1 < length"),
        ("if (index >= space->count)", "if (index > space->count)"),
        ("    all->last_function = report->function;\n", ""),
    ],
    ids=["looks a byte too far", "marks a thing too far", "forgets what it counted"],
)
def test_decoder_with_a_mistake_is_found_by_the_sanitizers(
    fuzz: Fuzz, tmp_path: Path, old: str, new: str
) -> None:
    right, wrong = SOURCE.read_text(), tmp_path / "wrong.c"
    assert right.count(old) == 1
    wrong.write_text(right.replace(old, new))
    done = fuzz(wrong, 2, 12000)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr or "does not hold" in done.stderr
