"""Gated attention from plain fused attention: one causal call, and the own slots merged to it.

A query's slots fall in two parts: the last `w` (its window, its own slot at least), which no gate hides, and the
earlier ones, which are gated. The softmax over all of them is the two parts' softmaxes merged by their log-sum-exps.

**Earlier slots**, one call. Keys and values are moved w tokens later, so that plain causality is "w tokens ago or
earlier". One more column of q (ones) and k adds β_j to slot j's logits: log g_j, and −HIDDEN where g_j = 0, so that the
softmax is over the visible slots alone. A row that sees none ends near −HIDDEN, and counts for nothing in the merger.

**Window**: for w = 1 one logit and one value per row, else a plain call with a sliding window. Merged, with
L = logaddexp(lse, lse_window):   o = e^{lse − L}·o_earlier + e^{lse_window − L}·o_window.

**Backward**, δ = ⟨do, o⟩: a flash kernel takes weights from the lse and δ from the o that it is given. It is given L for
lse, zeros for o, and three more columns,

    v' = [v_j | 1 | 0] where g_j > 0, zeros where g_j = 0        do' = [do_i | −δ_i | 1]

and β_j = −c_j for dropped slots, which are in nobody's way here: without values they get no dS. It yields

    P_ij = exp(s_ij + β_j − L_i)    dS_ij = P_ij·⟨do'_i, v'_j⟩ = P_ij·(⟨do_i, v_j⟩ − δ_i), exactly 0 for dropped slots
    dv' = Σ_i P_ij·[do_i | −δ_i | 1]

    dgate_j = Σ_i dS_ij / g_j                                            g_j > 0 (the sum is dk' of the column of ones)
            = min(e^{c_j}, N·e^{cap} / dv'[D+1]_j)·(⟨dv'[:D]_j, v_j⟩ + dv'[D]_j)    g_j = 0

for dv'[D+1]_j·e^{c_j}/N is the slot's weight in all rows together, averaged over query heads. c_j only has to keep P_ij in
the range of the numbers. It is 0, unless a slot's weights turn out to exceed e^HEADROOM: then backward is done again with
c_j its largest logit above L, which takes a pass over the scores, block by block.
In 16-bit types β_j and δ_i are each given as the sum of two columns.

Shapes: B batch, T tokens, H query heads, G KV heads, N query heads per KV head, D head dim; primed tensors are padded.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcat_nemo.kernels.protocol import FusedKernel
from kvcat_nemo.method.attention import document_positions

HEADROOM = 60.0
"""Logits by which a dropped slot's weights, summed, may exceed the visible ones; e^60 is far from float32's end."""
HIDDEN = 30000.0
"""Logits by which a slot is lowered so that it has no weight at all."""
BLOCK = 128
"""Queries of a block when dropped slots' largest weights are sought."""


def extra_columns(dtype: torch.dtype) -> tuple[int, int]:
    """Columns that keys and values get: one number in full is one column, two in 16-bit types."""
    split = 1 if dtype.itemsize >= 4 else 2
    return split, split + 1


class GatedAttention(torch.autograd.Function):
    """See the module's docstring. Inputs as kernels.gated_attention's, gates [B, T, G] in at least float32."""

    @staticmethod
    def forward(ctx, q, k, v, gate, kernel: FusedKernel, scale, window, gradient_cap, cu_seqlens):
        earlier = _Earlier(kernel, scale, window, cu_seqlens, q, v)
        near = (_OwnSlot if window == 1 else _Window)(kernel, scale, window, cu_seqlens)
        lse_near = near.forward(q, k, v)
        o, lse, saved = earlier.forward(q, k, v, gate)
        level = torch.logaddexp(lse, lse_near)
        o = near.add_output(o * (lse - level).exp()[..., None], (lse_near - level).exp(), v).to(q.dtype)
        ctx.save_for_backward(q, k, v, gate, o, level, lse_near)
        ctx.earlier, ctx.near, ctx.saved, ctx.gradient_cap = earlier, near, saved, gradient_cap
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, gate, o, level, lse_near = ctx.saved_tensors
        earlier: _Earlier = ctx.earlier
        delta = _dot(do, o)
        far = earlier.backward(do, delta, q, k, v, gate, 0.0, level, ctx.saved)
        # On a GPU this waits for the device, once per call.
        if not bool((earlier.weights(far) <= math.exp(HEADROOM)).all()):
            shift = earlier.largest_gaps(q, k, level).clamp(min=0)
            far = earlier.backward(do, delta, q, k, v, gate, shift, level, ctx.saved)
        dgate = earlier.gate_gradient(far, q, v, gate, ctx.gradient_cap)
        near = ctx.near.backward(do, delta, q, k, v, o, level, lse_near)
        return *earlier.add(near, far, gate), dgate, None, None, None, None, None


