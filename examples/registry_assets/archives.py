"""Debian and npm packages as a source of texts, fetched by apt's and npm's own clients and read without them."""

from __future__ import annotations

import io
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvcat_nemo.common.files import sha256_of
from registry_assets.packages import CACHE_VARIABLE, FetchError, cache_folder


@dataclass(frozen=True)
class DebPackage:
    """A binary package of Debian; apt checks its signature, so no hash is pinned and updates are taken."""

    name: str
    """The package's name."""
    license: str
    """SPDX identifier of what is taken out of it."""

    requirement = property(lambda self: self.name)

    def cached(self, folder: Path) -> Path | None:
        return max(folder.glob(f"{self.name}_*.deb"), default=None)

    def command(self) -> list[str]:
        return ["apt-get", "download", "-o", "APT::Sandbox::User=root", self.name]

    hint = "run `apt-get update` and try again"


@dataclass(frozen=True)
class NpmPackage:
    """A package of the npm registry."""

    name: str
    """The package's name, with its @scope."""
    version: str
    """The exact version."""
    sha256: str
    """What the .tgz file must hash to."""
    license: str
    """SPDX identifier of what is taken out of it."""

    requirement = property(lambda self: f"{self.name}@{self.version}")

    def cached(self, folder: Path) -> Path | None:
        path = folder / f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"
        return path if path.is_file() and sha256_of(path) == self.sha256 else None

    def command(self) -> list[str]:
        return ["npm", "pack", "--ignore-scripts", "--silent", self.requirement]

    hint = "check npm's settings (`npm config list`) and try again"


def fetch_archive(package: DebPackage | NpmPackage, say: Callable[[str], None] = print) -> Path:
    """Download a .deb or .tgz with the package's own client, or find it in the cache.

    Raises:
        FetchError: the client is not installed or failed (its last words are in the message), or an npm package
            is not the expected file.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if (found := package.cached(folder)) is not None:
        say(f"{package.requirement}: found in {folder}")
        return found
    say(f"{package.requirement}: downloading to {folder}")
    command = package.command()
    by_hand = f"; or copy the package's file to {folder} (or set {CACHE_VARIABLE})"
    if shutil.which(command[0]) is None:
        raise FetchError(f"{package.requirement}: needs {command[0]}, which is not installed{by_hand}")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True, errors="replace")
        files = sorted(os.listdir(temporary))
        if done.returncode or len(files) != 1:
            words = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise FetchError(
                f"{package.requirement}: {command[0]} could not download it: "
                f"{words[-1] if words else 'no message'}\nWhat to do: {package.hint}{by_hand}"
            )
        os.replace(Path(temporary) / files[0], folder / files[0])
    if (found := package.cached(folder)) is None:
        raise FetchError(
            f"{package.requirement}: {folder / files[0]} is not the expected file (another sha256)"
        )
    return found


def members(archive: str | Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The regular files in a .deb, .tgz or .tar.gz: (path inside, function that reads it), in the archive's order.

    The function may be called until the next file is asked for.

    Raises:
        ValueError: a damaged archive.
    """
    archive = Path(archive)
    try:
        with open(archive, "rb") as opened:
            data = _data_of_deb(opened, archive) if archive.suffix == ".deb" else opened
            with tarfile.open(fileobj=data, mode="r:*") as tar:
                for member in tar:
                    if member.isfile():
                        yield member.name.removeprefix("./"), lambda m=member: tar.extractfile(m).read()
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as error:
        why = str(error).partition("\n")[0]  # tarfile lists every compression that it tried
        raise ValueError(f"{archive}: damaged ({why}); remove it and fetch it again") from error


def _data_of_deb(opened: io.BufferedReader, archive: Path) -> io.BytesIO:
    # A .deb is an `ar` archive: 8 bytes of magic, then per member a 60-byte header (name 16, size at 48…58).
    if opened.read(8) == b"!<arch>\n":
        while len(header := opened.read(60)) == 60:
            size = int(header[48:58])
            if header.startswith(b"data.tar"):
                return io.BytesIO(opened.read(size))
            opened.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError(f"{archive}: no Debian package; remove it and fetch it again")
