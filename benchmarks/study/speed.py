"""How fast this machine trains the study's model: python -m benchmarks.study.speed. What a night costs (README.md).

Each policy in a process of its own, on text that comes with Python; tokens/s of the data, a paired pass counts once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.study.pool import ROOT
from benchmarks.study.scales import SCALES, Scale


def prepare(scale: Scale, folder: Path) -> None:
    """An untrained model of the scale's shape, converted, and a small dataset."""
    from benchmarks.study.model import write_untrained
    from benchmarks.study.text import gather, make_dataset, make_tokenizer
    from kvcat_nemo.conversion.importing import import_hf

    paths = gather(("python-topics",), folder / "text")
    make_tokenizer(paths, folder / "tokenizer", scale.shape.vocabulary, 0.2, scale.shape.tokens)
    make_dataset(paths, folder / "tokenizer", folder / "data", 0.2)
    import_hf(
        write_untrained(folder / "tokenizer", scale.shape, folder / "untrained", 1), folder / "megatron"
    )


def worker(job: dict, steps: int) -> None:
    """Train some steps and print their tokens/s, the first one left out."""
    import torch

    from benchmarks.study.model import start_process
    from benchmarks.study.trainer import Trainer

    torch.set_num_threads(job["threads"])
    start_process()
    trainer = Trainer(job)
    speeds = [trainer.step(number)["tokens_per_second"] for number in range(steps + 1)][1:]
    print(json.dumps({"tokens_per_second": statistics.median(speeds), "all": speeds}))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.speed", allow_abbrev=False)
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--policies", nargs="+", default=["none", "router"])
    parser.add_argument("--precision", choices=("bf16", "float32"), help="default: the scale's")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return worker(json.loads(args.worker.read_text()), args.steps)
    scale = SCALES[args.scale]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(scale, folder)
        for policy in args.policies:
            for threads in args.threads:
                job = {
                    "start": str(folder / "megatron"),
                    "data": str(folder / "data"),
                    "tokens": scale.shape.tokens,
                    "kvcat": {"policy": policy} | (scale.router if policy == "router" else {}),
                    "seed": 1,
                    "training": dataclasses.asdict(scale.continued),
                    "threads": threads,
                    "precision": args.precision or scale.precision,
                }
                (folder / "job.json").write_text(json.dumps(job))
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.study.speed",
                    "--worker",
                    str(folder / "job.json"),
                ]
                done = subprocess.run(
                    [*command, "--steps", str(args.steps)],
                    cwd=ROOT,
                    env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                    capture_output=True,
                    text=True,
                )
                if done.returncode:
                    sys.exit(done.stderr[-3000:])
                speed = json.loads(done.stdout.splitlines()[-1])["tokens_per_second"]
                print(f"{policy:8} {threads} thread(s): {speed:8,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
