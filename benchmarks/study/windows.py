"""Training windows from an indexed dataset: its documents end to end, cut at equal lengths, drawn without replacement."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class TokenWindows:
    """Windows of a dataset PREFIX.bin/.idx.

    Args:
        tokens: of a window; each overlaps the next by the one token that is its last label.
    """

    def __init__(self, prefix: Path, tokens: int):
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        dtype = IndexedDataset(str(prefix)).index.dtype
        self.stream = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
        self.tokens = tokens
        if len(self.stream) <= 2 * tokens:
            raise ValueError(f"{prefix}: {len(self.stream)} tokens are too few for windows of {tokens}")

    def __len__(self) -> int:
        """Whole windows of an epoch, wherever it begins."""
        return len(self.stream) // self.tokens - 1

    def at(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and labels, [windows, tokens] each."""
        rows = np.stack([self.stream[s : s + self.tokens + 1] for s in starts]).astype(np.int64)
        both = torch.from_numpy(rows)
        return both[:, :-1], both[:, 1:]

    def batch(self, step: int, windows: int, seed: int) -> tuple[Tensor, Tensor]:
        """The windows of a step (counted from 0), which depend on it and the seed alone: a resumed run goes on with them.

        An epoch takes every window once, in an order and from a beginning of its own.
        """
        starts = []
        for number in range(step * windows, (step + 1) * windows):
            epoch, place = divmod(number, len(self))
            order, first = self._epoch(epoch, seed)
            starts.append(first + order[place] * self.tokens)
        return self.at(np.array(starts))

    def _epoch(self, epoch: int, seed: int) -> tuple[np.ndarray, int]:
        if getattr(self, "_known", None) != (epoch, seed):
            rng = np.random.default_rng([seed, epoch])
            self._known = (epoch, seed)
            self._order = rng.permutation(len(self)), int(rng.integers(self.tokens))
        return self._order

    def spread(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` windows at even distances: the same at every validation."""
        count = min(count, len(self))
        return self.at(np.linspace(0, len(self) - 1, count).astype(np.int64) * self.tokens)
