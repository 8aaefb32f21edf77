"""The specifications: typed, documented by examples that run, and printed as a page that is current."""

from __future__ import annotations

import doctest
import inspect
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from memslot_hooks import DECIDING, HOOKS, LIFECYCLE, WATCHING, MemslotSpecs, docs, specs

CHECKOUT = Path(__file__).resolve().parents[2]
in_checkout = pytest.mark.skipif(
    not (CHECKOUT / "docs" / "hooks.md").exists(),
    reason="impossible: docs/hooks.md is in the checkout alone",
)


def test_every_hook_is_of_one_kind() -> None:
    assert sorted(HOOKS) == sorted(LIFECYCLE + DECIDING + WATCHING)
    for name in HOOKS:
        function = getattr(MemslotSpecs, name)
        assert function.memslot_spec["firstresult"] == (name in DECIDING), name
        assert name not in WATCHING or function.__annotations__["return"] == "None", name


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_has_one_sentence_and_an_example_that_runs(hook: str) -> None:
    text = inspect.getdoc(getattr(MemslotSpecs, hook)) or ""
    assert re.fullmatch(r"[A-Z].*\.", text.split("\n\n")[0], re.DOTALL)
    assert text.count(">>>") > 1
    example = doctest.DocTestParser().get_doctest(f"{specs.__doc__}\n{text}", {}, hook, None, None)
    report: list[str] = []
    result = doctest.DocTestRunner().run(example, out=report.append)
    assert not result.failed, "".join(report)


def test_page_documents_every_hook_and_fences_every_example() -> None:
    page = docs.hooks_page()
    assert [hook for hook in HOOKS if f"### {hook}\n" not in page] == []
    fenced = False
    for line in page.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        assert fenced or not line.startswith((">>>", "... ")), line
    assert not fenced


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs docs/generate.py with these arguments and returns its exit status."""
    main = runpy.run_path(str(CHECKOUT / "docs" / "generate.py"))["main"]

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
        status: int = main()
        return status

    return run


@in_checkout
def test_pages_of_the_checkout_are_current(
    generate: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    status = generate("--check")
    assert (status, capsys.readouterr().out) == (0, ""), "run python docs/generate.py"


@in_checkout
def test_stale_page_fails_the_check_with_a_diff(
    generate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ("--root", str(tmp_path))
    (tmp_path / "docs").mkdir()
    for copied in ("README.md", "docs/benchmark.json"):
        (tmp_path / copied).write_bytes((CHECKOUT / copied).read_bytes())
    assert generate("--check", *root) == 1  # hooks.md is missing
    assert generate(*root) == 0
    for name, said in {
        "docs/hooks.md": "### memslot_reset_memory",
        "README.md": "bare loops:",
    }.items():
        page = tmp_path / name
        text = page.read_text()
        assert text == (CHECKOUT / name).read_text()
        page.write_text(text.replace(said, "gone"))
        capsys.readouterr()
        assert generate("--check", *root) == 1
        diff = capsys.readouterr().out
        assert f"{page.name} (stored)" in diff
        assert said in diff
        assert said not in page.read_text()  # a check writes nothing
        page.write_text(text)
