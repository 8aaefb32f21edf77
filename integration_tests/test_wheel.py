"""The wheel: one for the stable ABI of CPython 3.10 and later, complete, and without other files."""

from __future__ import annotations

import configparser
import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import abi3info
import pytest
from abi3info.models import PyVersion, Symbol
from elftools.elf.elffile import ELFFile
from packaging.utils import parse_wheel_filename

pytestmark = pytest.mark.gate  # the gate builds it once and names it in MEMSLOT_WHEEL

ROOT = Path(__file__).resolve().parents[1]
EXTENSIONS = [f"memslot_plugin/_core/{name}.abi3.so" for name in ("_lib", "_fast")]
OLDEST = PyVersion(3, 10)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel that MEMSLOT_WHEEL names, or else build one from this tree."""
    if given := os.environ.get("MEMSLOT_WHEEL"):
        return Path(given)
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def metadata(wheel: Path, name: str) -> str:
    archive = zipfile.ZipFile(wheel)
    (path,) = (each for each in archive.namelist() if each.endswith(f".dist-info/{name}"))
    return archive.read(path).decode()


def test_wheel_tag_is_the_stable_abi_of_the_oldest_python(wheel: Path) -> None:
    name, _version, _build, tags = parse_wheel_filename(wheel.name)
    assert name == "memslot"
    assert {(tag.interpreter, tag.abi) for tag in tags} == {("cp310", "abi3")}
    assert all("linux" in tag.platform for tag in tags)
    said = re.findall(r"^Tag: (.+)$", metadata(wheel, "WHEEL"), re.MULTILINE)
    assert said == [str(tag) for tag in tags]


def test_wheel_has_both_packages_and_no_other_file(names: set[str]) -> None:
    typed = {"memslot_plugin/py.typed", "memslot_hooks/py.typed", "memslot_hooks/specs.py"}
    example = {"memslot_plugin/cli/example.wat", "memslot_plugin/cli/example.wasm"}
    assert typed | example | set(EXTENSIONS) <= names
    assert any(re.fullmatch(r"memslot_plugin/tests/.*test_\w+\.py", name) for name in names)
    allowed = re.compile(
        r"memslot_(plugin|hooks)/([a-z_0-9]+/)*(\w+\.pyi?|py\.typed|\w+\.wat|\w+\.wasm|\w+\.json)"
        r"|memslot-[^/]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/LICENSE)"
    )
    assert {name for name in names if not allowed.fullmatch(name)} == set(EXTENSIONS)


def test_wheel_has_every_data_file_of_the_sources(wheel: Path, names: set[str]) -> None:
    packages = ("memslot_plugin/", "hooks/memslot_hooks/")
    sources = [
        str(path.relative_to(ROOT)) for each in packages for path in (ROOT / each).rglob("*")
    ]
    for sdist in wheel.parent.glob("memslot-*.tar.gz"):  # the gate builds the wheel of them
        with tarfile.open(sdist) as archive:
            sources += [name.partition("/")[2] for name in archive.getnames()]
    shipped = (".py", ".pyi", ".typed", ".wat", ".wasm", ".json")
    expected = [each for each in sources if each.startswith(packages) and each.endswith(shipped)]
    assert expected
    assert {name.removeprefix("hooks/") for name in expected} <= names


def test_wheel_entry_points_are_the_command_and_the_two_allocators(wheel: Path) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(metadata(wheel, "entry_points.txt"))
    classes = {"memfd": "MemfdAllocator", "anonymous": "AnonymousAllocator"}
    assert {section: dict(parser[section]) for section in parser.sections()} == {
        "console_scripts": {"memslot": "memslot_plugin.__main__:main"},
        "memslot": {name: f"memslot_plugin.allocators:{made}" for name, made in classes.items()},
    }


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_extension_needs_the_stable_abi_and_offers_its_init_alone(
    wheel: Path, extension: str
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        elf = ELFFile(io.BytesIO(archive.read(extension)))
    table = [symbol for symbol in elf.get_section_by_name(".dynsym").iter_symbols() if symbol.name]
    needed = {symbol.name for symbol in table if symbol["st_shndx"] == "SHN_UNDEF"}
    used = {name for name in needed if name.startswith(("Py", "_Py"))}
    stable = abi3info.FUNCTIONS | abi3info.DATAS
    assert used, "the extension does not use Python at all"
    assert used <= {symbol.name for symbol, entry in stable.items() if entry.added <= OLDEST}
    assert Symbol("PyFrame_New") not in stable  # the table distinguishes stable from unstable names
    name = Path(extension).name.partition(".")[0]
    offered = {symbol.name for symbol in table} - needed - {"_init", "_fini"}
    assert offered == {f"PyInit_{name}"}
