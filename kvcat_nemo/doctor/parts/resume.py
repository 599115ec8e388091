"""Save, kill, resume."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvcat_nemo.doctor import nemo_training
from kvcat_nemo.doctor.parts.host import Host, agree, need
from kvcat_nemo.doctor.parts.nemo import NEMO_SAVES, nemo_job, unbroken_run
from kvcat_nemo.doctor.report import Check, checked


def checks(host: Host) -> Iterator[Check]:
    """A run that saves asynchronously is killed and started again: every figure is the unbroken run's, bit for bit."""
    need("nemo")
    yield checked("D 64, tied", functools.partial(_resume, host, "D 64, tied"))


def _resume(host: Host, name: str) -> dict[str, Any]:
    from kvcat_nemo.runs.metrics_file import TIMED

    straight, folder = unbroken_run(host, name), host.folder / f"nemo {name} killed"
    nemo_training.run_jobs([nemo_job(host, name, folder, kill=True)], host.device, host.folder / "killed log")
    before = len(nemo_training.lines_of(folder))
    nemo_training.run_jobs([nemo_job(host, name, folder)], host.device, host.folder / "resumed log")
    fresh = ("flipped",)  # of the previous step's window, which a new process does not have

    def comparable(run: Path) -> list[dict]:
        return [
            {k: v for k, v in line.items() if k not in TIMED and k.split("/")[0] not in fresh}
            for line in nemo_training.lines_of(run)
        ]

    ours, theirs = comparable(folder), comparable(straight)
    agree(bitwise_differences(ours, theirs, saved=NEMO_SAVES))
    return {"lines before the kill": before, "lines": len(ours)}


def bitwise_differences(ours: list[dict], theirs: list[dict], saved: int) -> list[str]:
    """In words, the first figure that is not equal to the last bit, and whether saving can have to do with it."""
    if len(ours) != len(theirs):
        return [f"{len(ours)} lines of figures, {len(theirs)} expected"]
    for mine, other in zip(ours, theirs, strict=True):
        for name in sorted(mine.keys() | other.keys()):
            if mine.get(name) != other.get(name):
                text = f"{other['kind']} step {other['step']}: {name} is {mine.get(name)}, expected {other.get(name)}"
                if other["step"] <= saved:
                    text += ": before the first save, so this host computes the same run in two ways"
                return [text]
    return []
