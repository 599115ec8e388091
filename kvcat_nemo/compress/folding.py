"""A cache without biases: each slot's bias becomes part of its key, so that any attention kernel reads the cache.

A slot's bias β asks for a constant on the slot's logit, scale·⟨q, k⟩ + β. Engines have no place for it. But the queries of
a KV head share a direction: with d such that scale·⟨q, d⟩ ≈ 1 for them, the key k + β·d carries the bias. Values are then
fitted once more to the attention that is read now. (A d for each slot, fitted to the queries that look at the slot, was no
better and cost a third more: docs/LOG.md.)

Shapes: G KV heads, Q reference queries, K slots, D and E head dims of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcat_nemo.compress.attention_matching_fit import Reference, fit_values, logits

KEY_RIDGE = 1e-3
"""Of the mean diagonal of the queries' second moment: how strongly d is drawn to 0."""


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
    d_GD = shared_direction(q, scale, key_ridge)
    keys = (k + bias_GK.to(wide)[..., None] * d_GD[:, None]).to(k_GKD.dtype)
    # Values are fitted to the keys as they are kept.
    attention = logits(q, keys.to(wide), scale).softmax(-1)
    return keys, fit_values(attention, target.output_GQE.to(wide), v, value_ridge).to(v_GKE.dtype)


def shared_direction(q_GQD: Tensor, scale: float, ridge: float) -> Tensor:
    """d [G, D] = argmin mean_q (scale·⟨q, d⟩ − 1)² + λ‖d‖², λ being `ridge` times the mean square of scale·q."""
    q = q_GQD * scale
    second_GDD = torch.stack([(x.T @ x).double() / len(x) for x in q])
    mean_square = second_GDD.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True)
    second_GDD.diagonal(dim1=1, dim2=2).add_(ridge * mean_square)
    d = torch.cholesky_solve(q.double().mean(1)[..., None], torch.linalg.cholesky(second_GDD))
    return d[..., 0].to(q.dtype)
