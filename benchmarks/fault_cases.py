"""Faults done to real training runs, and what must be true afterwards. One function per fault; faults.py runs them all.

Each returns {"tried", "survived", "lost", …}: how often the fault was brought about, how often everything held that must
hold, and what it cost: completed checkpoints (must be none) and steps (never more than one interval between saves).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fault_server import Run, Server

from kvcat_nemo.data.seal import BROKEN, complete, read_seal, survey

SAVE_EVERY = 4
REQUEUE, PEER_DIED = 75, 69
TIMED = {"time", "tokens_per_second", "step_seconds", "peak_memory_bytes"}
# Measured against the previous step's mask, which a new process does not have.
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
    return home(folder) / "checkpoints"


def lines(folder: Path) -> list[dict]:
    path = home(folder) / "kvcat" / "metrics.jsonl"
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
            if x == y or (relative and isinstance(x, float) and isinstance(y, float) and abs(x - y) <= relative * max(abs(x), abs(y), 1e-3)):
                continue
            return f"{a.get('kind')} step {a.get('step')}: {key} {x!r} ≠ {y!r}"
    return "" if len(mine) == len(other) else f"{len(mine)} lines against {len(other)}"


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
            lost |= {"steps_at_most": max(self.steps_lost), "steps_mean": round(sum(self.steps_lost) / len(self.steps_lost), 2)}
        out = {"tried": self.tried, "survived": self.survived, "lost": lost} | self.facts
        return out | ({"failures": self.failures} if self.failures else {})


def straight(server: Server, folder: Path, steps: int, layout: str = "TP1", **more) -> list[dict]:
    """The trajectory of a run that nothing interrupts."""
    run = server.run(folder, settings(steps, layout, **more), ranks=ranks(layout))
    codes = run.wait(300)
    assert codes == [0] * len(codes), run.tail()
    return trajectory(folder)


def left_behind(run: Run, seconds: float = 3.0) -> str:
    """Processes that outlive their run."""
    deadline = time.monotonic() + seconds
    while (found := run.left_behind()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return f"left behind: {'; '.join(found)}" if found else ""


# --- SIGKILL ---


def kill_moments(server: Server, folder: Path, *, in_step: int, in_save: int, seed: int, layout: str = "TP1", unbroken: list[dict], steps: int, environment=None) -> dict[str, Record]:
    """SIGKILL to every rank, at random moments of a step and in the middle of a save; each time the run is started again
    and must go on as the unbroken one."""
    rng, out = random.Random(seed), {"in a step": Record(), "in a save": Record()}
    left = ["in a step"] * in_step + ["in a save"] * in_save
    rng.shuffle(left)
    part, seconds_per_step, seconds_per_save = 0, 0.1, 0.3
    place = folder / f"{layout}-{part}"
    while left:
        moment = left[-1]
        before = {found.path.name for found in complete(checkpoints(place))}
        at = newest(place)
        if at + SAVE_EVERY + 2 > steps:  # its end is near: a new run
            out["in a step"].judge(f"end of {place.name}", [_finish(server, place, steps, layout, unbroken)])
            out["in a step"].tried -= 1
            out["in a step"].survived -= not out["in a step"].failures
            part += 1
            place = folder / f"{layout}-{part}"
            continue
        run = server.run(place, settings(steps, layout), ranks=ranks(layout), environment=environment)
        if moment == "in a step":
            target = at + rng.randint(1, SAVE_EVERY + 2)
            hit = _until(lambda run=run, target=target, place=place: not run.running or last_step(place) >= target - 1 + (target == 1), 60)
            if target > 1:
                time.sleep(rng.random() * seconds_per_step)
        else:
            marks = lambda place=place: [p for p in checkpoints(place).glob("*-unfinished")]  # noqa: E731
            hit = _until(lambda run=run, marks=marks, place=place, at=at: not run.running or (last_step(place) > at and bool(marks())), 60)
            time.sleep(rng.random() * seconds_per_save)
            hit = hit and bool(marks())
        if not hit or not run.running:
            run.kill()
            continue  # not the moment that was meant: again
        reached = last_step(place)
        run.kill()
        left.pop()
        record = out[moment]
        after = survey(checkpoints(place))
        whole = {found.path.name for found in after if not found.why_not}
        # Old ones are removed once newer ones are complete: what counts is that the newest is never older than before.
        lost = sum(1 for name in before if name not in whole) if newest(place) < at else 0
        record.checkpoints_lost += lost
        record.steps_lost.append(max(0, reached - newest(place)))
        record.judge(
            f"kill {record.tried + 1} ({place.name}, step {reached})",
            [
                "" if newest(place) >= at else f"newest complete checkpoint fell from step {at} to {newest(place)}",
                difference(trajectory(place, newest(place)), [x for x in unbroken if x["step"] <= newest(place)][: len(trajectory(place, newest(place)))]),
                left_behind(run),
                *(f"damaged: {f.why_not}" for f in after if f.damaged),
            ],
        )
    record = out["in a step"]
    if problem := _finish(server, place, steps, layout, unbroken):
        record.failures.append(f"last run to its end: {problem}")
        record.survived -= 1
    return out


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.004)
    return False


def _finish(server: Server, place: Path, steps: int, layout: str, unbroken: list[dict]) -> str:
    run = server.run(place, settings(steps, layout), ranks=ranks(layout))
    codes = run.wait(300)
    if any(codes):
        return f"exit codes {codes}: {run.tail(800)}"
    return difference(trajectory(place), unbroken)


# --- asked to stop ---


def stops(server: Server, folder: Path, unbroken: list[dict], steps: int, layouts: dict[str, list[dict]]) -> Record:
    """SIGTERM, SIGUSR1 (twice), the flag file: saved after the step, exit code 75 on every rank, the same trajectory."""
    record = Record()
    for layout, reference in layouts.items():
        for how in ("SIGTERM", "SIGUSR1", "KVCAT_STOP_FILE"):
            place = folder / f"{layout}-{how}"
            flag = folder / f"{layout}-flag"
            run = server.run(place, settings(steps, layout), ranks=ranks(layout), environment={"KVCAT_STOP_FILE": str(flag)})
            _until(lambda run=run, place=place: not run.running or last_step(place) >= SAVE_EVERY + 1, 90)
            asked = last_step(place)
            if how == "KVCAT_STOP_FILE":
                flag.touch()
            else:
                run.signal(getattr(signal, how), rank=ranks(layout) - 1)
                time.sleep(0.01)
                run.signal(getattr(signal, how))
            codes = run.wait(60)
            reached, saved = last_step(place), newest(place)
            record.steps_lost.append(reached - saved)
            problems = [
                "" if codes == [REQUEUE] * len(codes) else f"exit codes {codes}: {run.tail(800)}",
                "" if reached == saved else f"stopped after step {reached}, saved step {saved}",
                "" if reached <= asked + 3 else f"asked at step {asked}, stopped after {reached}",
                left_behind(run),
            ]
            told = home(place) / "kvcat" / "stopped.json"
            problems.append("" if told.is_file() and json.loads(told.read_text())["step"] == reached else f"no {told.name}")
            flag.unlink(missing_ok=True)
            problems.append(_finish(server, place, steps, layout, reference))
            record.judge(f"{how} at {layout}", problems)
    return record


# --- resume ---


def resume_exact(server: Server, folder: Path, layouts: list[str]) -> Record:
    """10 straight steps against 5, stop, 5: bit for bit in float32."""
    record = Record()
    for layout in layouts:
        whole = straight(server, folder / f"{layout}-10", 10, layout)
        place = folder / f"{layout}-5"
        run = server.run(place, settings(10, layout, **{"log.ckpt.every_n_train_steps": 5}), ranks=ranks(layout))
        _until(lambda run=run, place=place: not run.running or newest(place) >= 5, 90)
        run.kill()
        problems = ["" if newest(place) == 5 else f"newest checkpoint is of step {newest(place)}"]
        resumed = server.run(place, settings(10, layout) | {"resume.mode": "must"}, ranks=ranks(layout))
        codes = resumed.wait(120)
        problems += [f"exit codes {codes}: {resumed.tail(800)}" if any(codes) else ""]
        problems += ["" if "resuming from" in resumed.output() and "step=5" in resumed.output() else "the resolved path was not printed"]
        problems += [difference(trajectory(place), whole)]
        problems += ["" if all("samples" in x and "rng" in x for x in whole if x["kind"] == "train") else "no hash of samples or random state"]
        record.judge(layout, problems)
    return record


def resume_across(server: Server, folder: Path, source: str = "TP2PP2", target: str = "TP1", relative: float = 2e-4) -> Record:
    """5 steps at one layout, 5 at another: the same windows, the same figures to float32 rounding."""
    record = Record()
    whole = straight(server, folder / "10", 10, source)
    place = folder / "5"
    run = server.run(place, settings(5, source), ranks=ranks(source))
    assert not any(run.wait(120)), run.tail()
    resumed = server.run(place, settings(10, target) | {"resume.mode": "must"}, ranks=ranks(target))
    codes = resumed.wait(120)
    layout_bound = {"rng", "weighted/budget"}
    mine, other = ([{k: v for k, v in x.items() if k not in layout_bound} for x in t if x["step"] > 5 and x["kind"] == "train"] for t in (trajectory(place), whole))
    same_samples = [x["samples"] for x in mine] == [x["samples"] for x in other]
    record.judge(
        f"{source} → {target}",
        [
            f"exit codes {codes}: {resumed.tail(800)}" if any(codes) else "",
            "" if len(mine) == 5 else f"{len(mine)} steps",
            "" if same_samples else "other windows",
            difference(mine, other, relative),
        ],
    )
    record.facts["relative_tolerance"] = relative
    return record


# --- one rank dies ---


def one_dies(server: Server, folder: Path, layout: str, reference: list[dict], steps: int, seed: int, freeze: bool = False, victims: list[int] | None = None) -> Record:
    """SIGKILL (or SIGSTOP) to one rank: the others end within a bounded time, naming it; then the run goes on."""
    record, rng = Record(), random.Random(seed)
    seconds = []
    for victim in victims if victims is not None else range(ranks(layout)):
        place = folder / f"{layout}-{'frozen' if freeze else 'killed'}-{victim}"
        run = server.run(place, settings(steps, layout), ranks=ranks(layout), lifeline=(0.3, 5.0))
        _until(lambda run=run, place=place: not run.running or last_step(place) >= SAVE_EVERY + 1, 90)
        time.sleep(rng.random() * 0.3)
        died = time.monotonic()
        run.signal(signal.SIGSTOP if freeze else signal.SIGKILL, rank=victim)
        others = [r for r in range(ranks(layout)) if r != victim]
        ended = _until(lambda run=run, others=others: all(run.codes()[r] is not None for r in others), 30)
        took = max((run.ended_at(r) for r in others), default=0) - died if ended else 30.0
        seconds.append(took)
        codes = run.codes()
        said = [f"rank {victim} (host" in run.output(r) for r in others]
        problems = [
            "" if ended else f"others still run after 30 s: {codes}",
            "" if not ended or all(codes[r] not in (0, None) for r in others) else f"others ended with {codes}",
            "" if all(said) else f"ranks {[r for r, s in zip(others, said, strict=True) if not s]} did not name rank {victim}: {run.tail(1500)}",
        ]
        run.signal(signal.SIGKILL)
        run.wait(20)
        problems.append(left_behind(run))
        record.steps_lost.append(last_step(place) - newest(place))
        problems.append(_finish(server, place, steps, layout, reference))
        record.judge(f"rank {victim} of {layout} {'frozen' if freeze else 'killed'}", problems)
    record.facts["seconds_until_others_ended"] = [round(s, 1) for s in seconds]
    return record


# --- disk ---


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[Path]:
    """A file system of its own with so much room (tmpfs: its ENOSPC is the kernel's)."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def disk_full(server: Server, folder: Path, unbroken: list[dict], steps: int, checkpoint_mb: float) -> Record:
    """No room in the middle of the first save, no room before a later one; room again; and the policy `stop`."""
    record = Record()
    # The writing itself meets the end of the disk: there is no earlier checkpoint whose size could warn.
    with small_disk(folder / "first", 0.6 * checkpoint_mb) as disk:
        run = server.run(disk, settings(steps) | {"log.ckpt.max_failed_saves": 1}, environment={"TMPDIR": "/tmp"})
        codes = run.wait(120)
        out = run.output()
        record.judge(
            "in the middle of the first save",
            [
                "" if codes != [0] else "it ended as if all were well",
                "" if "FAILED" in out and "No space left" in out else f"the message does not say so: {out[-1500:]}",
                "" if not complete(checkpoints(disk)) else "a checkpoint counts as complete",
                left_behind(run),
            ],
        )
    # A later save finds no room; training goes on; then there is room again.
    with small_disk(folder / "later", 3.5 * checkpoint_mb + 2) as disk:
        run = server.run(disk, settings(steps) | {"log.ckpt.max_failed_saves": 50})
        _until(lambda: not run.running or newest(disk) >= SAVE_EVERY, 90)
        filler = disk / "filler"
        _fill(filler, leave_mb=0.3 * checkpoint_mb, disk=disk)
        was = newest(disk)
        _until(lambda: not run.running or last_step(disk) >= was + 2 * SAVE_EVERY + 1, 60)
        kept = newest(disk)
        said = "FAILED" in run.output() and "Training goes on" in run.output()
        filler.unlink()
        codes = run.wait(120)
        record.judge(
            "before a later save, then room again",
            [
                "" if kept >= was else f"newest complete checkpoint fell from step {was} to {kept}",
                "" if said else "not said aloud",
                "" if codes == [0] else f"exit codes {codes}: {run.tail(1500)}",
                "" if newest(disk) == steps else f"newest checkpoint after room was made: step {newest(disk)}",
                _but_for_failed_saves(trajectory(disk), unbroken),
            ],
        )
    with small_disk(folder / "stop", 3.5 * checkpoint_mb + 2) as disk:
        run = server.run(disk, settings(steps) | {"log.ckpt.on_failed_save": "stop"})
        _until(lambda: not run.running or newest(disk) >= SAVE_EVERY, 90)
        filler = disk / "filler"
        _fill(filler, leave_mb=0.3 * checkpoint_mb, disk=disk)
        was = newest(disk)
        codes = run.wait(120)
        filler.unlink()
        record.steps_lost.append(last_step(disk) - newest(disk))
        record.judge(
            "with log.ckpt.on_failed_save=stop",
            [
                "" if codes == [1] else f"exit codes {codes}",
                "" if "Training ends" in run.output() else "not said aloud",
                "" if newest(disk) >= was else f"newest complete checkpoint fell from step {was} to {newest(disk)}",
                _but_for_failed_saves_after(server, disk, steps, unbroken),
            ],
        )
    return record


def _but_for_failed_saves(mine: list[dict], other: list[dict]) -> str:
    return difference([{k: v for k, v in x.items() if k != "failed_saves"} for x in mine], other)


def _but_for_failed_saves_after(server: Server, place: Path, steps: int, unbroken: list[dict]) -> str:
    run = server.run(place, settings(steps))
    codes = run.wait(120)
    return f"exit codes {codes}: {run.tail(800)}" if any(codes) else _but_for_failed_saves(trajectory(place), unbroken)


def _fill(path: Path, leave_mb: float, disk: Path) -> None:
    free = shutil.disk_usage(disk).free
    with path.open("wb") as file:
        file.write(b"\0" * max(0, free - int(leave_mb * 1e6)))


# --- damage ---


def damaged_files(server: Server, folder: Path, unbroken: list[dict], steps: int) -> Record:
    """A truncated and a bit-flipped shard: found by size and by hash, with the file's name; the one before is taken."""
    record = Record()
    start = folder / "start"
    run = server.run(start, settings(2 * SAVE_EVERY) | {"log.ckpt.keep_last": 2})
    assert not any(run.wait(120)), run.tail()
    for how in ("truncated", "flipped", "flipped, the only one", "seal gone"):
        place = folder / how.replace(" ", "-").replace(",", "")
        shutil.copytree(start, place, symlinks=True)
        newer, older = (f.path for f in complete(checkpoints(place))[:2])
        victim = max((newer / "weights").glob("*.distcp"), key=lambda p: p.stat().st_size)
        if how == "truncated":
            os.truncate(victim, victim.stat().st_size - 100)
        elif how == "seal gone":
            (newer / "kvcat_seal.json").unlink()
        else:
            with victim.open("r+b") as file:
                file.seek(victim.stat().st_size // 2)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 4]))
        if how.endswith("only one"):
            shutil.rmtree(older)
            run = server.run(place, settings(steps))
            codes = run.wait(60)
            problems = ["" if codes == [1] else f"exit codes {codes}", "" if str(victim.name) in run.output() else f"{victim.name} is not named: {run.output()[-1500:]}"]
            problems.append("" if last_step(place) == 2 * SAVE_EVERY else "it trained")
        else:
            run = server.run(place, settings(steps))
            codes = run.wait(120)
            name = newer.name if how == "seal gone" else victim.name
            problems = [
                "" if codes == [0] else f"exit codes {codes}: {run.tail(1500)}",
                "" if name in run.output() else f"{name} is not named: {run.output()[-1500:]}",
                "" if how == "seal gone" or how == "truncated" or any(p.name.endswith(BROKEN) for p in checkpoints(place).iterdir()) else "not set aside",
                difference(trajectory(place), unbroken),
            ]
            record.steps_lost.append(SAVE_EVERY)
        record.judge(how, problems)
    return record


def resume_modes(server: Server, folder: Path) -> Record:
    """must without a checkpoint fails; never with one fails; both before any training."""
    record = Record()
    run = server.run(folder / "must", settings(4) | {"resume.mode": "must"})
    codes = run.wait(60)
    record.judge("must", ["" if codes == [1] and "resume.mode='must'" in run.output() else f"{codes}: {run.tail(800)}"])
    assert not any(server.run(folder / "never", settings(4)).wait(60))
    run = server.run(folder / "never", settings(8) | {"resume.mode": "never"})
    codes = run.wait(60)
    record.judge("never", ["" if codes == [1] and "resume.mode='never'" in run.output() and last_step(folder / "never") == 4 else f"{codes}: {run.tail(800)}"])
    return record


# --- NaN ---


def not_a_number(server: Server, folder: Path, steps: int = 10, layouts=(("TP1", 0), ("DP2", 1), ("PP2", 0), ("TP2", 1))) -> Record:
    """NaN in one rank's loss, or in its gradients alone: left out, or the end, as configured; on every rank alike."""
    record = Record()
    for layout, rank in layouts:
        for where in ("loss", "gradients"):
            place = folder / f"{layout}-{where}-skip"
            run = server.run(
                place,
                settings(steps, layout) | {"optim.nonfinite": "skip"},
                ranks=ranks(layout),
                faults=[{"kind": "poison", "steps": [3, 6], "rank": rank, "where": where}],
            )
            codes = run.wait(120)
            train = [x for x in lines(place) if x["kind"] == "train"]
            skipped = [x["step"] for x in train if x.get("skipped")]
            finite = all(isinstance(x.get("loss/total"), float) for x in train if not x.get("skipped"))
            record.judge(
                f"{where} at {layout}, skip",
                [
                    "" if not any(codes) else f"exit codes {codes}: {run.tail(1500)}",
                    "" if skipped == [3, 6] and train[-1]["skipped_steps"] == 2 else f"skipped {skipped}",
                    "" if finite else "a figure that is no number after it",
                    "" if "update left out" in run.output() else "not said aloud",
                ],
            )
    for layout, rank in layouts[:2]:
        place = folder / f"{layout}-stop"
        run = server.run(place, settings(steps, layout), ranks=ranks(layout), faults=[{"kind": "poison", "steps": [6], "rank": rank}])
        codes = run.wait(60)
        text = run.tail(100000)
        record.judge(
            f"stop at {layout}",
            [
                "" if all(c not in (0, None) for c in codes) else f"exit codes {codes}",
                "" if "step 6: not finite" in text else "the step is not named",
                "" if f"rank {rank} (host" in text else "the rank is not named",
                "" if newest(place) == SAVE_EVERY else f"newest checkpoint {newest(place)}",
            ],
        )
    place = folder / "limit"
    run = server.run(place, settings(steps) | {"optim.nonfinite": "skip", "optim.max_skipped": 2}, faults=[{"kind": "poison", "steps": [3, 4, 5]}])
    codes = run.wait(60)
    record.judge("limit of skipped steps in a row", ["" if codes == [1] and "after 2 skipped steps in a row" in run.output() else f"{codes}: {run.tail(1500)}"])
    return record


def skipped_step_changes_nothing(server: Server, folder: Path) -> Record:
    """A skipped last step leaves the weights of the step before: a validation after it gives that one's figures."""
    record = Record()
    plain, poisoned = folder / "plain", folder / "poisoned"
    every_step = {"trainer.val_check_interval": 1}
    assert not any(server.run(plain, settings(4) | every_step).wait(60))
    run = server.run(poisoned, settings(4) | every_step | {"optim.nonfinite": "skip"}, faults=[{"kind": "poison", "steps": [4]}])
    assert not any(run.wait(60)), run.tail()
    figures = lambda place, step: next({k: v for k, v in x.items() if k not in TIMED | FRESH | {"step"}} for x in lines(place) if x["kind"] == "validation" and x["step"] == step)  # noqa: E731
    record.judge(
        "weights after a skipped step",
        [
            "" if figures(poisoned, 4) == figures(plain, 3) else "they differ from those before it",
            "" if figures(plain, 4) != figures(plain, 3) else "the check cannot fail: an ordinary step changes nothing either",
        ],
    )
    return record


# --- through the whole command ---


def full_command(folder: Path, unbroken: list[dict], steps: int, kills: int, seed: int) -> Record:
    """`nemo llm pretrain` itself, from its first import: killed, started again, finished."""
    record, rng = Record(), random.Random(seed)
    binary = Path(sys.executable).parent / "nemo"
    place = folder / "command"
    place.mkdir(parents=True)
    arguments = [str(binary), "llm", "pretrain", "--factory", f"kvcat_tiny(dir='{place / 'runs'}', name='tiny')", "-y"]
    arguments += [f"{k}={v}" for k, v in settings(steps).items()]
    environment = os.environ | {"NEMORUN_HOME": str(place / ".nemo_run"), "OMP_NUM_THREADS": "1", "PATH": f"{binary.parent}{os.pathsep}{os.environ['PATH']}"}
    for life in range(kills + 1):
        log = place / f"log-{life}.txt"
        with log.open("wb") as out:
            process = subprocess.Popen(arguments, cwd=place, env=environment, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)
        if life == kills:
            code = process.wait(300)
            record.judge("finished", ["" if code == 0 else f"exit code {code}: {log.read_text()[-1500:]}", difference(trajectory(place), unbroken)])
            break
        at = newest(place)
        _until(lambda at=at, process=process: process.poll() is not None or last_step(place) >= at + SAVE_EVERY + 1, 240)
        time.sleep(rng.random() * 0.2)
        was, reached = newest(place), last_step(place)
        process.send_signal(signal.SIGKILL)
        process.wait()
        record.steps_lost.append(reached - newest(place))
        alive = lambda process=process: [p for p in Path("/proc").glob("[0-9]*") if _session(p) == process.pid]  # noqa: E731
        _until(lambda alive=alive: not alive(), 5)
        record.judge(
            f"SIGKILL {life + 1}",
            [
                "" if process.returncode == -signal.SIGKILL else f"it had ended with {process.returncode}: {log.read_text()[-1500:]}",
                "" if newest(place) >= was else "a completed checkpoint is gone",
                "" if not alive() else f"left behind: {[p.name for p in alive()]}",
            ],
        )
    return record


def _session(entry: Path) -> int:
    try:
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
        return int(fields[3]) if fields[0] != "Z" else -1
    except OSError:
        return -1


def checkpoint_megabytes(folder: Path) -> float:
    return read_seal(complete(checkpoints(folder))[0].path).bytes / 1e6


# --- data ---


def bad_data(folder: Path) -> Record:
    """A data module over broken files raises before anything is started, naming the file."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from kvcat_nemo.data.indexed_check import check_indexed

    record = Record()
    folder.mkdir(parents=True)

    def build(name: str, documents: int = 3) -> Path:
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        for i in range(documents):
            builder.add_item(torch.arange(5 + i))
            builder.end_document()
        builder.finalize(str(folder / f"{name}.idx"))
        return folder / name

    def spoil(name: str, act: Callable[[Path], None], file: str, words: str) -> None:
        prefix = build(name.replace(" ", "-"))
        act(prefix)
        try:
            check_indexed(prefix)
        except ValueError as error:
            good = file in str(error) and words in str(error)
            record.judge(name, ["" if good else f"the message is {error}"])
        else:
            record.judge(name, ["not noticed"])

    def cut(ending: str, by: int) -> Callable[[Path], None]:
        return lambda prefix: os.truncate(f"{prefix}{ending}", os.path.getsize(f"{prefix}{ending}") - by)

    spoil("bin missing", lambda p: os.remove(f"{p}.bin"), ".bin", "does not exist")
    spoil("bin empty", lambda p: os.truncate(f"{p}.bin", 0), ".bin", "is empty")
    spoil("idx empty", lambda p: os.truncate(f"{p}.idx", 0), ".idx", "is empty")
    spoil("bin truncated", cut(".bin", 4), ".bin", "truncated")
    spoil("idx truncated", cut(".idx", 8), ".idx", "truncated")
    spoil("not an index", lambda p: Path(f"{p}.idx").write_bytes(b"x" * 200), ".idx", "no Megatron index")
    spoil("of another dataset", lambda p: shutil.copy(f"{build('other', 7)}.idx", f"{p}.idx"), ".bin", "its index promises")

    def flip(prefix: Path) -> None:
        with open(f"{prefix}.idx", "r+b") as file:
            file.seek(9 + 8 + 1 + 16)
            file.write(b"\x07")

    spoil("index damaged", flip, ".idx", "damaged")
    whole = check_indexed(build("whole"))
    record.judge("whole", ["" if (whole.documents, whole.tokens) == (3, 18) else f"{whole}"])
    return record
