"""Runs training jobs side by side, one per core: two models with a thread each train faster than one with two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from kvcat_nemo.runs.layout import HF, RunFolder

ROOT = Path(__file__).resolve().parents[2]


def finished(folder: Path, job: dict) -> bool:
    """Whether the run in `folder` reached its end with these very settings.

    Raises:
        ValueError: when it was made with others; a study must not mix them.
    """
    known = folder / "job.json"
    if known.is_file():
        there = json.loads(known.read_text())
        differing = [k for k in {*there, *job} if k != "threads" and there.get(k) != job.get(k)]
        if differing:
            raise ValueError(
                f"{folder} was made with another {', '.join(sorted(differing))}; move it away or give another --out"
            )
    return RunFolder(folder).finished.is_file() and (folder / HF / "config.json").is_file()


def run_jobs(jobs: list[dict], workers: int) -> None:
    """Run every job that is not finished, `workers` at a time, in their order.

    A failed one does not stop the others.

    Raises:
        RuntimeError: at the end, naming the failed ones and the last lines of their logs.
    """
    waiting = [job for job in jobs if not finished(Path(job["out"]), job)]
    print(f"  {len(jobs) - len(waiting)} of {len(jobs)} runs are done", flush=True)
    running: dict[subprocess.Popen, dict] = {}
    failed: list[str] = []
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                process = _start(job, environment)
                running[process] = job
                print(f"  {time.strftime('%H:%M')} {Path(job['out']).name} starts", flush=True)
            for process in [p for p in running if p.poll() is not None]:
                job = running.pop(process)
                name = Path(job["out"]).name
                if process.returncode or not finished(Path(job["out"]), job):
                    tail = (Path(job["out"]) / "log.txt").read_text("utf-8", "replace").splitlines()[-8:]
                    failed.append(f"{name} (code {process.returncode}):\n    " + "\n    ".join(tail))
                print(
                    f"  {time.strftime('%H:%M')} {name} {'failed' if process.returncode else 'done'}",
                    flush=True,
                )
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()
            process.wait()
    if failed:
        raise RuntimeError(
            "these runs failed; start the study again to go on with them:\n  " + "\n  ".join(failed)
        )


def _start(job: dict, environment: dict) -> subprocess.Popen:
    folder = Path(job["out"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job, indent=2) + "\n")
    command = [sys.executable, "-m", "benchmarks.study.trainer", str((folder / "job.json").resolve())]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env=environment | {"OMP_NUM_THREADS": str(job["threads"])},
        )
