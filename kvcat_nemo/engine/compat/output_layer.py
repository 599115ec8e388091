"""An output layer of a class of our own, in the place where Megatron built one of its class.

GPTModel names ColumnParallelLinear itself. Building a second layer in its place would draw its weight anew and allocate it twice;
so the object that Megatron built is given a subclass, which adds methods and no state.
"""

from __future__ import annotations

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from kvcat_nemo.engine.compat import MEGATRON

for _name in ("forward", "__init__"):
    MEGATRON.reach(ColumnParallelLinear, _name, "make token losses from its weight")


def adopt(layer: ColumnParallelLinear, cls: type[ColumnParallelLinear]) -> None:
    """Make an output layer one of `cls`, weight and all.

    Raises:
        ValueError: when it is more than a product with a weight.
    """
    assert cls.__init__ is ColumnParallelLinear.__init__, "the subclass would find its state unset"
    if type(layer) is not ColumnParallelLinear or layer.bias is not None:
        raise ValueError(
            f"output layer {layer}: only Megatron's ColumnParallelLinear without bias is supported by the token losses"
        )
    layer.__class__ = cls


def accumulates(layer: ColumnParallelLinear, weight: Tensor) -> bool:
    """Whether the weight's gradient goes to its `main_grad` in place of `grad` (gradient_accumulation_fusion)."""
    return layer.gradient_accumulation_fusion and weight.requires_grad and hasattr(weight, "main_grad")


def add_to_main_grad(weight: Tensor, grad: Tensor) -> Tensor | None:
    """Megatron's contract for gradient_accumulation_fusion: sum into main_grad, and tell its hooks so."""
    weight.main_grad.add_(grad)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    # Zeros: where the embedding shares the weight, its gradient is added to them and then to main_grad.
    return weight.new_zeros(()).expand_as(weight).contiguous()
