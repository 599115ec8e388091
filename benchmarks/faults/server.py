"""Training runs at a second's notice: a process that has imported NeMo once forks the ranks of each run.

What a rank does is `nemo llm pretrain --factory kvcat_tiny …` after its imports: the same recipe, the same parser of
overrides, the same call. Ranks are processes of their own, in sessions of their own, and talk over gloo; they may be
killed, stopped and starved like any other. `Server` asks, rank.py forks.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Run:
    """One training run: its ranks' process ids, and what came of them."""

    server: Server
    folder: Path
    pids: list[int]
    logs: list[Path]
    started: float = field(default_factory=time.monotonic)

    def codes(self) -> list[int | None]:
        """Exit codes by rank: −n for signal n, None while it runs."""
        return [self.server.exits[pid][0] if pid in self.server.exits else None for pid in self.pids]

    def ended_at(self, rank: int) -> float:
        """Monotonic time of a rank's end."""
        return self.server.exits[self.pids[rank]][1]

    @property
    def running(self) -> bool:
        return None in self.codes()

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Exit codes of all ranks.

        Raises:
            TimeoutError: with the end of every rank's output; the run is killed then.
        """
        deadline = time.monotonic() + seconds
        while self.running:
            if time.monotonic() > deadline:
                codes = self.codes()
                self.kill()
                raise TimeoutError(
                    f"{self.folder}: still running after {seconds:g} s ({codes})\n{self.tail()}"
                )
            time.sleep(0.02)
        return [code for code in self.codes() if code is not None]

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for r, pid in enumerate(self.pids):
            if (rank is None or r == rank) and pid not in self.server.exits:
                os.kill(pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait(30)

    def output(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(errors="replace")

    def tail(self, characters: int = 3000) -> str:
        return "\n".join(f"--- rank {r}\n{self.output(r)[-characters:]}" for r in range(len(self.pids)))

    def left_behind(self) -> list[str]:
        """Processes of the run's sessions that still live, after its ranks have ended."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(stat[3]) in self.pids and stat[0] != "Z":
                    found.append(f"{entry.name}: {(entry / 'cmdline').read_text().replace(chr(0), ' ')[:80]}")
            except OSError:
                continue
        return found


class Server:
    """Starts the forking process and asks it for runs; use as a context manager."""

    def __init__(self, python: str = sys.executable):
        asks, self._asks = os.pipe()
        self._answers, answers = os.pipe()
        self.exits: dict[int, tuple[int, float]] = {}
        self._started: dict[int, list[int]] = {}
        self._count = 0
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "COLUMNS": "200"}
        for name in ("MLFLOW_TRACKING_URI", "RANK", "WORLD_SIZE", "LOCAL_RANK", "KVCAT_STOP_FILE"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.faults.rank", str(asks), str(answers)],
            cwd=ROOT,
            pass_fds=(asks, answers),
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        os.close(asks), os.close(answers)
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Server:
        if not self._ready.wait(300):
            raise TimeoutError("the forking process did not import NeMo within 300 s")
        return self

    def __exit__(self, *_) -> None:
        os.close(self._asks)  # it ends with its pipe, and its children with it
        self._process.wait(20)

    def _read(self) -> None:
        with open(self._answers, encoding="utf-8") as lines:
            for line in lines:
                answer = json.loads(line)
                if answer["event"] == "ready":
                    self._ready.set()
                elif answer["event"] == "started":
                    self._started[answer["run"]] = answer["pids"]
                else:
                    self.exits[answer["pid"]] = (answer["code"], answer["time"])

    def run(
        self,
        folder: Path,
        overrides: dict[str, Any] | None = None,
        *,
        ranks: int = 1,
        faults: list[dict] | None = None,
        environment: dict[str, str] | None = None,
        heartbeat: tuple[float, float] = (0.5, 30.0),
        loggers: bool = False,
        data: Path | None = None,
        recipe: str = "kvcat_tiny",
    ) -> Run:
        """Start a run of a small recipe in `folder`/runs/tiny.

        Args:
            overrides: as on the command line of `nemo llm pretrain`; faults: see rank.py's `FAULTS`.
            heartbeat: interval and patience of the ranks' heartbeats, seconds; loggers: keep MLflow;
            data: prefix of an indexed dataset to train on instead of windows that are made up.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._count += 1
        logs = [folder / f"log-{self._count}-{rank}.txt" for rank in range(ranks)]
        job = {
            "run": self._count,
            "folder": str(folder),
            "overrides": [f"{k}={v}" for k, v in (overrides or {}).items()],
            "ranks": ranks,
            "faults": faults or [],
            "environment": {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            | (environment or {}),
            "heartbeat": heartbeat,
            "loggers": loggers,
            "data": str(data or ""),
            "recipe": recipe,
            "logs": list(map(str, logs)),
        }
        os.write(self._asks, (json.dumps(job) + "\n").encode())
        while self._count not in self._started:
            if self._process.poll() is not None:
                raise RuntimeError(f"the forking process ended with {self._process.returncode}")
            time.sleep(0.005)
        return Run(self, folder, self._started[self._count], logs)
