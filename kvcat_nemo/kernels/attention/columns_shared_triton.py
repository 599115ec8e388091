"""What the Triton kernels of kernels/attention share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDE_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
"""Of numbers inside a kernel."""


@triton.jit
def row_of(ptr, b, t, h, sb, st, sh):
    """The first number of token t's head h."""
    return ptr + b.to(tl.int64) * sb + t.to(tl.int64) * st + h * sh


def settings_of(x: Tensor, terms: int, width: int) -> dict:
    wide = torch.promote_types(x.dtype, torch.float32)
    return {"TERMS": terms, "W2": power_of_two(width), "WIDE": WIDE_TYPES[wide]}


def power_of_two(width: int) -> int:
    return triton.next_power_of_2(width)
