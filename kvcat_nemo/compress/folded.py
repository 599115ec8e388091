"""Attention Matching without biases (folding.py), and any other compressor's slots folded after the fact.

Folding happens layer by layer while the text is read again, before the next layer is read: each layer's keys and values are
fitted to the queries that reach it over the folded layers below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvcat_nemo.compress.attention_matching import AttentionMatching
from kvcat_nemo.compress.attention_matching_fit import Reference, reference
from kvcat_nemo.compress.cache import KVCache, LayerCache
from kvcat_nemo.compress.context_limit import position_limit
from kvcat_nemo.compress.folding import fold
from kvcat_nemo.compress.prefill import Prefilled


@dataclass
class Folded(AttentionMatching):
    """Attention Matching whose slots have no bias."""

    given: ClassVar[Iterator[LayerCache] | None] = None
    """Layers of one row, made by another compressor, that are folded instead; each is taken once."""

    def compress_layer(
        self, layer: LayerCache, q_GQD: Tensor, scale: float, slots: int
    ) -> tuple[LayerCache, Reference]:
        if self.given is None and self.selection == "auto":
            return self.resolved(slots).compress_layer(layer, q_GQD, scale, slots)
        if self.given is None:
            smaller, target = super().compress_layer(layer, q_GQD, scale, slots)
        else:
            keys, values = layer.read()
            wide = torch.promote_types(torch.float32, keys.dtype)
            q, k, v = q_GQD.to(wide), keys[0].to(wide), values[0].to(wide)
            smaller, target = next(self.given), reference(q, k, v, scale)
        keys, values = smaller.read()
        if smaller.has_bias:
            bias = smaller.bias_BGS[0]
            k, v = fold(q_GQD, keys[0], values[0], bias, target, scale, value_ridge=self.ridge)
            keys, values = k[None], v[None]
        return LayerCache(keys, values, torch.zeros_like(smaller.bias_BGS)), target


def folded(prefilled: Prefilled, cache: KVCache) -> KVCache:
    """The same cache without biases; as it is where it has none.

    Args:
        prefilled: the context of one row, read with `needs=("queries",)`; cache: what a compressor made of it, as many
            slots in every layer and head.
    """
    if not any(layer.has_bias for layer in cache.layers):
        return cache
    folding = Folded(selection="highest")
    length = prefilled.lengths[0]
    if length + folding.tokens_after(length) > position_limit(prefilled.model.config):
        folding = Folded(
            selection="highest", queries="context"
        )  # no positions are left to read the text again
    folding.given = iter(cache.layers)
    out = folding.compress_row(prefilled, cache.layers[0].bias_BGS.shape[2])
    return KVCache(out.layers, cache.lengths_B, dict(cache.facts))
