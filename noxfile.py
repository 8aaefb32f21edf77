"""The gate's steps. `nox -l` lists them, `nox -s NAME` runs one, `.ci/run` runs all of them, two at a time.

Steps that test an installation use the wheel that MEMSLOT_WHEEL names, or else build one first.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml("pyproject.toml")
DEFAULT = "3.11"  # `python3` of the README's commands
HOSTS = {"3.10": "wasmtime,wasmer"}  # wasmer has no build for 3.11 and later
# Tests of what a Python between the oldest and the newest could break: the extension, the settings, each host.
SHORT = [
    "test_core",
    "test_public",
    "test_settings",
    "test_host",
    "test_host_imports",
    "test_fake_host",
]

# hypothesis repeats its examples, and pytest prints whole messages.
os.environ["CI"] = "1"
for name in list(os.environ):
    if name.startswith("MEMSLOT_") and name not in {"MEMSLOT_WHEEL", "MEMSLOT_GATE"}:
        del os.environ[name]  # a setting of the caller's own would change what tests see
for name in ("PYTHONPATH", "PYTEST_ADDOPTS", "VIRTUAL_ENV"):
    os.environ.pop(name, None)


def copy_of_the_tree(session: nox.Session) -> Path:
    """Make a folder with the files of a clone: tracked files, and new ones that git does not ignore."""
    folder = Path(session.create_tmp(), "tree").resolve()
    session.run("rm", "-rf", str(folder), external=True)
    folder.mkdir(parents=True)
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(git, check=True, capture_output=True).stdout.split(b"\0")
    there = [name for name in names if name and (ROOT / os.fsdecode(name)).exists()]
    pack = ["tar", "-C", str(ROOT), "--null", "--files-from=-", "-cf", "-"]
    packed = subprocess.run(pack, check=True, input=b"\0".join(there), capture_output=True).stdout
    subprocess.run(["tar", "-C", str(folder), "-xf", "-"], check=True, input=packed)
    return folder


def readme_command(session: nox.Session, name: str) -> None:
    """Run the fenced block after `<!-- command: NAME -->` of README.md, unchanged, in a copy of the tree."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- command: {name} -->\n```sh\n(.*?)```", readme, re.DOTALL)
    assert found is not None, f'README.md has no command marked "{name}"'
    session.chdir(copy_of_the_tree(session))
    session.run("bash", "-euo", "pipefail", "-c", found[1], external=True)


@nox.session(venv_backend="none")
def readme_run(session: nox.Session) -> None:
    """Run the README's run command."""
    readme_command(session, "run")


@nox.session(venv_backend="none")
def readme_test(session: nox.Session) -> None:
    """Run the README's test command: T0 on the sources and the default Python."""
    os.environ["PYTEST_ADDOPTS"] = "--durations=10 --require-hosts=wasmtime"
    readme_command(session, "test")


