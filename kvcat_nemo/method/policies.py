"""Where gates come from when no router proposes them. Shapes: B batch, T tokens, H query heads, G KV heads, D head dim.

| policy      | mask                                                            | gradient |
|-------------|-----------------------------------------------------------------|----------|
| `router`    | method/router.py                                                | yes      |
| `random`    | each slot kept with probability ρ, per token and layer group;   | no       |
|             | with `mask_span=prefix` behind a cut alone, ρ of each window    |          |
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


def prefix_ids(tokens_BT: Tensor, position_BT: Tensor | None = None) -> Tensor:
    """A number for each token, from its document up to it: the same on every rank and layout, and after every resume.

    Args:
        tokens_BT: integer token ids of whole windows.
        position_BT: each token's place in its document; None: a window is one document.

    Returns:
        [B, T] int64; a later token changes none of the earlier numbers, nor does another document.
    """
    place = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    position = place if position_BT is None else position_BT
    terms = _mix(_mix(position) ^ tokens_BT.to(torch.int64))
    sums = terms.cumsum(1)
    if position_BT is None:
        return sums
    first = place - position_BT
    return sums - (sums - terms).gather(1, first)  # integers: exact, wrapped around or not


def _uniform(ids: Tensor, position: Tensor, seed: int, stream: int) -> Tensor:
    """A number in [0, 1) for each token, float64, from a hash of (seed, stream, its id, its position)."""
    ids = ids.to(torch.int64)
    # new_full, not torch.tensor(…, device): a copy from the host would make it wait for a GPU.
    mixed = _mix(ids + _mix(ids.new_full((), seed * 1000003 + stream)))
    bits = _mix(mixed + position * -7046029254386353131)
    return ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64) / (1 << 53)


CUT_STREAM, KEEP_STREAM = -1, -2  # those of layer groups are 0 and above


def random_prefix(
    prefix_ids_BT: Tensor,
    *,
    keep_min: float,
    keep_max: float,
    seed: int,
    multiple: int = 1,
    position_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Where each document is cut, and the fraction of its prefix that is kept.

    A document of n tokens is cut at one of 1 … n − 1, each as likely, or at one of the multiples of `multiple` among them; the
    logarithm of the fraction is uniform between the two bounds. Both are drawn as `random_gate` draws, so that layouts,
    recomputation and resume agree. They are causal: the cut falls at t, if at no place before, with probability 1 over the
    number of places from t on, from a hash of the tokens before t.

    Args:
        prefix_ids_BT, position_BT: as random_gate's.

    Returns:
        [B, T] bool, true at the first token behind a cut (at none in documents of `multiple` tokens or fewer), and [B, T]
        float64, the kept fraction of each token's document; 0 in those that are not cut.
    """
    B, T = prefix_ids_BT.shape
    place = torch.arange(T, device=prefix_ids_BT.device).expand(B, T)
    position = place if position_BT is None else position_BT
    before = prefix_ids_BT.roll(1, 1)  # where a document begins, another's: position 0 is no cut
    draw = _uniform(before, position, seed, CUT_STREAM)
    places = (_document_lengths(position).long() - 1 - position).div(multiple, rounding_mode="floor") + 1
    hit = (position >= 1) & (position % multiple == 0) & (draw * places < 1)
    hits = hit.cumsum(1)
    begin = place - position
    hits = hits - (hits - hit.long()).gather(1, begin)  # of the document alone
    cut = hit & (hits == 1)
    keep = keep_min * (keep_max / keep_min) ** _uniform(before, position, seed, KEEP_STREAM)
    document = (position == 0).cumsum(1) - 1
    return cut, torch.zeros_like(keep).scatter_add_(1, document, keep * cut).gather(1, document)


def random_gate(
    prefix_ids_BT: Tensor, *, keep: float | Tensor, seed: int, group: int, position_BT: Tensor | None = None
) -> Tensor:
    """Each slot is kept with probability `keep`, from a hash of (seed, group, document up to the slot, position).

    No generator state: every layout, rank and recomputation draws the same mask for the same window.

    Args:
        prefix_ids_BT: int64, a number per token (`prefix_ids`); position_BT: as there.
        keep: of all slots, or [B, T] of each.

    Returns:
        [B, T] float32 of zeros and ones.
    """
    position = torch.arange(prefix_ids_BT.shape[1], device=prefix_ids_BT.device)
    uniform = _uniform(prefix_ids_BT, position if position_BT is None else position_BT, seed, group)
    return (uniform < keep).to(torch.float32)


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
    length = _document_lengths(position_BT)
    kept = position_BT < torch.ceil(keep * length)
    return torch.zeros_like(mass_BT).scatter(1, order, kept.to(mass_BT.dtype))


def _document_lengths(position_BT: Tensor) -> Tensor:
    """Tokens of each token's document, [B, T] float64."""
    document = (position_BT == 0).cumsum(1)
    same = torch.zeros_like(document).scatter_add_(1, document - 1, torch.ones_like(document))
    return same.gather(1, document - 1).double()
