"""Runs of `nemo llm pretrain --factory kvcat_tiny` for the doctor: the same recipe, parser of overrides and call.

Rank program: `python -m kvcat_nemo.doctor.nemo_training JOBS.json`. Without CUDA the jobs share one process' imports, of half a
minute: each is a fork. With CUDA each is a process of its own, since a fork cannot use a device that its parent has looked at.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from kvcat_nemo.common.processes import die_with_parent
from kvcat_nemo.doctor.ranks import RanksFailed, environment, tail
from kvcat_nemo.runs.layout import RunFolder

MASKS = "first_masks.pt"
RUN = Path("runs") / "doctor"


def job(
    folder: Path, *, shape: dict[str, Any], base: Path, steps: int, save_every: int, kill: bool = False
) -> dict:
    """A run in `folder`/runs/doctor.

    Args:
        shape: layers, hidden, heads, kv_heads, head_dim, tied, tokens, windows, vocab; base: the converted model it starts from.
        kill: end the run with SIGKILL once its first checkpoint is complete; the steps after that are slowed down for it.
    """
    config, strategy = "model.config", "trainer.strategy"
    overrides = {
        "resume.base": base,
        f"{config}.num_layers": shape["layers"],
        f"{config}.hidden_size": shape["hidden"],
        f"{config}.ffn_hidden_size": 2 * shape["hidden"],
        f"{config}.num_attention_heads": shape["heads"],
        f"{config}.num_query_groups": shape["kv_heads"],
        f"{config}.kv_channels": shape["head_dim"],
        f"{config}.share_embeddings_and_output_weights": shape["tied"],
        f"{config}.vocab_size": shape["vocab"],
        f"{config}.seq_length": shape["tokens"],
        "data.seq_length": shape["tokens"],
        "data.vocab_size": shape["vocab"],
        "data.micro_batch_size": shape["windows"],
        "data.global_batch_size": 2 * shape["windows"],
        "optim.config.lr": 1e-4,
        "optim.lr_scheduler.min_lr": 1e-4,
        "optim.lr_scheduler.warmup_steps": 0,
        f"{strategy}.ckpt_async_save": True,
        # Bit-equal resuming is asked for: kernels that add in any order would hide a fault, or be taken for one.
        "trainer.deterministic": True,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps,
        "log.ckpt.every_n_train_steps": save_every,
    }
    return {
        "folder": str(folder),
        "overrides": [f"{key}={value}" for key, value in overrides.items()],
        "slow_after": save_every if kill else None,
        "kill": kill,
    }


def run_jobs(jobs: list[dict[str, Any]], device: str, folder: Path, timeout: float = 600.0) -> None:
    """Run jobs one after the other on a device.

    Raises:
        RanksFailed: when one fails, is not killed though it should be, or all do not end in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nemo-jobs.json"
    path.write_text(json.dumps(jobs))
    log = folder / "nemo.log"
    more = {
        "NEMORUN_HOME": str(folder / ".nemo_run"),
        "COLUMNS": "200",
        "TERM": "dumb",
        # trainer.deterministic asks it of PyTorch; Transformer Engine's own layers ask this variable.
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    if device == "cpu":
        more |= {"KVCAT_ASYNC_SAVE_ON_CPU": "1", "KVCAT_DISTRIBUTED_OPTIMIZER_ON_CPU": "1"}
    surroundings = environment(device) | more
    surroundings.pop("MLFLOW_TRACKING_URI", None)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvcat_nemo.doctor.nemo_training", str(path), device],
            env=surroundings,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        process.kill()
        process.wait()
    if code:
        raise RanksFailed(f"NeMo on {device} ended with {code}; its log ends:\n{tail(log)}")
    if code is None:
        raise RanksFailed(f"NeMo on {device} did not end in {timeout:.0f} s; its log ends:\n{tail(log)}")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The figures of a run: a line for every step and validation."""
    from kvcat_nemo.runs.metrics_file import MetricsFile

    return MetricsFile.lines(RunFolder(folder / RUN).metrics)


def serve(jobs_file: str, device: str) -> None:
    """Run the jobs of a file, each in a process of its own."""
    jobs = json.loads(Path(jobs_file).read_text())
    if device == "cpu":
        from kvcat_nemo.recipes import RECIPES  # first: it prepares the host for NeMo

        from nemo.collections import llm  # noqa: F401  # isort: skip

        RECIPES["kvcat_tiny"]()  # whatever is imported late
    for number, one in enumerate(jobs):
        if device == "cpu":
            pid = os.fork()
            if pid == 0:
                os.setsid()
                die_with_parent()
                _as_process(one)
        else:
            command = [
                sys.executable,
                "-m",
                "kvcat_nemo.doctor.nemo_training",
                jobs_file,
                device,
                str(number),
            ]
            pid = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent).pid
        code = _wait(pid, one)
        if code != (-signal.SIGKILL if one["kill"] else 0):
            print(f"job {number} ended with {code}{', before it could be killed' if one['kill'] else ''}")
            sys.exit(1)


def _wait(pid: int, one: dict[str, Any]) -> int:
    from kvcat_nemo.runs.checkpoints import complete

    checkpoints = RunFolder(Path(one["folder"]) / RUN).checkpoints
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if one["kill"] and checkpoints.is_dir() and complete(checkpoints):
            os.killpg(pid, signal.SIGKILL)  # the writer of checkpoints, too
        time.sleep(0.05)


def _as_process(one: dict[str, Any]) -> None:
    """Never returns."""
    code: Any = 1
    try:
        train(one)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train(one: dict[str, Any]) -> None:
    """One run, in this process."""
    import fiddle as fdl
    import nemo_run as run
    from nemo_run.cli.cli_parser import parse_cli_args

    from kvcat_nemo.recipes import RECIPES

    folder = Path(one["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    recipe = RECIPES["kvcat_tiny"](dir=str(folder / RUN.parent), name=RUN.name)
    recipe = parse_cli_args(recipe, one["overrides"])
    recipe.log.extra_loggers = []
    if one["slow_after"] is not None:
        recipe.trainer.callbacks.append(run.Config(_slow(), after=one["slow_after"]))
    _record_first_masks(folder / MASKS)
    fdl.build(recipe)()


def _slow() -> type:
    import lightning.pytorch as pl

    class Slow(pl.Callback):
        """Takes its time after a step, so that a checkpoint becomes complete while the run goes on."""

        def __init__(self, after: int):
            self.after = after

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step > self.after:
                time.sleep(1.0)

    return Slow


def _record_first_masks(path: Path) -> None:
    """Write the keep probabilities of every router on the first training micro-batch, in the order of the groups."""
    import torch

    from kvcat_nemo.method.router import Router

    taken: dict[int, torch.Tensor] = {}
    seen: set[int] = set()

    def take(module, _, routing):
        if (
            isinstance(module, Router)
            and module.training
            and torch.is_grad_enabled()
            and id(module) not in seen
        ):
            seen.add(id(module))
            taken[len(taken)] = routing.p_BT.detach().float().cpu()
            torch.save(taken, path)

    if not path.exists():  # a resumed run's first masks are not the run's
        torch.nn.modules.module.register_module_forward_hook(take)


if __name__ == "__main__":  # the checkpoint writer spawns
    if len(sys.argv) == 4:
        _as_process(json.loads(Path(sys.argv[1]).read_text())[int(sys.argv[3])])
    serve(sys.argv[1], sys.argv[2])
