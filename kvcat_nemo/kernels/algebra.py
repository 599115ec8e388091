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

**Split windows** (context parallelism): q, do, o and the own slots are this rank's; keys, values and gates are gathered
to the whole window before both passes, by which the above holds with the kernel of kernels/split_kernel.py. What backward
sums over rows (dk, dv, the gates' sums, Σ_i P_ij) is summed over ranks too before a gate's gradient is made of it.

Shapes: B batch, T tokens, H query heads, G KV heads, N query heads per KV head, D head dim; primed tensors are padded.
Of a split window q, o and their like have this rank's tokens, of which there are T/ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcat_nemo.kernels.protocol import FusedKernel
from kvcat_nemo.kernels.split_kernel import SplitKernel
from kvcat_nemo.kernels.window_split import WindowSplit
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
    def forward(
        ctx, q, k, v, gate, kernel: FusedKernel, scale, window, gradient_cap, cu_seqlens, sinks=0, split=None
    ):
        kernel = kernel if split is None else SplitKernel(kernel, split)
        slots = _Slots(k, v, gate, sinks, cu_seqlens, split)
        earlier = _Earlier(kernel, scale, window, cu_seqlens, q, slots, split)
        near = (_OwnSlot if window == 1 else _Window)(kernel, scale, window, cu_seqlens)
        k_near, v_near = (k, v) if window == 1 else (slots.k, slots.v)
        lse_near = near.forward(q, k_near, v_near)
        o, lse, saved = earlier.forward(q, slots)
        level = torch.logaddexp(lse, lse_near)
        o = near.add_output(o * (lse - level).exp()[..., None], (lse_near - level).exp(), v).to(q.dtype)
        ctx.save_for_backward(q, k, v, gate, o, level, lse_near)
        ctx.earlier, ctx.near, ctx.saved, ctx.gradient_cap = earlier, near, saved, gradient_cap
        ctx.sinks, ctx.cu_seqlens, ctx.split = sinks, cu_seqlens, split
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, gate, o, level, lse_near = ctx.saved_tensors
        earlier: _Earlier = ctx.earlier
        split: WindowSplit | None = ctx.split
        slots = _Slots(k, v, gate, ctx.sinks, ctx.cu_seqlens, split)
        delta = _dot(do, o)
        far = earlier.backward(do, delta, q, slots, 0.0, level, ctx.saved)
        heavy = (~(earlier.weights(far) <= math.exp(HEADROOM)).all()).float()
        # On a GPU this waits for the device, once per call.
        if bool(heavy if split is None else split.maximum(heavy)):
            shift = earlier.largest_gaps(q, slots.k, level).clamp(min=0)
            shift = shift if split is None else split.maximum(shift)
            far = earlier.backward(do, delta, q, slots, shift, level, ctx.saved)
        dgate = earlier.gate_gradient(far, q, slots, ctx.gradient_cap)
        own = split is None or isinstance(ctx.near, _OwnSlot)
        k_near, v_near = (k, v) if own else (slots.k, slots.v)
        near = ctx.near.backward(do, delta, q, k_near, v_near, o, level, lse_near)
        if split is None:
            dq, dk, dv = earlier.add(near, far, slots.gate)
        else:
            dq, *grads = near
            grads = [split.place(x) for x in grads] if own else grads
            grads = [x.to(y.dtype) for x, y in zip(grads, far[1:3], strict=True)]
            dq, *grads = earlier.add((dq, *grads), far, slots.gate)
            dk, dv = (split.sum_to_owner(x.to(k.dtype)) for x in grads)
        return dq, dk, dv, dgate, *[None] * 7


class _Slots:
    """Keys, values and gates of the whole window, wherever its tokens lie; the gates of sinks are open."""

    def __init__(self, k, v, gate, sinks: int, cu_seqlens: Tensor | None, split: WindowSplit | None):
        self.k, self.v, self.gate = (k, v, gate) if split is None else map(split.whole, (k, v, gate))
        self.position, _ = document_positions(self.k.shape[1], cu_seqlens, k.device)
        self.sink = self.position < sinks
        if sinks:
            self.gate = torch.where(self.sink[:, None], 1.0, self.gate)


class _Earlier:
    """The gated call: slots at least `window` tokens ago, with columns for gates and their gradients."""

    def __init__(
        self, kernel, scale: float, window: int, cu_seqlens: Tensor | None, q, slots: _Slots, split: WindowSplit | None
    ):
        self.kernel, self.scale, self.cu_seqlens, self.split = kernel, scale, cu_seqlens, split
        self.D, self.E = q.shape[-1], slots.v.shape[-1]
        self.twice, more = extra_columns(q.dtype)
        self.widths = kernel.widths(self.D + self.twice, self.E + more)
        self.window = min(window, slots.k.shape[1])
        self.position = slots.position
        self.empty = slots.position < window  # places of moved slots where no slot of the document lies
        self.runs = [(0, 0, q.shape[1])] if split is None else split.runs(q.shape[1])

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
        if self.twice == 2:
            out[..., column + 1] = x - out[..., column]

    def _moved(self, x_BTG: Tensor, empty: float) -> Tensor:
        out = torch.full_like(x_BTG, empty)
        out[:, self.window :] = x_BTG[:, : x_BTG.shape[1] - self.window]
        return out.masked_fill_(self.empty[:, None], empty)

    def _beta(self, gate: Tensor, shift) -> Tensor:
        return torch.where(gate > 0, gate.clamp(min=torch.finfo(gate.dtype).tiny).log(), -shift)

    def _inputs(self, q, slots: _Slots, shift) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q', k', v' and each slot's β_j as the columns hold it."""
        D, E = self.D, self.E
        k, v, gate = slots.k, slots.v, slots.gate
        keep, beta = gate > 0, self._beta(gate, shift)
        wide_q = self._columns(q, self.widths[0])
        wide_q[..., D : D + self.twice] = 1
        wide_k = self._columns(k, self.widths[0], moved=True)
        self._put(wide_k, D, self._moved(beta, -HIDDEN) / self.scale)
        wide_v = self._columns(v, self.widths[1], moved=True)
        visible = self._moved(keep.to(v.dtype), 0)[..., None]
        wide_v[..., :E] *= visible
        wide_v[..., E : E + self.twice] = visible
        held = wide_k[:, self.window :, :, D : D + self.twice].double().sum(-1) * self.scale
        return wide_q, wide_k, wide_v, held

    def forward(self, q, slots: _Slots) -> tuple[Tensor, Tensor, Any]:
        """Output [B, T, H, D] and log-sum-exp [B, T, H] over the visible slots, and the kernel's own."""
        settings = {"scale": self.scale, "cu_seqlens": self.cu_seqlens}
        if self.kernel.takes_key_bias and self.D == self.E:
            bias = self._moved(self._beta(slots.gate, HIDDEN), -HIDDEN)
            k, v = (self._columns(x, self.D, moved=True) for x in (slots.k, slots.v))
            out, lse, saved = self.kernel.forward(q, k, v, key_bias_BTG=bias, **settings)
        else:
            *inputs, _ = self._inputs(q, slots, HIDDEN)
            out, lse, saved = self.kernel.forward(*inputs, **settings)
        return out[..., : self.E], lse.transpose(1, 2), saved

    def backward(self, do, delta, q, slots: _Slots, shift, level, saved) -> tuple[Tensor, ...]:
        """dq', dk', dv' of the call, and the slots' β_j."""
        *inputs, beta = self._inputs(q, slots, shift)
        wide_do = self._columns(do, self.widths[1])
        self._put(wide_do, self.E, -delta)
        wide_do[..., self.E + self.twice] = 1
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
        return far[2][:, self.window :, :, self.E + self.twice]

    def gate_gradient(self, far, q, slots: _Slots, cap: float) -> Tensor:
        """[B, T, G] of this rank's slots; see the module's docstring."""
        _, dk, dv, beta = far
        gate, w, D, E = slots.gate, self.window, self.D, self.E
        T = gate.shape[1]
        dk, dv, keep = dk[:, w:], dv[:, w:], gate[:, : T - w] > 0
        # β_j's own gradient: the kernel sums dS_ij before it rounds, so kept slots' terms cancel in full precision.
        kept = dk[..., D].to(gate.dtype) / self.scale
        dropped = _dot(dv[..., :E], slots.v[:, : T - w]) + dv[..., E : E + self.twice].to(gate.dtype).sum(-1)
        sums = torch.stack([torch.where(keep, kept, dropped), self.weights(far).to(gate.dtype)], -1)
        sums = torch.cat([sums, sums.new_zeros(*sums.shape[:1], w, *sums.shape[2:])], 1)
        beta = torch.cat([beta, beta.new_zeros(*beta.shape[:1], w, *beta.shape[2:])], 1)
        keep, sink = gate > 0, slots.sink.expand(len(gate), T)
        if self.split is not None:
            sums = self.split.sum_to_owner(sums)
            beta, keep, sink = (self.split.own(x) for x in (beta, keep, sink))
        weight = sums[..., 1].double().clamp(min=torch.finfo(torch.float64).tiny)
        unlowered = (-beta).clamp(max=700).exp()
        most = math.exp(cap) * (q.shape[2] // gate.shape[2]) / weight
        factor = torch.where(keep, unlowered, unlowered.minimum(most))
        dgate = (sums[..., 0] * factor).to(gate.dtype)
        return dgate.masked_fill(sink[..., None], 0.0)

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
        B, T, G, _ = k.shape
        w = self.window
        out = level.new_full((B, G, T), float("-inf"))
        t = torch.arange(T, device=q.device)
        k = k.permute(0, 2, 3, 1)[:, :, None].to(level.dtype)
        blocks = [
            (own + first, at + first, min(BLOCK, n - first))
            for own, at, n in self.runs
            for first in range(0, n, BLOCK)
        ]
        for own, at, n in blocks:
            seen = at + n - w  # slots before it are gated for some query of the block
            if seen <= 0:
                continue
            rows = q[:, own : own + n].to(level.dtype).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)
            gap = rows @ k[..., :seen] * self.scale
            gap -= level[:, own : own + n].unflatten(2, (G, -1)).permute(0, 2, 3, 1)[..., None]
            i, j = t[at : at + n, None], t[None, :seen]
            gap.masked_fill_((j > i - w) | (j < i - self.position[at : at + n, None]), float("-inf"))
            out[..., :seen] = out[..., :seen].maximum(gap.amax((2, 3)))
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
