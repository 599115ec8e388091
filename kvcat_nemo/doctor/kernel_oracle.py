"""Dense softmax attention in float64 and random inputs: what the cases and the tests of fused kernels are held to.

Shapes: B batch, T tokens, H query heads, G KV heads, S tokens of one document (without causality k and v may have another
number), D head dim of q and k, E of v and o.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores(q_SHD: Tensor, k_SGD: Tensor, scale: float, left: int, causal: bool) -> Tensor:
    """[H, S, S] scores; left ≥ 0: a query sees itself and the left slots before it."""
    S, H, _ = q_SHD.shape
    k_SHD = k_SGD.double().repeat_interleave(H // k_SGD.shape[1], 1)
    s = torch.einsum("shd,thd->hst", q_SHD.double(), k_SHD) * scale
    if not causal:
        if left != -1:
            raise ValueError("a window needs causal attention")
        return s
    place = torch.arange(S, device=s.device)
    distance = place[:, None] - place[None, :]
    seen = distance >= 0
    if left >= 0:
        seen &= distance <= left
    return s.masked_fill(~seen, float("-inf"))


def forward(
    q_SHD: Tensor, k_SGD: Tensor, v_SGE: Tensor, scale: float, left: int, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """One document: (o [S, H, E], lse [H, S]), both float64."""
    s = scores(q_SHD, k_SGD, scale, left, causal)
    lse = s.logsumexp(-1)
    v = v_SGE.double().repeat_interleave(q_SHD.shape[1] // v_SGE.shape[1], 1)
    return torch.einsum("hst,the->she", (s - lse[..., None]).exp(), v), lse


def documents(cu_seqlens: Tensor) -> list[slice]:
    """The token ranges of a packed stream."""
    bounds = cu_seqlens.tolist()
    return [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def random_case(shape, dtype=torch.float64, seed: int = 0, strided: bool = False) -> list[Tensor]:
    """q, k, v, do of shape (B, T, H, G, D, E); strided: as slices of a wider tensor in another order of dimensions."""
    B, T, H, G, D, E = shape
    rng = torch.Generator().manual_seed(seed)

    def one(heads, width):
        if strided:
            return torch.randn(T, heads, B, width + 3, generator=rng, dtype=torch.float64)[
                ..., :width
            ].permute(2, 0, 1, 3)
        return torch.randn(B, T, heads, width, generator=rng, dtype=torch.float64)

    return [one(heads, width).to(dtype) for heads, width in ((H, D), (G, D), (G, E), (H, E))]


def reference(q, k, v, do, *, scale, window=None, cu_seqlens=None) -> tuple[Tensor, ...]:
    """o, lse, dq, dk, dv by PyTorch's autograd over the dense softmax, document by document."""
    leaves = [x.detach().double().clone().requires_grad_() for x in (q, k, v)]
    if cu_seqlens is None:
        pieces = [tuple(x[row] for x in leaves) for row in range(q.shape[0])]
    else:
        pieces = [tuple(x[0, at] for x in leaves) for at in documents(cu_seqlens)]
    left = -1 if window is None else window - 1
    outs, lses = zip(*(forward(*piece, scale, left) for piece in pieces), strict=True)
    if cu_seqlens is None:
        o, lse = torch.stack(outs), torch.stack(lses)
    else:
        o, lse = torch.cat(outs)[None], torch.cat(lses, -1)[None]
    return o.detach(), lse.detach(), *torch.autograd.grad((o * do.double()).sum(), leaves)
