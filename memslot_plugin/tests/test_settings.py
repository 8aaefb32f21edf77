"""Settings: where values come from, and one clear sentence for each wrong one."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memslot_plugin import SettingError, Settings
from memslot_plugin.settings import GIB, KIB, MIB, parse_size

Toml = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("MEMSLOT_"):
            monkeypatch.delenv(name)


@pytest.fixture
def toml(tmp_path: Path) -> Toml:
    """Writes a settings file."""

    def write(text: str) -> Path:
        path = tmp_path / "service.toml"
        path.write_text(text)
        return path

    return write


# Origins of values


def test_keywords_come_before_environment_before_file_before_defaults(
    toml: Toml, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toml('[memslot]\nslots = -3\nguard = "3MiB"\nreserved = "3GiB"\nstrategy = "random"\n')
    monkeypatch.setenv("MEMSLOT_SLOTS", "2")
    monkeypatch.setenv("MEMSLOT_GUARD", "2MiB")
    monkeypatch.setenv("MEMSLOT_RESERVED", "2GiB")
    found = Settings.from_file(path, slots=128, guard="1MiB")  # 128 is also the default
    assert (found.slots, found.guard, found.reserved) == (128, MIB, 2 * GIB)
    assert (found.strategy, found.allocation) == ("random", "pooling")
    assert Settings.from_file(path).slots == 2  # the wrong value in the file is overruled
    assert (Settings().slots, Settings(slots=1).slots) == (2, 1)


@pytest.mark.parametrize("table", ["memslot", "tool.memslot"])
def test_table_may_be_in_a_pyproject(toml: Toml, table: str) -> None:
    text = f'[build-system]\nrequires = []\n[{table}]\nslots = 7\nplugins = ["a", "b"]\n'
    found = Settings.from_file(str(toml(text)))
    assert (found.slots, found.plugins) == (7, ("a", "b"))


@pytest.mark.parametrize("text", ["memfd,mine", " memfd , ,mine,", ""])
def test_names_are_separated_by_commas(monkeypatch: Any, text: str) -> None:
    names = ("memfd", "mine") if text else ()
    assert Settings().plugins is None
    monkeypatch.setenv("MEMSLOT_PLUGINS", text)
    assert Settings().plugins == Settings(blocked=text).blocked == names
    assert Settings(plugins=list(names)).plugins == names
    assert Settings(plugins=None).plugins is None


def test_every_setting_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = Settings().model_dump()
    texts = {"plugins": "a", "blocked": "a", "memory_limit": "1MiB", "heap_limit": "2MiB"}
    for name, value in values.items():
        monkeypatch.setenv(f"MEMSLOT_{name.upper()}", texts.get(name, str(value)))
    found = Settings()
    assert found.model_fields_set == set(values)
    assert (found.plugins, found.blocked, found.memory_limit) == (("a",), ("a",), MIB)


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("MEMSLOT_SLOT", "MEMSLOT_SLOTS"),
        ("memslot_image_limits", "MEMSLOT_IMAGE_LIMIT"),
        ("MEMSLOT_PLUGIN", "MEMSLOT_PLUGINS"),
        ("MEMSLOT_", "MEMSLOT_"),
    ],
)
def test_variable_that_is_no_setting_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, variable: str, nearest: str
) -> None:
    found = Settings()
    monkeypatch.setenv(variable, "1")
    said = f"environment variable {variable} is no setting; the nearest is {nearest}"
    for make in (Settings, lambda: Settings(slots=2), lambda: found.replace(slots=2)):
        with pytest.raises(SettingError, match=said):
            make()
    monkeypatch.delenv(variable)
    # For a service called memslot, and for our own tests.
    for other in ("MEMSLOT_SERVICE_HOST", "MEMSLOT_PORT_80_TCP_ADDR", "MEMSLOT_PROFILE", "MEMSLO"):
        monkeypatch.setenv(other, "1")
    assert Settings() == found


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

UNITS = {"": 1, "B": 1, "kB": 10**3, "KiB": KIB, "MB": 10**6, "MiB": MIB, "GiB": GIB}


@given(st.integers(0, 10**30), st.sampled_from([*UNITS, "TiB"]))
def test_whole_sizes_are_exact(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * UNITS.get(unit, 1024 * GIB)


def test_size_may_have_blanks_small_letters_and_a_fraction() -> None:
    texts = ("64 MiB", " 1gib ", "1.5GiB", "4.35kB", "2TB")
    found = [Settings(memory_limit=text).memory_limit for text in texts]
    # 4350 is not 4349.99, as a float would have it.
    assert found == [64 * MIB, GIB, GIB * 3 // 2, 4350, 2 * 10**12]


# Wrong values: one sentence, with setting, value and what is allowed

NUMBERS = [
    "slots",
    "max_unused_warm_slots",
    "ready_instances",
    "memories_per_instance",
    "table_limit",
    "tables_per_instance",
]
SIZES = ["reserved", "guard", "memory_limit", "heap_limit", "image_limit", "keep_resident"]
FLOATS = ["audit", "wait_timeout"]
CHOICES = {
    name: [str(value) for value in get_args(field.annotation)]
    for name, field in Settings.model_fields.items()
    if get_origin(field.annotation) is Literal
}
NAMED = "names, separated by commas or as a list of text"
NOT_NEGATIVE = [*NUMBERS[1:], *SIZES[1:], *FLOATS]
NO_SIZES = ["big", "", "-1", "1 XiB", "0x10", "1e3", "1_000", "1,5MiB", "MiB", "\u0661"]

WRONG: list[tuple[list[str], list[Any], str]] = [
    (NUMBERS, [None, "many", "", [1], {}], "valid integer"),
    (NUMBERS + SIZES, [1.5], "integer"),
    (NUMBERS + SIZES, [math.inf], "number"),
    (NUMBERS + SIZES + FLOATS, [True, False], "number"),
    (NOT_NEGATIVE, [-1], "greater than or equal to 0"),
    (["slots"], [0], "greater than or equal to 1"),
    (["slots"], [1_000_001], "less than or equal to 1000000"),
    (["reserved"], ["63KiB"], "greater than or equal to 65536"),
    (["reserved"], ["2TiB"], "less than or equal to 1099511627776"),
    (["guard"], ["17GiB"], "less than or equal to 17179869184"),
    (["audit"], [1.01], "less than or equal to 1"),
    (["wait_timeout"], [86_401], "less than or equal to 86400"),
    (FLOATS, [math.nan, math.inf], "finite number"),
    (FLOATS, ["soon"], "valid number"),
    (SIZES, NO_SIZES, "a size is a number of bytes, or a number with a unit such as"),
    (SIZES, ["0.5"], "a size is a whole number of bytes"),
    (SIZES, ["9" * 200], "less than or equal to "),
    (SIZES, [[]], "integer"),
    *(([name], ["X", "", 1, None], CHOICES[name][0]) for name in CHOICES),
    *(([name], [CHOICES[name][0].upper()], CHOICES[name][-1]) for name in CHOICES),
    (["host"], [5, None], "it is a name, which is text"),
    (["plugins"], [5, [5]], NAMED),
    (["blocked"], [None], NAMED),
]


@pytest.mark.parametrize("name", Settings.model_fields)
def test_wrong_value_is_one_clear_sentence(name: str) -> None:
    tried = [(value, said) for names, values, said in WRONG if name in names for value in values]
    assert tried
    assert Settings.model_fields[name].description
    for value, said in tried:
        sentence = refusal(name, value)
        begin = re.escape(f"setting {name} = {repr(value)[:60]}")
        assert re.fullmatch(rf"{begin}.* is not allowed: .*{said}.*", sentence), value
        assert "pydantic" not in sentence, value
        assert len(sentence) < 400, value


def refusal(name: str, value: Any) -> str:
    try:
        return f"accepted: {Settings(**{name: value})}"
    except SettingError as error:
        return str(error)


def test_several_wrong_values_are_a_sentence_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMSLOT_SLOTS", "many")
    several = "^setting slots = 'many' is not allowed: .*; setting reset = 'x' is not allowed: .*;"
    with pytest.raises(SettingError, match=several + " unknown setting nonsense; allowed: host, "):
        Settings(reset="x", nonsense=1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[memslot]\nslot = 1\n", "unknown setting slot; allowed: host, "),
        ("[other]\nslots = 1\n", r"has no table \[memslot\] or \[tool.memslot\]"),
        ("tool = 3\n", "has no table"),
        ("[tool]\nmemslot = 3\n", "has no table"),
        ("[[memslot]]\nslots = 1\n", "has no table"),
        ("[memslot\n", "is not TOML: .*line 1"),
        ("[memslot]\nslots = many\n", "is not TOML"),
        ("[memslot]\nslots = 'many'\n", "setting slots = 'many' is not allowed"),
        ("[memslot]\nslots = 2020-01-01\n", "setting slots = .* is not allowed"),
    ],
)
def test_wrong_file_is_one_clear_sentence(toml: Toml, text: str, sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        Settings.from_file(toml(text))


def test_file_that_cannot_be_read_says_why(toml: Toml) -> None:
    path = toml("")
    path.write_bytes(b"[memslot]\n\xff\xfe")
    with pytest.raises(SettingError, match="is not TOML: 'utf-8'"):
        Settings.from_file(path)
    with pytest.raises(SettingError, match="cannot be read: Is a directory"):
        Settings.from_file(path.parent)
    path.unlink()
    with pytest.raises(SettingError, match=r"service\.toml cannot be read: No such file"):
        Settings.from_file(path)