class _Earlier:
    """The gated call: slots at least `window` tokens ago, with columns for gates and their gradients."""

    def __init__(self, kernel: FusedKernel, scale: float, window: int, cu_seqlens: Tensor | None, q, v):
        self.kernel, self.scale, self.cu_seqlens = kernel, scale, cu_seqlens
        self.D, self.E = q.shape[-1], v.shape[-1]
        self.split, more = extra_columns(q.dtype)
        self.widths = kernel.widths(self.D + self.split, self.E + more)
        self.window = min(window, q.shape[1])
        position, _ = document_positions(q.shape[1], cu_seqlens, q.device)
        self.empty = position < window  # places of moved slots where no slot of the document lies

    def _columns(self, x: Tensor, width: int, moved: bool = False) -> Tensor:
        """x with room for columns up to `width`; moved: `window` tokens later, zeros at first."""
        w = self.window if moved else 0
        out = x.new_empty(*x.shape[:-1], width)
        out[:, :w] = 0
        out[:, w:, :, : x.shape[-1]] = x[:, : x.shape[1] - w]
        out[:, w:, :, x.shape[-1] :] = 0
        return out

    def _put(self, out: Tensor, column: int, x: Tensor) -> None:
        out[..., column] = x
        if self.split == 2:
            out[..., column + 1] = x - out[..., column]

    def _moved(self, x_BTG: Tensor, empty: float) -> Tensor:
        out = torch.full_like(x_BTG, empty)
        out[:, self.window :] = x_BTG[:, : x_BTG.shape[1] - self.window]
        return out.masked_fill_(self.empty[:, None], empty)

    def _beta(self, gate: Tensor, shift) -> Tensor:
        return torch.where(gate > 0, gate.clamp(min=torch.finfo(gate.dtype).tiny).log(), -shift)

    def _inputs(self, q, k, v, gate, shift) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q', k', v' and each slot's β_j as the columns hold it."""
        D, E = self.D, self.E
        keep, beta = gate > 0, self._beta(gate, shift)
        wide_q = self._columns(q, self.widths[0])
        wide_q[..., D : D + self.split] = 1
        wide_k = self._columns(k, self.widths[0], moved=True)
        self._put(wide_k, D, self._moved(beta, -HIDDEN) / self.scale)
        wide_v = self._columns(v, self.widths[1], moved=True)
        visible = self._moved(keep.to(v.dtype), 0)[..., None]
        wide_v[..., :E] *= visible
        wide_v[..., E : E + self.split] = visible
        held = wide_k[:, self.window :, :, D : D + self.split].double().sum(-1) * self.scale
        return wide_q, wide_k, wide_v, held

    def forward(self, q, k, v, gate) -> tuple[Tensor, Tensor, Any]:
        """Output [B, T, H, D] and log-sum-exp [B, T, H] over the visible slots, and the kernel's own."""
        settings = {"scale": self.scale, "cu_seqlens": self.cu_seqlens}
        if self.kernel.takes_key_bias and self.D == self.E:
            bias = self._moved(self._beta(gate, HIDDEN), -HIDDEN)
            k, v = (self._columns(x, self.D, moved=True) for x in (k, v))
            out, lse, saved = self.kernel.forward(q, k, v, key_bias_BTG=bias, **settings)
        else:
            *inputs, _ = self._inputs(q, k, v, gate, HIDDEN)
            out, lse, saved = self.kernel.forward(*inputs, **settings)
        return out[..., : self.E], lse.transpose(1, 2), saved

    def backward(self, do, delta, q, k, v, gate, shift, level, saved) -> tuple[Tensor, ...]:
        """dq', dk', dv' of the call, and the slots' β_j."""
        *inputs, beta = self._inputs(q, k, v, gate, shift)
        wide_do = self._columns(do, self.widths[1])
        self._put(wide_do, self.E, -delta)
        wide_do[..., self.E + self.split] = 1
        zeros = do.new_zeros(self.widths[1]).expand_as(wide_do)
        grads = self.kernel.backward(
            wide_do,
            *inputs,
            zeros,
            level.transpose(1, 2),
            saved,
            scale=self.scale,
            cu_seqlens=self.cu_seqlens,
        )
        return *grads, beta

    def weights(self, far) -> Tensor:
        """Each slot's P_ij, summed over the rows that see it through its gate: [B, T − window, G]."""
        return far[2][:, self.window :, :, self.E + self.split]

    def gate_gradient(self, far, q, v, gate, cap: float) -> Tensor:
        """[B, T, G]; see the module's docstring."""
        _, dk, dv, beta = far
        w, T, D, E = self.window, q.shape[1], self.D, self.E
        dk, dv, keep = dk[:, w:], dv[:, w:], gate[:, : T - w] > 0
        # β_j's own gradient: the kernel sums dS_ij before it rounds, so kept slots' terms cancel in full precision.
        kept = dk[..., D].to(gate.dtype) / self.scale
        dropped = _dot(dv[..., :E], v[:, : T - w]) + dv[..., E : E + self.split].to(gate.dtype).sum(-1)
        weight = self.weights(far).double().clamp(min=torch.finfo(torch.float64).tiny)
        unlowered = (-beta).clamp(max=700).exp()
        most = math.exp(cap) * (q.shape[2] // gate.shape[2]) / weight
        factor = torch.where(keep, unlowered, unlowered.minimum(most))
        dgate = torch.zeros_like(gate)
        dgate[:, : T - w] = torch.where(keep, kept, dropped) * factor
        return dgate

    def add(self, near, far, gate) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the two parts together, in near's memory."""
        w, T = self.window, gate.shape[1]
        dq, dk, dv = near
        dq += far[0][..., : self.D]
        dk[:, : T - w] += far[1][:, w:, :, : self.D]
        dv[:, : T - w].addcmul_(far[2][:, w:, :, : self.E], (gate[:, : T - w, :, None] > 0).to(dv.dtype))
        return dq, dk, dv

    def largest_gaps(self, q, k, level) -> Tensor:
        """[B, T, G]: the largest s_ij − L_i among the rows i that see slot j through its gate; −inf if none does."""
        B, T, H, D = q.shape
        G, w = k.shape[2], self.window
        out = level.new_full((B, G, T), float("-inf"))
        position, _ = document_positions(T, self.cu_seqlens, q.device)
        t = torch.arange(T, device=q.device)
        k = k.permute(0, 2, 3, 1)[:, :, None].to(level.dtype)
        for first in range(w, T, BLOCK):
            last = min(first + BLOCK, T)
            block = slice(first, last)
            rows = q[:, block].to(level.dtype).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)
            gap = rows @ k[..., : last - w] * self.scale
            gap -= level[:, block].unflatten(2, (G, -1)).permute(0, 2, 3, 1)[..., None]
            i, j = t[block, None], t[None, : last - w]
            gap.masked_fill_((j > i - w) | (j < i - position[block, None]), float("-inf"))
            out[..., : last - w] = out[..., : last - w].maximum(gap.amax((2, 3)))
        return out.transpose(1, 2)


