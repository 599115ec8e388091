"""Autograd functions that carry gates across ranks, and the scale of routers' losses."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
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


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BT: Tensor, group) -> Tensor:
        ctx.group = group
        x = x_BT.detach().transpose(0, 1).contiguous()
        out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        torch.distributed.all_gather_into_tensor(out, x, group=group)
        return out.transpose(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.transpose(0, 1).contiguous()
        out = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        torch.distributed.reduce_scatter_tensor(out, grad, group=ctx.group)
        return out.transpose(0, 1), None


def gather_sequence(gate_BT: Tensor, group) -> Tensor:
    """[B, T/ranks] of each tensor-parallel rank → [B, T] on all; backward sums the ranks' gradients, each from its own
    heads, at the token's owner."""
    return _GatherSequence.apply(gate_BT, group)


def window_sum(x: Tensor, group) -> Tensor:
    """Sum over the ranks of a group (None: this one), without gradient."""
    total = x.detach().clone()
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total


def window_mean(x_BT: Tensor, group) -> Tensor:
    """Mean over the tokens of all ranks of a group (None: this one), on every rank; its gradient is of own tokens alone.

    Every rank must hold as many tokens.
    """
    if group is None:
        return x_BT.mean()
    own = x_BT.sum()
    return (window_sum(own, group) + (own - own.detach())) / (x_BT.numel() * group.size())


def set_router_loss_scale(config, num_microbatches: int) -> None:
    """Give router losses the scale that Megatron's schedules, and engine.step, give the main loss.

    Routers' losses ride on hidden states by the scaler of Megatron's mixture-of-experts losses, so that every pipeline stage
    back-propagates its own. Megatron's schedules set its scale for such models alone, and leave context parallelism out.

    Args:
        config: the model's TransformerConfig; its `grad_scale_func` applies when a precision plugin scales losses.
            Gradients are averaged over context-parallel ranks, of which each has a part of the loss' gradient: hence
            `context_parallel_size`.
    """
    unit = torch.ones(())
    scale = float(config.grad_scale_func(unit)) if config.grad_scale_func else 1.0
    scale *= config.context_parallel_size / num_microbatches
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(scale, dtype=torch.float64))
