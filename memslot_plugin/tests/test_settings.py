"""Settings: origins of values, sizes, and a clear sentence for each wrong value."""

from __future__ import annotations

import copy
import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memslot_plugin import SettingError, Settings
from memslot_plugin.settings import GIB, KIB, MIB, fields, parse_size

Toml = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("MEMSLOT_"):
            monkeypatch.delenv(name)


@pytest.fixture
def toml(tmp_path: Path) -> Toml:
    """Return a function that writes a settings file."""

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
def test_table_of_settings_in_a_pyproject_is_read(toml: Toml, table: str) -> None:
    text = f'[build-system]\nrequires = []\n[{table}]\nslots = 7\nplugins = ["a", "b"]\n'
    found = Settings.from_file(str(toml(text)))
    assert (found.slots, found.plugins) == (7, ("a", "b"))


@pytest.mark.parametrize("text", ["memfd,mine", " memfd , ,mine,", ""])
def test_list_of_names_in_a_variable_is_split_at_commas(monkeypatch: Any, text: str) -> None:
    names = ("memfd", "mine") if text else ()
    assert Settings().plugins is None
    monkeypatch.setenv("MEMSLOT_PLUGINS", text)
    assert Settings().plugins == Settings(blocked=text).blocked == names
    assert Settings(plugins=list(names)).plugins == names
    assert Settings(plugins=None).plugins is None


def test_setting_of_any_name_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = msgspec.structs.asdict(Settings())
    texts = {"plugins": "a", "blocked": "a", "memory_limit": "1MiB", "heap_limit": "2MiB"}
    for name, value in values.items():
        monkeypatch.setenv(f"MEMSLOT_{name.upper()}", texts.get(name, str(value)))
        assert Settings() == Settings(**{name: os.environ[f"MEMSLOT_{name.upper()}"]})
    found = Settings()
    assert (found.plugins, found.blocked, found.memory_limit) == (("a",), ("a",), MIB)


@pytest.mark.parametrize("variable", ["MEMSLOT_SLOT", "memslot_image_limits", "MEMSLOT_"])
def test_variable_that_is_no_setting_is_refused_with_the_allowed_ones(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    found = Settings()
    monkeypatch.setenv(variable, "1")
    said = rf"\(variable {variable.upper()}\); allowed: host, "
    for make in (Settings, lambda: Settings(slots=2), lambda: found.replace(slots=2)):
        with pytest.raises(SettingError, match=said):
            make()
    monkeypatch.delenv(variable)
    # Variables of a service called memslot, and of these tests.
    for other in ("MEMSLOT_SERVICE_HOST", "MEMSLOT_PORT_80_TCP_ADDR", "MEMSLOT_PROFILE", "MEMSLO"):
        monkeypatch.setenv(other, "1")
    assert Settings() == found


def test_settings_are_frozen_and_replaced() -> None:
    found = Settings(slots=3, memory_limit="2MiB")
    with pytest.raises(AttributeError, match="immutable"):
        found.slots = 4  # type: ignore[misc]
    changed = found.replace(slots=4)
    assert (found.slots, changed.slots, changed.memory_limit) == (3, 4, 2 * MIB)
    with pytest.raises(
        SettingError, match="slots: expected a whole number from 1 to 1000000, got 0"
    ):
        found.replace(slots=0)
    with pytest.raises(SettingError, match="unknown setting slot "):
        found.replace(slot=1)


def test_settings_are_values_that_can_be_copied_pickled_and_read() -> None:
    found = Settings(slots=3, plugins="a,b")
    for other in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found), found.replace()):
        assert other == found != Settings()
        assert hash(other) == hash(found)
    assert repr(found).startswith("Settings(host='auto', plugins=('a', 'b'), blocked=(), slots=3, ")


# Sizes

UNITS = {"": 1, "B": 1, "kB": 10**3, "KiB": KIB, "MB": 10**6, "MiB": MIB, "GiB": GIB}


