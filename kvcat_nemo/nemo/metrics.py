"""The figures of every step and every validation of a training run, and validation at both ends."""

import json
import math
import os
import time
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo.utils import logging

from kvcat_nemo.engine import hardware, rank_sync
from kvcat_nemo.engine.grad_norm import gradient_norms
from kvcat_nemo.engine.rng_state import digest
from kvcat_nemo.engine.step import step_metrics
from kvcat_nemo.nemo.compat import (
    count_resumed_batches,
    limit_val_batches_in_micro_batches,
    validate_between_steps,
)
from kvcat_nemo.nemo.mlflow_logger import MetricsFile, MLflowTracker, run_folder, write_atomically
from kvcat_nemo.nemo.records import tflops_per_gpu
from kvcat_nemo.nemo.run_state import RunCallback, StepState
from kvcat_nemo.runs.layout import FINISHED, METRICS_FILE

STUCK_KEEP_RATE = 0.99


class KVCatMetrics(RunCallback, pl.Callback):
    """Gathers, names and logs the figures of every step and validation; each rank has them in the run's state.

    Args:
        validate_at_ends: run a validation before the first step and, if the last step had none, after it.
        warn_after: steps after which a keep rate that never left 1 is worth a warning (nothing is masked, so the
            run trains nothing new).
    """

    def __init__(self, validate_at_ends: bool = True, warn_after: int = 100):
        self.validate_at_ends = validate_at_ends
        self.warn_after = warn_after
        self._batches: list[dict[str, float]] = []
        self._validated_at = -1
        self._file: MetricsFile | None = None
        self._waiting: list[tuple[str, int, dict[str, float]]] = []
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        return {"consumed_tokens": self.run.consumed_tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.run.consumed_tokens = state_dict.get("consumed_tokens", 0)

    # --- figures ---

    def on_megatron_step_end(self, step, microbatch_outputs, reduced) -> None:
        """Called on every rank after the micro-batches of a training or validation step."""
        kvcat = step.pl_module.config.kvcat
        sums = [micro["token_sums"] for micro in microbatch_outputs or []]
        metrics = step_metrics(sums, list(step.pipeline), kvcat, device=hardware.device())
        samples = step.pl_module.samples.take(parallel_state.get_data_parallel_group())
        if step.forward_only:
            self._batches.append(metrics)
        else:
            self.run.step.local_loss_finite = all(bool(torch.isfinite(s).all()) for s in sums)
            self.run.step.figures = metrics | {"samples": samples}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.run.step = StepState(seconds_at_start=time.perf_counter())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.run.step.norms = gradient_norms(chunk.module for chunk in trainer.strategy.megatron_parallel)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        run, this, step = self.run, self.run.step, trainer.global_step
        seconds = time.perf_counter() - this.seconds_at_start
        figures = dict(this.known("figures"))
        run.consumed_tokens += int(figures["tokens"])
        figures |= {f"grad_norm/{name}": value for name, value in this.known("norms").items()}
        figures |= {
            "consumed_tokens": run.consumed_tokens,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "tokens_per_second": figures["tokens"] / seconds,
            "step_seconds": seconds,
            "peak_memory_bytes": float(hardware.peak_memory_bytes()),
        } | tflops_per_gpu(trainer, pl_module, seconds)
        if this.skipped:
            # Figures that are no numbers are left out of records: without this word the step would look like any other.
            figures["skipped"] = 1
        if run.skipped_steps:
            figures["skipped_steps"] = run.skipped_steps
        if run.failed_saves:
            figures["failed_saves"] = run.failed_saves
        if run.random_state is not None:
            figures["rng"] = rank_sync.sum_over_ranks(digest(run.random_state)) & ((1 << 53) - 1)
        run.train = figures
        self._log(trainer, "train", step, figures)
        self._warn_if_nothing_is_masked(step, figures)

    def _warn_if_nothing_is_masked(self, step: int, figures: dict[str, float]) -> None:
        if self._warned or step < self.warn_after or figures.get("keep_rate", 0) < STUCK_KEEP_RATE:
            return
        self._warned = True
        logging.warning(
            f"The keep rate is still {figures['keep_rate']:.3f} after {step} steps: almost nothing is masked, so the masked pass "
            "teaches nothing. Start the routers nearer the threshold (kvcat.router_init_keep=0.5) or raise kvcat.router_lr_mult."
        )

    # --- validation ---

    def on_fit_start(self, trainer, pl_module) -> None:
        limit_val_batches_in_micro_batches(trainer, get_num_microbatches())

    def on_train_start(self, trainer, pl_module) -> None:
        if trainer.global_step:
            count_resumed_batches(trainer)
        if trainer.is_global_zero:
            # A run that restarts without a checkpoint keeps no line, not even the validation before its first step.
            resumed_at = trainer.global_step or -1
            self._file = MetricsFile(run_folder() / METRICS_FILE, resumed_at=resumed_at)
        if (self.validate_at_ends and trainer.global_step == 0) or self._validation_was_lost(trainer):
            self._validate(trainer)

    def _validation_was_lost(self, trainer) -> bool:
        """Whether the run ended between the save that it goes on from and the validation of the same step."""
        every = trainer.val_check_interval
        due = isinstance(every, int) and every > 0 and trainer.global_step % every == 0
        known = self._file is not None and ("validation", trainer.global_step) in self._file.steps
        return rank_sync.any_rank(trainer.is_global_zero and trainer.global_step > 0 and due and not known)

    def on_train_end(self, trainer, pl_module) -> None:
        if self.run.stop_requested:
            return  # the time may be short; the resumed run makes up for it
        if self.validate_at_ends and self._validated_at != trainer.global_step:
            self._validate(trainer)

    def on_fit_end(self, trainer, pl_module) -> None:
        # After the last checkpoint is on disk; what waits for the run looks for this file.
        if trainer.is_global_zero and trainer.global_step >= trainer.max_steps:
            write_atomically(run_folder() / FINISHED, json.dumps({"step": trainer.global_step}) + "\n")

    def _validate(self, trainer: pl.Trainer) -> None:
        if trainer.enable_validation:
            validate_between_steps(trainer)

    def on_validation_start(self, trainer, pl_module) -> None:
        self._batches = []

    def on_validation_end(self, trainer, pl_module) -> None:
        if not self._batches or trainer.sanity_checking:
            return
        tokens = sum(batch["tokens"] for batch in self._batches)
        names = [name for name in self._batches[0] if name != "tokens"]
        mean = {n: sum(b[n] * b["tokens"] for b in self._batches) / tokens for n in names}
        mean["tokens"] = tokens
        mean["dense_ppl"] = math.exp(mean["loss/anchor"])
        if "ce_masked" in mean:
            mean["masked_ppl"] = math.exp(mean["ce_masked"])
        self.run.validation = mean
        self._validated_at = trainer.global_step
        self._log(trainer, "validation", trainer.global_step, mean)

    # --- records ---

    def _log(self, trainer: pl.Trainer, kind: str, step: int, metrics: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        metrics = metrics | {"time": time.time()}
        if self._file is not None:
            self._write(kind, step, metrics)
        for logger in trainer.loggers:
            if isinstance(logger, MLflowTracker):
                logger.log_line({"kind": kind, "step": step} | metrics)
            else:
                logger.log_metrics({f"{kind}/{name}": value for name, value in metrics.items()}, step)

    def _write(self, kind: str, step: int, metrics: dict[str, float]) -> None:
        """A line of the metrics file; on a full disk lines wait in memory for the next try, and training goes on."""
        assert self._file is not None
        self._waiting.append((kind, step, metrics))
        path = self._file.path
        while self._waiting:
            size = path.stat().st_size if path.exists() else 0
            try:
                self._file.write(*self._waiting[0])
            except OSError as error:
                if path.exists():
                    os.truncate(path, size)  # half a line would hide those after it
                if len(self._waiting) == 1:
                    logging.error(f"kvcat: {path} cannot be written ({error}); its lines wait in memory")
                return
            self._waiting.pop(0)
