"""A layer whose slots are kept as 8- or 4-bit codes, the newest ones in full precision.

As in KIVI (arXiv 2402.02750): keys are quantised per channel over groups of tokens, because a few channels of keys are
large in every token; values per token over groups of channels. x ≈ lowest + step · code, codes from 0 to 2^bits − 1.
With scales in float16 the error is at most step/2 + 2⁻¹¹·|lowest|.

Slots are in two parts, each padded behind: coded ones in whole groups of tokens, then recent ones in full precision.
Appended slots join the recent part; what exceeds its window by a group is coded.

Shapes: B rows, G KV heads, C groups of g tokens, S slots in all, R recent slots, D and E head dims of keys and values,
d and e their bytes (half of them with 4 bits), F groups of channels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcat_nemo.compress.layers import LayerCache
from kvcat_nemo.compress.packing import check_counts, check_memory, expect, spread

_HALF_LIMIT = 6e4


_PER_GROUP = ("keys_lowest_BGCD", "keys_step_BGCD")


@dataclass
class Coded:
    """Codes of the slots in whole groups, and what turns them back into numbers."""

    keys_BGCgd: Tensor
    """uint8."""
    keys_lowest_BGCD: Tensor
    keys_step_BGCD: Tensor
    values_BGCge: Tensor
    """uint8."""
    values_lowest_BGCgF: Tensor
    values_step_BGCgF: Tensor
    bias_BGCg: Tensor
    """−∞ where a group is padded."""

    def map(self, function) -> Coded:
        return Coded(*(function(getattr(self, field.name)) for field in fields(self)))

    def padded(self, groups: int) -> Coded:
        """With empty groups behind, up to so many."""
        missing = groups - self.bias_BGCg.shape[2]

        def pad(x: Tensor) -> Tensor:
            empty = -torch.inf if x is self.bias_BGCg else 0
            return F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing), value=empty)

        return self.map(pad)

    @staticmethod
    def cat(parts: list[Coded], dim: int) -> Coded:
        return Coded(*(torch.cat([getattr(p, field.name) for p in parts], dim) for field in fields(Coded)))


def encode(x: Tensor, present: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x with one scale per place along `dim`.

    Args:
        present: broadcasts to x; False where x is padding, which neither sets the scale nor matters.

    Returns:
        codes (uint8, shape of x), lowest and step (x without `dim`; float16, or float32 where float16 overflows).
    """
    wide = x.detach().float()
    dtype = torch.float32 if wide.numel() and float(wide.abs().max()) > _HALF_LIMIT else torch.float16
    lowest = wide.masked_fill(~present, torch.inf).amin(dim, keepdim=True)
    highest = wide.masked_fill(~present, -torch.inf).amax(dim, keepdim=True)
    empty = lowest > highest
    # Codes refer to the rounded scales, so that rounding these costs range, not a shift of every number.
    lowest = lowest.masked_fill(empty, 0).to(dtype)
    step = ((highest.masked_fill(empty, 0) - lowest.float()) / (2**bits - 1)).clamp(min=0).to(dtype)
    codes = ((wide - lowest.float()) / step.float().clamp(min=1e-30)).round().clamp(0, 2**bits - 1)
    return codes.masked_fill(~present, 0).to(torch.uint8), lowest.squeeze(dim), step.squeeze(dim)


def to_bytes(codes: Tensor, bits: int) -> Tensor:
    """4-bit codes two to a byte along the last dimension: first half low, second half high."""
    if bits == 8:
        return codes
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


def from_bytes(packed: Tensor, bits: int) -> Tensor:
    """What `to_bytes` was given."""
    return packed if bits == 8 else torch.cat([packed & 15, packed >> 4], -1)


