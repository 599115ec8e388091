"""What a result was made with, so that it can be made again."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from kvcat_nemo.common.redact import redact_tree

PACKAGES = (
    "kvcat-nemo",
    "torch",
    "nemo-toolkit",
    "nemo-run",
    "megatron-core",
    "transformers",
    "tokenizers",
    "numpy",
    "kvpress",
    "lm_eval",
    "mlflow",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; those that are not installed are left out."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def git_revision(folder: Path) -> str | None:
    """Commit of the checkout, with `+changes` when files differ from it; None outside of one."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def manifest(**facts: Any) -> dict[str, Any]:
    """Versions, revision and machine, and the given facts (configuration, seeds, data fingerprint), credentials hidden."""
    return {
        "versions": versions(),
        "git_revision": git_revision(Path(__file__).parent),
        "machine": {"system": platform.system(), "architecture": platform.machine(), "cores": os.cpu_count()},
        **redact_tree(facts),
    }
