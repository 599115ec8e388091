"""Gated attention from plain fused attention: one causal call, and the own slots merged to it.

A query's slots fall in two parts: the last `w` (its window, its own slot at least), which no gate hides, and the
earlier ones, which are gated. The softmax over all of them is the two parts' softmaxes merged by their log-sum-exps.

**Earlier slots**, one call. Keys and values are delayed by w tokens, so that plain causality is "w tokens ago or
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
the range of the numbers. It is 0, unless a slot's weights turn out to exceed e^60 (kernels/attention/overflow.py): then backward is done again with
c_j its largest logit above L, which takes a pass over the scores, block by block.
In 16-bit types β_j and δ_i are each given as the sum of two columns.

**Split windows** (context parallelism): q, do, o and the own slots are this rank's; keys, values and gates are gathered
to the whole window before both passes, by which the above holds with the kernel of kernels/attention/context_parallel_kernel.py. What backward
sums over rows (dk, dv, the gates' sums, Σ_i P_ij) is summed over ranks too before a gate's gradient is made of it.

Shapes: B batch, T tokens, H query heads, G KV heads, N query heads per KV head, D head dim; primed tensors are padded.
Of a split window q, o and their like have this rank's tokens, of which there are T/ranks.
"""

from __future__ import annotations

import torch

from kvcat_nemo.kernels.attention.columns import add_gated
from kvcat_nemo.kernels.attention.columns_choice import columns_for
from kvcat_nemo.kernels.attention.context_parallel import WindowSplit
from kvcat_nemo.kernels.attention.context_parallel_kernel import SplitKernel
from kvcat_nemo.kernels.attention.gated_past import GatedPast, Slots
from kvcat_nemo.kernels.attention.overflow import watch
from kvcat_nemo.kernels.attention.recent_window import OwnSlot, RecentWindow
from kvcat_nemo.kernels.fused.interface import FusedKernel


class GatedAttention(torch.autograd.Function):
    """See the module's docstring. Inputs as kernels.gated_attention's, gates [B, T, G] in at least float32."""

    @staticmethod
    def forward(
        ctx, q, k, v, gate, kernel: FusedKernel, scale, window, gradient_cap, cu_seqlens, sinks=0, split=None
    ):
        kernel = kernel if split is None else SplitKernel(kernel, split)
        columns = columns_for(q.device)
        slots = Slots(k, v, gate, sinks, cu_seqlens, split)
        past = GatedPast(kernel, scale, window, cu_seqlens, q, slots, split, columns)
        recent = OwnSlot(columns, scale) if window == 1 else RecentWindow(kernel, scale, window, cu_seqlens)
        k_recent, v_recent = (k, v) if window == 1 else (slots.k, slots.v)
        o, lse, saved = past.forward(q, slots)
        o, merged_lse, lse_recent = recent.merge(q, k_recent, v_recent, o, lse)
        ctx.save_for_backward(q, k, v, gate, o, merged_lse, lse_recent)
        ctx.past, ctx.recent, ctx.saved, ctx.gradient_cap = past, recent, saved, gradient_cap
        ctx.sinks, ctx.cu_seqlens, ctx.split = sinks, cu_seqlens, split
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, gate, o, merged_lse, lse_recent = ctx.saved_tensors
        past: GatedPast = ctx.past
        split: WindowSplit | None = ctx.split
        slots = Slots(k, v, gate, ctx.sinks, ctx.cu_seqlens, split)
        wide_do, delta = past.gradient_columns(do, o)
        past_grads = past.backward(wide_do, q, slots, 0.0, merged_lse, ctx.saved)
        if watch.exceeded(past.weights(past_grads), split):
            shift = past.largest_gaps(q, slots.k, merged_lse).clamp(min=0)
            shift = shift if split is None else split.maximum(shift)
            past_grads = past.backward(wide_do, q, slots, shift, merged_lse, ctx.saved)
        dgate = past.gate_gradient(past_grads, q, slots, ctx.gradient_cap)
        if split is None and isinstance(ctx.recent, OwnSlot):
            grads = past.columns.own_and_gated_gradients(
                do, delta, q, k, v, merged_lse, lse_recent, past.scale, past_grads, slots.gate
            )
            return *grads, dgate, *[None] * 7
        own = isinstance(ctx.recent, OwnSlot)
        k_recent, v_recent = (k, v) if own else (slots.k, slots.v)
        recent = ctx.recent.backward(do, delta, q, k_recent, v_recent, o, merged_lse, lse_recent)
        if split is None:
            dq, dk, dv = add_gated(recent, past_grads, slots.gate, past.window)
        else:
            dq, *grads = recent
            grads = [split.place(x) for x in grads] if own else grads
            grads = [x.to(y.dtype) for x, y in zip(grads, past_grads[1:3], strict=True)]
            dq, *grads = add_gated((dq, *grads), past_grads, slots.gate, past.window)
            dk, dv = (split.sum_to_owner(x.to(k.dtype)) for x in grads)
        return dq, dk, dv, dgate, *[None] * 7
