"""The walk over code, compiled with sanitizers and fed with code that has something wrong in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from memslot_plugin import _core, wasm
from memslot_plugin.tests.profiles import examples

from . import modules, toy
from .generated import FEATURES, generate

CORE = Path(_core.__file__).parent
TARGET = Path(__file__).with_name("fuzz_decoder.c")
SANITIZERS = "-fsanitize=address,undefined"

if not (CORE / "analyse.c").exists():
    pytest.skip("impossible: a wheel has no sources of the core", allow_module_level=True)


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("fuzz") / "fuzz"
    command = [
        "cc",
        "-g",
        "-O1",
        "-std=c11",
        "-D_GNU_SOURCE",
        "-DALONE=1",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    command += [SANITIZERS, "-fno-sanitize-recover=undefined", f"-I{CORE}", str(TARGET)]
    done = subprocess.run(
        [*command, str(CORE / "analyse.c"), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Contents of code sections, each behind a byte that says how many things of each kind there are."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = [toy.A, *(each.binary for each in modules.MODULES.values())]
    sources += [generate(seed, FEATURES["wasmtime"]).binary for seed in range(60)]
    for number, source in enumerate(sources):
        section = wasm.parse(source).section(wasm.SectionId.CODE)
        if section is not None:
            code = source[section.payload : section.end]
            (folder / str(number)).write_bytes(bytes([number]) + code)
    return sorted(folder.iterdir())


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_nothing_is_read_or_marked_outside(fuzz: Path, corpus: list[Path]) -> None:
    for seed in range(4):
        done = run(fuzz, seed, examples(250), *corpus)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("rounds of 64 executions\n")


def test_the_target_notices_what_does_not_hold(corpus: list[Path], tmp_path: Path) -> None:
    """A decoder that looks one byte too far, and one that forgets what it counted."""
    right = (CORE / "analyse.c").read_text()
    for number, (old, new) in enumerate(
        [
            (
                "if ((size_t)(in->end - in->at) < length)",
                "if ((size_t)(in->end - in->at) + 1 < length)",
            ),
            ("if (index >= space->count)", "if (index > space->count)"),
            ("    report->sites++;\n", "    report->sites += report->sites != 3;\n"),
        ]
    ):
        assert right.count(old) == 1
        wrong = tmp_path / f"wrong{number}.c"
        wrong.write_text(right.replace(old, new))
        program = tmp_path / f"wrong{number}"
        command = ["cc", "-g", "-O1", "-D_GNU_SOURCE", "-DALONE=1", SANITIZERS, f"-I{CORE}"]
        subprocess.run([*command, str(TARGET), str(wrong), "-o", str(program)], check=True)
        done = run(program, 1, 3000, *corpus)
        assert done.returncode != 0, new
        assert "AddressSanitizer" in done.stderr or "does not hold" in done.stderr
