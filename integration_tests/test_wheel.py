"""The wheel is one stable-ABI wheel for CPython 3.10 and later, complete, and without anything that strayed in."""

from __future__ import annotations

import configparser
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import abi3info
import pluggy
import pytest
from abi3info.models import PyVersion, Symbol
from elftools.elf.elffile import ELFFile
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
EXTENSIONS = [f"memslot_plugin/_core/{name}.abi3.so" for name in ("_lib", "_watched")]
OLDEST = PyVersion(3, 10)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that MEMSLOT_WHEEL names, else one built from this tree."""
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
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def symbols(wheel: Path, extension: str) -> tuple[set[str], set[str]]:
    """The dynamic symbols of an extension: those it needs, those it offers."""
    with zipfile.ZipFile(wheel) as archive:
        elf = ELFFile(io.BytesIO(archive.read(extension)))
    table = [symbol for symbol in elf.get_section_by_name(".dynsym").iter_symbols() if symbol.name]
    needed = {symbol.name for symbol in table if symbol["st_shndx"] == "SHN_UNDEF"}
    return needed, {symbol.name for symbol in table} - needed


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (n for n in archive.namelist() if n.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


def test_its_tag_is_the_stable_abi_of_the_oldest_python(wheel: Path) -> None:
    name, _version, _build, tags = parse_wheel_filename(wheel.name)
    assert name == "memslot"
    assert {(tag.interpreter, tag.abi) for tag in tags} == {("cp310", "abi3")}
    assert all("linux" in tag.platform for tag in tags)
    assert re.findall(r"^Tag: (.+)$", metadata(wheel, "WHEEL"), re.MULTILINE) == [
        str(tag) for tag in tags
    ]


def test_it_holds_both_packages_typed_with_the_tests_and_the_extensions(names: set[str]) -> None:
    assert {
        "memslot_plugin/py.typed",
        "memslot_hooks/py.typed",
        "memslot_hooks/specs.py",
        *EXTENSIONS,
    } <= names
    assert any(re.fullmatch(r"memslot_plugin/tests/.*test_\w+\.py", name) for name in names)


def test_nothing_strayed_into_it(names: set[str]) -> None:
    allowed = re.compile(
        r"memslot_(plugin|hooks)/([a-z_0-9]+/)*(\w+\.pyi?|py\.typed|\w+\.wat|\w+\.json)"
        r"|memslot-[^/]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/LICENSE)"
    )
    assert {name for name in names if not allowed.fullmatch(name)} == set(EXTENSIONS)


@pytest.mark.skipif(
    not (ROOT / "memslot_plugin").is_dir(),
    reason="impossible: this copy of the tests has no sources beside it",
)
def test_every_data_file_of_the_tree_is_in_it(names: set[str]) -> None:
    shipped = {".py", ".pyi", ".typed", ".wat", ".json"}
    trees = {
        "memslot_plugin": ROOT / "memslot_plugin",
        "memslot_hooks": ROOT / "hooks" / "memslot_hooks",
    }
    expected = {
        f"{package}/{path.relative_to(tree).as_posix()}"
        for package, tree in trees.items()
        for path in tree.rglob("*")
        if path.suffix in shipped
    }
    assert expected <= names


def test_its_entry_points_are_the_command_and_the_two_allocators(wheel: Path) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(metadata(wheel, "entry_points.txt"))
    assert {section: dict(parser[section]) for section in parser.sections()} == {
        "console_scripts": {"memslot": "memslot_plugin.cli:main"},
        "memslot": {
            "memfd": "memslot_plugin.allocators:MemfdAllocator",
            "anonymous": "memslot_plugin.allocators:AnonymousAllocator",
        },
    }


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_an_extension_needs_the_stable_abi_of_the_oldest_python_only(
    wheel: Path, extension: str
) -> None:
    needed, _ = symbols(wheel, extension)
    used = {name for name in needed if name.startswith(("Py", "_Py"))}
    promised = {
        symbol.name
        for symbol, entry in (abi3info.FUNCTIONS | abi3info.DATAS).items()
        if entry.added <= OLDEST
    }
    assert used, "the extension does not use Python at all"
    assert used <= promised
    assert Symbol("PyFrame_New") not in abi3info.FUNCTIONS  # the table tells stable from unstable


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_an_extension_offers_its_init_function_only(wheel: Path, extension: str) -> None:
    _, offered = symbols(wheel, extension)
    name = Path(extension).name.partition(".")[0]
    assert offered - {"_init", "_fini"} == {f"PyInit_{name}"}


def test_the_hooks_need_pluggy_alone(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(
            tmp_path, [n for n in archive.namelist() if n.startswith("memslot_hooks/")]
        )
    shutil.copytree(Path(pluggy.__file__).parent, tmp_path / "pluggy")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import memslot_hooks; print(memslot_hooks.__file__)"
    alone = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.strip() == str(tmp_path / "memslot_hooks" / "__init__.py")
