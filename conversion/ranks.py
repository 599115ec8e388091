"""Starts the rank processes of `verify` and never waits for a dead one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from kvcat_nemo.conversion.verify_rank import RankJob


def run_ranks(jobs: Sequence[RankJob], *, timeout: float = 1800.0) -> list[dict]:
    """Answers {"logits": [T, V] float32, "decoded": token ids} of the Megatron models.

    All jobs must need the same number of processes, which are started once.

    Args:
        timeout: seconds for everything.

    Raises:
        ValueError: when a rank dies or time runs out; names the rank and shows the end of its log.
    """
    sizes = {job.tensor_model_parallel_size * job.pipeline_model_parallel_size for job in jobs}
    assert len(sizes) == 1, sizes
    world_size = sizes.pop()
    with tempfile.TemporaryDirectory(prefix="kvcat-verify-") as name:
        folder = Path(name)
        torch.save(list(jobs), folder / "jobs.pt")
        threads = str(max(1, len(os.sched_getaffinity(0)) // world_size))
        environment = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONWARNINGS": "ignore"}
        ranks = []
        try:
            for rank in range(world_size):
                command = [sys.executable, "-m", "kvcat_nemo.conversion.verify_rank", str(folder / "jobs.pt")]
                with (folder / f"rank-{rank}.log").open("wb") as log:
                    ranks.append(
                        subprocess.Popen(
                            [*command, str(rank), str(world_size), str(timeout)],
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            env=environment,
                        )
                    )
            _watch(ranks, folder, time.monotonic() + timeout)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return [torch.load(folder / f"answer-{number}.pt") for number in range(len(jobs))]


def _watch(ranks: list[subprocess.Popen], folder: Path, deadline: float) -> None:
    while True:
        codes = [process.poll() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            # A killed rank makes its peers fail a moment later: the signalled one is the cause.
            rank = min(failed, key=lambda r: (codes[r] > 0, r))
            raise ValueError(_report(folder, rank, len(ranks), f"ended with code {codes[rank]}"))
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            rank = codes.index(None)
            raise ValueError(_report(folder, rank, len(ranks), "did not finish in time"))
        time.sleep(0.1)


def _report(folder: Path, rank: int, world_size: int, what: str) -> str:
    log = (folder / f"rank-{rank}.log").read_text(errors="replace").strip().splitlines()
    return f"rank {rank} of {world_size} {what}; the end of its log:\n" + "\n".join(log[-12:])
