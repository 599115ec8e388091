"""The forking side of the fault suite: imports NeMo once, then forks the ranks of every run it is asked for.

`python -m benchmarks.faults.rank ASKS ANSWERS`, two pipes of JSON lines (server.py holds their other ends). Faults that come from within
a rank, and cannot be done to it from outside, are callbacks of its own.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def serve(asks: int, answers: int) -> None:
    from kvcat_nemo.common.processes import die_with_parent

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
    from kvcat_nemo.common.processes import die_with_parent

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

    from kvcat_nemo.nemo.data_module import KVCatDataModule
    from kvcat_nemo.nemo.liveness import KVCatHeartbeat
    from kvcat_nemo.recipes import RECIPES

    recipe = RECIPES[job["recipe"]](dir=str(Path(job["folder"]) / "runs"), name="tiny")
    recipe.trainer.devices = job["ranks"]
    if job["data"]:
        recipe.data = run.Config(
            KVCatDataModule, paths=job["data"], tokenizer=run.Config(Numbers), seq_length=64, num_workers=1
        )
    recipe = parse_cli_args(recipe, job["overrides"])
    callbacks = recipe.trainer.callbacks
    line = next(c for c in callbacks if fdl.get_callable(c) is KVCatHeartbeat)
    line.interval, line.patience = job["heartbeat"]
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


def _die_validating() -> type:
    import signal

    import lightning.pytorch as pl

    class DieValidating(pl.Callback):
        """Every rank is killed as the validation after a step begins; what that step saved is complete by then."""

        def __init__(self, step: int):
            self.step = step

        def on_validation_start(self, trainer, pl_module) -> None:
            if trainer.global_step == self.step:
                os.kill(os.getpid(), signal.SIGKILL)

    return DieValidating


FAULTS = {"poison": _poison, "die_validating": _die_validating}
"""kind → callback class; the rest of a fault's fields are its arguments."""


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # taking NeMo's modules down took over twenty seconds of a busy machine
