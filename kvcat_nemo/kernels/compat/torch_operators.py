"""PyTorch's operators below its public attention, and three more of its parts that no public name gives."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcat_nemo.common.private_api import Package

TORCH = Package("torch", "2.9 to 2.13")

CPU_FORWARD, CPU_BACKWARD = (
    TORCH.reach(torch.ops.aten, name, "compute attention on a CPU").default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    )
)
"""Forward gives log-sum-exps, backward takes them; `scaled_dot_product_attention` on a CPU is these two."""

TORCH.reach(torch.Tensor, "_version", "see that a kept tensor was not written to")
TORCH.reach(torch, "_assert_async", "check labels on a GPU")


def version_of(x: Tensor) -> int:
    """How often a tensor was written to in place."""
    return x._version


def assert_later(holds: Tensor, message: str) -> None:
    """Stop a CUDA device where a condition does not hold, without waiting for it (no public operator does)."""
    torch._assert_async(holds, message)


def cuda_flash(name: str):
    """`_flash_attention_forward` or `_flash_attention_backward`; None where this PyTorch has none."""
    return getattr(torch.ops.aten, name, None)


def schema_of(operator) -> torch.FunctionSchema:
    """What an operator's default overload, or an overload, takes and returns."""
    return getattr(operator, "default", operator)._schema


def overload_of(function):
    """The operator behind a torch.library.custom_op, which hides its signature behind *args; None for others."""
    return getattr(function, "_opoverload", None)