def built_wheel(session: nox.Session) -> str:
    """Return the wheel that MEMSLOT_WHEEL names, or else build one from the sdist, which proves the sdist complete."""
    if given := os.environ.get("MEMSLOT_WHEEL"):
        return given
    folder = ROOT / "build" / "dist"
    session.run("rm", "-rf", str(folder), external=True)
    session.install("build")
    session.run("python", "-m", "build", "--outdir", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    os.environ["MEMSLOT_WHEEL"] = str(wheel)  # integration_tests/test_wheel.py looks into it
    return str(wheel)


@nox.session(python=DEFAULT)
def wheel(session: nox.Session) -> None:
    """Build the sdist, and the wheel from it, in build/dist."""
    os.environ.pop("MEMSLOT_WHEEL", None)
    session.log(built_wheel(session))


def pytest_on_the_wheel(session: nox.Session, *arguments: str, extra: str = "test") -> None:
    """Install the wheel with the hosts that work on this Python, and run tests in a tree without the packages."""
    hosts = HOSTS.get(str(session.python), "wasmtime")
    session.install(f"{built_wheel(session)}[{hosts},{extra}]")
    folder = copy_of_the_tree(session)
    session.run("rm", "-r", str(folder / "memslot_plugin"), str(folder / "hooks"), external=True)
    session.chdir(folder)
    session.run(
        "pytest", "-q", "--durations=10", f"--require-hosts={hosts}", *arguments, *session.posargs
    )


EVERYTHING = ("--pyargs", "memslot_plugin", "integration_tests", "examples")


@nox.session(python=["3.10", "3.13"])
def tests(session: nox.Session) -> None:
    """Run T0 on the wheel, on the oldest and the newest Python."""
    pytest_on_the_wheel(session, *EVERYTHING)


@nox.session(python=["3.11", "3.12"])
def tests_short(session: nox.Session) -> None:
    """Run tests of hosts, the matrix and the examples on the wheel, on the Pythons between."""
    units = [f"memslot_plugin.tests.{name}" for name in SHORT]
    pytest_on_the_wheel(session, "--pyargs", *units, "integration_tests/test_matrix.py", "examples")


@nox.session(python="3.10")
def gate(session: nox.Session) -> None:
    """Run T1 beyond T0, on the Python that has every host: the whole matrix, machines, faults, the differential."""
    pytest_on_the_wheel(session, "-m", "gate", *EVERYTHING, extra="test,servers")


@nox.session(python=DEFAULT)
def gate_sources(session: nox.Session) -> None:
    """Run T1 of the tests that need the core's sources, or a package that Python 3.10 lacks; `-- long` for T2."""
    folder = copy_of_the_tree(session)
    session.install("-e", f"{folder}[wasmtime,test]")
    session.chdir(folder)
    tier = session.posargs or ["gate"]
    files = [f"integration_tests/test_{name}.py" for name in ("fuzz_decoder", "wasm_tools")]
    session.run("python", "-m", "pytest", "-q", "--require-hosts=", "-m", *tier, *files)


@nox.session(python=["3.10", "3.11", "3.12", "3.13"], default=False)
def night(session: nox.Session) -> None:
    """Run T2, which takes hours."""
    pytest_on_the_wheel(session, "-m", "long", *EVERYTHING)


@nox.session(venv_backend="none")
def sanitizers(session: nox.Session) -> None:
    """Run the core's tests under AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer."""
    folder = copy_of_the_tree(session)
    work = folder.parent / "sanitized"
    session.run("rm", "-rf", str(work), external=True)
    session.run(str(folder / ".ci" / "sanitize"), f"python{DEFAULT}", str(work), external=True)


@nox.session(python=DEFAULT)
def fuzz(session: nox.Session) -> None:
    """Fuzz the module reader, guided by coverage, for a moment."""
    session.install(f"{built_wheel(session)}[wasmtime,test]", "atheris>=3.0")
    folder = copy_of_the_tree(session)
    session.run("rm", "-r", str(folder / "memslot_plugin"), str(folder / "hooks"), external=True)
    session.chdir(folder)
    options = session.posargs or ["-runs=20000", "-seed=1", "-verbosity=0"]
    session.run("python", "-m", "integration_tests.fuzz_reader", *options)


def development_tools(session: nox.Session, *names: str) -> None:
    """Install these tools of the extra `dev`, in the versions that pyproject.toml pins."""
    extra = PROJECT["project"]["optional-dependencies"]["dev"]
    session.install(*(each for each in extra if re.split(r"[^\w-]", each)[0] in names))


@nox.session(python=DEFAULT)
def ruff(session: nox.Session) -> None:
    """Run the linter, and check the format."""
    development_tools(session, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python=DEFAULT)
def mypy(session: nox.Session) -> None:
    """Check types, as the oldest Python reads them."""
    extras = PROJECT["project"]["optional-dependencies"]
    session.install(*PROJECT["project"]["dependencies"], *extras["wasmtime"], *extras["test"])
    development_tools(session, "mypy", "nox", "types-cffi")
    session.run("mypy")


@nox.session(python=DEFAULT)
def contracts(session: nox.Session) -> None:
    """Check that imports point down only."""
    development_tools(session, "import-linter")
    session.run("lint-imports", env={"PYTHONPATH": f"{ROOT}:{ROOT / 'hooks'}"})


@nox.session(python=DEFAULT)
def docs(session: nox.Session) -> None:
    """Check that pages printed from the code are current."""
    session.install(built_wheel(session))
    session.run("python", "docs/generate.py", "--check")


@nox.session(venv_backend="none")
def c_warnings(session: nox.Session) -> None:
    """Run gcc's static analyser, and clang's syntax check if clang is installed."""
    include = subprocess.run(
        [f"python{DEFAULT}", "-c", "import sysconfig; print(sysconfig.get_path('include'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{include}"]
    flags.append("-DPy_LIMITED_API=0x030a0000")
    # Without these flags the analyser reports false errors: it does not know what ioctl(2) and wasmtime write, nor that
    # Python owns an outcome that it gets as a number.
    analyser = ["-fanalyzer", "-Wno-analyzer-use-of-uninitialized-value"]
    analyser.append("-Wno-analyzer-malloc-leak")
    clang = subprocess.run(["which", "clang"], check=False, capture_output=True).returncode == 0
    for file in sorted((ROOT / "memslot_plugin" / "_core").glob("*.c")):
        with session.chdir(file.parent):
            null = os.devnull
            session.run("gcc", *flags, *analyser, "-c", "-o", null, file.name, external=True)
            if clang:
                session.run("clang", *flags, "-fsyntax-only", file.name, external=True)
