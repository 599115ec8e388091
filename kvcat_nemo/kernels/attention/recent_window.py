"""The slots of a query that no gate hides: its own one, or its last few. Part of kernels/attention/gated_function.py; shapes as there.

Each form merges its output with that of the gated slots, and has its own part of backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcat_nemo.kernels.fused.interface import FusedKernel


class OwnSlot:
    """A window of one: each query's own slot."""

    def __init__(self, columns, scale: float):
        self.columns, self.scale = columns, scale

    def merge(self, q, k, v, o, lse) -> tuple[Tensor, Tensor, Tensor]:
        """The gated slots' output with the own slots': o, L and the own slot's logit."""
        return self.columns.merge_own(q, k, v, o, lse, self.scale)

    def backward(self, do, delta, q, k, v, o, merged_lse, lse) -> tuple[Tensor, Tensor, Tensor]:
        return self.columns.own_gradients(do, delta, q, k, v, merged_lse, lse, self.scale)


class RecentWindow:
    """A wider window: a plain call in which a query sees its last slots."""

    def __init__(self, kernel: FusedKernel, scale: float, window: int, cu_seqlens: Tensor | None):
        self.kernel = kernel
        self.settings = {"scale": scale, "window": window, "cu_seqlens": cu_seqlens}

    def _padded(self, qk: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> list[Tensor]:
        widths = self.kernel.widths(qk[0].shape[-1], v[0].shape[-1])
        pad = lambda x, width: F.pad(x, (0, width - x.shape[-1])) if width > x.shape[-1] else x  # noqa: E731
        return [pad(x, widths[0]) for x in qk] + [pad(x, widths[1]) for x in v]

    def merge(self, q, k, v, o, lse) -> tuple[Tensor, Tensor, Tensor]:
        """The gated slots' output with the window's: o, L and the window's log-sum-exp."""
        out, lse_recent, self.saved = self.kernel.forward(*self._padded((q, k), (v,)), **self.settings)
        lse_recent = lse_recent.transpose(1, 2)
        merged_lse = torch.logaddexp(lse, lse_recent)
        o = o * (lse - merged_lse).exp()[..., None]
        o.addcmul_(out[..., : v.shape[-1]], (lse_recent - merged_lse).exp()[..., None])
        return o.to(q.dtype), merged_lse, lse_recent

    def backward(self, do, delta, q, k, v, o, merged_lse, lse) -> tuple[Tensor, Tensor, Tensor]:
        q_, k_, v_, o_, do_ = self._padded((q, k), (v, o, do))
        grads = self.kernel.backward(
            do_, q_, k_, v_, o_, merged_lse.transpose(1, 2), self.saved, **self.settings
        )
        return tuple(g[..., : x.shape[-1]] for g, x in zip(grads, (q, k, v), strict=True))
