"""The sentences of the checkout: docstrings open with a verb or a noun, and prose names its subject."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
FOLDERS = ("memslot_plugin", "hooks", "integration_tests", "examples", "docs", ".ci")
WRITTEN = {".py", ".pyi", ".c", ".h", ".md", ".toml", ".txt", ""}
"""Suffixes of the files that people write; scripts have none."""

OPENER = re.compile(r"\s*((?:What|Who)(?:ever)?|Whether|How|Why|(?:Some|No)body|Everything)\b")
C_COMMENT_OPENER = re.compile(r"/\*" + OPENER.pattern)
# Letters in brackets keep this line out of the findings. A line may end within the last words, before the next comment
# sign. NOBODY and a quoted name are an account.
NO_SUBJECT = re.compile(
    r"\b([Ww]hoeve[r]|(?<![\"'`])nobod[y](?![\"'`])|Nobod[y]|[Ss]omebod[y]|[Tt]he[\s#*]+same[\s#*]+of)\b"
)


def findings(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the words of each sentence that style forbids."""
    for found in NO_SUBJECT.finditer(text):
        yield text.count("\n", 0, found.start()) + 1, f"{found[1]!r} names no subject"
    if path.suffix in {".c", ".h"}:
        for found in C_COMMENT_OPENER.finditer(text):
            yield text.count("\n", 0, found.start()) + 1, f"the comment opens with {found[1]!r}"
    if path.suffix in {".py", ".pyi"}:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                opener = OPENER.match(str(node.value.value))
                if opener:
                    yield node.lineno, f"the docstring opens with {opener[1]!r}"


def written_files() -> Iterator[Path]:
    """Yield the files of the checkout that people write, those at its top included."""
    for folder in FOLDERS:
        yield from (CHECKOUT / folder).rglob("*")
    yield from CHECKOUT.glob("*")


@pytest.mark.skipif(
    not (CHECKOUT / "docs/hooks.md").exists(), reason="impossible: the checkout alone has sources"
)
def test_checkout_has_no_sentence_that_style_forbids() -> None:
    files = [path for path in written_files() if path.suffix in WRITTEN and path.is_file()]
    names = {str(path.relative_to(CHECKOUT)) for path in files}
    assert {"README.md", "noxfile.py", "memslot_plugin/_core/memslot.c"} <= names
    found = [
        f"{name}:{line}: {words}"
        for name in sorted(names)
        for line, words in findings(
            CHECKOUT / name, (CHECKOUT / name).read_text(encoding="utf-8", errors="replace")
        )
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("a.py", '"""Wha' + 't a module is."""\n', [1]),
        ("a.py", 'X = 1\n\n"""Who' + 'ever reads X."""\n', [3, 3]),
        ("a.py", 'def f():\n    """Return it."""\n    # The\n    # same o' + "f\n", [3]),
        ("a.py", '"""However it came, a wholesome module."""\nNOBODY = "nobody"\n', []),
        ("a.h", "int x; /* Whe" + "ther it is. */\n", [1]),
        ("a.md", "What is read by some" + "body.\n", [1]),
    ],
)
def test_forbidden_sentence_is_found_on_its_line(name: str, text: str, lines: list[int]) -> None:
    assert sorted(line for line, _ in findings(Path(name), text)) == lines
