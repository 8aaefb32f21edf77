"""Packages of npm, fetched by name and version, checked, and kept in pytest's cache."""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import dataclass
from pathlib import Path

from .fetch import fetched, kept


@dataclass(frozen=True)
class Package:
    """A file of a package. `sha512` is the digest of the archive that npm serves."""

    name: str
    version: str
    sha512: str
    member: str

    def fetch(self, folder: Path) -> bytes:
        """Return the file. A failed download is an error."""
        return kept(folder / f"{self.version}-{Path(self.member).name}", self._download)

    def _download(self, work: Path) -> bytes:
        command = ["npm", "pack", "--silent", "--ignore-scripts", "--cache", "cache"]
        fetched(self.name, [*command, f"{self.name}@{self.version}"], work)
        (archive,) = work.glob("*.tgz")
        assert hashlib.sha512(archive.read_bytes()).hexdigest() == self.sha512, self.name
        with tarfile.open(archive) as opened:
            return opened.extractfile(f"package/{self.member}").read()  # type: ignore[union-attr]  # a file


RUBY = Package(
    "@ruby/3.4-wasm-wasi",
    "2.10.1",
    "aabcc827fed3192a6c6691722c96fd3973ba4d802ad7c5e82ddd7559ed7b4abe"
    "fc856a5be48186160310f40d98f16c399f493cb8a03f23cfcff0c25dce5257d1",
    "dist/ruby+stdlib.wasm",
)
