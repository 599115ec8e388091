"""Megatron's output layer, which can give a batch's token metrics in place of its logits.

It stays the module that Megatron knows: hooks on it run (under overlapped parameter gathering they wait for its
weight), and its parameter keeps its name and its sharding.
"""

from __future__ import annotations

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from kvcat_nemo.kernels.losses.token_loss import token_losses


class TokenLossOutputLayer(ColumnParallelLinear):
    """[T, B, M] → logits as ever; with `labels_BT`, token metrics, and [T, V] logits are never formed."""

    @classmethod
    def adopt(cls, layer: ColumnParallelLinear) -> None:
        """Make an output layer one of these, weight and all.

        Raises:
            ValueError: when it is more than a product with a weight.
        """
        if type(layer) is not ColumnParallelLinear or layer.bias is not None:
            raise ValueError(
                f"output layer {layer}: only Megatron's ColumnParallelLinear without bias is supported by the token losses"
            )
        layer.__class__ = cls

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
        fused = self.gradient_accumulation_fusion and weight.requires_grad and hasattr(weight, "main_grad")
        return token_losses(
            input_,
            weight,
            labels_BT,
            group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            take_weight_gradient=(lambda grad: _add_to_main_grad(weight, grad)) if fused else None,
            **losses,
        )


def _add_to_main_grad(weight: Tensor, grad: Tensor) -> Tensor | None:
    """Megatron's contract for gradient_accumulation_fusion: sum into main_grad, and tell its hooks so."""
    weight.main_grad.add_(grad)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    # Zeros: where the embedding shares the weight, its gradient is added to them and then to main_grad.
    return weight.new_zeros(()).expand_as(weight).contiguous()
