"""A run's figures as JSON lines: the record that everything else is made from."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvcat_nemo.common.files import new_file

TIMED = frozenset({"time", "tokens_per_second", "tflops_per_gpu", "step_seconds", "peak_memory_bytes"})
"""Figures of the clock and the machine: what differs between two runs that are otherwise equal to the last bit."""

_log = logging.getLogger(__name__)


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary name and rename, so that no reader or crash sees half a file."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_line(text: str) -> dict[str, Any] | None:
    """A line of a metrics file, or None for anything else."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(line, dict) and isinstance(line.get("kind"), str) and isinstance(line.get("step"), int)
    return line if whole else None


class MetricsFile:
    """One JSON object per line. Steps after the one a run resumes from are dropped first, so that none stands twice."""

    def __init__(self, path: Path, resumed_at: int):
        self.path = path
        kept = [line for line in self.read(path) if line["step"] <= resumed_at]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.steps = {(line["kind"], line["step"]) for line in kept}
        self._failed = False

    @staticmethod
    def read(path: Path) -> Iterator[dict[str, Any]]:
        """The whole lines of a metrics file; those cut short by a crash or a full disk are left out."""
        if not path.is_file():
            return
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                if (line := parse_line(text)) is not None:
                    yield line

    @staticmethod
    def lines(path: Path) -> list[dict[str, Any]]:
        """All of `read`."""
        return list(MetricsFile.read(path))

    def write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line. A full disk is reported once and does not end the training run."""
        clean = {name: value for name, value in metrics.items() if math.isfinite(value)}
        line = json.dumps({"kind": kind, "step": step} | clean) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}" if self._failed else line)  # after half a line
            self._failed = False
        except OSError as error:
            if not self._failed:
                _log.warning(
                    "%s cannot be written, its figures are missing from here on: %s", self.path, error
                )
            self._failed = True
