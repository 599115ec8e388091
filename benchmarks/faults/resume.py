"""Runs that are asked to stop, and runs that go on."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from benchmarks.faults.runs import (
    SAVE_EVERY,
    Record,
    difference,
    finish,
    home,
    last_step,
    left_behind,
    newest,
    ranks,
    settings,
    straight,
    trajectory,
    until,
)
from benchmarks.faults.server import Server
from kvcat_nemo.runs.exit_codes import REQUEUE
from kvcat_nemo.runs.layout import RunFolder


def stops(
    server: Server, folder: Path, unbroken: list[dict], steps: int, layouts: dict[str, list[dict]]
) -> Record:
    """SIGTERM, SIGUSR1 (twice), the flag file: saved after the step, exit code 75 on every rank, the same trajectory."""
    record = Record()
    for layout, reference in layouts.items():
        for how in ("SIGTERM", "SIGUSR1", "KVCAT_STOP_FILE"):
            place = folder / f"{layout}-{how}"
            flag = folder / f"{layout}-flag"
            run = server.run(
                place,
                settings(steps, layout),
                ranks=ranks(layout),
                environment={"KVCAT_STOP_FILE": str(flag)},
            )
            until(lambda run=run, place=place: not run.running or last_step(place) >= SAVE_EVERY + 1, 240)
            asked = last_step(place)
            if how == "KVCAT_STOP_FILE":
                flag.touch()
            else:
                run.signal(getattr(signal, how), rank=ranks(layout) - 1)
                time.sleep(0.01)
                run.signal(getattr(signal, how))
            codes = run.wait(240)
            reached, saved = last_step(place), newest(place)
            record.steps_lost.append(reached - saved)
            problems = [
                "" if codes == [REQUEUE] * len(codes) else f"exit codes {codes}: {run.tail(800)}",
                "" if reached == saved else f"stopped after step {reached}, saved step {saved}",
                "" if reached <= asked + 6 else f"asked at step {asked}, stopped after {reached}",
                left_behind(run),
            ]
            told = RunFolder(home(place)).stopped
            problems.append(
                ""
                if told.is_file() and json.loads(told.read_text())["step"] == reached
                else f"no {told.name}"
            )
            flag.unlink(missing_ok=True)
            problems.append(finish(server, place, steps, layout, reference))
            record.judge(f"{how} at {layout}", problems)
    return record


def resume_exact(server: Server, folder: Path, layouts: list[str], **more) -> Record:
    """10 straight steps against 5, stop, 5: bit for bit in float32. more: further overrides of every run."""
    record = Record()
    for layout in layouts:
        whole = straight(server, folder / f"{layout}-10", 10, layout, **more)
        place = folder / f"{layout}-5"
        run = server.run(
            place, settings(10, layout, **{"log.ckpt.every_n_train_steps": 5} | more), ranks=ranks(layout)
        )
        until(lambda run=run, place=place: not run.running or newest(place) >= 5, 240)
        run.kill()
        problems = ["" if newest(place) == 5 else f"newest checkpoint is of step {newest(place)}"]
        again = settings(10, layout, **more) | {"resume.mode": "must"}
        resumed = server.run(place, again, ranks=ranks(layout))
        codes = resumed.wait(300)
        problems += [f"exit codes {codes}: {resumed.tail(800)}" if any(codes) else ""]
        problems += [
            ""
            if "resuming from" in resumed.output() and "step=5" in resumed.output()
            else "the resolved path was not printed"
        ]
        problems += [difference(trajectory(place), whole)]
        problems += [
            ""
            if all("samples" in x and "rng" in x for x in whole if x["kind"] == "train")
            else "no hash of samples or random state"
        ]
        record.judge(layout, problems)
    return record


def resume_with_files(server: Server, folder: Path, layouts: list[str]) -> Record:
    """The same on an indexed dataset, with a loader's worker process, killed while it trains."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(0)
    builder = IndexedDatasetBuilder(str(folder / "numbers.bin"), dtype=np.uint16)
    for _ in range(60):
        builder.add_item(
            torch.randint(1, 128, (int(torch.randint(50, 200, (), generator=rng)),), generator=rng)
        )
        builder.end_document()
    builder.finalize(str(folder / "numbers.idx"))
    record = Record()
    for layout in layouts:
        more = {"data": folder / "numbers", "ranks": ranks(layout)}
        places = folder / f"{layout}-10", folder / f"{layout}-5"
        codes = server.run(places[0], settings(10, layout), **more).wait(300)
        run = server.run(places[1], settings(10, layout), **more)
        until(lambda run=run, place=places[1]: not run.running or last_step(place) >= SAVE_EVERY + 2, 240)
        run.kill()
        problems = [left_behind(run)]
        codes += server.run(places[1], settings(10, layout) | {"resume.mode": "must"}, **more).wait(300)
        mine, other = trajectory(places[1]), trajectory(places[0])
        problems += ["" if not any(codes) else f"exit codes {codes}", difference(mine, other)]
        windows = [x["samples"] for x in other if x["kind"] == "train"]
        problems += ["" if len(set(windows)) == len(windows) == 10 else f"windows repeat: {windows}"]
        record.judge(layout, problems)
    return record


def resume_across(
    server: Server, folder: Path, source: str = "TP2PP2", target: str = "TP1", relative: float = 2e-4
) -> Record:
    """5 steps at one layout, 5 at another: the same windows, the same figures to float32 rounding."""
    record = Record()
    whole = straight(server, folder / "10", 10, source)
    place = folder / "5"
    run = server.run(place, settings(5, source), ranks=ranks(source))
    assert not any(run.wait(300)), run.tail()
    resumed = server.run(place, settings(10, target) | {"resume.mode": "must"}, ranks=ranks(target))
    codes = resumed.wait(300)
    layout_bound = {"rng", "weighted/budget"}
    mine, other = (
        [
            {k: v for k, v in x.items() if k not in layout_bound}
            for x in t
            if x["step"] > 5 and x["kind"] == "train"
        ]
        for t in (trajectory(place), whole)
    )
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


def resume_modes(server: Server, folder: Path) -> Record:
    """must without a checkpoint fails; never with one fails; both before any training."""
    record = Record()
    run = server.run(folder / "must", settings(4) | {"resume.mode": "must"})
    codes = run.wait(240)
    record.judge(
        "must", ["" if codes == [1] and "resume.mode='must'" in run.output() else f"{codes}: {run.tail(800)}"]
    )
    assert not any(server.run(folder / "never", settings(4)).wait(240))
    run = server.run(folder / "never", settings(8) | {"resume.mode": "never"})
    codes = run.wait(240)
    record.judge(
        "never",
        [
            ""
            if codes == [1] and "resume.mode='never'" in run.output() and last_step(folder / "never") == 4
            else f"{codes}: {run.tail(800)}"
        ],
    )
    return record
