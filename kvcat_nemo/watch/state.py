"""What a run's files say about it: how far, how fast, how well, and whether it is still alive."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcat_nemo.runs.checkpoints import complete
from kvcat_nemo.runs.layout import MANIFEST, RunFolder, max_steps_of, read_record
from kvcat_nemo.watch.tail import Tail

HISTORY = 2000  # points kept of each figure, thinned out evenly beyond
_RECENT = 20  # steps that speed and time left are taken from


class History:
    """A figure over the steps, thinned to at most HISTORY points so that a run of any length fits."""

    def __init__(self):
        self.points: list[tuple[int, float]] = []
        self._every, self._count = 1, 0

    def add(self, step: int, value: float) -> None:
        if self._count % self._every == 0:
            self.points.append((step, value))
        self._count += 1
        if len(self.points) > HISTORY:
            self.points = self.points[::2]
            self._every *= 2


@dataclass
class Snapshot:
    """A run at one moment."""

    folder: Path
    now: float
    status: str
    """finished, running, quiet, or waiting (no step yet)."""
    detail: str
    """The status in words."""
    step: int
    max_steps: int | None
    last: dict[str, float]
    """The last step's figures."""
    validation: dict[str, float]
    """The last validation's figures, and its step."""
    tokens_per_second: float | None
    seconds_left: float | None
    checkpoint: str | None
    checkpoint_age: float | None
    history: dict[str, History] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


class RunWatcher:
    """Follows a run's folder (the one with `checkpoints/` and `kvcat/`), which need not exist yet."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._run = RunFolder(folder)
        self._tail = Tail(self._run.metrics)
        self._config: dict[str, Any] = {}
        self._config_read: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._last: dict[str, float] = {}
        self._validation: dict[str, float] = {}
        self._history: dict[str, History] = {}
        self._recent: list[dict[str, float]] = []

    def snapshot(self, now: float | None = None) -> Snapshot:
        """Read what is new and say how the run stands."""
        now = time.time() if now is None else now
        lines, restarted = self._tail.read()
        if restarted:
            self._reset()
        for line in lines:
            self._take(line)
        self._read_config()
        step = int(self._last.get("step", self._validation.get("step", 0)))
        max_steps = max_steps_of(self._config)
        status, detail = self._status(now, step, max_steps)
        checkpoint, age = self._checkpoint(now)
        pace = self._seconds_per_step()
        left = pace * (max_steps - step) if pace and max_steps and status == "running" else None
        speeds = [x["tokens_per_second"] for x in self._recent if "tokens_per_second" in x]
        return Snapshot(
            folder=self.folder,
            now=now,
            status=status,
            detail=detail,
            step=step,
            max_steps=max_steps,
            last=self._last,
            validation=self._validation,
            tokens_per_second=statistics.median(speeds) if speeds else None,
            seconds_left=left,
            checkpoint=checkpoint,
            checkpoint_age=age,
            history=self._history,
            config=self._config,
        )

    def _take(self, line: dict[str, Any]) -> None:
        line = {
            name: value for name, value in line.items() if name == "kind" or isinstance(value, int | float)
        }
        if line["kind"] == "validation":
            self._validation = line
            return
        if line["kind"] != "train":
            return
        self._last = line
        self._recent = [*self._recent, line][-_RECENT:]
        for name, value in line.items():
            if name.startswith(("loss/", "keep_rate", "tokens_per_second")):
                self._history.setdefault(name, History()).add(line["step"], float(value))

    def _read_config(self) -> None:
        path = self._run.config
        try:
            changed = path.stat().st_mtime
            if changed != self._config_read:
                self._config, self._config_read = read_record(path), changed
        except (OSError, ValueError):
            return

    def _seconds_per_step(self) -> float | None:
        """From the clock, so that validations and checkpoints between the steps count in."""
        if len(self._recent) < 2:
            return self._last.get("step_seconds")
        first, last = self._recent[0], self._recent[-1]
        steps = last["step"] - first["step"]
        spent = last.get("time", 0) - first.get("time", 0)
        # A pause between two jobs is no pace.
        own = statistics.median(x.get("step_seconds", 0) for x in self._recent)
        return own if not steps or spent <= 0 or spent / steps > 20 * max(own, 0.05) else spent / steps

    def _status(self, now: float, step: int, max_steps: int | None) -> tuple[str, str]:
        if max_steps is not None and step >= max_steps and (self._run.finished_at() or 0) >= max_steps:
            return "finished", f"finished at step {step:,}"
        seen = max(self._last.get("time", 0), self._validation.get("time", 0))
        saved = self._newest_change()
        if not seen and not saved:
            return (
                "waiting",
                "waiting for the first step" if self.folder.is_dir() else "the folder is not there yet",
            )
        typical = statistics.median(x.get("step_seconds", 1) for x in self._recent) if self._recent else 1.0
        patience = max(30.0, 10 * typical)
        quiet = now - max(seen, saved)
        if not seen:
            return (
                ("waiting", "starting")
                if quiet < 600
                else ("quiet", f"no step yet, silent for {duration(quiet)}")
            )
        if quiet <= patience:
            doing = "running" if now - seen <= patience else "running, saving or validating"
            return "running", f"{doing}, last step {duration(now - seen)} ago"
        return (
            "quiet",
            f"silent for {duration(quiet)} where a step takes {duration(typical)}: stopped, killed or hanging",
        )

    def _newest_change(self) -> float:
        """When anything in the run's folder or its checkpoints last changed: a save takes longer than a step."""
        times = [0.0]
        for folder in (self.folder, self._run.checkpoints):
            try:
                times += [entry.stat().st_mtime for entry in folder.iterdir() if not entry.is_symlink()]
            except OSError:
                continue
        return max(times)

    def _checkpoint(self, now: float) -> tuple[str | None, float | None]:
        """The newest complete checkpoint and its age, as a resume would see it (hashes left out)."""
        newest = next(iter(complete(self._run.checkpoints)), None)
        if newest is None:
            return None, None
        try:
            saved = (newest.path / MANIFEST).stat().st_mtime
        except OSError:  # removed a moment ago
            return None, None
        return newest.path.name, max(now - saved, 0.0)


def duration(seconds: float) -> str:
    """Seconds in words: 0.35 s, 12 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds >= 0.05 else "0 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for size, big, small_size, small in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // small_size
            return f"{whole // size} {big}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"
