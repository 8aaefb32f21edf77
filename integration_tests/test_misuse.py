"""Run the adversary that draws public calls: it finds no fault, and finds each fault that is put back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import children
from .cells import REAL_HOSTS
from .children import ROOT
from .misuse import mutants

LIMIT = 120
"""Seconds after which an adversary counts as hanging and prints its stacks."""


def adversary(tmp_path: Path, host: str, **options: object) -> tuple[int, str]:
    """Return the exit status and the output of an adversary."""
    command = [sys.executable, "-m", "integration_tests.misuse", host]
    command += [f"--{name}={each}" for name, each in options.items()]
    said = tmp_path / "said"  # a file: a child left behind would keep a pipe open
    inherited = {name: each for name, each in os.environ.items() if not name.startswith("MEMSLOT_")}
    with said.open("w") as output:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=inherited,
            stdout=output,
            stderr=output,
            check=False,
            timeout=LIMIT + 30,
        )
    return done.returncode, said.read_text(errors="replace")


def finds_nothing(tmp_path: Path, host: str, seed: int, rounds: int, threads: int = 1) -> None:
    """Fail unless an adversary comes to its end."""
    status, said = adversary(
        tmp_path, host, seed=seed, rounds=rounds, threads=threads, seconds=LIMIT
    )
    assert status == 0, f"status {status}: {said[-6000:]}"


HOSTS = children.hosts(REAL_HOSTS)


@pytest.mark.parametrize(("seed", "threads"), [(3, 1), (4, 3)])
@pytest.mark.parametrize("host", HOSTS)
def test_adversary_in_a_short_run_finds_no_fault(
    host: str, seed: int, threads: int, tmp_path: Path
) -> None:
    finds_nothing(tmp_path, host, seed, 60, threads)


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("seed", range(100, 110))
@pytest.mark.parametrize("host", HOSTS)
def test_adversary_in_a_long_run_finds_no_fault(
    host: str, seed: int, threads: int, tmp_path: Path
) -> None:
    finds_nothing(tmp_path, host, seed, 3000, threads)


MUTANTS = [
    pytest.param(host, name, seed, marks=host_.marks, id=f"{host}-{name}")
    for host_ in HOSTS
    for host in map(str, host_.values)
    for name, mutant in mutants.MUTANTS.items()
    if (seed := mutant.seeds.get(host)) is not None
]


@pytest.mark.long
@pytest.mark.parametrize(("host", "name", "seed"), MUTANTS)
def test_adversary_with_a_fault_put_back_finds_it(
    host: str, name: str, seed: int, tmp_path: Path
) -> None:
    mutant = mutants.MUTANTS[name]
    options = {
        "seed": seed,
        "rounds": 400,
        "threads": mutant.threads,
        "seconds": 20,
        "mutant": name,
    }
    for _ in range(
        1 if mutant.threads == 1 else 10
    ):  # which thread runs when is not drawn by the seed
        status, said = adversary(tmp_path, host, **options)
        if status:
            break
    assert status != 0
    assert mutant.says in said, said[-3000:]
