"""The two selections that any method must beat: random slots, and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvcat_nemo.compress.cache import KVCache
from kvcat_nemo.compress.compressor import Compressor, select
from kvcat_nemo.compress.prefill import Prefilled


@dataclass
class Random(Compressor):
    """Slots drawn evenly, for each layer and KV head anew."""

    name: ClassVar[str] = "random"
    seed: int = 0
    """Seed of the draw."""

    def compress_row(self, prefilled: Prefilled, slots: int) -> KVCache:
        generator = torch.Generator().manual_seed(self.seed)
        scores = [
            torch.rand(layer.bias_BGS.shape, generator=generator).to(layer.bias_BGS.device)
            for layer in prefilled.cache.layers
        ]
        return select(prefilled, scores, slots)


@dataclass
class Recent(Compressor):
    """The last slots, with the first `sinks` kept if asked for (0: none)."""

    name: ClassVar[str] = "recent"
    sinks: int = 0
    """First slots that stay."""

    @property
    def smallest(self) -> int:
        return self.sinks + 1

    def compress_row(self, prefilled: Prefilled, slots: int) -> KVCache:
        scores = []
        for layer in prefilled.cache.layers:
            place = torch.arange(layer.bias_BGS.shape[-1], device=layer.bias_BGS.device, dtype=torch.float32)
            place[: self.sinks] = torch.inf
            scores.append(place.expand(layer.bias_BGS.shape))
        return select(prefilled, scores, slots)
