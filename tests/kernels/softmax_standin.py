"""What a fused attention kernel promises, in dense float64: the arithmetic behind both stand-ins.

Forward gives o = P·v and lse = log Σ exp(scale·⟨q, k⟩); backward knows nothing but its arguments, as the kernels do:
P = exp(scale·⟨q, k⟩ − lse), δ = Σ_c do·o over all columns of the very o it is given, ds = P ⊙ (do·vᵀ − δ).

Shapes: H query heads, G KV heads, S tokens of one document (without causality k and v may have another number), D head
dim of q and k, E of v and o.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcat_nemo.doctor.kernel_oracle import documents, forward, scores

__all__ = ["backward", "dense_view", "documents", "forward"]


def backward(
    do_SHE, q_SHD, k_SGD, v_SGE, o_SHE, lse_HS, scale: float, left: int, causal: bool = True
) -> tuple[Tensor, ...]:
    """One document: (dq, dk, dv) in float64."""
    G = k_SGD.shape[1]
    N = q_SHD.shape[1] // G
    do, q, o = do_SHE.double(), q_SHD.double(), o_SHE.double()
    k, v = (x.double().repeat_interleave(N, 1) for x in (k_SGD, v_SGE))
    p = (scores(q_SHD, k_SGD, scale, left, causal) - lse_HS.double()[..., None]).exp()
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