@given(st.integers(0, 10**30), st.sampled_from([*UNITS, "TiB"]))
def test_size_of_a_whole_number_is_exact(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * UNITS.get(unit, 1024 * GIB)


def test_size_with_blanks_or_small_letters_is_read() -> None:
    texts = ("64 MiB", " 1gib ", "435kB", "2TB")
    found = [Settings(memory_limit=text).memory_limit for text in texts]
    assert found == [64 * MIB, GIB, 435_000, 2 * 10**12]


# Wrong values: a sentence with setting, value and allowed values

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
    name: field.expected.removeprefix("one of ").split(", ")
    for name, field in fields().items()
    if field.expected.startswith("one of")
}
NAMED = "names, separated by commas or in a list"
NO_SIZES = ["big", "", "-1", "1 XiB", "0x10", "1e3", "1_000", "1,5MiB", "1.5MiB", "MiB", "\u0661"]
SIZED = "a size such as 64MiB, "

WRONG: list[tuple[list[str], list[Any], str]] = [
    (NUMBERS, [None, "many", "", [1], {}, 1.5, math.inf, True, False, -1], "a whole number "),
    (["slots"], [0, 1_000_001], "from 1 to 1000000"),
    (["max_unused_warm_slots"], [-1], r"from 0 to 2\^63 - 1"),
    (["reserved"], ["63KiB", "2TiB", -1], "from 65536 to 1099511627776 bytes"),
    (["guard"], ["17GiB"], "from 0 to 17179869184 bytes"),
    (SIZES, [*NO_SIZES, "0.5", "9" * 200, [], 1.5, math.inf, True, False, -1], SIZED),
    (FLOATS, [math.nan, math.inf, "nan", "soon", None, True, -1, 86_401], "a number from 0 to "),
    (["audit"], [1.01], "from 0 to 1"),
    *(([name], ["X", "", 1, None, CHOICES[name][0].upper()], "one of ") for name in CHOICES),
    (["host"], [5, None, b"x"], "a name"),
    (["plugins"], [5, [5]], NAMED),
    (["blocked"], [None, b"x"], NAMED),
]


@pytest.mark.parametrize("name", fields())
def test_setting_of_a_wrong_value_is_refused_in_one_sentence(name: str) -> None:
    tried = [(value, said) for names, values, said in WRONG if name in names for value in values]
    assert tried
    assert fields()[name].description
    for value, said in tried:
        sentence = refusal(name, value)
        begin, end = re.escape(f"setting {name}: expected "), re.escape(f", got {value!r}")
        assert re.fullmatch(f"{begin}.*{said}.*{end}", sentence), (value, sentence)
        assert len(sentence) < 400, value


def refusal(name: str, value: Any) -> str:
    try:
        return f"accepted: {Settings(**{name: value})}"
    except SettingError as error:
        return str(error)


def test_settings_of_several_wrong_values_are_refused_in_a_sentence_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEMSLOT_SLOTS", "many")
    several = "^setting slots: expected .*, got 'many'; setting reset: expected .*, got 'x';"
    with pytest.raises(
        SettingError, match=several + r" unknown setting nonsense .*; allowed: host, "
    ):
        Settings(reset="x", nonsense=1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[memslot]\nslot = 1\n", "unknown setting slot .*; allowed: host, "),
        ("[other]\nslots = 1\n", r"has no table \[memslot\] or \[tool.memslot\]"),
        ("tool = 3\n", "has no table"),
        ("[tool]\nmemslot = 3\n", "has no table"),
        ("[[memslot]]\nslots = 1\n", "has no table"),
        ("[memslot\n", "is not TOML: .*line 1"),
        ("[memslot]\nslots = many\n", "is not TOML"),
        ("[memslot]\nslots = 'many'\n", "setting slots: expected .*, got 'many'"),
        ("[memslot]\nslots = 2020-01-01\n", "setting slots: expected .*, got datetime"),
    ],
)
def test_settings_file_that_is_wrong_is_refused_in_one_sentence(
    toml: Toml, text: str, sentence: str
) -> None:
    with pytest.raises(SettingError, match=sentence):
        Settings.from_file(toml(text))


def test_settings_file_that_cannot_be_read_is_refused_with_the_reason(toml: Toml) -> None:
    path = toml("")
    path.write_bytes(b"[memslot]\n\xff\xfe")
    with pytest.raises(SettingError, match="is not TOML: 'utf-8'"):
        Settings.from_file(path)
    with pytest.raises(SettingError, match="cannot be read: Is a directory"):
        Settings.from_file(path.parent)
    path.unlink()
    with pytest.raises(SettingError, match=r"service\.toml cannot be read: No such file"):
        Settings.from_file(path)
