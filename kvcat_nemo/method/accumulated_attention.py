"""H2O's gates (arXiv 2306.14048): the slots that get most attention. Shapes: B batch, T tokens, H query heads, G KV heads, D head dim."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvcat_nemo.method.attention import document_lengths


@torch.no_grad()
def accumulated_attention(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    *,
    scale: float,
    block: int = 512,
    places_T: Tensor | None = None,
    position_BT: Tensor | None = None,
) -> Tensor:
    """Attention mass that each slot receives from the given queries, summed over heads, [B, T of the slots].

    Computed in blocks of queries, so that no T×T matrix exists per head.

    Args:
        q_BTHD, k_BTGD: queries, and the whole window's keys.
        places_T: each query's place in the window; None: there is a query for every slot.
        position_BT: each slot's place in its document, [B, T of the slots]; no attention across documents.
    """
    B, queries, H, D = q_BTHD.shape
    T, G = k_BTGD.shape[1:3]
    wide = torch.promote_types(q_BTHD.dtype, torch.float32)
    k = k_BTGD.to(wide).permute(0, 2, 3, 1)[:, :, None]
    mass = q_BTHD.new_zeros(B, T, dtype=wide)
    j = torch.arange(T, device=q_BTHD.device)
    places = j if places_T is None else places_T
    for start in range(0, queries, block):
        q = q_BTHD[:, start : start + block].to(wide).view(B, -1, G, H // G, D).permute(0, 2, 3, 1, 4)
        i = places[start : start + block, None]
        hidden = j > i
        if position_BT is not None:
            hidden = hidden | (j < i - position_BT[:, i[:, 0], None])
            hidden = hidden[:, None, None]
        s = (q @ k * scale).masked_fill(hidden, float("-inf"))
        mass += s.softmax(-1).sum((1, 2, 3))
    return mass


def attention_gate(mass_BT: Tensor, keep: float, position_BT: Tensor | None = None) -> Tensor:
    """Keep the ⌈keep·T⌉ slots of largest mass, of each document of T tokens (position_BT: places in them).

    The mass is of the whole document, so this gate, unlike the router's, looks ahead.
    """
    if position_BT is None:
        kept = math.ceil(keep * mass_BT.shape[1])
        return torch.zeros_like(mass_BT).scatter(1, mass_BT.topk(kept, dim=1).indices, 1.0)
    document = (position_BT == 0).cumsum(1)
    # By document, and in it by mass: the second sort keeps the first one's order.
    order = mass_BT.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, document.gather(1, order).argsort(dim=1, stable=True))
    # Documents keep their places, so position_BT ranks the sorted ones too.
    length = document_lengths(position_BT)
    kept = position_BT < torch.ceil(keep * length)
    return torch.zeros_like(mass_BT).scatter(1, order, kept.to(mass_BT.dtype))
