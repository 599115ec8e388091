"""A fused kernel over spans: rows behind a cut see all earlier slots of their document. Part of kernels/span_gated.py.

Spans of a document are halved again and again: the rows of the later half see the slots of the earlier half, in one call that
is not causal. So most rows are in long calls, which kernels compute faster than many short ones, and every pair of a row and a
slot of an earlier span is in exactly one call. Eight spans of n rows take calls of 4n × 4n, 2 of 2n × 2n and 4 of n × n.
`SpanKernel` makes of these calls one that has the interface of a `FusedKernel`, so that kernels/earlier.py gives it its columns
for gates.

Shapes: as in kernels/protocol.py.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from kvcat_nemo.kernels.columns_choice import columns_for
from kvcat_nemo.kernels.earlier import BLOCK, Earlier, Slots
from kvcat_nemo.kernels.protocol import FusedKernel
from kvcat_nemo.method.spans import Span, Spans


class Call(NamedTuple):
    """Rows that see slots of earlier spans."""

    window: int
    rows: tuple[int, int]
    slots: tuple[int, int]
    first: bool
    """Whether these rows are in no call before."""

    @property
    def places(self) -> tuple[slice, slice, slice]:
        """(window, rows, slots), as slices, so that dimensions stay."""
        return slice(self.window, self.window + 1), slice(*self.rows), slice(*self.slots)


@functools.lru_cache(maxsize=64)
def calls_of(spans: Spans) -> tuple[Call, ...]:
    """The calls in which the rows of every span meet the slots of all earlier spans of their document."""
    out: list[Call] = []

    def halve(group: list[Span], seen: bool) -> None:
        if len(group) < 2:
            return
        middle = len(group) // 2
        b, cut = group[0].window, group[middle].start
        later = group[middle:]
        out.append(Call(b, (cut, group[-1].end), (group[0].start, cut), not seen))
        halve(group[:middle], seen)
        halve(later, True)

    for _, document in itertools.groupby(spans.spans, key=lambda s: (s.window, s.first)):
        halve(list(document), False)
    return tuple(out)


class SpanKernel:
    """See `protocol.FusedKernel`. Rows of a document's first span see no slot: their output is 0, their lse −∞.

    Gradients of keys and values are sums over spans, in at least float32.
    """

    def __init__(self, kernel: FusedKernel, spans: Spans):
        self.kernel, self.calls = kernel, calls_of(spans)
        self.name, self.takes_key_bias = kernel.name, kernel.takes_key_bias
        self.check, self.widths = kernel.check, kernel.widths

    def forward(self, q_BTHD, k_BTGD, v_BTGE, *, scale, cu_seqlens=None, key_bias_BTG=None):
        assert cu_seqlens is None  # the spans know the documents
        out = q_BTHD.new_zeros(*q_BTHD.shape[:3], v_BTGE.shape[-1])
        wide = torch.promote_types(q_BTHD.dtype, torch.float32)
        lse = q_BTHD.new_full((q_BTHD.shape[0], *q_BTHD.shape[2:0:-1]), float("-inf"), dtype=wide)
        saved = []
        for call in self.calls:
            b, rows, slots = call.places
            bias = {} if key_bias_BTG is None else {"key_bias_BTG": key_bias_BTG[b, slots]}
            o, lse_call, kept = self.kernel.forward(
                q_BTHD[b, rows], k_BTGD[b, slots], v_BTGE[b, slots], scale=scale, causal=False, **bias
            )
            if call.first:  # of its rows
                out[b, rows], lse[b, :, rows] = o, lse_call
            else:
                before = lse[b, :, rows]
                both = torch.logaddexp(before, lse_call)
                shares = [(x - both).exp().transpose(1, 2)[..., None] for x in (before, lse_call)]
                out[b, rows] = (out[b, rows] * shares[0] + o * shares[1]).to(out.dtype)
                lse[b, :, rows] = both
            saved.append(kept)
        return out, lse, saved

    def backward(
        self, do_BTHE, q_BTHD, k_BTGD, v_BTGE, o_BTHE, lse_BHT, saved, *, scale, cu_seqlens=None
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(q_BTHD.dtype, torch.float32)
        dq = torch.zeros_like(q_BTHD, dtype=wide)
        dk, dv = torch.zeros_like(k_BTGD, dtype=wide), torch.zeros_like(v_BTGE, dtype=wide)
        for call, kept in zip(self.calls, saved, strict=True):
            b, rows, slots = call.places
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
            dq[b, rows] += grads[0]
            dk[b, slots] += grads[1]
            dv[b, slots] += grads[2]
        return dq.to(q_BTHD.dtype), dk, dv


class EarlierSpans(Earlier):
    """The gated call of kernels/earlier.py over spans: no slot is moved, for no slot of a row's own span takes part."""

    def __init__(self, kernel: FusedKernel, spans: Spans, scale: float, q: Tensor, slots: Slots):
        super().__init__(SpanKernel(kernel, spans), scale, 0, None, q, slots, None, columns_for(q.device))
        self.behind = spans.behind

    def largest_gaps(self, q: Tensor, k: Tensor, level: Tensor) -> Tensor:
        """[B, T, G]: the largest s_ij − L_i among the rows i that see slot j through its gate; −inf if none does."""
        B, T, G, _ = k.shape
        out = level.new_full((B, T, G), float("-inf"))
        for span in self.behind:
            b, _, slots = _places(span)
            keys = k[b, slots].permute(0, 2, 3, 1)[:, :, None].to(level.dtype)
            for first in range(span.start, span.end, BLOCK):
                rows = slice(first, min(first + BLOCK, span.end))
                queries = q[b, rows].to(level.dtype).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)
                gap = queries @ keys * self.scale
                gap -= level[b, rows].unflatten(2, (G, -1)).permute(0, 2, 3, 1)[..., None]
                out[b, slots] = out[b, slots].maximum(gap.amax((2, 3)).transpose(1, 2))
        return out


def _places(span: Span) -> tuple[slice, slice, slice]:
    """(its window, its rows, the slots before it), as slices, so that dimensions stay."""
    return slice(span.window, span.window + 1), slice(span.start, span.end), slice(span.first, span.start)
