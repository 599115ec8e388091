"""Training runs at a second's notice: a process that has imported NeMo once forks the ranks of each run.

What a rank does is `nemo llm pretrain --factory kvcat_tiny …` after its imports: the same recipe, the same parser of
overrides, the same call. Ranks are processes of their own, in sessions of their own, and talk over gloo; they may be
killed, stopped and starved like any other. `python fault_server.py` is the forking side, `Server` the asking one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# --- the asking side ---


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
            [python, str(Path(__file__).resolve()), str(asks), str(answers)],
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
        lifeline: tuple[float, float] = (0.5, 30.0),
        loggers: bool = False,
        data: Path | None = None,
    ) -> Run:
        """Start a run of kvcat_tiny in `folder`/runs/tiny.

        Args:
            overrides: as on the command line of `nemo llm pretrain`; faults: see `FAULTS`.
            lifeline: interval and patience of the ranks' signs of life, seconds; loggers: keep MLflow;
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
            "lifeline": lifeline,
            "loggers": loggers,
            "data": str(data or ""),
            "logs": list(map(str, logs)),
        }
        os.write(self._asks, (json.dumps(job) + "\n").encode())
        while self._count not in self._started:
            if self._process.poll() is not None:
                raise RuntimeError(f"the forking process ended with {self._process.returncode}")
            time.sleep(0.005)
        return Run(self, folder, self._started[self._count], logs)


# --- the forking side ---


def serve(asks: int, answers: int) -> None:
    from kvcat_nemo.processes import die_with_parent

    die_with_parent()
    import nemo_run.cli.cli_parser  # noqa: F401
    from nemo.collections import llm  # noqa: F401

    from kvcat_nemo.recipes import RECIPES

    RECIPES["kvcat_tiny"]()  # whatever is imported late

    def tell(**answer) -> None:
        os.write(answers, (json.dumps(answer) + "\n").encode())

    tell(event="ready")
    waiting, children = b"", set()
    while True:
        if select.select([asks], [], [], 0.02)[0]:
            part = os.read(asks, 1 << 16)
            if not part:
                return
            waiting += part
        while b"\n" in waiting:
            line, _, waiting = waiting.partition(b"\n")
            job = json.loads(line)
            pids = []
            for rank in range(job["ranks"]):
                pid = os.fork()
                if pid == 0:
                    os.close(asks), os.close(answers)
                    become_rank(job, rank)
                pids.append(pid)
            children |= set(pids)
            tell(event="started", run=job["run"], pids=pids)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            children.discard(pid)
            tell(event="exit", pid=pid, code=os.waitstatus_to_exitcode(status), time=time.monotonic())


def become_rank(job: dict, rank: int) -> None:
    """Never returns."""
    from kvcat_nemo.processes import die_with_parent

    os.setsid()
    die_with_parent()
    log = os.open(job["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    ranks = job["ranks"]
    os.environ.update(job["environment"])
    if ranks > 1:  # as torchrun sets them
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            GROUP_RANK="0",
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks),
            TORCHELASTIC_RUN_ID="faults",
        )
    os.chdir(job["folder"])
    code: Any = 1
    try:
        train(job)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def train(job: dict) -> None:
    import fiddle as fdl
    import nemo_run as run
    from nemo_run.cli.cli_parser import parse_cli_args

    from kvcat_nemo.nemo.data import KVCatDataModule
    from kvcat_nemo.nemo.lifeline import KVCatLifeline
    from kvcat_nemo.recipes import RECIPES

    recipe = RECIPES["kvcat_tiny"](dir=str(Path(job["folder"]) / "runs"), name="tiny")
    recipe.trainer.devices = job["ranks"]
    if job["data"]:
        recipe.data = run.Config(
            KVCatDataModule, paths=job["data"], tokenizer=run.Config(Numbers), seq_length=64, num_workers=1
        )
    recipe = parse_cli_args(recipe, job["overrides"])
    callbacks = recipe.trainer.callbacks
    line = next(c for c in callbacks if fdl.get_callable(c) is KVCatLifeline)
    line.interval, line.patience = job["lifeline"]
    callbacks[0:0] = [run.Config(FAULTS[f.pop("kind")](), **f) for f in job["faults"]]
    if not job["loggers"]:
        recipe.log.extra_loggers = []
    fdl.build(recipe)()


class Numbers:
    """A tokenizer for data that are numbers to begin with."""

    vocab_size = 128
    eod = eos_id = eos = pad = pad_id = 0
    unique_identifiers = {"class": "numbers"}


# --- faults from within a rank ---


def _poison() -> type:
    import lightning.pytorch as pl
    import torch

    class Poison(pl.Callback):
        """One rank's activations, or its gradients, become NaN in certain steps."""

        def __init__(self, steps: list[int], rank: int = 0, where: str = "loss"):
            self.steps, self.rank, self.where = steps, rank, where
            self._now = False

        def on_train_start(self, trainer, pl_module) -> None:
            if int(os.environ.get("RANK", "0")) != self.rank:
                return
            model = trainer.strategy.megatron_parallel[0].module.module
            layer = next(m for name, m in model.named_modules() if name.endswith("decoder.layers.0.mlp"))

            def forward(module, args, output):
                if not self._now or not torch.is_grad_enabled():
                    return output
                first, *rest = output
                if self.where == "loss":
                    return (first * float("nan"), *rest)
                first.register_hook(lambda grad: grad * float("nan"))
                return output

            layer.register_forward_hook(forward)

        def on_train_batch_start(self, trainer, *_) -> None:
            self._now = trainer.global_step + 1 in self.steps

        def on_train_batch_end(self, *_) -> None:
            self._now = False

    return Poison


FAULTS = {"poison": _poison}
"""kind → callback class; the rest of a fault's fields are its arguments."""


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
