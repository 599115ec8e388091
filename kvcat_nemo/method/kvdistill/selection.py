"""Which tokens of a context are kept, how many, and what their slots weigh in training (arXiv 2503.10337).

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvcat_nemo.method.hashing import uniform

KEEP_STREAM = -3


def choose(score_BT: Tensor, context_BT: Tensor, kept_B: Tensor, whole_BT: Tensor | None = None) -> Tensor:
    """The tokens of each context that stay: those that must, and of the others those of the highest scores.

    Args:
        score_BT: the scorer's numbers; equal scores go to the earlier token.
        context_BT: bool, the tokens of each window that are its context. Others are never chosen.
        kept_B: int64, how many tokens stay in all. Where more must stay, those stay; where the context has fewer, all do.
        whole_BT: bool, context tokens that must stay (the first ones, spans that are not compressible); None: none.

    Returns:
        [B, T] bool, no gradient.
    """
    score = score_BT.detach()
    score = torch.where(score.isnan(), torch.full_like(score, -math.inf), score)
    must = torch.zeros_like(context_BT) if whole_BT is None else whole_BT & context_BT
    # Three classes that no score crosses: what must stay, the rest of the context, everything else.
    rank = must.to(torch.int8) * 2 + (context_BT & ~must).to(torch.int8)
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, rank.gather(1, order).argsort(dim=1, descending=True, stable=True))
    count = torch.minimum(torch.maximum(kept_B, must.sum(1)), context_BT.sum(1))
    place = torch.arange(score.shape[1], device=score.device)
    return torch.zeros_like(context_BT).scatter(1, order, place < count[:, None])


def always_kept(context_BT: Tensor, first: int) -> Tensor:
    """[B, T] bool: the first `first` tokens of each window's context."""
    return context_BT & (context_BT.cumsum(1) <= first)


def draw_keep_fraction(ids_B: Tensor, *, keep_min: float, keep_max: float, seed: int) -> Tensor:
    """The kept fraction of each example: its logarithm is uniform between those of the two bounds.

    No generator state: every rank and layout, and every resumed run, draws the same fraction for the same example.

    Args:
        ids_B: int64, a number for each example.

    Returns:
        [B] float64.
    """
    drawn = uniform(ids_B, torch.zeros_like(ids_B), seed, KEEP_STREAM)
    return keep_min * (keep_max / keep_min) ** drawn


def kept_tokens(fraction_B: Tensor, context_BT: Tensor) -> Tensor:
    """⌈fraction · tokens of the context⌉, int64."""
    return torch.ceil(fraction_B * context_BT.sum(1)).to(torch.int64)


def slot_gates(score_BT: Tensor, chosen_BT: Tensor, whole_BT: Tensor, *, dropped_gradient: bool) -> Tensor:
    """What the answer's rows see of a context's slots: σ(score) of chosen ones, 1 of those that must stay, 0 of the others.

    The paper writes σ(score) as a factor on unnormalised logits. That would raise negative logits, so it is read as a factor
    on the slot's weight: log σ(score) is added to the logit, as gated attention does.

    Args:
        dropped_gradient: whether the gradient of a slot that was not chosen reaches its score, straight through its gate of 0.

    Returns:
        [B, T] in the scores' dtype.
    """
    soft = score_BT.sigmoid()
    gate = soft * chosen_BT
    if dropped_gradient:
        gate = gate + (soft - soft.detach()) * ~chosen_BT
    return torch.where(whole_BT, torch.ones_like(gate), gate)
