"""Gates and cuts that are drawn from the tokens alone, by hashes: no generator state, so that layouts, recomputation and resume agree.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcat_nemo.method.attention import document_lengths


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
    places = (document_lengths(position).long() - 1 - position).div(multiple, rounding_mode="floor") + 1
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
