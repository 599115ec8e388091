"""Callbacks of a training run: the figures of every step, and validation at both ends."""

import json
import math
import time

import lightning.pytorch as pl
from megatron.core.num_microbatches_calculator import get_num_microbatches
from nemo.utils import logging

from kvcat_nemo.engine import host
from kvcat_nemo.engine.grad_norm import gradient_norms
from kvcat_nemo.engine.step import step_metrics
from kvcat_nemo.nemo.records import tflops_per_gpu
from kvcat_nemo.nemo.tracking import METRICS_FILE, MetricsFile, MLflowTracker, run_folder, write_atomically

STUCK_KEEP_RATE = 0.99


class KVCatMetrics(pl.Callback):
    """Gathers, names and logs the figures of every step and validation; each rank has them in `train` and `validation`.

    Args:
        validate_at_ends: run a validation before the first step and, if the last step had none, after it.
        warn_after: steps after which a keep rate that never left 1 is worth a warning (nothing is masked, so the
            run trains nothing new).
    """

    def __init__(self, validate_at_ends: bool = True, warn_after: int = 100):
        self.validate_at_ends = validate_at_ends
        self.warn_after = warn_after
        self.train: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self._batches: list[dict[str, float]] = []
        self._norms: dict[str, float] = {}
        self._validated_at = -1
        self._file: MetricsFile | None = None
        self._started = 0.0
        self._warned = False

    # --- figures ---

    def on_megatron_step_end(self, step, microbatch_outputs, reduced) -> None:
        """Called on every rank after the micro-batches of a training or validation step."""
        kvcat = step.pl_module.config.kvcat
        sums = [micro["token_sums"] for micro in microbatch_outputs or []]
        metrics = step_metrics(sums, list(step.pipeline), kvcat, device=host.device())
        if step.forward_only:
            self._batches.append(metrics)
        else:
            self.train = metrics

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._started = time.perf_counter()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self._norms = gradient_norms(chunk.module for chunk in trainer.strategy.megatron_parallel)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        seconds = time.perf_counter() - self._started
        step = trainer.global_step
        self.train |= {f"grad_norm/{name}": value for name, value in self._norms.items()}
        self.train |= {
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "tokens_per_second": self.train["tokens"] / seconds,
            "step_seconds": seconds,
            "peak_memory_bytes": float(host.peak_memory_bytes()),
        } | tflops_per_gpu(trainer, pl_module, seconds)
        self._log(trainer, "train", step, self.train)
        self._warn_if_nothing_is_masked(step)

    def _warn_if_nothing_is_masked(self, step: int) -> None:
        if self._warned or step < self.warn_after or self.train.get("keep_rate", 0) < STUCK_KEEP_RATE:
            return
        self._warned = True
        logging.warning(
            f"The keep rate is still {self.train['keep_rate']:.3f} after {step} steps: almost nothing is masked, so the masked pass "
            "teaches nothing. Start the routers nearer the threshold (kvcat.router_init_keep=0.5) or raise kvcat.router_lr_mult."
        )

    # --- validation ---

    def on_fit_start(self, trainer, pl_module) -> None:
        # Lightning counts what the loader yields, and NeMo's yields micro-batches: without this a limit of 8 would be
        # half a global batch where a batch has 16 of them.
        if isinstance(trainer.limit_val_batches, int):
            trainer.limit_val_batches *= get_num_microbatches()

    def on_train_start(self, trainer, pl_module) -> None:
        if trainer.global_step:
            # A checkpoint is saved before Lightning counts its batch as completed: after a resume the batch number, and
            # with it every later validation, would be one step behind.
            done = trainer.fit_loop.epoch_loop.batch_progress.current
            done.ready = done.started = done.processed = done.completed = trainer.global_step
        if trainer.is_global_zero:
            self._file = MetricsFile(run_folder() / METRICS_FILE, resumed_at=trainer.global_step)
        if self.validate_at_ends and trainer.global_step == 0:
            self._validate(trainer)

    def on_train_end(self, trainer, pl_module) -> None:
        if self.validate_at_ends and self._validated_at != trainer.global_step:
            self._validate(trainer)

    def on_fit_end(self, trainer, pl_module) -> None:
        # After the last checkpoint is on disk; what waits for the run looks for this file.
        if trainer.is_global_zero and trainer.global_step >= trainer.max_steps:
            write_atomically(run_folder() / "finished.json", json.dumps({"step": trainer.global_step}) + "\n")

    def _validate(self, trainer: pl.Trainer) -> None:
        if not trainer.enable_validation:
            return
        # As Lightning's training loop does between steps.
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

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
        self.validation = mean
        self._validated_at = trainer.global_step
        self._log(trainer, "validation", trainer.global_step, mean)

    # --- records ---

    def _log(self, trainer: pl.Trainer, kind: str, step: int, metrics: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        metrics = metrics | {"time": time.time()}
        if self._file is not None:
            self._file.write(kind, step, metrics)
        for logger in trainer.loggers:
            if isinstance(logger, MLflowTracker):
                logger.log_line({"kind": kind, "step": step} | metrics)
            else:
                logger.log_metrics({f"{kind}/{name}": value for name, value in metrics.items()}, step)
