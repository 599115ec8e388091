"""Runs that are extended, or resumed with other settings of their data: the same windows go on, or the start is refused."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.faults.runs import Record, difference, newest, settings, trajectory
from benchmarks.faults.server import Server

REFUSED = {
    "data.seed": 5,
    "data.seq_length": 32,
    "data.split": "90,10,0",
    "trainer.accumulate_grad_batches": 4,
    "trainer.limit_train_batches": 3,
}
"""Settings of a resumed run that are refused by name, before a process group starts."""


def numbers(prefix: Path, documents: int, seed: int = 0) -> Path:
    """An indexed dataset of documents of 50 to 199 tokens."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        length = int(torch.randint(50, 200, (), generator=rng))
        builder.add_item(torch.randint(1, 128, (length,), generator=rng))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def extended(server: Server, folder: Path, short: int = 5, steps: int = 16) -> Record:
    """A run within an epoch, extended over its end and the next one's, against a run that was as long from the start."""
    record = Record()
    data = numbers(folder / "numbers", documents=14)  # some 25 windows of 64 tokens; a step takes four
    split = {"data.split": "80,20,0", "trainer.val_check_interval": 4}
    whole, place = folder / "whole", folder / "extended"
    codes = server.run(whole, settings(steps, **split), data=data).wait(300)
    codes += server.run(place, settings(short, **split), data=data).wait(300)
    run = server.run(place, settings(steps, **split) | {"resume.mode": "must"}, data=data)
    codes += run.wait(300)
    mine, other = ([x for x in trajectory(p) if x["kind"] == "train"] for p in (place, whole))
    record.judge(
        f"{short} steps extended to {steps}",
        [f"exit codes {codes}: {run.tail(800)}" if any(codes) else "", difference(mine, other)],
    )
    for name, value in REFUSED.items():
        given = settings(steps + 4, **split) | {name: value, "resume.mode": "must"}
        run = server.run(place, given, data=data)
        codes = run.wait(120)
        record.judge(
            f"{name}={value}",
            [
                "" if all(codes) else f"exit codes {codes}",
                ""
                if re.search(
                    rf"{re.escape(name)}( \(the train part\))?={re.escape(repr(value))}", run.output()
                )
                else f"not named: {run.tail(600)}",
                "" if newest(place) == steps else "something was trained",
            ],
        )
    elsewhere = numbers(folder / "others", documents=14, seed=1)
    run = server.run(place, settings(steps + 4, **split) | {"resume.mode": "must"}, data=elsewhere)
    named = "data.paths (the train part)" in run.output() if all(run.wait(120)) else False
    record.judge("another dataset", ["" if named else f"not refused: {run.tail(600)}"])
    smaller = {"data.global_batch_size": 2, "data.micro_batch_size": 1}
    run = server.run(place, settings(steps + 4, **split) | smaller, data=data)
    codes = run.wait(300)
    steps_done = [x for x in trajectory(place) if x["kind"] == "train"]
    windows = [x["samples"] for x in steps_done]
    record.judge(
        "a smaller batch",
        [
            f"exit codes {codes}: {run.tail(800)}" if any(codes) else "",
            "" if "data.global_batch_size=2, which was 4" in run.output() else "not said",
            "" if len(windows) == len(set(windows)) == steps + 4 else f"windows repeat: {windows}",
        ],
    )
    return record
