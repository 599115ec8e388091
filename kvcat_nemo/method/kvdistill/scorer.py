"""The scorer: one number per token, from the unmodified model's hidden states after layer η (arXiv 2503.10337).

Shapes: B batch, T tokens, M model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvcat_nemo.method.kvdistill.config import KVDistillConfig


class Scorer(nn.Module):
    """score = W₂·gelu(W₁·h + b₁) + b₂.

    The scorer is computed in float32 whatever the model is cast to: a choice among thousands of tokens must not hang on
    bf16's eight bits.
    """

    def __init__(self, hidden_size: int, config: KVDistillConfig):
        super().__init__()
        width = config.scorer_width or hidden_size
        self.up = nn.Linear(hidden_size, width)
        self.down = nn.Linear(width, 1)
        self.reset_parameters(config.seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Initialise from the seed alone, so that every rank draws the same values. Scores begin near 0: gates near ½."""
        rng = torch.Generator().manual_seed(seed * 1009)
        for linear in (self.up, self.down):
            drawn = torch.randn(linear.weight.shape, generator=rng) / math.sqrt(linear.in_features)
            linear.weight.copy_(drawn)
            linear.bias.zero_()

    def _apply(self, fn, recurse=True):
        # Follow moves between devices, but not casts to half precision.
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)

    def forward(self, h_BTM: Tensor) -> Tensor:
        """Hidden states [B, T, M] → scores [B, T], in the scorer's own precision. No gradient reaches the hidden states:
        the model below is frozen."""
        with torch.autocast(h_BTM.device.type, enabled=False):
            h = h_BTM.detach().to(self.up.weight.dtype)
            return self.down(F.gelu(self.up(h))).squeeze(-1)
