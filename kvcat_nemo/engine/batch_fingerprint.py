"""Which windows a step trained on, as one number: the same whatever the layout, and after every resume."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcat_nemo.engine import rank_sync
from kvcat_nemo.method.random_draws import prefix_ids

_EXACT = (1 << 53) - 1  # integers up to here are exact in JSON and in a double


class SampleHash:
    """Sums a hash of (number, tokens) over a step's windows, on each rank its own."""

    def __init__(self):
        self._seen: dict[int, int] = {}

    def add(self, sample_ids_B: Tensor, tokens_BT: Tensor) -> None:
        """Windows of a micro-batch, on the CPU. A window that is read twice (by two model chunks) counts once."""
        contents = prefix_ids(tokens_BT)[:, -1]
        mixed = prefix_ids(torch.stack([sample_ids_B.to(torch.int64), contents], 1))[:, -1]
        self._seen |= dict(zip(sample_ids_B.tolist(), mixed.tolist(), strict=True))

    def take(self, group) -> int:
        """A 53-bit number of the step's windows on all data-parallel ranks; begins anew. A collective call of the group."""
        mine = torch.tensor(list(self._seen.values()), dtype=torch.int64).sum().item()
        self._seen = {}
        return rank_sync.sum_over_ranks(int(mine), group) & _EXACT
