"""Reads a growing metrics file: only what is new, whatever happens to the file meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kvcat_nemo.runs.metrics_file import parse_line


class Tail:
    """New whole lines of a JSON-lines file at each call.

    A last line without its end waits for the rest. A file that shrank or was replaced (a resumed run drops the steps that it
    will make again) is read from the start; so is one that was missing.
    """

    def __init__(self, path: Path):
        self.path = path
        self._offset = 0
        self._identity: tuple[int, int] | None = None

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """New lines, and whether what was read before no longer counts."""
        try:
            with self.path.open("rb") as file:
                state = os.fstat(file.fileno())
                identity = (state.st_dev, state.st_ino)
                restarted = identity != self._identity or state.st_size < self._offset
                if restarted:
                    self._offset = 0
                file.seek(self._offset)
                data = file.read()
        except OSError:  # not there yet, or a network file system's mood: try again later
            restarted, self._identity, self._offset = self._identity is not None, None, 0
            return [], restarted
        self._identity = identity
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = [parse_line(text) for text in whole.decode("utf-8", "replace").split("\n")]
        return [line for line in lines if line is not None], restarted
