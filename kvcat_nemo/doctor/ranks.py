"""Starts rank processes of the doctor's programs, and never waits for a dead one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kvcat_nemo.common.processes import die_with_parent


class RanksFailed(RuntimeError):
    """A rank failed or hung; the message ends with the ends of the logs."""


def environment(device: str) -> dict[str, str]:
    """Of a child process on that device: where the CPU is meant, it sees no GPU."""
    out = os.environ | {"PYTHONWARNINGS": "ignore", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        out.pop(name, None)
    if device == "cpu":
        out |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return out


def run_ranks(
    jobs: list[dict[str, Any]], processes: int, device: str, folder: Path, timeout: float = 300.0
) -> list[list[dict]]:
    """Results of training jobs (training.py), [job][rank]; the jobs share the processes.

    Raises:
        RanksFailed: when a rank fails, or all do not end in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs_file = folder / "jobs.pt"
    torch.save(jobs, jobs_file)
    command = [sys.executable, "-m", "kvcat_nemo.doctor.training", str(jobs_file)]
    logs = [folder / f"rank-{rank}.log" for rank in range(processes)]
    ranks: list[subprocess.Popen] = []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as out:
                ranks.append(
                    subprocess.Popen(
                        [*command, str(rank), str(processes)],
                        env=environment(device),
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        preexec_fn=die_with_parent,
                    )
                )
        deadline = time.monotonic() + timeout
        while any(rank.poll() is None for rank in ranks):
            # A dead rank leaves its peers waiting: end them all at once.
            if any(rank.poll() for rank in ranks) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        ends = [rank.poll() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(ends) or None in ends:
        what = (
            f"ended with {ends}" if any(ends) else f"did not end in {timeout:.0f} s ({ends}: None is running)"
        )
        first = next((i for i, end in enumerate(ends) if end), 0)
        raise RanksFailed(
            f"{processes} rank(s) on {device} {what}; the log of rank {first} ends:\n{tail(logs[first])}"
        )
    return [
        [torch.load(f"{jobs_file}.{number}.{rank}", weights_only=False) for rank in range(processes)]
        for number in range(len(jobs))
    ]


def run_each(
    jobs: dict[str, dict[str, Any]], processes: int, device: str, folder: Path, timeout: float = 300.0
) -> dict[str, list[dict] | RanksFailed]:
    """Every job's results by rank, or why it has none. The jobs share the processes; when one fails, each gets its own."""
    try:
        return dict(
            zip(jobs, run_ranks(list(jobs.values()), processes, device, folder, timeout), strict=True)
        )
    except RanksFailed as error:
        if len(jobs) == 1:
            return dict.fromkeys(jobs, error)
    out: dict[str, list[dict] | RanksFailed] = {}
    for number, (name, job) in enumerate(jobs.items()):
        out |= run_each({name: job}, processes, device, folder / f"alone-{number}", timeout)
    return out


def result_of(results: dict[str, list[dict] | RanksFailed], name: str, rank: int = 0) -> dict:
    """A rank's result of a job of `run_each`.

    Raises:
        RanksFailed: when it has none.
    """
    found = results[name]
    if isinstance(found, RanksFailed):
        raise found
    return found[rank]


def tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-lines:])
