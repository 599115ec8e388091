"""Megatron's optimizer as a run uses it: routers with their own learning rate, and updates that the guard can leave out."""

from collections.abc import Callable
from typing import Literal, Optional

from megatron.core.optimizer import OptimizerConfig
from nemo.core.optim.mcore_optim import McoreDistributedOptimizer
from nemo.lightning.pytorch.optim import LRSchedulerModule, MegatronOptimizerModule

from kvcat_nemo.nemo.choices import check_choice

OnNonfinite = Literal["stop", "skip"]
"""What a step leads to whose loss or gradient is NaN or infinite (optim.nonfinite)."""


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


class KVCatOptimizerModule(MegatronOptimizerModule):
    """Megatron's optimizer, with the routers' learning rate multiplied by `kvcat.router_lr_mult`.

    Args:
        nonfinite: what a step leads to whose loss or gradient is NaN or infinite: `stop` ends the run, `skip` leaves the
            update out (kvcat_nemo.nemo.guard).
        max_skipped: skipped steps in a row after which `skip` stops as well.
        others: as NeMo's.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        lr_scheduler: Optional[LRSchedulerModule] = None,
        no_weight_decay_cond: Optional[Callable] = None,
        scale_lr_cond: Optional[Callable] = None,
        lr_mult: float = 1.0,
        nonfinite: OnNonfinite = "stop",
        max_skipped: int = 10,
    ):
        check_choice("optim.nonfinite", nonfinite, OnNonfinite)
        if max_skipped < 1:
            raise ValueError(f"optim.max_skipped={max_skipped!r}: give at least 1")
        super().__init__(config, lr_scheduler, no_weight_decay_cond, scale_lr_cond, lr_mult)
        self.nonfinite, self.max_skipped = nonfinite, max_skipped

    def optimizers(self, model):
        kvcat = model.module.config.kvcat
        self.lr_mult = kvcat.router_lr_mult
        self.scale_lr_cond = lambda name, parameter: ".router." in name
        return [GuardedOptimizer(optimizer.mcore_optimizer) for optimizer in super().optimizers(model)]
