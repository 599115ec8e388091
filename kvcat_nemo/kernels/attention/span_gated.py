"""Gates that apply to rows behind a cut alone, from fused kernels. method/spans.py says which rows see what.

A row's slots fall in two parts: those of its own span, which no gate hides, and the earlier ones, which are gated.

    own span    a plain causal call on the span                      o', lse'
    earlier     a call that is not causal: the span's rows over all earlier slots of the document, with columns for gates
                and their gradients (kernels/attention/span_kernel.py)         o'', lse''
    merged      L = logaddexp(lse', lse'')      o = e^{lse' − L}·o' + e^{lse'' − L}·o''

Backward gives both calls the merged o and L, as kernels/attention/gated_function.py derives it: weights and δ come from those alone, so
nothing has to be merged, and what that module says of dropped slots' gates holds with sums over all rows behind the slot.
Rows of a document's first span have no earlier slots; theirs is the plain causal call as it is.

The two calls of a span of n rows behind P slots take n²/2 + n·P products, as those rows of one causal call do.

Shapes: B windows, T tokens, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcat_nemo.kernels.attention.columns import add_gated
from kvcat_nemo.kernels.attention.gated_past import Slots
from kvcat_nemo.kernels.attention.overflow import watch
from kvcat_nemo.kernels.attention.span_kernel import GatedPastSpans
from kvcat_nemo.kernels.fused.interface import FusedKernel
from kvcat_nemo.kernels.fused.selection import kernel, select_backend
from kvcat_nemo.method.attention import GATE_GRADIENT_CAP, span_gated_attention_reference
from kvcat_nemo.method.spans import Span, Spans


def span_gated_attention(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    gate_BTG: Tensor,
    *,
    spans: Spans,
    scale: float,
    sinks: int = 0,
    gradient_cap: float = GATE_GRADIENT_CAP,
    first_spans: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Causal attention in which rows behind a cut see the slots before it through their gates.

    O(T) memory. Output and gradients are those of method.attention.span_gated_attention_reference, those of the gates of
    dropped slots included.

    Args:
        q_BTHD, k_BTGD, v_BTGD: queries, keys and values; H must be a multiple of G.
        gate_BTG: gates in [0, 1] per KV head, or [B, T, 1] shared by all heads; soft ones (σ of a score) too. A slot that
            no row is gated to (of a document's last span) gets a gradient of 0.
        spans: where windows and documents are cut, e.g. `Spans.from_cuts([[512], [300, 700]], tokens=1024)`.
        scale: softmax scale.
        sinks: first slots of each document that no gate hides.
        gradient_cap: as kernels.gated_attention's, over all rows that see the slot through its gate.
        first_spans: False leaves out the rows of each document's first span, which no gate concerns: their output is 0, and
            they give no gradient. For a caller that has them from a plain call.
        backend: a name of kernels.fused.selection.BACKENDS, or `auto`.

    Returns:
        [B, T, H, D] in q's dtype.

    Raises:
        ValueError: on shapes that do not fit, or a backend or feature that is not there.
    """
    B, T, H, D = q_BTHD.shape
    G = k_BTGD.shape[2]
    if k_BTGD.shape != (B, T, G, D) or v_BTGD.shape[:3] != (B, T, G) or H % G:
        raise ValueError(
            f"q {tuple(q_BTHD.shape)}, k {tuple(k_BTGD.shape)}, v {tuple(v_BTGD.shape)}: not [B,T,H,D] and [B,T,G,D] with G "
            "dividing H"
        )
    if gate_BTG.shape not in ((B, T, G), (B, T, 1)):
        raise ValueError(f"gate {tuple(gate_BTG.shape)}: give [{B}, {T}, {G}] or [{B}, {T}, 1]")
    if (spans.windows, spans.tokens) != (B, T):
        raise ValueError(f"spans of {spans.windows} windows of {spans.tokens} tokens: q has {B} of {T}")
    backend = select_backend(backend, device=q_BTHD.device, dtype=q_BTHD.dtype, head_dim=D, spans=True)
    q, k, v = q_BTHD, k_BTGD, v_BTGD
    if backend == "oracle":
        settings = {"spans": spans, "scale": scale, "sinks": sinks, "gradient_cap": gradient_cap}
        out = span_gated_attention_reference(*(x.double() for x in (q, k, v, gate_BTG)), **settings)
        return (out if first_spans else out * spans.behind_BT(out.device)[:, :, None, None]).to(q.dtype)
    gate = gate_BTG.to(torch.promote_types(q.dtype, torch.float32)).expand(B, T, G)
    if sinks:
        gate = torch.where(spans.sinks_BT(sinks, q.device)[:, :, None], 1.0, gate)
    return SpanGatedAttention.apply(q, k, v, gate, kernel(backend), scale, gradient_cap, spans, first_spans)


