"""A distribution with entry points, as pip leaves it in a folder."""

from __future__ import annotations

from pathlib import Path


def install(
    folder: Path, name: str, module: str, code: str, version: str = "1.5", **entries: str
) -> None:
    """Install a module of this code. An entry follows the module's name, as in ":Class"."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (folder / f"{module}.py").write_text(code)
    (metadata / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    lines = [f"{entry} = {module}{value}\n" for entry, value in entries.items()]
    (metadata / "entry_points.txt").write_text("[memslot]\n" + "".join(lines))
