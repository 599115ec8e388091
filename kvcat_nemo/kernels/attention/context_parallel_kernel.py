"""A fused kernel over a split window (context parallelism): queries of this rank, keys and values of the whole window.

A chunk of queries sees the slots of its own chunk causally and all those before it:

    forward    a causal call on the own chunk and a plain one on the earlier slots, merged by their log-sum-exps:
               L = logaddexp(lse, lse')      o = e^{lse − L}·o + e^{lse' − L}·o'
    backward   the same two calls, each given the rows' do, o and L: weights and δ come from those alone
               (kernels/fused/interface.py), so that nothing has to be merged; dq is their sum

A sliding window reaches back into the earlier slots by less than its width: one call in which that many rows without a
gradient precede the chunk's queries.

Shapes: as in kernels/fused/interface.py, with T/n tokens of q, o, lse and T of k, v; see kernels/attention/context_parallel.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcat_nemo.kernels.attention.context_parallel import WindowSplit
from kvcat_nemo.kernels.fused.interface import FusedKernel


class SplitKernel:
    """See `protocol.FusedKernel`. Gradients of keys and values are the whole window's, this rank's queries' part, in at
    least float32."""

    def __init__(self, kernel: FusedKernel, split: WindowSplit):
        self.kernel, self.split = kernel, split
        self.name, self.takes_key_bias = kernel.name, kernel.takes_key_bias
        self.check, self.widths = kernel.check, kernel.widths

    def forward(self, q_BTHD, k_BTGD, v_BTGE, *, scale, window=None, cu_seqlens=None, key_bias_BTG=None):
        assert cu_seqlens is None
        outs, lses, saved = [], [], []
        for own, at, n in self.split.runs(q_BTHD.shape[1]):
            q = q_BTHD[:, own : own + n]
            if window is not None:
                halo = min(window - 1, at)
                slots = slice(at - halo, at + n)
                o, lse, kept = self.kernel.forward(
                    _after(q, halo), k_BTGD[:, slots], v_BTGE[:, slots], scale=scale, window=window
                )
                o, lse, kept = o[:, halo:], lse[..., halo:], (kept, None)
            else:
                o, lse, kept = self._call(q, k_BTGD, v_BTGE, slice(at, at + n), True, scale, key_bias_BTG)
                kept = kept, None
                if at:
                    o_, lse_, kept_ = self._call(q, k_BTGD, v_BTGE, slice(0, at), False, scale, key_bias_BTG)
                    o, lse = _merge(o, lse, o_, lse_)
                    kept = kept[0], kept_
            outs.append(o.to(q.dtype))
            lses.append(lse)
            saved.append(kept)
        return torch.cat(outs, 1), torch.cat(lses, 2), saved

    def _call(self, q, k, v, slots: slice, causal: bool, scale: float, bias: Tensor | None):
        more = {} if bias is None else {"key_bias_BTG": bias[:, slots]}
        return self.kernel.forward(q, k[:, slots], v[:, slots], scale=scale, causal=causal, **more)

    def backward(
        self, do_BTHE, q_BTHD, k_BTGD, v_BTGE, o_BTHE, lse_BHT, saved, *, scale, window=None, cu_seqlens=None
    ):
        wide = torch.promote_types(q_BTHD.dtype, torch.float32)
        dqs = []
        dk, dv = torch.zeros_like(k_BTGD, dtype=wide), torch.zeros_like(v_BTGE, dtype=wide)
        for (own, at, n), (kept, kept_before) in zip(self.split.runs(q_BTHD.shape[1]), saved, strict=True):
            rows = slice(own, own + n)
            do, q, o, lse = do_BTHE[:, rows], q_BTHD[:, rows], o_BTHE[:, rows], lse_BHT[..., rows]
            halo = 0 if window is None else min(window - 1, at)
            slots = slice(at - halo, at + n)
            grads = self.kernel.backward(
                _after(do, halo),
                _after(q, halo),
                k_BTGD[:, slots],
                v_BTGE[:, slots],
                _after(o, halo),
                F.pad(lse, (halo, 0)),  # those rows' weights are 1, times a gradient of 0
                kept,
                scale=scale,
                window=window,
            )
            dq = grads[0][:, halo:].to(wide)
            dk[:, slots] += grads[1]
            dv[:, slots] += grads[2]
            if window is None and at:
                k, v = k_BTGD[:, :at], v_BTGE[:, :at]
                grads = self.kernel.backward(do, q, k, v, o, lse, kept_before, scale=scale, causal=False)
                dq += grads[0]
                dk[:, :at] += grads[1]
                dv[:, :at] += grads[2]
            dqs.append(dq.to(q.dtype))
        return torch.cat(dqs, 1), dk, dv


def _after(x_BTHD: Tensor, rows: int) -> Tensor:
    """x with rows of zeros before it."""
    return F.pad(x_BTHD, (0, 0, 0, 0, rows, 0)) if rows else x_BTHD


def _merge(o: Tensor, lse_BHT: Tensor, other: Tensor, lse_other: Tensor) -> tuple[Tensor, Tensor]:
    merged_lse = torch.logaddexp(lse_BHT, lse_other)
    share, share_other = ((x - merged_lse).exp().transpose(1, 2)[..., None] for x in (lse_BHT, lse_other))
    return o * share + other * share_other, merged_lse
