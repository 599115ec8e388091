"""The gated slots of a query: one fused call with columns for gates and their gradients. Part of kernels/attention/gated_function.py, which
derives it; shapes as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcat_nemo.kernels.attention import columns
from kvcat_nemo.kernels.attention.columns import HIDDEN
from kvcat_nemo.kernels.attention.context_parallel import WindowSplit
from kvcat_nemo.method.attention import document_positions

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


class GatedPast:
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
        columns,
    ):
        self.columns = columns
        self.kernel, self.scale, self.cu_seqlens, self.split = kernel, scale, cu_seqlens, split
        self.D, self.E = q.shape[-1], slots.v.shape[-1]
        self.terms, more = extra_columns(q.dtype)
        self.widths = kernel.widths(self.D + self.terms, self.E + more)
        self.window = min(window, slots.k.shape[1])
        self.position = slots.position
        self.runs = [(0, 0, q.shape[1])] if split is None else split.runs(q.shape[1])

    def _slot_columns(self, slots: Slots, shift) -> tuple[Tensor, Tensor, Tensor]:
        return self.columns.slot_columns(
            slots.k,
            slots.v,
            slots.gate,
            slots.position,
            window=self.window,
            widths=self.widths,
            terms=self.terms,
            scale=self.scale,
            shift=shift,
        )

    def forward(self, q, slots: Slots) -> tuple[Tensor, Tensor, Any]:
        """Output [B, T, H, D] and log-sum-exp [B, T, H] over the visible slots, and the kernel's own."""
        settings = {"scale": self.scale, "cu_seqlens": self.cu_seqlens}
        if self.kernel.takes_key_bias and self.D == self.E:
            bias = columns.key_bias(slots.gate, slots.position, self.window)
            k, v = (columns.delayed(x, self.window) for x in (slots.k, slots.v))
            out, lse, saved = self.kernel.forward(q, k, v, key_bias_BTG=bias, **settings)
        else:
            wide_k, wide_v, _ = self._slot_columns(slots, HIDDEN)
            wide_q = self.columns.query_columns(q, self.widths[0], self.terms)
            out, lse, saved = self.kernel.forward(wide_q, wide_k, wide_v, **settings)
        return out[..., : self.E], lse.transpose(1, 2), saved

    def backward(self, wide_do, q, slots: Slots, shift, merged_lse, saved) -> tuple[Tensor, ...]:
        """dq', dk', dv' of the call, and the slots' β_j.

        Args:
            wide_do: `gradient_columns`.
        """
        wide_k, wide_v, beta = self._slot_columns(slots, shift)
        grads = self.kernel.backward(
            wide_do,
            self.columns.query_columns(q, self.widths[0], self.terms),
            wide_k,
            wide_v,
            wide_do.new_zeros(self.widths[1]).expand_as(wide_do),
            merged_lse.transpose(1, 2),
            saved,
            scale=self.scale,
            cu_seqlens=self.cu_seqlens,
        )
        return *grads, beta

    def gradient_columns(self, do, o) -> tuple[Tensor, Tensor]:
        """do' for `backward`, and δ."""
        return self.columns.gradient_columns(do, o, self.widths[1], self.terms)

    def weights(self, past_grads) -> Tensor:
        """Each slot's P_ij, summed over the rows that see it through its gate: [B, T − window, G]."""
        return past_grads[2][:, self.window :, :, self.E + self.terms]

    def gate_gradient(self, past_grads, q, slots: Slots, cap: float) -> Tensor:
        """[B, T, G] of this rank's slots; see the module's docstring."""
        _, dk, dv, beta = past_grads
        gate, sink = slots.gate, slots.sink[None]
        settings = {"window": self.window, "D": self.D, "terms": self.terms, "scale": self.scale}
        sums = self.columns.gate_sums(dk, dv, slots.v, gate, **settings)
        if self.split is not None:
            own = self.split.own
            sums = self.split.sum_to_owner(sums)
            beta = torch.cat([beta, beta.new_zeros(len(beta), self.window, beta.shape[2])], 1)
            beta, gate, sink = own(beta), own(gate), own(sink)
        return self.columns.gate_gradient(sums, beta, gate, sink, cap, q.shape[2] // gate.shape[2])

    def largest_gaps(self, q, k, merged_lse) -> Tensor:
        """[B, T, G]: the largest s_ij − L_i among the rows i that see slot j through its gate; −inf if none does."""
        B, T, G, _ = k.shape
        w = self.window
        out = merged_lse.new_full((B, G, T), float("-inf"))
        t = torch.arange(T, device=q.device)
        k = k.permute(0, 2, 3, 1)[:, :, None].to(merged_lse.dtype)
        blocks = [
            (own + first, at + first, min(BLOCK, n - first))
            for own, at, n in self.runs
            for first in range(0, n, BLOCK)
        ]
        for own, at, n in blocks:
            seen = at + n - w  # slots before it are gated for some query of the block
            if seen <= 0:
                continue
            rows = q[:, own : own + n].to(merged_lse.dtype).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)
            gap = rows @ k[..., :seen] * self.scale
            gap -= merged_lse[:, own : own + n].unflatten(2, (G, -1)).permute(0, 2, 3, 1)[..., None]
            i, j = t[at : at + n, None], t[None, :seen]
            gap.masked_fill_((j > i - w) | (j < i - self.position[at : at + n, None]), float("-inf"))
            out[..., :seen] = out[..., :seen].maximum(gap.amax((2, 3)))
        return out.transpose(1, 2)