class QuantisedLayer(LayerCache):
    """A LayerCache of coded and recent slots; `keys_BGSD` and `values_BGSE` are made anew at each reading."""

    kind = "quantised"

    def __init__(self, coded: Coded, recent: LayerCache, *, bits: int, window: int):
        self.coded = coded
        self.recent = recent
        self.bits = bits
        self.window = window
        """Recent slots that stay in full precision when new ones come."""
        B, G = recent.bias_BGS.shape[:2]
        self.bias_BGS = torch.cat([coded.bias_BGCg.reshape(B, G, -1), recent.bias_BGS], 2)

    @classmethod
    def of(cls, layer: LayerCache, *, bits: int, group: int, window: int, recent: int) -> QuantisedLayer:
        """Quantise a plain layer.

        Args:
            group: tokens that share a key's scale, and channels that share a value's (all of them where that does not
                divide the head dim).
            window: recent slots that stay when new ones come; recent: those that stay now. The group
                before them is filled up.

        Raises:
            ValueError: when 4-bit codes do not fill whole bytes.
        """
        D, E = layer.keys_BGSD.shape[-1], layer.values_BGSE.shape[-1]
        if bits == 4 and (D % 2 or E % 2):
            raise ValueError(f"head dims {D} and {E}: 4-bit codes need even ones, two fill a byte; use int8")
        S = layer.bias_BGS.shape[2]
        coded = max(0, S - recent)
        head, tail = _part(layer, 0, coded), _part(layer, coded, S)
        return cls(_encode_slots(head, bits, group), tail, bits=bits, window=window)

    @property
    def settings(self) -> dict[str, int]:
        return {"bits": self.bits, "window": self.window, "group": self.group}

    @property
    def group(self) -> int:
        return self.coded.bias_BGCg.shape[3]

    @property
    def keys_BGSD(self) -> Tensor:
        return self.read()[0]

    @property
    def values_BGSE(self) -> Tensor:
        return self.read()[1]

    @property
    def nbytes(self) -> int:
        """Codes and scales of the slots there are, the recent ones, and biases where there are any."""
        coded, here = self.coded, self.coded.bias_BGCg > -torch.inf
        slots, groups = int(here.sum()), int(here.any(-1).sum())
        scales = _item_bytes(coded.keys_lowest_BGCD) + _item_bytes(coded.keys_step_BGCD)
        slot = coded.keys_BGCgd.shape[-1] + coded.values_BGCge.shape[-1]
        slot += _item_bytes(coded.values_lowest_BGCgF) + _item_bytes(coded.values_step_BGCgF)
        recent = self.recent.slots_BG.sum()
        D, E = self.recent.keys_BGSD.shape[-1], self.recent.values_BGSE.shape[-1]
        plain = (D + E) * self.recent.keys_BGSD.element_size()
        bias = self.bias_BGS.element_size() * (slots + int(recent)) if self.has_bias else 0
        return slots * slot + groups * scales + int(recent) * plain + bias

    def read(self) -> tuple[Tensor, Tensor]:
        c, dtype = self.coded, self.recent.keys_BGSD.dtype
        k = from_bytes(c.keys_BGCgd, self.bits).float() * c.keys_step_BGCD[..., None, :].float()
        k = (k + c.keys_lowest_BGCD[..., None, :].float()).flatten(2, 3)
        v = from_bytes(c.values_BGCge, self.bits)
        v = v.unflatten(-1, (c.values_step_BGCgF.shape[-1], -1)).float()
        v = v * c.values_step_BGCgF[..., None].float() + c.values_lowest_BGCgF[..., None].float()
        v = v.flatten(-2).flatten(2, 3)
        recent_k, recent_v = self.recent.read()
        return torch.cat([k.to(dtype), recent_k], 2), torch.cat([v.to(dtype), recent_v], 2)

    def append(self, keys_BGND: Tensor, values_BGNE: Tensor, bias_BGN: Tensor) -> QuantisedLayer:
        recent = self.recent.append(
            keys_BGND.to(self.recent.keys_BGSD.dtype), values_BGNE.to(self.recent.values_BGSE.dtype), bias_BGN
        )
        coded, R = self.coded, recent.bias_BGS.shape[2]
        over = max(0, R - self.window) // self.group * self.group
        if over:
            new = _encode_slots(_part(recent, 0, over), self.bits, self.group)
            coded, recent = Coded.cat([coded, new], 2), _part(recent, over, R)
        return QuantisedLayer(coded, recent, bits=self.bits, window=self.window)

    def to(self, device: str | torch.device) -> QuantisedLayer:
        coded = self.coded.map(lambda x: x.to(device))
        return QuantisedLayer(coded, self.recent.to(device), bits=self.bits, window=self.window)

    def row(self, b: int, slots: int) -> QuantisedLayer:
        """One row of the batch, without the padding behind its longest head (`slots` follows from that)."""
        coded = self.coded.map(lambda x: x[b : b + 1])
        used = (coded.bias_BGCg > -torch.inf).any(-1).any(1).flatten().nonzero()
        groups = int(used.max()) + 1 if len(used) else 0
        used = self.recent.present_BGS[b].any(0).nonzero()
        recent = self.recent.row(b, int(used.max()) + 1 if len(used) else 0)
        return QuantisedLayer(
            coded.map(lambda x: x[:, :, :groups]), recent, bits=self.bits, window=self.window
        )

    @staticmethod
    def stack(parts: list[QuantisedLayer]) -> QuantisedLayer:
        """One batch of single-row layers."""
        first = parts[0]
        groups = max(part.coded.bias_BGCg.shape[2] for part in parts)
        coded = Coded.cat([part.coded.padded(groups) for part in parts], 0)
        recent = LayerCache.stack([part.recent for part in parts])
        return QuantisedLayer(coded, recent, bits=first.bits, window=first.window)

    def pack(self) -> dict[str, Tensor]:
        """What a file holds: codes of the slots there are, scales of the groups there are."""
        coded, here = self.coded, self.coded.bias_BGCg > -torch.inf
        used = here.any(-1)
        packed = {"group_counts_BGC": here.sum(-1).short()}
        for field in fields(Coded):
            x = getattr(coded, field.name)
            packed[f"coded.{field.name}"] = x[used] if field.name in _PER_GROUP else x[here]
        if not self.has_bias:
            del packed["coded.bias_BGCg"]
        return packed | {f"recent.{name}": x for name, x in self.recent.pack().items()}

    @classmethod
    def unpack(cls, packed: dict[str, Tensor], *, bits: int, window: int, group: int) -> QuantisedLayer:
        """The layer again."""
        _check_packed(packed, bits, window, group)
        counts = packed["group_counts_BGC"].long()
        here = torch.arange(group, device=counts.device) < counts[..., None]
        parts = {"bias_BGCg": torch.zeros(int(counts.sum()), device=counts.device)}
        parts |= {name[6:]: x for name, x in packed.items() if name.startswith("coded.")}
        coded = {
            name: spread(
                x, counts > 0 if name in _PER_GROUP else here, empty=-torch.inf if "bias" in name else 0
            )
            for name, x in parts.items()
        }
        recent = LayerCache.unpack({name[7:]: x for name, x in packed.items() if name.startswith("recent.")})
        return cls(Coded(**coded), recent, bits=bits, window=window)


