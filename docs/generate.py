"""Write the pages that are printed from the code and from stored runs, or check them with --check.

    docs/hooks.md                      from the hook specifications
    docs/settings.md                   from the struct Settings
    docs/architecture.md, tables       from the first sentence of each file
    README.md, section "benchmark"     from docs/benchmark.json, a stored `memslot bench --json`

--check also fails if a page names a test or a path that does not exist.  The exit status is 1 if --check fails, else 0.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from pathlib import Path

import benchmark_tables
import files_table
from hooks_page import hooks_page

from memslot_plugin.bench.results import Run
from memslot_plugin.settings import fields

ROOT = Path(__file__).resolve().parent.parent


def pages(root: Path) -> dict[Path, str]:
    """Return the text that each page should have."""
    readme, stored = root / "README.md", root / "docs" / "benchmark.json"
    architecture = root / "docs" / "architecture.md"
    run = Run.read(json.loads(stored.read_text(encoding="utf-8")))
    return {
        root / "docs" / "hooks.md": hooks_page(),
        root / "docs" / "settings.md": settings_page(),
        architecture: files_table.insert(architecture.read_text(encoding="utf-8"), ROOT),
        readme: benchmark_tables.insert(readme.read_text(encoding="utf-8"), run),
    }


def settings_page() -> str:
    """Return the page of every setting, its default, what it takes and what it does."""
    rows = [
        f"| `{name}` | {field.default!r} | {field.expected} | {field.description} |"
        for name, field in fields().items()
    ]
    return "\n".join(
        [
            "# Settings",
            "",
            "Keywords of `open_host`, variables (`MEMSLOT_SLOTS=16`), or a TOML table `[memslot]`.",
            'Sizes are bytes, or text with a unit: "64MiB". `python docs/generate.py` prints this page.',
            "",
            "| setting | default | takes | what it is |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def missing_files(root: Path) -> list[str]:
    """Return a line for each test or path that a page of `root` names and that this checkout lacks."""
    tests = {path.name for path in ROOT.glob("*/**/test_*.py")}
    places = (ROOT, ROOT / "docs", ROOT / "memslot_plugin")
    missing = []
    for page in (*root.glob("*.md"), *root.glob("docs/*.md")):
        text = page.read_text(encoding="utf-8")
        named = {test for test in re.findall(r"\btest_\w+\.py", text) if test not in tests}
        for path in set(re.findall(r"(?<![\w/>.])(?:[\w.]+/)+\w+\.(?:py|c|h|md)\b", text)):
            if not any((place / path).exists() for place in places):
                named.add(path)
        missing += [f"{page.name} names {each}, which is not there" for each in sorted(named)]
    return missing


def main() -> int:
    """Write or check every page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="print a diff instead of writing")
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the checkout whose pages are meant"
    )
    options = parser.parse_args()
    missing = missing_files(options.root) if options.check else []
    for each in missing:
        print(each)
    stale = bool(missing)
    for path, wanted in pages(options.root).items():
        found = path.read_text(encoding="utf-8") if path.exists() else ""
        if found == wanted:
            continue
        if options.check:
            stale = True
            sys.stdout.writelines(
                difflib.unified_diff(
                    found.splitlines(keepends=True),
                    wanted.splitlines(keepends=True),
                    fromfile=f"{path.name} (stored)",
                    tofile=f"{path.name} (as it should be)",
                )
            )
        else:
            path.write_text(wanted, encoding="utf-8")
            print(f"wrote {path}")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
