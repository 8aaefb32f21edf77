"""The profiles of the property tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ASK = """
from hypothesis import settings
from memslot_plugin.tests import profiles
profiles.load()
print(profiles.FACTOR, profiles.EXPENSIVE, profiles.examples(7), settings().max_examples, settings().derandomize)
"""


def asked(**environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in ("CI", "MEMSLOT_PROFILE")
    }
    return subprocess.run(
        [sys.executable, "-c", ASK],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "answer"),
    [
        ({}, "1 False 7 100 False"),
        ({"CI": "1"}, "1 False 7 100 True"),
        ({"MEMSLOT_PROFILE": "expensive"}, "60 True 420 6000 False"),
        ({"MEMSLOT_PROFILE": "expensive", "CI": "1"}, "60 True 420 6000 False"),
    ],
)
def test_a_profile_multiplies_the_examples(environment: dict[str, str], answer: str) -> None:
    assert asked(**environment).stdout.strip() == answer


def test_a_profile_that_does_not_exist_is_refused() -> None:
    done = asked(MEMSLOT_PROFILE="cheap")
    assert done.returncode != 0
    assert "MEMSLOT_PROFILE=cheap is not allowed: it is expensive, or not set" in done.stderr


def test_nobody_else_reads_the_variable() -> None:
    asks = 'environ.get("MEMSLOT_PROFILE"'
    readers = [path.name for path in TESTS.rglob("*.py") if asks in path.read_text()]
    assert sorted(readers) == ["profiles.py", "test_profiles.py"]
