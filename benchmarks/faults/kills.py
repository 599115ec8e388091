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
    SAVE_EVERY,
    Record,
    checkpoints,
    difference,
    finish,
    last_step,
    left_behind,
    newest,
    ranks,
    reached_since,
    settings,
    trajectory,
    until,
)
from benchmarks.faults.server import Run, Server
from kvcat_nemo.runs.checkpoints import survey
from kvcat_nemo.runs.exit_codes import REQUEUE

MOMENTS = ("in a step", "in a save", "while starting")
_STEP, _SAVE, _START = 0.15, 0.4, 1.5  # seconds that they take here, for drawing a moment in them


def kill_moments(
    server: Server,
    folder: Path,
    counts: dict[str, int],
    *,
    seed: int,
    unbroken: list[dict],
    steps: int,
    layout: str = "TP1",
    environment: dict[str, str] | None = None,
) -> dict[str, Record]:
    """SIGKILL to every rank, at random moments of a step, of a save, and of the start from a checkpoint.

    Each time the run is started again, and must go on as the unbroken one.

    Args:
        counts: how often, by moment (MOMENTS).
    """
    rng, out = random.Random(seed), {moment: Record() for moment in counts}
    left = [moment for moment, count in counts.items() for _ in range(count)]
    rng.shuffle(left)
    part, place = 0, folder / f"{layout}-0"
    while left:
        at = newest(place)
        if at + 3 * SAVE_EVERY > steps:  # its end is near: it may reach it, and another begins
            _judge_end(out[left[-1]], server, place, steps, layout, unbroken)
            part, place = part + 1, folder / f"{layout}-{part + 1}"
            continue
        struck = _strike(server, place, left[-1], rng, settings(steps, layout), ranks(layout), environment)
        if struck is None:
            continue  # not the moment that was meant: again
        moment, (run, reached) = left.pop(), struck
        record, now = out[moment], newest(place)
        record.steps_lost.append(max(0, reached - now))
        record.checkpoints_lost += now < at
        mine = trajectory(place, now)
        record.judge(
            f"kill {record.tried + 1} {moment} ({place.name}, step {reached})",
            [
                "" if now >= at else f"newest complete checkpoint fell from step {at} to {now}",
                # Its figures so far; the validation after the last of them may not have been reached.
                difference(mine, [x for x in unbroken if x["step"] <= now][: len(mine)]),
                left_behind(run),
                *(f"damaged: {f.why_not}" for f in survey(checkpoints(place)) if f.damaged),
            ],
        )
    _judge_end(out[moment], server, place, steps, layout, unbroken)
    return out


def _judge_end(
    record: Record, server: Server, place: Path, steps: int, layout: str, unbroken: list[dict]
) -> None:
    """Let a run that was killed often come to its end; a difference is a failure of the last kill."""
    if problem := finish(server, place, steps, layout, unbroken):
        record.failures.append(f"{place.name}, its end: {problem}")
        record.survived -= 1


def _strike(
    server: Server,
    place: Path,
    moment: str,
    rng: random.Random,
    overrides: dict,
    count: int,
    environment: dict[str, str] | None,
) -> tuple[Run, int] | None:
    """Start a run and kill it at such a moment; None when it got past it. With the run, the last step it had logged."""
    born, at = time.time(), newest(place)

    def reached() -> int:
        return reached_since(place, born, at)

    def saving(step: int) -> bool:
        mark = checkpoints(place) / f"step={step}-unfinished"
        try:
            return mark.stat().st_mtime > born  # an older one is a former life's
        except OSError:
            return False

    run = server.run(place, overrides, ranks=count, environment=environment)
    if moment == "while starting":
        time.sleep(rng.random() * _START)
        hit = reached() == at
    elif moment == "in a step":
        target = at + rng.randint(1, SAVE_EVERY + 2)
        until(lambda: not run.running or reached() >= target, 240)
        time.sleep(rng.random() * _STEP)
        hit = reached() >= target
    else:
        target = at + SAVE_EVERY * rng.randint(1, 2)
        until(lambda: not run.running or saving(target), 240)
        time.sleep(rng.random() * _SAVE)
        hit = saving(target)
    hit = hit and run.running
    run.kill()
    return (run, reached()) if hit else None


def before_validation(
    server: Server, folder: Path, layouts: dict[str, list[dict]], steps: int, at: int = 2 * SAVE_EVERY
) -> Record:
    """SIGKILL between a save and the validation of the same step, which the resumed run makes up for.

    Args:
        layouts: the trajectory of an unbroken run by layout; at: the step, after an earlier validation.
    """
    record = Record()
    for layout, reference in layouts.items():
        place, count = folder / layout, ranks(layout)
        run = server.run(
            place, settings(steps, layout), ranks=count, faults=[{"kind": "die_validating", "step": at}]
        )
        codes = run.wait(240)
        record.steps_lost.append(last_step(place) - newest(place))
        problems = [
            "" if newest(place) == at else f"newest checkpoint is of step {newest(place)}",
            # Of several ranks one may see the others gone before it comes to its own end.
            "" if -signal.SIGKILL in codes and 0 not in codes else f"exit codes {codes}: {run.tail(800)}",
            left_behind(run),
            finish(server, place, steps, layout, reference),
        ]
        record.judge(f"before the validation of step {at} at {layout}", problems)
    return record


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
        run = server.run(place, settings(steps, layout), ranks=ranks(layout), heartbeat=(0.3, 6.0))
        until(lambda run=run, place=place: not run.running or last_step(place) >= SAVE_EVERY + 1, 240)
        time.sleep(rng.random() * 0.3)
        died = time.monotonic()
        run.signal(signal.SIGSTOP if freeze else signal.SIGKILL, rank=victim)
        others = [r for r in range(ranks(layout)) if r != victim]
        ended = until(lambda run=run, others=others: all(run.codes()[r] is not None for r in others), 60)
        took = max((run.ended_at(r) for r in others), default=0) - died if ended else 60.0
        seconds.append(took)
        codes = run.codes()
        said = [f"rank {victim} (host" in run.output(r) for r in others]
        problems = [
            "" if ended else f"others still run after 60 s: {codes}",
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
    """`nemo llm pretrain` itself, from its first import: killed, started again, asked to stop (exit code 75), finished."""
    record, rng = Record(), random.Random(seed)
    record.facts["sigkills"] = kills
    place = folder / "command"
    place.mkdir(parents=True)
    for life, fate in enumerate([signal.SIGKILL] * kills + [signal.SIGTERM, None]):
        log = place / f"log-{life}.txt"
        born = time.time()
        process = _command(place, steps, log)
        if fate is None:
            code = process.wait(300)
            problems = ["" if code == 0 else f"exit code {code}: {log.read_text()[-1500:]}"]
            record.judge("finished", [*problems, difference(trajectory(place), unbroken)])
            break
        wanted = newest(place) + (SAVE_EVERY + 1 if fate == signal.SIGKILL else 1)
        until(
            lambda p=process, wanted=wanted, born=born: (
                p.poll() is not None or reached_since(place, born, 0) >= wanted
            ),
            240,
        )
        time.sleep(rng.random() * 0.1)
        was = newest(place)
        process.send_signal(fate)
        code, reached = process.wait(240), last_step(place)
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
