"""Skips a step, or ends the run, on every rank, when a loss or a gradient is NaN or infinite."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.utils import logging

from kvcat_nemo.engine import rank_sync
from kvcat_nemo.nemo.run_state import RunCallback, StepState


class NonFiniteStep(RuntimeError):
    """A step's loss or gradient was NaN or infinite, and the run is to end."""


class KVCatGuard(RunCallback, pl.Callback):
    """Looks at every step's loss parts and gradient norms before the update.

    `optim.nonfinite=stop` ends the run with the step and the ranks it came from; `skip` leaves the update out, counts it
    and goes on with the next data, but ends after `optim.max_skipped` in a row (the weights themselves may be bad).
    Megatron's own check ends one rank and leaves the others waiting; recipes switch it off (ddp.check_for_nan_in_grad).
    """

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_steps": self.run.skipped_steps, "in_a_row": self.run.skipped_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.run.skipped_steps = state_dict["skipped_steps"]
        self.run.skipped_in_a_row = state_dict["in_a_row"]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        run, this = self.run, self.run.step
        norms = {f"grad_norm/{name}": value for name, value in this.known("norms").items()}
        figures = this.known("figures") | norms
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if not rank_sync.any_rank(bool(bad)):
            run.skipped_in_a_row = 0
            return
        step = trainer.global_step + 1
        origin = "; ".join(o for o in rank_sync.gather(_origin(trainer, this)) if o)
        names = sorted({name for found in rank_sync.gather(bad) for name in found})
        run.skipped_in_a_row += 1
        run.skipped_steps += 1
        this.skipped = True
        what = f"step {step}: not finite: {', '.join(names)} ({origin or 'from no single rank: the sum over ranks'})"
        optim = pl_module.optim
        if optim.nonfinite == "stop":
            raise NonFiniteStep(
                f"{what}. The weights are those before this step. To leave such steps out: optim.nonfinite=skip"
            )
        if run.skipped_in_a_row > optim.max_skipped:
            raise NonFiniteStep(
                f"{what}, after {optim.max_skipped} skipped steps in a row (optim.max_skipped)"
            )
        trainer.strategy.optimizers[0].skip = True
        logging.warning(
            f"kvcat: {what}: update left out ({run.skipped_in_a_row} in a row, {run.skipped_steps} in all)"
        )


def _origin(trainer, step: StepState) -> str:
    """Where on this rank it came from, as far as can be told after gradients were summed over ranks."""
    found = []
    if not step.known("local_loss_finite"):
        found.append("loss of its own micro-batches")
    for chunk in trainer.strategy.megatron_parallel:
        for name, parameter in chunk.module.named_parameters():
            if not torch.isfinite(parameter).all():
                found.append(f"weights of {name}")
                break
    return f"{rank_sync.whoami()}: {', '.join(found)}" if found else ""
