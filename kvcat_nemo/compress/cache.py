"""The KV cache as compressors see it: layers and heads of different lengths, and a bias per slot.

Shapes: B rows of the batch, G KV heads, S slots (the longest head's; shorter ones are padded), D and E head dims of keys
and values, N new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "kvcat-kv-cache-1"


@dataclass
class LayerCache:
    """Keys and values of one layer. A query's logit at a slot is scale·⟨q, k⟩ + bias; −∞ marks padding.

    Keys carry their rotary embedding, made at the token's position in the full text. Slots are in text order.
    """

    keys_BGSD: Tensor
    values_BGSE: Tensor
    bias_BGS: Tensor
    """float32 log-weight of each slot; 0 for a plain one."""

    def __post_init__(self):
        if (
            self.keys_BGSD.shape[:3] != self.bias_BGS.shape
            or self.values_BGSE.shape[:3] != self.bias_BGS.shape
        ):
            raise ValueError(
                f"keys {tuple(self.keys_BGSD.shape)}, values {tuple(self.values_BGSE.shape)}, bias"
                f" {tuple(self.bias_BGS.shape)}: the first three sizes must agree"
            )

    @property
    def present_BGS(self) -> Tensor:
        """True where there is a slot, False in padding."""
        return self.bias_BGS > -torch.inf

    @property
    def slots_BG(self) -> Tensor:
        return self.present_BGS.sum(-1)

    @property
    def has_bias(self) -> bool:
        """Whether any slot has a weight of its own (a plain cache needs no bias to be stored)."""
        return bool((self.bias_BGS[self.present_BGS] != 0).any())

    @property
    def nbytes(self) -> int:
        """Bytes of the slots there are, padding left out."""
        bias = self.bias_BGS.element_size() if self.has_bias else 0
        D, E = self.keys_BGSD.shape[-1], self.values_BGSE.shape[-1]
        each = D * self.keys_BGSD.element_size() + E * self.values_BGSE.element_size() + bias
        return int(self.slots_BG.sum()) * each

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values as attention takes them."""
        return self.keys_BGSD, self.values_BGSE

    def append(self, keys_BGND: Tensor, values_BGNE: Tensor, bias_BGN: Tensor) -> LayerCache:
        """A layer with new slots behind the old ones; this one is left as it is."""
        return replace(
            self,
            keys_BGSD=torch.cat([self.keys_BGSD, keys_BGND], 2),
            values_BGSE=torch.cat([self.values_BGSE, values_BGNE], 2),
            bias_BGS=torch.cat([self.bias_BGS, bias_BGN], 2),
        )

    def take(self, index_BGK: Tensor, present_BGK: Tensor | None = None) -> LayerCache:
        """The layer with the slots at the given places alone, in the order given.

        Args:
            index_BGK: places in this layer; present_BGK: False where an entry is padding (heads of different lengths).
        """
        bias = self.bias_BGS.gather(2, index_BGK)
        if present_BGK is not None:
            bias = bias.masked_fill(~present_BGK, -torch.inf)
        keys, values = self.read()
        return LayerCache(
            keys.gather(2, index_BGK[..., None].expand(-1, -1, -1, keys.shape[-1])),
            values.gather(2, index_BGK[..., None].expand(-1, -1, -1, values.shape[-1])),
            bias,
        )

    def to(self, device: str | torch.device) -> LayerCache:
        """The layer on another device."""
        keys, values = self.keys_BGSD.to(device), self.values_BGSE.to(device)
        return LayerCache(keys, values, self.bias_BGS.to(device))

    def row(self, b: int, slots: int) -> LayerCache:
        """One row of the batch, its first `slots` slots."""
        part = (slice(b, b + 1), slice(None), slice(0, slots))
        return replace(
            self,
            keys_BGSD=self.keys_BGSD[part],
            values_BGSE=self.values_BGSE[part],
            bias_BGS=self.bias_BGS[part],
        )

    @staticmethod
    def stack(parts: list[LayerCache]) -> LayerCache:
        """One batch of single-row layers; shorter ones are padded behind."""
        size = max(part.bias_BGS.shape[2] for part in parts)
        keys, values, bias = zip(*(_padded(part, size) for part in parts), strict=True)
        return LayerCache(torch.cat(keys), torch.cat(values), torch.cat(bias))


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
        """Write as safetensors: the slots there are, without padding."""
        from kvcat_nemo.compress.storage import save

        save(self, path)

    @staticmethod
    def load(path: str | Path) -> KVCache:
        from kvcat_nemo.compress.storage import load

        return load(path)


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


def _padded(layer: LayerCache, size: int) -> Iterator[Tensor]:
    missing = size - layer.bias_BGS.shape[2]
    keys, values = layer.read()
    yield torch.nn.functional.pad(keys, (0, 0, 0, missing))
    yield torch.nn.functional.pad(values, (0, 0, 0, missing))
    yield torch.nn.functional.pad(layer.bias_BGS, (0, missing), value=-torch.inf)
