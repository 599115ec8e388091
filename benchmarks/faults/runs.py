"""Training runs of the fault suite: their settings, what they leave, and whether two of them are the same."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.server import Run, Server
from kvcat_nemo.runs.checkpoint_manifest import read_manifest
from kvcat_nemo.runs.checkpoints import complete
from kvcat_nemo.runs.layout import RunFolder
from kvcat_nemo.runs.metrics_file import TIMED

SAVE_EVERY = 4


FRESH = {"flipped", "flipped/group0", "flipped/group1"}


LAYOUTS = {
    "TP1": (1, {}),
    "TP2": (2, {"trainer.strategy.tensor_model_parallel_size": 2}),
    "PP2": (2, {"trainer.strategy.pipeline_model_parallel_size": 2}),
    "DP2": (2, {}),
    "TP2PP2": (
        4,
        {
            "trainer.strategy.tensor_model_parallel_size": 2,
            "trainer.strategy.pipeline_model_parallel_size": 2,
        },
    ),
}


def settings(steps: int, layout: str = "TP1", **more) -> dict:
    """Overrides of kvcat_tiny for a run of so many steps."""
    values = {
        "trainer.max_steps": steps,
        "trainer.val_check_interval": 2 * SAVE_EVERY,
        "log.ckpt.every_n_train_steps": SAVE_EVERY,
        "data.micro_batch_size": 2,
        "data.global_batch_size": 4,
    }
    return values | LAYOUTS[layout][1] | more


def ranks(layout: str) -> int:
    return LAYOUTS[layout][0]


def home(folder: Path) -> Path:
    return folder / "runs" / "tiny"


def checkpoints(folder: Path) -> Path:
    return RunFolder(home(folder)).checkpoints


def lines(folder: Path) -> list[dict]:
    path = RunFolder(home(folder)).metrics
    if not path.is_file():
        return []
    out = []
    for line in path.read_text().splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:
            break  # the line that a kill cut short
    return out


def last_step(folder: Path) -> int:
    return max((line["step"] for line in lines(folder) if line["kind"] == "train"), default=0)


def reached_since(folder: Path, born: float, default: int) -> int:
    """The last step that was logged after a moment (time.time()): lines before it are a former life's."""
    after = (x["step"] for x in lines(folder) if x["kind"] == "train" and x["time"] > born)
    return max(after, default=default)


def newest(folder: Path) -> int:
    found = complete(checkpoints(folder))
    return found[0].step if found else 0


def trajectory(folder: Path, upto: int | None = None) -> list[dict]:
    """Every figure of every step but those of the clock."""
    return [
        {k: v for k, v in line.items() if k not in TIMED | FRESH}
        for line in lines(folder)
        if upto is None or line["step"] <= upto
    ]


def difference(mine: list[dict], other: list[dict], relative: float = 0.0) -> str:
    """The first difference between two trajectories, or nothing."""
    for a, b in zip(mine, other, strict=False):
        for key in sorted(set(a) | set(b)):
            x, y = a.get(key), b.get(key)
            if x == y or (
                relative
                and isinstance(x, float)
                and isinstance(y, float)
                and abs(x - y) <= relative * max(abs(x), abs(y), 1e-3)
            ):
                continue
            return f"{a.get('kind')} step {a.get('step')}: {key} {x!r} ≠ {y!r}"
    return "" if len(mine) == len(other) else f"{len(mine)} lines against {len(other)}"


def checkpoint_megabytes(folder: Path) -> float:
    return read_manifest(complete(checkpoints(folder))[0].path).bytes / 1e6


@dataclass
class Record:
    """What came of one kind of fault."""

    tried: int = 0
    survived: int = 0
    steps_lost: list[int] = field(default_factory=list)
    checkpoints_lost: int = 0
    failures: list[str] = field(default_factory=list)
    facts: dict = field(default_factory=dict)

    def judge(self, what: str, problems: list[str]) -> None:
        problems = [p for p in problems if p]
        self.tried += 1
        self.survived += not problems
        self.failures += [f"{what}: {p}" for p in problems]

    def result(self) -> dict:
        lost = {"completed_checkpoints": self.checkpoints_lost}
        if self.steps_lost:
            lost |= {
                "steps_at_most": max(self.steps_lost),
                "steps_mean": round(sum(self.steps_lost) / len(self.steps_lost), 2),
            }
        out = {"tried": self.tried, "survived": self.survived, "lost": lost} | self.facts
        return out | ({"failures": self.failures} if self.failures else {})


def straight(server: Server, folder: Path, steps: int, layout: str = "TP1", **more) -> list[dict]:
    """The trajectory of a run that nothing interrupts."""
    run = server.run(folder, settings(steps, layout, **more), ranks=ranks(layout))
    codes = run.wait(300)
    assert codes == [0] * len(codes), run.tail()
    return trajectory(folder)


def finish(server: Server, place: Path, steps: int, layout: str, unbroken: list[dict]) -> str:
    run = server.run(place, settings(steps, layout), ranks=ranks(layout))
    codes = run.wait(300)
    if any(codes):
        return f"exit codes {codes}: {run.tail(800)}"
    return difference(trajectory(place), unbroken)


def until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.004)
    return False


def left_behind(run: Run, seconds: float = 3.0) -> str:
    """Processes that outlive their run."""
    deadline = time.monotonic() + seconds
    while (found := run.left_behind()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return f"left behind: {'; '.join(found)}" if found else ""
