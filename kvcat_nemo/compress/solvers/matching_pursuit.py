"""Greedy choice of slots whose weighted masses add up to the full attention's (orthogonal matching pursuit).

Shapes: G KV heads, Q reference queries, T slots, K kept slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcat_nemo.compress.attention_matching_fit import _JITTER, HIGH, LOW, product
from kvcat_nemo.compress.solvers.bounded_least_squares import bounded_least_squares


def pursue(m_GQT: Tensor, slots: int, ridge: float, block: int = 1, steps: int = 50) -> Tensor:
    """Take the slots that go with the residual 1 − Σ_k m_k·B_k best, `block` at a time; B is fitted anew each time.

    All inner products come from one Gram matrix: a step costs T·K, not Q·T. Steps go over kept slots, heads are batched.

    Args:
        m_GQT: attention over all slots.
        ridge: as in `fit_weights`.
        steps: of the solver at each fit; two choose the same slots as the exact solution, nearly always.

    Returns:
        [G, slots] places, in the order in which they were taken.
    """
    Q = m_GQT.shape[1]
    gram = product(m_GQT.transpose(1, 2), m_GQT) / Q
    goal = (m_GQT.sum(1) / Q).double()
    places = torch.empty(len(gram), 0, dtype=torch.long, device=gram.device)
    weights = goal.new_empty(len(gram), 0)
    correlation = goal
    while places.shape[1] < slots:
        best = (
            correlation.scatter(1, places, -torch.inf).topk(min(block, slots - places.shape[1]), -1).indices
        )
        places = torch.cat([places, best], 1)
        rows = gram.gather(1, places[..., None].expand(-1, -1, gram.shape[2])).double()
        H = rows.gather(2, places[:, None].expand(-1, places.shape[1], -1))
        H.diagonal(dim1=1, dim2=2).mul_(1 + _JITTER).add_(ridge)
        start = torch.cat([weights, torch.ones_like(best, dtype=goal.dtype)], 1)
        weights = bounded_least_squares(
            H, goal.gather(1, places) + ridge, LOW, HIGH, start_GK=start, steps=steps
        )
        correlation = goal - (weights[:, None] @ rows)[:, 0]
    return places
