"""Autograd functions that carry gates and router losses across ranks and layers."""

from __future__ import annotations

import torch
from torch import Tensor


class _CopyToTensorParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # A contiguous buffer of its own: Megatron's `_reduce` loses the sum when the gradient is a strided view.
        grad = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


def copy_to_tensor_parallel(gate: Tensor, group) -> Tensor:
    """The same gate on every tensor-parallel rank; backward sums the ranks' gradients, each from its own heads."""
    return gate if group is None or group.size() == 1 else _CopyToTensorParallel.apply(gate, group)


class RouterLoss(torch.autograd.Function):
    """Lets a scalar loss ride on hidden states: forward passes them on, backward adds `scale` × d(loss).

    So every pipeline stage back-propagates its own routers' loss, wherever the main loss is computed.
    """

    scale: float = 1.0
    """Loss scale over the number of micro-batches; set at every forward step (`set_router_loss_scale`)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (loss,) = ctx.saved_tensors
        return grad, torch.full_like(loss, RouterLoss.scale)


def set_router_loss_scale(config, num_microbatches: int) -> None:
    """Give router losses the scale that Megatron's schedules give the main loss.

    Args:
        config: the model's TransformerConfig; its `grad_scale_func` applies when a precision plugin scales losses.
    """
    unit = torch.ones(())
    scale = float(config.grad_scale_func(unit)) if config.grad_scale_func else 1.0
    RouterLoss.scale = scale / num_microbatches
