"""What happens when a loss or a gradient is not a number: the step is skipped or the run ends, on all ranks alike."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.core.optim.mcore_optim import McoreDistributedOptimizer
from nemo.utils import logging

from kvcat_nemo.engine import rank_sync


class NonFiniteStep(RuntimeError):
    """A step's loss or gradient was NaN or infinite, and the run is to end."""


class GuardedOptimizer(McoreDistributedOptimizer):
    """NeMo's wrapper of Megatron's optimizer, with a step that can be left out after its gradients are known."""

    skip = False
    """Leave the coming update out: weights, moments and weight decay stay as they are."""

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        if self.skip:
            self.skip = False
            return loss, None, None
        _, grad_norm, num_zeros = super().step()
        return loss, grad_norm, num_zeros


class KVCatGuard(pl.Callback):
    """Looks at every step's loss parts and gradient norms before the update.

    `optim.nonfinite=stop` ends the run with the step and the ranks it came from; `skip` leaves the update out, counts it
    and goes on with the next data, but ends after `optim.max_skipped` in a row (the weights themselves may be bad).
    Megatron's own check ends one rank and leaves the others waiting; recipes switch it off (ddp.check_for_nan_in_grad).
    """

    def __init__(self):
        self.skipped_steps = 0
        """Over the whole run, resumed parts included."""
        self.in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_steps": self.skipped_steps, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped_steps, self.in_a_row = state_dict["skipped_steps"], state_dict["in_a_row"]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        metrics = _metrics(trainer)
        figures = metrics.train | {f"grad_norm/{name}": value for name, value in metrics.norms.items()}
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if not rank_sync.any_rank(bool(bad)):
            self.in_a_row = 0
            return
        step = trainer.global_step + 1
        origin = "; ".join(o for o in rank_sync.gather(_origin(trainer, metrics)) if o)
        names = sorted({name for found in rank_sync.gather(bad) for name in found})
        self.in_a_row += 1
        self.skipped_steps += 1
        metrics.skipped = True
        what = f"step {step}: not finite: {', '.join(names)} ({origin or 'from no single rank: the sum over ranks'})"
        optim = pl_module.optim
        if optim.nonfinite == "stop":
            raise NonFiniteStep(
                f"{what}. The weights are those before this step. To leave such steps out: optim.nonfinite=skip"
            )
        if self.in_a_row > optim.max_skipped:
            raise NonFiniteStep(
                f"{what}, after {optim.max_skipped} skipped steps in a row (optim.max_skipped)"
            )
        trainer.strategy.optimizers[0].skip = True
        logging.warning(
            f"kvcat: {what}: update left out ({self.in_a_row} in a row, {self.skipped_steps} in all)"
        )


def _metrics(trainer):
    from kvcat_nemo.nemo.callbacks import KVCatMetrics

    return next(c for c in trainer.callbacks if isinstance(c, KVCatMetrics))


def _origin(trainer, metrics) -> str:
    """Where on this rank it came from, as far as can be told after gradients were summed over ranks."""
    found = []
    if not metrics.local_loss_finite:
        found.append("loss of its own micro-batches")
    for chunk in trainer.strategy.megatron_parallel:
        for name, parameter in chunk.module.named_parameters():
            if not torch.isfinite(parameter).all():
                found.append(f"weights of {name}")
                break
    return f"{rank_sync.whoami()}: {', '.join(found)}" if found else ""
