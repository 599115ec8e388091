"""Rank-stabilised LoRA (arXiv 2312.03732) whose product is added to some rows alone.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class RoutedLoRA(nn.Module):
    """Δy = (α/√r)·B·A·x for routed rows, 0 for the others. B is 0 at step 0: training starts from the unmodified model.

    K and V are adapted for every token of a context, Q and O for its chosen tokens (arXiv 2503.10337).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, seed: int):
        """Args: scale: α/√r, `KVDistillConfig.lora_scale`; seed: of A, so that every rank draws the same values."""
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.down.copy_(torch.randn(rank, in_features, generator=rng) / math.sqrt(in_features))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [B, T, in], rows [B, T] bool → Δy [B, T, out]."""
        delta = (x @ self.down.to(x.dtype).T) @ self.up.to(x.dtype).T
        return torch.where(rows[..., None], self.scale * delta, torch.zeros_like(delta))
