"""The gated slots of a query: one fused call with columns for gates and their gradients. Part of kernels/algebra.py, which
derives it and whose letters hold.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kvcat_nemo.kernels.near import dot
from kvcat_nemo.kernels.window_split import WindowSplit
from kvcat_nemo.method.attention import document_positions

HIDDEN = 30000.0
"""Logits by which a slot is lowered so that it has no weight at all."""
BLOCK = 128
"""Queries of a block when dropped slots' largest weights are sought."""


def extra_columns(dtype: torch.dtype) -> tuple[int, int]:
    """Columns that keys and values get: one number in full is one column, two in 16-bit types."""
    split = 1 if dtype.itemsize >= 4 else 2
    return split, split + 1


class Slots:
    """Keys, values and gates of the whole window, wherever its tokens lie; the gates of sinks are open."""

    def __init__(self, k, v, gate, sinks: int, cu_seqlens: Tensor | None, split: WindowSplit | None):
        self.k, self.v, self.gate = (k, v, gate) if split is None else map(split.whole, (k, v, gate))
        self.position, _ = document_positions(self.k.shape[1], cu_seqlens, k.device)
        self.sink = self.position < sinks
        if sinks:
            self.gate = torch.where(self.sink[:, None], 1.0, self.gate)


class Earlier:
    """The gated call: slots at least `window` tokens ago, with columns for gates and their gradients."""

    def __init__(
        self,
        kernel,
        scale: float,
        window: int,
        cu_seqlens: Tensor | None,
        q,
        slots: Slots,
        split: WindowSplit | None,
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

    def _inputs(self, q, slots: Slots, shift) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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

    def forward(self, q, slots: Slots) -> tuple[Tensor, Tensor, Any]:
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

    def backward(self, do, delta, q, slots: Slots, shift, level, saved) -> tuple[Tensor, ...]:
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

    def gate_gradient(self, far, q, slots: Slots, cap: float) -> Tensor:
        """[B, T, G] of this rank's slots; see the module's docstring."""
        _, dk, dv, beta = far
        gate, w, D, E = slots.gate, self.window, self.D, self.E
        T = gate.shape[1]
        dk, dv, keep = dk[:, w:], dv[:, w:], gate[:, : T - w] > 0
        # β_j's own gradient: the kernel sums dS_ij before it rounds, so kept slots' terms cancel in full precision.
        kept = dk[..., D].to(gate.dtype) / self.scale
        dropped = dot(dv[..., :E], slots.v[:, : T - w]) + dv[..., E : E + self.twice].to(gate.dtype).sum(-1)
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
