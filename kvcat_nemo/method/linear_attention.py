"""Causal linear attention in chunks: O(T) memory, equal to the quadratic form.

Shapes: B batch, T tokens, N chunks, C tokens of a chunk, R width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def quadratic_linear_attention(q_BTR: Tensor, k_BTR: Tensor, v_BTR: Tensor, eps: float = 1e-6) -> Tensor:
    """a_t = qₜᵀ Σ_{j≤t} kⱼ vⱼᵀ / (qₜᵀ Σ_{j≤t} kⱼ + ε), by the T×T matrix. The oracle of the chunked form.

    Args:
        q_BTR, k_BTR: non-negative features, [batch, tokens, width].
        v_BTR: values, [batch, tokens, width].

    Returns:
        [batch, tokens, width].
    """
    weight_BTT = torch.tril(q_BTR @ k_BTR.transpose(1, 2))
    return weight_BTT @ v_BTR / (weight_BTT.sum(-1, keepdim=True) + eps)


def chunked_linear_attention(
    q_BTR: Tensor, k_BTR: Tensor, v_BTR: Tensor, eps: float = 1e-6, chunk: int = 128
) -> Tensor:
    """The same by chunks: inside a chunk by a C×C matrix, before it by the running state Σ kⱼ vⱼᵀ.

    One state of R×(R+1) numbers is kept per chunk, so memory is T·(C + R²/C) numbers and not T².

    Args, returns: as `quadratic_linear_attention`; any T, the last chunk is padded with zeros.
    """
    B, T, R = q_BTR.shape
    pad = -T % chunk
    # A column of ones makes the normaliser qᵀz one more output column of the same sums.
    v1 = F.pad(v_BTR, (0, 1), value=1.0)
    q, k, v = (F.pad(x, (0, 0, 0, pad)).view(B, -1, chunk, x.shape[-1]) for x in (q_BTR, k_BTR, v1))
    inside = torch.tril(q @ k.transpose(-1, -2)) @ v
    state_BNRR = k.transpose(-1, -2) @ v
    # Shifted by a chunk, not `cumsum − own`: subtraction would leave rounding of later tokens in earlier outputs.
    before = F.pad(state_BNRR.cumsum(1)[:, :-1], (0, 0, 0, 0, 1, 0))
    out = (inside + q @ before).reshape(B, T + pad, R + 1)[:, :T]
    return out[..., :R] / (out[..., R:] + eps)
