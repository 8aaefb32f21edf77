"""Settings: where values come from, and one clear sentence for each wrong one."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memslot_plugin import SettingError, Settings
from memslot_plugin.settings import GIB, KIB, MIB, parse_size


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("MEMSLOT_"):
            monkeypatch.delenv(name)


def file_with(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "service.toml"
    path.write_text(text)
    return path


# Where values come from


def test_keywords_come_before_environment_before_file_before_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_with(
        tmp_path, '[memslot]\nslots = 3\nguard = "3MiB"\nreserved = "3GiB"\nstrategy = "random"\n'
    )
    monkeypatch.setenv("MEMSLOT_SLOTS", "2")
    monkeypatch.setenv("MEMSLOT_GUARD", "2MiB")
    monkeypatch.setenv("MEMSLOT_RESERVED", "2GiB")
    found = Settings.from_file(path, slots=1, guard="1MiB")
    assert (found.slots, found.guard) == (1, MIB)
    assert found.reserved == 2 * GIB
    assert found.strategy == "random"
    assert found.allocation == "pooling"
    assert Settings().slots == 2
    assert Settings(slots=1).slots == 1


def test_a_keyword_wins_also_where_it_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMSLOT_SLOTS", "2")
    path = file_with(tmp_path, "[memslot]\nslots = 3\n")
    assert Settings.from_file(path, slots=128).slots == 128


def test_a_wrong_value_that_is_overruled_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_with(tmp_path, "[memslot]\nslots = -3\n")
    monkeypatch.setenv("MEMSLOT_SLOTS", "2")
    assert Settings.from_file(path).slots == 2


@pytest.mark.parametrize("table", ["memslot", "tool.memslot"])
def test_the_table_may_be_in_a_pyproject(tmp_path: Path, table: str) -> None:
    text = f'[build-system]\nrequires = []\n[{table}]\nslots = 7\nplugins = ["a", "b"]\n'
    found = Settings.from_file(str(file_with(tmp_path, text)))
    assert (found.slots, found.plugins) == (7, ("a", "b"))


@pytest.mark.parametrize(
    ("text", "names"),
    [("memfd,mine", ("memfd", "mine")), (" a , ,b,", ("a", "b")), ("one", ("one",))],
)
def test_names_are_separated_by_commas(
    monkeypatch: pytest.MonkeyPatch, text: str, names: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MEMSLOT_PLUGINS", text)
    monkeypatch.setenv("MEMSLOT_BLOCKED", text)
    assert Settings().plugins == Settings().blocked == names
    assert Settings(plugins=text, blocked=list(names)).blocked == names


def test_names_may_be_none_and_nothing() -> None:
    assert Settings().plugins is None
    assert Settings(plugins=None).plugins is None
    assert Settings(plugins=()).plugins == Settings(plugins="").plugins == ()


def test_every_setting_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = Settings().model_dump()
    for name, value in values.items():
        text = "a" if value is None and name == "plugins" else str(value or "")
        if name == "blocked":
            text = "a"
        elif name == "memory_limit":
            text = "1MiB"
        elif value in (0, 0.0):
            text = "0"
        monkeypatch.setenv(f"MEMSLOT_{name.upper()}", text)
    found = Settings()
    assert found.model_fields_set == set(values)
    assert (found.plugins, found.blocked, found.memory_limit) == (("a",), ("a",), MIB)


def test_settings_are_frozen_and_replaced() -> None:
    found = Settings(slots=3, memory_limit="2MiB")
    with pytest.raises(ValueError, match="frozen"):
        found.slots = 4
    changed = found.replace(slots=4)
    assert (found.slots, changed.slots, changed.memory_limit) == (3, 4, 2 * MIB)
    with pytest.raises(SettingError, match="slots = 0 is not allowed"):
        found.replace(slots=0)
    with pytest.raises(SettingError, match="unknown setting slot;"):
        found.replace(slot=1)


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("64KiB", 64 * KIB),
        ("64 MiB", 64 * MIB),
        (" 1gib ", GIB),
        ("1.5GiB", GIB * 3 // 2),
        ("0.001kB", 1),
        ("64kB", 64_000),
        ("64MB", 64_000_000),
        ("2TB", 2 * 10**12),
        ("12b", 12),
        ("9007199254740993", 2**53 + 1),  # more than a float can tell apart
        ("0.1MB", 100_000),
        ("4.35kB", 4350),
    ],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert Settings(memory_limit=text).memory_limit == size


@given(st.integers(0, 10**30), st.sampled_from(["", "B", "kB", "KiB", "MB", "MiB", "GiB", "TiB"]))
def test_whole_sizes_are_exact(number: int, unit: str) -> None:
    units = {"": 1, "B": 1, "kB": 10**3, "KiB": KIB, "MB": 10**6, "MiB": MIB, "GiB": GIB}
    assert parse_size(f"{number}{unit}") == number * units.get(unit, 1024 * GIB)


# Wrong values: one sentence, with setting, value and what is allowed

NUMBERS = ["slots", "max_unused_warm_slots", "ready_instances"]
SIZES = ["reserved", "guard", "memory_limit", "image_limit", "keep_resident"]
FLOATS = ["audit", "wait_timeout"]
CHOICES = {
    "allocation": ["pooling", "on-demand"],
    "strategy": ["affinity", "next-available", "random"],
    "growth": ["mprotect", "ftruncate"],
    "bounds_checks": ["guard", "code"],
    "memfd": ["auto", "on", "off"],
    "reset": ["auto", "madvise", "pagemap", "copy"],
}

NONE_OF_THEM: list[Any] = ["X", "", 1, None]
NO_NUMBERS: list[Any] = [None, "many", "", [1], {}]

WRONG: list[tuple[str, Any, str]] = [
    *((name, value, "valid integer") for name in NUMBERS for value in NO_NUMBERS),
    *((name, 1.5, "integer") for name in NUMBERS + SIZES),
    *((name, math.inf, "number") for name in NUMBERS + SIZES),
    *((name, value, "number") for name in NUMBERS + SIZES + FLOATS for value in (True, False)),
    *((name, -1, "greater than or equal to 0") for name in ["guard", "memory_limit", "audit"]),
    *((name, -1, "greater than or equal to 0") for name in ["image_limit", "keep_resident"]),
    *((name, -1, "greater than or equal to 0") for name in ["wait_timeout"]),
    ("max_unused_warm_slots", -1, "greater than or equal to 0"),
    ("ready_instances", -1, "greater than or equal to 0"),
    ("slots", 0, "greater than or equal to 1"),
    ("slots", 1_000_001, "less than or equal to 1000000"),
    ("reserved", "63KiB", "greater than or equal to 65536"),
    ("reserved", "2TiB", "less than or equal to 1099511627776"),
    ("guard", "17GiB", "less than or equal to 17179869184"),
    ("audit", 1.01, "less than or equal to 1"),
    ("wait_timeout", 86_401, "less than or equal to 86400"),
    *((name, value, "finite number") for name in FLOATS for value in (math.nan, math.inf)),
    *((name, "soon", "valid number") for name in FLOATS),
    *(
        (name, value, "a size is a number of bytes, or a number with a unit such as")
        for name in SIZES
        for value in ("big", "", "-1", "1 XiB", "0x10", "1e3", "1_000", "1,5MiB", "MiB", "\u0661")
    ),
    *((name, "0.5", "a size is a whole number of bytes") for name in SIZES),
    *((name, "9" * 200, "less than or equal to ") for name in SIZES),
    *((name, [], "integer") for name in SIZES),
    *((name, value, CHOICES[name][0]) for name in CHOICES for value in NONE_OF_THEM),
    *((name, CHOICES[name][0].upper(), CHOICES[name][-1]) for name in CHOICES),
    ("host", 5, "it is a name, which is text"),
    ("host", None, "it is a name, which is text"),
    ("plugins", 5, "names, separated by commas or as a list of text"),
    ("plugins", [5], "names, separated by commas or as a list of text"),
    ("blocked", None, "names, separated by commas or as a list of text"),
]


@pytest.mark.parametrize(
    ("name", "value", "allowed"), WRONG, ids=[f"{w[0]}={str(w[1])[:20]!r}" for w in WRONG]
)
def test_a_wrong_value_is_one_clear_sentence(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(SettingError) as caught:
        Settings(**{name: value})
    sentence = str(caught.value)
    assert sentence.startswith(f"setting {name} = "), sentence
    assert "is not allowed: " in sentence
    assert allowed in sentence
    assert "\n" not in sentence
    assert "pydantic" not in sentence
    assert repr(value)[:60] in sentence
    assert len(sentence) < 400


def test_every_field_has_a_wrong_value_above() -> None:
    assert {name for name, _, _ in WRONG} == set(Settings.model_fields)
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize(
    ("name", "text"), [("SLOTS", "many"), ("PLUGINS", ""), ("RESERVED", "lots"), ("RESET", "maybe")]
)
def test_a_wrong_value_of_the_environment_is_the_same_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(f"MEMSLOT_{name}", text)
    if name == "PLUGINS":
        assert Settings().plugins == ()
        return
    with pytest.raises(SettingError, match=f"^setting {name.lower()} = '{text}' is not allowed: "):
        Settings()


def test_several_wrong_values_are_a_sentence_each() -> None:
    with pytest.raises(SettingError) as caught:
        Settings(slots=0, reset="x", nonsense=1)
    first, second, third = re.split(r"; (?=setting |unknown )", str(caught.value))
    assert first.startswith("setting slots = 0 is not allowed: ")
    assert second.startswith("setting reset = 'x' is not allowed: ")
    assert third.startswith("unknown setting nonsense; allowed: host, plugins")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[memslot]\nslot = 1\n", "unknown setting slot; allowed: host, "),
        ("[other]\nslots = 1\n", r"has no table \[memslot\] or \[tool.memslot\]"),
        ("memslot = 3\n", "has no table"),
        ("tool = 3\n", "has no table"),
        ("[tool]\nmemslot = 3\n", "has no table"),
        ("[[memslot]]\nslots = 1\n", "has no table"),
        ("[memslot\n", "is not TOML: .*line 1"),
        ("[memslot]\nslots = many\n", "is not TOML"),
        ("[memslot]\nslots = 'many'\n", "setting slots = 'many' is not allowed"),
        ("[memslot]\nslots = true\n", "setting slots = True is not allowed"),
        ("[memslot]\nslots = 2020-01-01\n", "setting slots = .* is not allowed"),
    ],
)
def test_a_wrong_file_is_one_clear_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        Settings.from_file(file_with(tmp_path, text))


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"nowhere\.toml cannot be read: No such file"):
        Settings.from_file(tmp_path / "nowhere.toml")
    with pytest.raises(SettingError, match="cannot be read: Is a directory"):
        Settings.from_file(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_bytes(b"[memslot]\n\xff\xfe")
    with pytest.raises(SettingError, match="is not TOML: 'utf-8'"):
        Settings.from_file(broken)