class _OwnSlot:
    """A window of one: each query's own slot."""

    def __init__(self, kernel: FusedKernel, scale: float, window: int, cu_seqlens: Tensor | None):
        self.scale = scale

    def forward(self, q, k, v) -> Tensor:
        """Log-sum-exp, here the logit, [B, T, H]."""
        return _dot(q, k) * self.scale

    def add_output(self, o, weight, v) -> Tensor:
        return _grouped(o, v).addcmul_(_grouped(weight[..., None], v), v[:, :, :, None]).flatten(2, 3)

    def backward(self, do, delta, q, k, v, o, level, lse) -> tuple[Tensor, Tensor, Tensor]:
        p = (lse - level).exp()
        ds = (p * (_dot(do, v) - delta) * self.scale).to(q.dtype)[..., None]
        dq = _grouped(ds, k) * k[:, :, :, None]
        dk = (_grouped(ds, k) * _grouped(q, k)).sum(3)
        dv = (_grouped(p.to(q.dtype)[..., None], v) * _grouped(do, v)).sum(3)
        return dq.flatten(2, 3), dk, dv


class _Window:
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


def _grouped(x_BTHD: Tensor, like_BTGD: Tensor) -> Tensor:
    """[B, T, H, D] as [B, T, G, N, D]."""
    return x_BTHD.unflatten(2, (like_BTGD.shape[2], -1))


def _dot(a_BTHD: Tensor, b_BTGD: Tensor) -> Tensor:
    """⟨a_h, b_{h/N}⟩ for every head of a, [B, T, H], in at least float32."""
    wide = torch.promote_types(a_BTHD.dtype, torch.float32)
    a, b = _grouped(a_BTHD, b_BTGD), b_BTGD[:, :, :, None]
    out = torch.linalg.vecdot(a, b) if a.dtype == wide else (a.to(wide) * b).sum(-1)
    return out.flatten(2)
