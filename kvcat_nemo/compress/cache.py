"""The KV cache as compressors see it: layers (layers.py) and the text that they stand for.

Shapes: B rows of the batch, G KV heads, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcat_nemo.compress import cache_file
from kvcat_nemo.compress.cache_file import FORMAT
from kvcat_nemo.compress.layers import LayerCache

__all__ = ["FORMAT", "KVCache", "LayerCache", "stack_rows"]


@dataclass
class KVCache:
    """A cache that stands for `lengths_B` tokens of text, with however many slots per layer and head."""

    layers: list[LayerCache]
    lengths_B: Tensor
    """Tokens of text behind the cache: the position of the next token."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What made it (compressor, budget, model): plain JSON."""

    @property
    def batch(self) -> int:
        return len(self.lengths_B)

    @property
    def slots(self) -> float:
        """Slots per layer, KV head and row, on average."""
        counts = torch.stack([layer.slots_BG.double().mean() for layer in self.layers])
        return float(counts.mean())

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def row(self, b: int) -> KVCache:
        """One row of the batch; its padding behind the longest head goes."""
        layers = [layer.row(b, _last_present(layer.present_BGS[b])) for layer in self.layers]
        return KVCache(layers, self.lengths_B[b : b + 1], dict(self.facts))

    def to(self, device: str | torch.device) -> KVCache:
        """The cache on another device."""
        return KVCache([x.to(device) for x in self.layers], self.lengths_B.to(device), dict(self.facts))

    def save(self, path: str | Path) -> None:
        """Write as safetensors: the slots there are, without padding. A crash leaves either the old file or the new one.

        Raises:
            ValueError: when the facts are not plain JSON, the folder is not there, or the file is somebody else's.
        """
        cache_file.write(path, self.layers, self.lengths_B, self.facts)

    @staticmethod
    def load(path: str | Path, *, device: str | torch.device = "cpu") -> KVCache:
        """Read what `save` wrote.

        Raises:
            ValueError: names the file when it is missing, cut off, damaged, or no cache of ours.
        """
        return KVCache(*cache_file.read(path, device=device))


def _last_present(present_GS: Tensor) -> int:
    places = torch.arange(1, present_GS.shape[-1] + 1, device=present_GS.device)
    return int((present_GS * places).max()) if present_GS.numel() else 0


def stack_rows(rows: list[KVCache]) -> KVCache:
    """One batch of single-row caches; shorter ones are padded behind."""
    if len(rows) == 1:
        return rows[0]
    layers = []
    for parts in zip(*(row.layers for row in rows), strict=True):
        kinds = {type(part) for part in parts}
        kind = kinds.pop() if len(kinds) == 1 else LayerCache
        layers.append(kind.stack(list(parts)))
    return KVCache(layers, torch.cat([row.lengths_B for row in rows]), dict(rows[0].facts))