class SpanGatedAttention(torch.autograd.Function):
    """See the module's docstring. Gates [B, T, G] in at least float32, those of sinks open."""

    @staticmethod
    def forward(ctx, q, k, v, gate, kernel: FusedKernel, scale, gradient_cap, spans: Spans, first_spans):
        slots = Slots(k, v, gate, 0, None, None)
        past = GatedPastSpans(kernel, spans, scale, q, slots)
        own = OwnSpan(kernel, spans.spans if first_spans else spans.behind, scale)
        o, lse, saved = past.forward(q, slots)
        o, merged_lse = own.merge(q, k, v, o, lse)
        ctx.save_for_backward(q, k, v, gate, o, merged_lse)
        ctx.past, ctx.own, ctx.saved, ctx.gradient_cap = past, own, saved, gradient_cap
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, gate, o, merged_lse = ctx.saved_tensors
        past: GatedPastSpans = ctx.past
        slots = Slots(k, v, gate, 0, None, None)
        recent = ctx.own.backward(do, q, k, v, o, merged_lse)
        if not past.behind:
            return (
                *(x.to(y.dtype) for x, y in zip(recent, (q, k, v), strict=True)),
                torch.zeros_like(gate),
                *[None] * 5,
            )
        wide_do, _ = past.gradient_columns(do, o)
        past_grads = past.backward(wide_do, q, slots, 0.0, merged_lse, ctx.saved)
        if watch.exceeded(past.weights(past_grads)):
            shift = past.largest_gaps(q, k, merged_lse).clamp(min=0)
            past_grads = past.backward(wide_do, q, slots, shift, merged_lse, ctx.saved)
        dgate = past.gate_gradient(past_grads, q, slots, ctx.gradient_cap)
        grads = add_gated(recent, past_grads, gate, 0)
        return *(x.to(y.dtype) for x, y in zip(grads, (q, k, v), strict=True)), dgate, *[None] * 5


class OwnSpan:
    """Each span's plain causal call on itself."""

    def __init__(self, kernel: FusedKernel, spans: tuple[Span, ...], scale: float):
        self.kernel, self.spans, self.scale = kernel, spans, scale

    def merge(self, q, k, v, o_earlier, lse_earlier_BTH) -> tuple[Tensor, Tensor]:
        """(o in q's dtype, L [B, T, H]) of both parts together; 0 and 0 for rows of no span."""
        out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
        merged_lse = torch.zeros_like(lse_earlier_BTH)
        self.saved = []
        for span in self.spans:
            at = _own(span)
            o, lse, kept = self.kernel.forward(*self._padded(q[at], k[at], v[at]), scale=self.scale)
            o, lse = o[..., : v.shape[-1]], lse.transpose(1, 2)
            self.saved.append(kept)
            if span.behind:
                other = lse_earlier_BTH[at]
                both = torch.logaddexp(lse, other)
                share, share_other = ((x - both).exp()[..., None] for x in (lse, other))
                o, lse = o * share + o_earlier[at] * share_other, both
            out[at], merged_lse[at] = o, lse
        return out, merged_lse

    def backward(self, do, q, k, v, o, merged_lse) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv of these calls, the latter two in at least float32."""
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.zeros_like(x, dtype=t) for x, t in ((q, q.dtype), (k, wide), (v, wide)))
        for span, kept in zip(self.spans, self.saved, strict=True):
            at = _own(span)
            q_, k_, v_ = self._padded(q[at], k[at], v[at])
            o_, do_ = (_pad(x[at], v_.shape[-1]) for x in (o, do))
            grads = self.kernel.backward(
                do_, q_, k_, v_, o_, merged_lse[at].transpose(1, 2), kept, scale=self.scale
            )
            for total, grad in zip((dq, dk, dv), grads, strict=True):
                total[at] = grad[..., : total.shape[-1]]
        return dq, dk, dv

    def _padded(self, q, k, v) -> tuple[Tensor, Tensor, Tensor]:
        D, E = self.kernel.widths(q.shape[-1], v.shape[-1])
        return _pad(q, D), _pad(k, D), _pad(v, E)


def _own(span: Span) -> tuple[slice, slice]:
    return slice(span.window, span.window + 1), slice(span.start, span.end)


def _pad(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if width > x.shape[-1] else x
