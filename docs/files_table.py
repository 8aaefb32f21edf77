"""Fill the tables of docs/architecture.md: each file of a folder with its subject, the first sentence of the file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

SUFFIXES = {".py", ".c", ".h"}


def insert(page: str, root: Path) -> str:
    """Return the page with the table of a folder after each `<!-- files: FOLDER -->`."""
    return re.sub(
        r"(<!-- files: (\S+) -->\n).*?(?=<!-- /files -->)",
        lambda found: f"{found[1]}\n{_table(root / found[2])}\n",
        page,
        flags=re.DOTALL,
    )


def _table(folder: Path) -> str:
    files = [each for each in sorted(folder.iterdir()) if each.suffix in SUFFIXES]
    rows = [f"| `{file.name}` | {_subject(file)} |" for file in files]
    return "\n".join(["| file | subject |", "|---|---|", *rows, ""])


def _subject(file: Path) -> str:
    """Return the first sentence of a module's docstring, or of a C file's first comment."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = re.sub(r"\n \*", "\n", text.partition("/*")[2].partition("*/")[0])
    first = " ".join(text.strip().partition("\n\n")[0].split())
    return re.split(r"(?<=\w\.) +", first)[0].removesuffix(".")
