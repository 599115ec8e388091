"""A cache without biases: each slot's bias becomes part of its key, so that any attention kernel reads the cache.

A slot's bias β asks for a constant on the slot's logit, scale·⟨q, k⟩ + β. Engines have no place for it. But the queries of
a KV head share a direction: with δ such that scale·⟨q, δ⟩ ≈ β for the queries that look at the slot, the key k + δ carries
the bias. Values are then fitted once more to the attention that is read now.

Shapes: G KV heads, Q reference queries, K slots, D and E head dims of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcat_nemo.compress.matching import Reference, fit_values, logits

KEY_RIDGE = 1e-3
"""Of the mean diagonal of the queries' second moment: how strongly δ is drawn to 0."""
_MOST = 1024
"""Queries of a head that δ is fitted to; evenly spaced."""
_SHARED = 0.1
_AT_ONCE = 2**25  # numbers: of Q·D², 128 MB in float32


def fold(
    q_GQD: Tensor,
    k_GKD: Tensor,
    v_GKE: Tensor,
    bias_GK: Tensor,
    target: Reference,
    scale: float,
    *,
    key_ridge: float = KEY_RIDGE,
    value_ridge: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Keys that carry the biases, and values fitted to what attention without biases gives.

    Args:
        target: attention of the queries over all slots of the context.

    Returns:
        keys [G, K, D] and values [G, K, E], of the types of k and v.
    """
    wide = torch.float64 if k_GKD.dtype == torch.float64 else torch.float32
    q, k, v = q_GQD.to(wide), k_GKD.to(wide), v_GKE.to(wide)
    keys = (k + directions(q, k, bias_GK.to(wide), scale, key_ridge)).to(k_GKD.dtype)
    # Values are fitted to the keys as they are kept.
    attention = logits(q, keys.to(wide), scale).softmax(-1)
    return keys, fit_values(attention, target.output_GQE.to(wide), v, value_ridge).to(v_GKE.dtype)


def directions(q_GQD: Tensor, k_GKD: Tensor, bias_GK: Tensor, scale: float, ridge: float) -> Tensor:
    """δ [G, K, D] with scale·⟨q, δ_k⟩ ≈ β_k, for each slot by weighted ridge least squares.

    δ_k = argmin Σ_q w_qk (scale·⟨q, δ⟩ − β_k)² + λ‖δ‖², where w_qk is the attention that query q gives slot k, mixed with
    an even share of all queries (a slot that few of them look at must not gain a logit with the others), Σ_q w_qk = 1, and
    λ is `ridge` times the mean diagonal of the queries' second moment.
    """
    step = -(-q_GQD.shape[1] // _MOST)
    out = []
    for q, k, bias in zip(q_GQD[:, ::step] * scale, k_GKD, bias_GK, strict=True):
        weight_QK = (q @ k.T + bias).softmax(-1)
        weight_QK = weight_QK / weight_QK.sum(0).clamp(min=torch.finfo(q.dtype).tiny)
        weight_QK = (1 - _SHARED) * weight_QK + _SHARED / len(q)
        D = q.shape[1]
        square_QDD = (q[:, :, None] * q[:, None, :]).reshape(len(q), D * D)
        second_KDD = (weight_QK.T @ square_QDD).view(-1, D, D).double()
        mean_KD = (weight_QK.T @ q).double()
        wanted_KD = bias.double()[:, None] * mean_KD
        second_KDD.diagonal(dim1=1, dim2=2).add_(ridge * float(q.square().mean()))
        solved = torch.cholesky_solve(wanted_KD[..., None], torch.linalg.cholesky(second_KDD))[..., 0]
        out.append(solved.to(q.dtype))
    return torch.stack(out)