def _item_bytes(x: Tensor) -> int:
    return x.shape[-1] * x.element_size()


def _part(layer: LayerCache, first: int, end: int) -> LayerCache:
    keys, values = layer.read()
    return LayerCache(keys[:, :, first:end], values[:, :, first:end], layer.bias_BGS[:, :, first:end])


def _encode_slots(layer: LayerCache, bits: int, group: int) -> Coded:
    """Slots in groups, the last one filled up with padding."""
    E = layer.values_BGSE.shape[-1]
    fill = -layer.bias_BGS.shape[2] % group
    keys = F.pad(layer.keys_BGSD, (0, 0, 0, fill)).unflatten(2, (-1, group))
    values = F.pad(layer.values_BGSE, (0, 0, 0, fill)).unflatten(2, (-1, group))
    bias = F.pad(layer.bias_BGS, (0, fill), value=-torch.inf).unflatten(2, (-1, group))
    present = (bias > -torch.inf)[..., None]
    k, k_lowest, k_step = encode(keys, present, bits, -2)
    channels = group if E % group == 0 else E
    v, v_lowest, v_step = encode(values.unflatten(-1, (-1, channels)), present[..., None], bits, -1)
    return Coded(to_bytes(k, bits), k_lowest, k_step, to_bytes(v.flatten(-2), bits), v_lowest, v_step, bias)


def _check_packed(packed: dict[str, Tensor], bits: Any, window: Any, group: Any) -> None:
    """What the file says against what it holds, before memory is asked for."""
    if bits not in (4, 8) or type(window) is not int or window < 0 or type(group) is not int:
        raise RuntimeError(f"bits={bits!r}, window={window!r}, group={group!r}: no such quantisation")
    counts = packed["group_counts_BGC"]
    expect(counts, "group_counts_BGC", counts.dim(), whole=True)
    if counts.dim() != 3 or not 1 <= group <= torch.iinfo(counts.dtype).max:
        raise RuntimeError(f"group_counts_BGC of shape {tuple(counts.shape)} in groups of {group}")
    parts = {name: x for name, x in packed.items() if name.startswith("coded.")}
    if missing := {f"coded.{field.name}" for field in fields(Coded)} - {*parts, "coded.bias_BGCg"}:
        raise KeyError(sorted(missing)[0])
    slots, groups = int(counts.clamp(min=0).long().sum()), int((counts > 0).sum())
    for name, x in parts.items():
        codes = name in ("coded.keys_BGCgd", "coded.values_BGCge")
        expect(
            x,
            name,
            1 if "bias" in name else 2,
            whole=codes,
            entries=groups if name[6:] in _PER_GROUP else slots,
        )
    each = sum(x[0].numel() * x.element_size() if len(x) else 0 for x in parts.values()) + 8
    # Groups are padded to `group` slots each.
    check_counts(counts, slots, "group_counts_BGC", most=group)
    check_memory(counts.numel() * group * each, "group_counts_BGC")
