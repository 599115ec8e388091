"""One training run of the study: python -m benchmarks.study.trainer JOB.json. Goes on where it was stopped.

Writes the same files as a NeMo run (so `kvcat train watch` shows it): kvcat/metrics.jsonl, config.json, finished.json;
and hf/, the exported model.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.study import masks
from benchmarks.study.model import build, export, start_process
from benchmarks.study.windows import TokenWindows
from kvcat_nemo.common.files import new_file
from kvcat_nemo.runs.layout import METRICS_FILE
from kvcat_nemo.runs.metrics_file import MetricsFile, write_atomically
from kvcat_nemo.runs.provenance import manifest


def rate(step: int, steps: int, warmup: int, floor: float) -> float:
    """Learning rate over its peak at a step counted from 0: linear warm-up, then a cosine to the floor."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


class Trainer:
    """A model under Megatron's own schedule and optimizer, in one process."""

    def __init__(self, job: dict[str, Any]):
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.job, self.plan = job, job["training"]
        half = job["precision"] == "bf16"
        self.model, trained = build(Path(job["start"]), job["kvcat"], job["seed"], job["precision"])
        self.config = self.model.config
        self.config.finalize_model_grads_func = finalize_model_grads
        self.ddp = DistributedDataParallel(
            self.config, DistributedDataParallelConfig(grad_reduce_in_fp32=half), trained
        )
        settings = OptimizerConfig(
            optimizer="adam",
            lr=self.plan["lr"],
            weight_decay=0.01,
            adam_beta1=0.9,
            adam_beta2=0.95,
            clip_grad=1.0,
            bf16=half,
            params_dtype=self.config.params_dtype,
        )
        self.optimizer = get_megatron_optimizer(
            settings,
            [self.ddp],
            scale_lr_cond=lambda name, parameter: ".router." in name,
            lr_mult=self.config.kvcat.router_lr_mult,
        )
        data = Path(job["data"])
        self.train = TokenWindows(data / "train", job["tokens"])
        self.held = TokenWindows(data / "heldout", job["tokens"])

    def _run(self, inputs, labels, forward_only: bool) -> dict[str, float]:
        """Forward (and backward) of windows [N, T] in micro-batches; named figures."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from kvcat_nemo.engine.collectives import set_router_loss_scale
        from kvcat_nemo.engine.step import microbatch_loss, step_metrics

        micro, config = self.plan["micro"], self.config
        parts = list(zip(inputs.split(micro), labels.split(micro), strict=True))
        positions = torch.arange(inputs.shape[1]).expand(micro, -1)

        def forward_step(iterator, model):
            tokens, targets = next(iterator)
            mask = torch.ones(targets.shape)
            set_router_loss_scale(config, len(parts))
            out = model(tokens, positions[: len(tokens)], None, labels=targets, loss_mask=mask)
            return out, lambda metrics: microbatch_loss(metrics, mask, config.kvcat)

        sums = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(parts),
            model=[self.ddp],
            num_microbatches=len(parts),
            seq_length=inputs.shape[1],
            micro_batch_size=micro * (2 if config.kvcat.paired else 1),
            forward_only=forward_only,
        )
        return step_metrics(sums, [self.ddp], config.kvcat)

    def step(self, number: int) -> dict[str, float]:
        """Training step `number`, counted from 0."""
        began, plan = time.perf_counter(), self.plan
        factor = rate(number, plan["steps"], plan["warmup"], plan["floor"])
        for group in self.optimizer.param_groups:
            group["lr"] = plan["lr"] * group.get("lr_mult", 1.0) * factor
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        figures = self._run(*self.train.batch(number, plan["windows"], self.job["seed"]), forward_only=False)
        good, norm, _ = self.optimizer.step()
        if not good or not math.isfinite(figures["loss/total"]):
            raise FloatingPointError(f"step {number + 1}: loss {figures['loss/total']}, gradient norm {norm}")
        seconds = time.perf_counter() - began
        return figures | {
            "grad_norm": float(norm),
            "learning_rate": plan["lr"] * factor,
            "step_seconds": seconds,
            "tokens_per_second": figures["tokens"] / seconds,
        }

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Dense (and masked) perplexity on held-out windows, always the same."""
        self.ddp.eval()
        mean = self._run(*self.held.spread(self.plan["validation_windows"]), forward_only=True)
        mean["dense_ppl"] = math.exp(mean["loss/anchor"])
        if "ce_masked" in mean:
            mean["masked_ppl"] = math.exp(mean["ce_masked"])
        return mean

    @torch.no_grad()
    def record_masks(self, path: Path) -> None:
        """Which slots the routers keep on held-out windows (benchmarks.study.masks); nothing without routers."""
        recorder = masks.Recorder(self.model)
        if recorder.routers:
            self.ddp.eval()
            inputs, labels = self.held.spread(self.plan["validation_windows"])
            with recorder:
                self._run(inputs, labels, forward_only=True)
            recorder.write(path, inputs)

    def save(self, path: Path, step: int) -> None:
        """Everything that the next step depends on."""
        state = {"step": step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        with new_file(path) as temporary:
            torch.save(state, temporary)

    def restore(self, path: Path) -> int:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"]


def run(job: dict[str, Any], *, stop_at: int | None = None) -> Path:
    """Train to the end (or stop after `stop_at` steps in all) and export. Returns the run's folder."""
    torch.set_num_threads(job.get("threads", 1))
    out = Path(job["out"])
    kept = out / "kvcat"
    kept.mkdir(parents=True, exist_ok=True)
    lock = (out / "lock").open("w")
    try:
        fcntl.flock(
            lock, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # a study that was killed may have left its run at work
    except OSError:
        raise RuntimeError(f"{out}: another process is training here; wait for it or end it") from None
    start_process()
    began, trainer, plan = time.time(), Trainer(job), job["training"]
    checkpoint = out / "resume.pt"
    done = trainer.restore(checkpoint) if checkpoint.is_file() else 0
    described = {
        "trainer": {"max_steps": plan["steps"], "world_size": 1},
        "model": {"kvcat": vars(trainer.config.kvcat)},
        "job": job,
    }
    write_atomically(kept / "config.json", json.dumps(described, indent=2) + "\n")
    write_atomically(kept / "manifest.json", json.dumps(manifest(config=job), indent=2) + "\n")
    file = MetricsFile(kept / METRICS_FILE, resumed_at=done)
    if ("validation", done) not in file.steps:
        file.write("validation", done, trainer.validate() | {"time": time.time()})
    for number in range(done, plan["steps"]):
        if number == stop_at:
            return out
        step = number + 1
        file.write("train", step, trainer.step(number) | {"time": time.time()})
        if step % plan["validate_every"] == 0 or step == plan["steps"]:
            file.write("validation", step, trainer.validate() | {"time": time.time()})
        if step % plan["save_every"] == 0 and step < plan["steps"]:
            trainer.save(checkpoint, step)
    trainer.record_masks(out / masks.FILE)
    export(trainer.model, Path(job["template"]), out / "hf")
    ended = {"step": plan["steps"], "seconds_of_last_start": time.time() - began}
    write_atomically(kept / "finished.json", json.dumps(ended) + "\n")
    checkpoint.unlink(missing_ok=True)
    return out


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run(json.loads(Path(sys.argv[1]).read_text()))
