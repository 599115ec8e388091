"""One layer of a KV cache: heads of different lengths, and a bias per slot.

Shapes: B rows of the batch, G KV heads, S slots (the longest head's; shorter ones are padded), P slots there are, over all
rows and heads; D and E head dims of keys and values, N new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvcat_nemo.compress.packing import check_counts, check_memory, expect, spread


@dataclass
class LayerCache:
    """Keys and values of one layer. A query's logit at a slot is scale·⟨q, k⟩ + bias; −∞ marks padding.

    Keys carry their rotary embedding, made at the token's position in the full text. Slots are in text order.
    """

    kind: ClassVar[str] = "plain"
    """What files call it."""

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

    @property
    def settings(self) -> dict[str, Any]:
        """What a file says of the layer besides its kind; `unpack` takes it."""
        return {}

    def pack(self) -> dict[str, Tensor]:
        """What a file holds of the layer: the slots there are, without padding (names: see cache_file)."""
        present = self.present_BGS
        packed = {
            "counts_BG": self.slots_BG.int(),
            "keys_PD": self.keys_BGSD[present],
            "values_PE": self.values_BGSE[present],
        }
        if self.has_bias:
            packed["bias_P"] = self.bias_BGS[present]
        return packed

    @classmethod
    def unpack(cls, packed: dict[str, Tensor]) -> LayerCache:
        """The layer again, padded behind each head's slots.

        Raises:
            RuntimeError: what the file says does not go together; KeyError: a tensor is missing.
        """
        counts, keys, values = packed["counts_BG"], packed["keys_PD"], packed["values_PE"]
        expect(counts, "counts_BG", 2, whole=True)
        expect(keys, "keys_PD", 2)
        check_counts(counts, len(keys), "counts_BG", most=len(keys))
        expect(values, "values_PE", 2, entries=len(keys))
        bias = packed.get("bias_P")
        if bias is not None:
            expect(bias, "bias_P", 1, entries=len(keys))
        entry = (
            keys.shape[1] * keys.element_size() + values.shape[1] * values.element_size() + 5
        )  # bias, presence
        check_memory(counts.numel() * int(counts.max()) * entry, "counts_BG")
        counts = counts.long()
        present = torch.arange(int(counts.max()), device=counts.device) < counts[..., None]
        bias = torch.zeros(len(keys), device=counts.device) if bias is None else bias
        return LayerCache(
            spread(packed["keys_PD"], present),
            spread(packed["values_PE"], present),
            spread(bias, present, empty=-torch.inf),
        )


def _padded(layer: LayerCache, size: int) -> Iterator[Tensor]:
    missing = size - layer.bias_BGS.shape[2]
    keys, values = layer.read()
    yield torch.nn.functional.pad(keys, (0, 0, 0, missing))
    yield torch.nn.functional.pad(values, (0, 0, 0, missing))
    yield torch.nn.functional.pad(layer.bias_BGS, (0, missing), value=-torch.inf)
