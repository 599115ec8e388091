"""Where gates come from when no router proposes them. Shapes: B batch, T tokens, H query heads, G KV heads, D head dim.

| policy      | mask                                                            | gradient |
|-------------|-----------------------------------------------------------------|----------|
| `router`    | method/router.py                                                | yes      |
| `random`    | each slot kept with probability ρ, per token and layer group    | no       |
| `attention` | the ρ·T slots with most accumulated attention, per layer (H2O)  | no       |
| `none`      | no masked pass                                                  | —        |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _mix(x: Tensor) -> Tensor:
    """A 64-bit integer hash (the finaliser of SplitMix64), elementwise on int64 with wrap-around."""

    def shifted(y: Tensor, bits: int) -> Tensor:
        return (y >> bits) & ((1 << (64 - bits)) - 1)  # logical, where torch's own shift keeps the sign

    x = (x ^ shifted(x, 30)) * -4658895280553007687
    x = (x ^ shifted(x, 27)) * -7723592293110705685
    return x ^ shifted(x, 31)


def prefix_ids(tokens_BT: Tensor) -> Tensor:
    """A number for each token, from the window up to it: the same on every rank and layout, and after every resume.

    Args:
        tokens_BT: integer token ids.

    Returns:
        [B, T] int64; a later token changes none of the earlier numbers.
    """
    position = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    return _mix(_mix(position) ^ tokens_BT.to(torch.int64)).cumsum(1)


def random_gate(prefix_ids_BT: Tensor, *, keep: float, seed: int, group: int) -> Tensor:
    """Each slot is kept with probability `keep`, from a hash of (seed, group, window up to the slot, position).

    No generator state: every layout, rank and recomputation draws the same mask for the same window.

    Args:
        prefix_ids_BT: int64, a number per token (`prefix_ids`).

    Returns:
        [B, T] float32 of zeros and ones.
    """
    ids = prefix_ids_BT.to(torch.int64)
    position = torch.arange(ids.shape[1], device=ids.device)
    stream = _mix(ids + _mix(torch.tensor(seed * 1000003 + group, device=ids.device)))
    bits = _mix(stream + position * -7046029254386353131)
    uniform = ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64) / (1 << 53)
    return (uniform < keep).to(torch.float32)


@torch.no_grad()
def accumulated_attention(q_BTHD: Tensor, k_BTGD: Tensor, *, scale: float, block: int = 512) -> Tensor:
    """Attention mass that each slot receives from all queries of the window, summed over heads, [B, T].

    Computed in blocks of queries, so that no T×T matrix exists per head.
    """
    B, T, H, D = q_BTHD.shape
    G = k_BTGD.shape[2]
    k = k_BTGD.float().permute(0, 2, 3, 1)[:, :, None]
    mass = q_BTHD.new_zeros(B, T, dtype=torch.float32)
    j = torch.arange(T, device=q_BTHD.device)
    for start in range(0, T, block):
        q = q_BTHD[:, start : start + block].float().view(B, -1, G, H // G, D).permute(0, 2, 3, 1, 4)
        i = torch.arange(start, start + q.shape[3], device=q.device)
        s = (q @ k * scale).masked_fill(j > i[:, None], float("-inf"))
        mass += s.softmax(-1).sum((1, 2, 3))
    return mass


def attention_gate(mass_BT: Tensor, keep: float) -> Tensor:
    """Keep the ⌈keep·T⌉ slots of largest mass. The mass is of the whole window, so this gate, unlike the router's, looks ahead."""
    kept = math.ceil(keep * mass_BT.shape[1])
    return torch.zeros_like(mass_BT).scatter(1, mass_BT.topk(kept, dim=1).indices, 1.0)
