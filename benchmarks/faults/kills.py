"""Processes that are killed: whole runs at random moments, one rank of several, and `nemo llm pretrain` itself."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.faults.runs import (
    REQUEUE,
    SAVE_EVERY,
    Record,
    checkpoints,
    difference,
    finish,
    last_step,
    left_behind,
    newest,
    ranks,
    settings,
    trajectory,
    until,
)
from benchmarks.faults.server import Server
from kvcat_nemo.data.seal import complete, survey


def kill_moments(
    server: Server,
    folder: Path,
    *,
    in_step: int,
    in_save: int,
    seed: int,
    layout: str = "TP1",
    unbroken: list[dict],
    steps: int,
    environment=None,
) -> dict[str, Record]:
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
            out["in a step"].judge(f"end of {place.name}", [finish(server, place, steps, layout, unbroken)])
            out["in a step"].tried -= 1
            out["in a step"].survived -= not out["in a step"].failures
            part += 1
            place = folder / f"{layout}-{part}"
            continue
        run = server.run(place, settings(steps, layout), ranks=ranks(layout), environment=environment)
        if moment == "in a step":
            target = at + rng.randint(1, SAVE_EVERY + 2)
            hit = until(
                lambda run=run, target=target, place=place: (
                    not run.running or last_step(place) >= target - 1 + (target == 1)
                ),
                60,
            )
            if target > 1:
                time.sleep(rng.random() * seconds_per_step)
        else:
            marks = lambda place=place: [p for p in checkpoints(place).glob("*-unfinished")]  # noqa: E731
            hit = until(
                lambda run=run, marks=marks, place=place, at=at: (
                    not run.running or (last_step(place) > at and bool(marks()))
                ),
                60,
            )
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
                ""
                if newest(place) >= at
                else f"newest complete checkpoint fell from step {at} to {newest(place)}",
                difference(
                    trajectory(place, newest(place)),
                    [x for x in unbroken if x["step"] <= newest(place)][
                        : len(trajectory(place, newest(place)))
                    ],
                ),
                left_behind(run),
                *(f"damaged: {f.why_not}" for f in after if f.damaged),
            ],
        )
    record = out["in a step"]
    if problem := finish(server, place, steps, layout, unbroken):
        record.failures.append(f"last run to its end: {problem}")
        record.survived -= 1
    return out


def one_dies(
    server: Server,
    folder: Path,
    layout: str,
    reference: list[dict],
    steps: int,
    seed: int,
    freeze: bool = False,
    victims: list[int] | None = None,
) -> Record:
    """SIGKILL (or SIGSTOP) to one rank: the others end within a bounded time, naming it; then the run goes on."""
    record, rng = Record(), random.Random(seed)
    seconds = []
    for victim in victims if victims is not None else range(ranks(layout)):
        place = folder / f"{layout}-{'frozen' if freeze else 'killed'}-{victim}"
        run = server.run(place, settings(steps, layout), ranks=ranks(layout), lifeline=(0.3, 5.0))
        until(lambda run=run, place=place: not run.running or last_step(place) >= SAVE_EVERY + 1, 90)
        time.sleep(rng.random() * 0.3)
        died = time.monotonic()
        run.signal(signal.SIGSTOP if freeze else signal.SIGKILL, rank=victim)
        others = [r for r in range(ranks(layout)) if r != victim]
        ended = until(lambda run=run, others=others: all(run.codes()[r] is not None for r in others), 30)
        took = max((run.ended_at(r) for r in others), default=0) - died if ended else 30.0
        seconds.append(took)
        codes = run.codes()
        said = [f"rank {victim} (host" in run.output(r) for r in others]
        problems = [
            "" if ended else f"others still run after 30 s: {codes}",
            ""
            if not ended or all(codes[r] not in (0, None) for r in others)
            else f"others ended with {codes}",
            ""
            if all(said)
            else f"ranks {[r for r, s in zip(others, said, strict=True) if not s]} did not name rank {victim}: {run.tail(1500)}",
        ]
        run.signal(signal.SIGKILL)
        run.wait(20)
        problems.append(left_behind(run))
        record.steps_lost.append(last_step(place) - newest(place))
        problems.append(finish(server, place, steps, layout, reference))
        record.judge(f"rank {victim} of {layout} {'frozen' if freeze else 'killed'}", problems)
    record.facts["seconds_until_others_ended"] = [round(s, 1) for s in seconds]
    return record


def full_command(folder: Path, unbroken: list[dict], steps: int, kills: int, seed: int) -> Record:
    """`nemo llm pretrain` itself, from its first import: killed, started again, asked to stop, finished."""
    record, rng = Record(), random.Random(seed)
    place = folder / "command"
    place.mkdir(parents=True)
    for life, fate in enumerate([signal.SIGKILL] * kills + [signal.SIGTERM, None]):
        log = place / f"log-{life}.txt"
        process = _command(place, steps, log)
        if fate is None:
            code = process.wait(300)
            problems = ["" if code == 0 else f"exit code {code}: {log.read_text()[-1500:]}"]
            record.judge("finished", [*problems, difference(trajectory(place), unbroken)])
            break
        wanted = newest(place) + (SAVE_EVERY + 1 if fate == signal.SIGKILL else 1)
        until(lambda p=process, wanted=wanted: p.poll() is not None or last_step(place) >= wanted, 240)
        time.sleep(rng.random() * 0.1)
        was = newest(place)
        process.send_signal(fate)
        code, reached = process.wait(60), last_step(place)
        record.steps_lost.append(reached - newest(place))
        expected = -signal.SIGKILL if fate == signal.SIGKILL else REQUEUE
        until(lambda p=process: not _alive(p.pid), 5)
        record.judge(
            f"{fate.name}, life {life + 1}",
            [
                "" if code == expected else f"exit code {code}: {log.read_text()[-1500:]}",
                "" if newest(place) >= was else "a completed checkpoint is gone",
                ""
                if fate == signal.SIGKILL or newest(place) == reached
                else "it did not save when it stopped",
                "" if not _alive(process.pid) else f"left behind: {_alive(process.pid)}",
            ],
        )
    return record


def _command(place: Path, steps: int, log: Path) -> subprocess.Popen:
    binary = Path(sys.executable).parent / "nemo"
    arguments = ["--factory", f"kvcat_tiny(dir='{place / 'runs'}', name='tiny')", "-y"]
    arguments += [f"{k}={v}" for k, v in settings(steps).items()]
    environment = os.environ | {
        "NEMORUN_HOME": str(place / ".nemo_run"),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{binary.parent}{os.pathsep}{os.environ['PATH']}",
    }
    with log.open("wb") as out:
        return subprocess.Popen(
            [str(binary), "llm", "pretrain", *arguments],
            cwd=place,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _alive(leader: int) -> list[str]:
    return [p.name for p in Path("/proc").glob("[0-9]*") if _session(p) == leader]


def _session(entry: Path) -> int:
    try:
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
        return int(fields[3]) if fields[0] != "Z" else -1
    except OSError:
        return -1
