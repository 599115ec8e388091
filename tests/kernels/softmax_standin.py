"""What a fused attention kernel promises, in dense float64: the arithmetic behind both stand-ins.

Forward gives o = P·v and lse = log Σ exp(scale·⟨q, k⟩); backward knows nothing but its arguments, as the kernels do:
P = exp(scale·⟨q, k⟩ − lse), δ = Σ_c do·o over all columns of the very o it is given, ds = P ⊙ (do·vᵀ − δ).

Shapes: H query heads, G KV heads, S tokens of one document (without causality k and v may have another number), D head
dim of q and k, E of v and o.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _scores(q_SHD: Tensor, k_SGD: Tensor, scale: float, left: int, causal: bool) -> Tensor:
    """[H, S, S] scores; left ≥ 0: a query sees itself and the left slots before it."""
    S, H, _ = q_SHD.shape
    k_SHD = k_SGD.double().repeat_interleave(H // k_SGD.shape[1], 1)
    s = torch.einsum("shd,thd->hst", q_SHD.double(), k_SHD) * scale
    if not causal:
        assert left == -1
        return s
    distance = torch.arange(S)[:, None] - torch.arange(S)[None, :]
    seen = (distance >= 0) & ((distance <= left) if left >= 0 else torch.ones(S, S, dtype=torch.bool))
    return s.masked_fill(~seen, float("-inf"))


def forward(
    q_SHD: Tensor, k_SGD: Tensor, v_SGE: Tensor, scale: float, left: int, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """One document: (o [S, H, E], lse [H, S]), both float64."""
    s = _scores(q_SHD, k_SGD, scale, left, causal)
    lse = s.logsumexp(-1)
    v = v_SGE.double().repeat_interleave(q_SHD.shape[1] // v_SGE.shape[1], 1)
    return torch.einsum("hst,the->she", (s - lse[..., None]).exp(), v), lse


def backward(
    do_SHE, q_SHD, k_SGD, v_SGE, o_SHE, lse_HS, scale: float, left: int, causal: bool = True
) -> tuple[Tensor, ...]:
    """One document: (dq, dk, dv) in float64."""
    G = k_SGD.shape[1]
    N = q_SHD.shape[1] // G
    do, q, o = do_SHE.double(), q_SHD.double(), o_SHE.double()
    k, v = (x.double().repeat_interleave(N, 1) for x in (k_SGD, v_SGE))
    p = (_scores(q_SHD, k_SGD, scale, left, causal) - lse_HS.double()[..., None]).exp()
    delta = torch.einsum("she,she->hs", do, o)
    ds = p * (torch.einsum("she,the->hst", do, v) - delta[..., None]) * scale
    dk = torch.einsum("hst,shd->thd", ds, q).unflatten(1, (G, N)).sum(2)
    dv = torch.einsum("hst,she->the", p, do).unflatten(1, (G, N)).sum(2)
    return torch.einsum("hst,thd->shd", ds, k), dk, dv


def dense_view(x: Tensor) -> Tensor:
    """x as a kernel that ignores strides reads it: the memory from x's first element on, in x's shape."""
    strides, step = [], 1
    for size in reversed(x.shape):
        strides.insert(0, step)
        step *= size
    return x.as_strided(x.shape, strides, x.storage_offset())


def documents(cu_seqlens: Tensor) -> list[slice]:
    """The token ranges of a packed stream."""
    bounds = cu_seqlens.tolist()
    return [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
