"""A cache as parameters that an optimiser can train."""

from __future__ import annotations

import torch

from kvcat_nemo.compress.cache import KVCache, LayerCache


class TrainedSlots:
    """A cache's keys, values and biases as parameters, in units of the row's root mean square; padding stays padding."""

    def __init__(self, cache: KVCache, train_bias: bool, dtype: torch.dtype):
        self.start, self.dtype = cache, dtype
        self.layers, self.parameters = [], []
        for layer in cache.layers:
            present = layer.present_BGS
            bias = layer.bias_BGS.detach().to(dtype).masked_fill(~present, 0)
            scaled = []
            for x in layer.read():
                x = x.detach().to(dtype)
                there = present[..., None]
                mean = (x * there).square().sum((1, 2, 3), keepdim=True)
                mean = mean / (there.sum((1, 2, 3), keepdim=True) * x.shape[-1]).clamp(min=1)
                unit = mean.sqrt().clamp(min=1e-6)
                scaled.append((torch.nn.Parameter(x / unit), unit))
            bias = torch.nn.Parameter(bias, requires_grad=train_bias)
            self.layers.append((*scaled, bias, present))
            self.parameters += [scaled[0][0], scaled[1][0], *([bias] if train_bias else [])]

    def cache(self) -> KVCache:
        """Differentiable."""
        layers = [
            LayerCache(k * k_unit, v * v_unit, bias.masked_fill(~present, -torch.inf))
            for (k, k_unit), (v, v_unit), bias, present in self.layers
        ]
        return KVCache(layers, self.start.lengths_B, dict(self.start.facts))

    @torch.no_grad()
    def result(self) -> KVCache:
        """In the dtypes of the cache it started from."""
        layers = []
        for mine, old in zip(self.cache().layers, self.start.layers, strict=True):
            k, v = old.read()
            bias = mine.bias_BGS.detach().to(old.bias_BGS.dtype).clone()
            layers.append(LayerCache(mine.keys_BGSD.to(k.dtype), mine.values_BGSE.to(v.dtype), bias))
        return KVCache(layers, self.start.lengths_B, dict(self.start.facts))
