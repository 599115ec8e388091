"""A fused kernel over spans: rows behind a cut see all earlier slots of their document. Part of kernels/attention/span_gated.py.

A span's rows are one call that is not causal, on the slots from the document's first to the span's. `SpanKernel` makes of
these calls one that has the interface of a `FusedKernel`, so that kernels/attention/gated_past.py gives it its columns for gates.

Shapes: as in kernels/fused/interface.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcat_nemo.kernels.attention.columns_choice import columns_for
from kvcat_nemo.kernels.attention.gated_past import BLOCK, GatedPast, Slots
from kvcat_nemo.kernels.fused.interface import FusedKernel
from kvcat_nemo.method.spans import Span, Spans


class SpanKernel:
    """See `protocol.FusedKernel`. Rows of a document's first span see no slot: their output is 0, their lse −∞.

    Gradients of keys and values are sums over spans, in at least float32.
    """

    def __init__(self, kernel: FusedKernel, spans: Spans):
        self.kernel, self.behind = kernel, spans.behind
        self.name, self.takes_key_bias = kernel.name, kernel.takes_key_bias
        self.check, self.widths = kernel.check, kernel.widths

    def forward(self, q_BTHD, k_BTGD, v_BTGE, *, scale, cu_seqlens=None, key_bias_BTG=None):
        assert cu_seqlens is None  # the spans know the documents
        out = q_BTHD.new_zeros(*q_BTHD.shape[:3], v_BTGE.shape[-1])
        wide = torch.promote_types(q_BTHD.dtype, torch.float32)
        lse = q_BTHD.new_full((q_BTHD.shape[0], *q_BTHD.shape[2:0:-1]), float("-inf"), dtype=wide)
        saved = []
        for span in self.behind:
            b, rows, slots = _places(span)
            bias = {} if key_bias_BTG is None else {"key_bias_BTG": key_bias_BTG[b, slots]}
            o, lse_span, kept = self.kernel.forward(
                q_BTHD[b, rows], k_BTGD[b, slots], v_BTGE[b, slots], scale=scale, causal=False, **bias
            )
            out[b, rows], lse[b, :, rows] = o, lse_span
            saved.append(kept)
        return out, lse, saved

    def backward(
        self, do_BTHE, q_BTHD, k_BTGD, v_BTGE, o_BTHE, lse_BHT, saved, *, scale, cu_seqlens=None
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(q_BTHD.dtype, torch.float32)
        dq = torch.zeros_like(q_BTHD)
        dk, dv = torch.zeros_like(k_BTGD, dtype=wide), torch.zeros_like(v_BTGE, dtype=wide)
        for span, kept in zip(self.behind, saved, strict=True):
            b, rows, slots = _places(span)
            grads = self.kernel.backward(
                do_BTHE[b, rows],
                q_BTHD[b, rows],
                k_BTGD[b, slots],
                v_BTGE[b, slots],
                o_BTHE[b, rows],
                lse_BHT[b, :, rows],
                kept,
                scale=scale,
                causal=False,
            )
            dq[b, rows] = grads[0]
            dk[b, slots] += grads[1]
            dv[b, slots] += grads[2]
        return dq, dk, dv


class GatedPastSpans(GatedPast):
    """The gated call of kernels/attention/gated_past.py over spans: no slot is delayed, for no slot of a row's own span takes part."""

    def __init__(self, kernel: FusedKernel, spans: Spans, scale: float, q: Tensor, slots: Slots):
        super().__init__(SpanKernel(kernel, spans), scale, 0, None, q, slots, None, columns_for(q.device))
        self.behind = spans.behind

    def largest_gaps(self, q: Tensor, k: Tensor, merged_lse: Tensor) -> Tensor:
        """[B, T, G]: the largest s_ij − L_i among the rows i that see slot j through its gate; −inf if none does."""
        B, T, G, _ = k.shape
        out = merged_lse.new_full((B, T, G), float("-inf"))
        for span in self.behind:
            b, _, slots = _places(span)
            keys = k[b, slots].permute(0, 2, 3, 1)[:, :, None].to(merged_lse.dtype)
            for first in range(span.start, span.end, BLOCK):
                rows = slice(first, min(first + BLOCK, span.end))
                queries = q[b, rows].to(merged_lse.dtype).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)
                gap = queries @ keys * self.scale
                gap -= merged_lse[b, rows].unflatten(2, (G, -1)).permute(0, 2, 3, 1)[..., None]
                out[b, slots] = out[b, slots].maximum(gap.amax((2, 3)).transpose(1, 2))
        return out


def _places(span: Span) -> tuple[slice, slice, slice]:
    """(its window, its rows, the slots before it), as slices, so that dimensions stay."""
    return slice(span.window, span.window + 1), slice(span.start, span.end), slice(span.first, span.start)
