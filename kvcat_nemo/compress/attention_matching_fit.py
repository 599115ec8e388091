"""Attention Matching's closed forms (arXiv 2602.16284): fewer slots that attend as all of them do.

Everything is of one layer and batched over its KV heads; a KV head's reference queries are those of all its query
heads. The paper's E = exp(logit − row maximum) is divided by its row sum here: masses are then the attention itself,
their target is 1, and a query whose attention is spread thin counts as much as one that looks at a single slot.

Shapes: G KV heads, Q reference queries, T slots, K kept slots, D and E head dims of keys and values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcat_nemo.compress.solvers.bounded_least_squares import bounded_least_squares

LOW, HIGH = math.exp(-3), math.exp(3)
"""Bounds of a slot's weight B = exp β."""
_JITTER = 1e-6  # of each diagonal entry: what rounding of a float32 Gram matrix may be worth
_BLOCK = 512


@dataclass
class Reference:
    """What attention over all slots gives the reference queries."""

    lse_GQ: Tensor
    """log Σ_t exp(scale·⟨q, k_t⟩)."""
    output_GQE: Tensor
    """Attention output."""
    masses_GQK: Tensor | None = None
    """Attention that the slots asked for get."""
    score_GT: Tensor | None = None
    """Root mean square over the queries of the attention each slot gets; where no slots were asked for."""


def product(a_GQD: Tensor, b_GDT: Tensor) -> Tensor:
    """a @ b, [G, Q, T].

    On a CPU head by head, all cores at each: `torch.bmm` deals whole heads out to cores, and three heads on two cores took
    1.5 times as long.
    """
    if a_GQD.device.type != "cpu":
        return torch.bmm(a_GQD, b_GDT)
    out = a_GQD.new_empty(*a_GQD.shape[:2], b_GDT.shape[2])
    for a, b, into in zip(a_GQD, b_GDT, out, strict=True):
        torch.mm(a, b, out=into)
    return out


def logits(q_GQD: Tensor, k_GTD: Tensor, scale: float) -> Tensor:
    """scale·⟨q, k⟩, [G, Q, T]."""
    return product(q_GQD * scale, k_GTD.transpose(1, 2))


def scores(q_GQD: Tensor, k_GTD: Tensor, scale: float) -> Tensor:
    """Root mean square over the queries of the attention that each slot gets, [G, T]."""
    squares = torch.zeros_like(k_GTD[..., 0])
    for q in q_GQD.split(_BLOCK, 1):
        squares += logits(q, k_GTD, scale).softmax(-1).square_().sum(1)
    return (squares / q_GQD.shape[1]).sqrt()


def reference(
    q_GQD: Tensor, k_GTD: Tensor, v_GTE: Tensor, scale: float, places_GK: Tensor | None = None
) -> Reference:
    """Attention of the queries over all slots, none of them hidden, in blocks of queries.

    Args:
        places_GK: slots whose masses are wanted.
    """
    lse, outputs, masses = [], [], []
    squares = torch.zeros_like(k_GTD[..., 0])
    for q in q_GQD.split(_BLOCK, 1):
        s = logits(q, k_GTD, scale)
        # One pass of exponentials: the log-sum-exp is what softmax took off the largest logit.
        a = s.softmax(-1)
        lse.append(s.amax(-1) - a.amax(-1).log())
        outputs.append(product(a, v_GTE))
        if places_GK is None:
            squares += a.square_().sum(1)
        else:
            masses.append(a.gather(2, places_GK[:, None].expand(-1, a.shape[1], -1)))
    found = Reference(torch.cat(lse, 1), torch.cat(outputs, 1))
    if places_GK is None:
        found.score_GT = (squares / q_GQD.shape[1]).sqrt()
    else:
        found.masses_GQK = torch.cat(masses, 1)
    return found


def fit_weights(m_GQK: Tensor, ridge: float) -> Tensor:
    """B in [e⁻³, e³] that gives every query its mass back: argmin mean_q (Σ_k m_qk·B_k − 1)² + ridge·Σ_k (B_k − 1)².

    Args:
        m_GQK: attention, in the softmax over all slots, that the kept slots get.

    Returns:
        [G, K] float64.
    """
    Q = m_GQK.shape[1]
    H = product(m_GQK.transpose(1, 2), m_GQK).double() / Q
    c = m_GQK.sum(1).double() / Q
    H.diagonal(dim1=1, dim2=2).mul_(1 + _JITTER).add_(ridge)
    return bounded_least_squares(H, c + ridge, LOW, HIGH)


def fit_values(x_GQK: Tensor, y_GQE: Tensor, old_GKE: Tensor, ridge: float) -> Tensor:
    """Values with which attention x gives y: argmin_C mean_q ‖x_q·C − y_q‖² + ridge·‖C − old‖².

    The ridge draws towards the slots' own values: what the queries don't determine stays as it was, and no value grows
    to 1e15, as plain least squares lets them when two slots are attended alike.

    Returns:
        [G, K, E] of the type of `old`.
    """
    Q = x_GQK.shape[1]
    H = product(x_GQK.transpose(1, 2), x_GQK).double() / Q
    c = product(x_GQK.transpose(1, 2), y_GQE - product(x_GQK, old_GKE)).double() / Q
    H.diagonal(dim1=1, dim2=2).mul_(1 + _JITTER).add_(ridge)
    change = torch.cholesky_solve(c, torch.linalg.cholesky(H))
    return old_GKE + change.to(old_GKE.dtype)


def match(
    q_GQD: Tensor,
    k_GKD: Tensor,
    v_GKE: Tensor,
    target: Reference,
    scale: float,
    *,
    ridge: float,
    weight_ridge: float,
) -> tuple[Tensor, Tensor]:
    """β = log B [G, K] float32 and values [G, K, E] of the kept slots, fitted to the target."""
    s = logits(q_GQD, k_GKD, scale)
    # β rounds to float32 in the cache: values are fitted to what will be read.
    beta = fit_weights((s - target.lse_GQ[..., None]).exp_(), weight_ridge).log().float()
    x = (s + beta.to(s.dtype)[:, None]).softmax(-1)
    return beta, fit_values(x, target.output_GQE, v_GKE, ridge)


def attend(
    q_GQD: Tensor, k_GKD: Tensor, v_GKE: Tensor, bias_GK: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """log-sum-exp [G, Q] and output [G, Q, E] of attention over slots with biases, in blocks of queries."""
    lse, outputs = [], []
    for q in q_GQD.split(_BLOCK, 1):
        s = logits(q, k_GKD, scale) + bias_GK.to(q.dtype)[:, None]
        lse.append(s.logsumexp(-1))
        outputs.append(product(s.sub_(lse[-1][..., None]).exp_(), v_GKE))
    return torch.cat(lse, 1), torch.cat(outputs, 1)
