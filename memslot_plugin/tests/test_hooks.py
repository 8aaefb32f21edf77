"""Hook specifications: typed, documented by examples that run, and printed as a current page."""

from __future__ import annotations

import doctest
import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest

from memslot_hooks import DECIDING, HOOKS, LIFECYCLE, WATCHING, MemslotSpecs, specs

CHECKOUT = Path(__file__).resolve().parents[2]
in_checkout = pytest.mark.skipif(
    not (CHECKOUT / "docs/hooks.md").exists(), reason="impossible: the checkout alone has pages"
)


def test_hook_of_any_name_is_of_exactly_one_kind() -> None:
    assert sorted(HOOKS) == sorted(LIFECYCLE + DECIDING + WATCHING)
    for name in HOOKS:
        function = getattr(MemslotSpecs, name)
        assert function.memslot_spec["firstresult"] == (name in DECIDING), name
        assert name not in WATCHING or function.__annotations__["return"] == "None", name


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_of_any_name_has_one_sentence_and_an_example_that_runs(hook: str) -> None:
    text = inspect.getdoc(getattr(MemslotSpecs, hook)) or ""
    assert re.fullmatch(r"[A-Z].*\.", text.split("\n\n")[0], re.DOTALL)
    assert text.count(">>>") > 1
    example = doctest.DocTestParser().get_doctest(f"{specs.__doc__}\n{text}", {}, hook, None, None)
    report: list[str] = []
    result = doctest.DocTestRunner().run(example, out=report.append)
    assert not result.failed, "".join(report)


@in_checkout
def test_page_of_hooks_has_every_hook_and_fences_every_example() -> None:
    page = (CHECKOUT / "docs" / "hooks.md").read_text()
    assert [hook for hook in HOOKS if f"### {hook}\n" not in page] == []
    fenced = False
    for line in page.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        assert fenced or not line.startswith((">>>", "... ")), line
    assert not fenced


@in_checkout
def test_page_of_the_checkout_is_current_and_a_stale_one_fails_with_a_diff(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(CHECKOUT / "docs")  # as for a script
    main = runpy.run_path(str(CHECKOUT / "docs" / "generate.py"))["main"]

    def generate(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["generate.py", *arguments, "--root", str(tmp_path)])
        status: int = main()
        return status

    (tmp_path / "docs").mkdir()
    for copied in ("README.md", "docs/benchmark.json", "docs/architecture.md"):
        (tmp_path / copied).write_bytes((CHECKOUT / copied).read_bytes())
    assert generate("--check") == 1  # hooks.md is missing
    assert generate() == 0
    for name, said in (
        ("docs/hooks.md", "### memslot_reset_memory"),
        ("docs/settings.md", "| `table_limit` | 1000000 |"),
        ("README.md", "bare loops:"),
        ("docs/architecture.md", "| `slot.py` | A slot"),
    ):
        page = tmp_path / name
        text = page.read_text()
        assert text == (CHECKOUT / name).read_text(), "run python docs/generate.py"
        page.write_text(text.replace(said, "gone"))
        capsys.readouterr()
        assert generate("--check") == 1
        diff = capsys.readouterr().out
        assert f"{page.name} (stored)" in diff
        assert said in diff
        assert said not in page.read_text()  # a check writes nothing
        page.write_text(text)
    assert generate("--check") == 0
    (tmp_path / "GUIDE.md").write_text("Read memory/slot.py, memory/gone.py and test_gone.py.")
    capsys.readouterr()
    assert generate("--check") == 1
    assert capsys.readouterr().out.splitlines() == [
        f"GUIDE.md names {gone}, which is not there" for gone in ("memory/gone.py", "test_gone.py")
    ]
