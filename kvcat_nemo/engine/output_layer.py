"""Megatron's output layer, which can give a batch's token metrics in place of its logits.

It stays the module that Megatron knows: hooks on it run (under overlapped parameter gathering they wait for its
weight), and its parameter keeps its name and its sharding.
"""

from __future__ import annotations

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from kvcat_nemo.engine.compat.output_layer import accumulates, add_to_main_grad
from kvcat_nemo.kernels.losses.token_loss import token_losses


class TokenLossOutputLayer(ColumnParallelLinear):
    """[T, B, M] → logits as ever; with `labels_BT`, token metrics, and [T, V] logits are never formed."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels_BT: Tensor | None = None,
        **losses,
    ):
        """Logits and None, or with labels the metrics of kernels.losses.token_loss.token_losses, to which `losses` go.

        Args:
            input_: [T, 2B, M], [T/tp, 2B, M] under sequence parallelism; weight: the tied one, or None.
        """
        if labels_BT is None:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        return token_losses(
            input_,
            weight,
            labels_BT,
            group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            take_weight_gradient=(lambda grad: add_to_main_grad(weight, grad))
            if accumulates(self, weight)
            else None,
            **losses,
        )
