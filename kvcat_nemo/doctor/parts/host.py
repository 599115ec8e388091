"""What the parts share: where they run, and how they say that things differ."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from kvcat_nemo.doctor.report import Skip


class Differs(AssertionError):
    """Two things that must agree do not."""


@dataclass(frozen=True)
class Host:
    """Where parts run."""

    device: str
    folder: Path
    """Working folder; parts share what they made there."""
    model: Path | None = None
    """Hugging Face folder for `converted`; None: a random model made from a seed."""

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


def agree(*differences: list[str]) -> None:
    """Raise Differs with the first few, when there are any."""
    found = [text for some in differences for text in some]
    if found:
        more = f" (and {len(found) - 4} more)" if len(found) > 4 else ""
        raise Differs("; ".join(found[:4]) + more)


def need(package: str) -> None:
    """Skip the part where a package is not installed."""
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise Skip(f"{package} is not installed")
