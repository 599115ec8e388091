"""The slots of a query that no gate hides: its own one, or its last few. Part of kernels/algebra.py, whose letters hold.

Each form gives log-sum-exps, adds its output to that of the gated slots, and has its own part of backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcat_nemo.kernels.protocol import FusedKernel


class OwnSlot:
    """A window of one: each query's own slot."""

    def __init__(self, kernel: FusedKernel, scale: float, window: int, cu_seqlens: Tensor | None):
        self.scale = scale

    def forward(self, q, k, v) -> Tensor:
        """Log-sum-exp, here the logit, [B, T, H]."""
        return dot(q, k) * self.scale

    def add_output(self, o, weight, v) -> Tensor:
        return grouped(o, v).addcmul_(grouped(weight[..., None], v), v[:, :, :, None]).flatten(2, 3)

    def backward(self, do, delta, q, k, v, o, level, lse) -> tuple[Tensor, Tensor, Tensor]:
        p = (lse - level).exp()
        ds = (p * (dot(do, v) - delta) * self.scale).to(q.dtype)[..., None]
        dq = grouped(ds, k) * k[:, :, :, None]
        dk = (grouped(ds, k) * grouped(q, k)).sum(3)
        dv = (grouped(p.to(q.dtype)[..., None], v) * grouped(do, v)).sum(3)
        return dq.flatten(2, 3), dk, dv


class Window:
    """A wider window: a plain call in which a query sees its last slots."""

    def __init__(self, kernel: FusedKernel, scale: float, window: int, cu_seqlens: Tensor | None):
        self.kernel = kernel
        self.settings = {"scale": scale, "window": window, "cu_seqlens": cu_seqlens}

    def _padded(self, qk: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> list[Tensor]:
        widths = self.kernel.widths(qk[0].shape[-1], v[0].shape[-1])
        pad = lambda x, width: F.pad(x, (0, width - x.shape[-1])) if width > x.shape[-1] else x  # noqa: E731
        return [pad(x, widths[0]) for x in qk] + [pad(x, widths[1]) for x in v]

    def forward(self, q, k, v) -> Tensor:
        out, lse, self.saved = self.kernel.forward(*self._padded((q, k), (v,)), **self.settings)
        self.out = out[..., : v.shape[-1]]
        return lse.transpose(1, 2)

    def add_output(self, o, weight, v) -> Tensor:
        out, self.out = self.out, None  # not kept for backward
        return o.addcmul_(out, weight[..., None])

    def backward(self, do, delta, q, k, v, o, level, lse) -> tuple[Tensor, Tensor, Tensor]:
        q_, k_, v_, o_, do_ = self._padded((q, k), (v, o, do))
        grads = self.kernel.backward(do_, q_, k_, v_, o_, level.transpose(1, 2), self.saved, **self.settings)
        return tuple(g[..., : x.shape[-1]] for g, x in zip(grads, (q, k, v), strict=True))


def grouped(x_BTHD: Tensor, like_BTGD: Tensor) -> Tensor:
    """[B, T, H, D] as [B, T, G, N, D]."""
    return x_BTHD.unflatten(2, (like_BTGD.shape[2], -1))


def dot(a_BTHD: Tensor, b_BTGD: Tensor) -> Tensor:
    """⟨a_h, b_{h/N}⟩ for every head of a, [B, T, H], in at least float32."""
    wide = torch.promote_types(a_BTHD.dtype, torch.float32)
    a, b = grouped(a_BTHD, b_BTGD), b_BTGD[:, :, :, None]
    out = torch.linalg.vecdot(a, b) if a.dtype == b.dtype == wide else (a.to(wide) * b).sum(-1)
    return out.flatten(2)
