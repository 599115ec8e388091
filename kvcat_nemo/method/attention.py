"""Gated attention in its plainest form: the oracle of every kernel.

    A_ij = g_ij·exp(s_ij) / Σ_{l≤i} g_il·exp(s_il),   g_ij = 1 where slot j is always visible to query i, else gate_j

Shapes: B batch, T tokens, H query heads, G KV heads, N query heads per KV head, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvcat_nemo.method.spans import Spans

GATE_GRADIENT_CAP = 30.0
"""In its gate's gradient, a dropped slot's weight e^{s_ij}/Z_i is at most exp(30), all rows together.

The output is unaffected (the gate is 0). Without a cap the gradient is as large as the exponential of the gap and
overflows where a dropped slot dominates a row by some eighty logits.
"""


def document_positions(tokens: int, cu_seqlens: Tensor | None = None, device=None) -> tuple[Tensor, Tensor]:
    """Each token's place in its document and how many tokens of the document come after it, both [T] int64.

    Args:
        tokens: T; cu_seqlens: [n + 1] the documents' boundaries 0 … T; None: one document.
    """
    t = torch.arange(tokens, device=device if cu_seqlens is None else cu_seqlens.device)
    if cu_seqlens is None:
        return t, tokens - 1 - t
    cu = cu_seqlens.long()
    document = torch.searchsorted(cu, t, right=True) - 1
    return t - cu[document], cu[document + 1] - 1 - t


def document_lengths(position_BT: Tensor) -> Tensor:
    """Tokens of each token's document, [B, T] float64, from each token's place in its document."""
    document = (position_BT == 0).cumsum(1)
    same = torch.zeros_like(document).scatter_add_(1, document - 1, torch.ones_like(document))
    return same.gather(1, document - 1).double()


def always_visible(
    tokens: int, sinks: int, recent_window: int, device=None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """[T, T] bool: slot j is visible to query i whatever its gate (own slot and recent window, sinks)."""
    i = torch.arange(tokens, device=device)[:, None]
    j = torch.arange(tokens, device=device)[None, :]
    position, _ = document_positions(tokens, cu_seqlens, device)
    return _sees(tokens, device, cu_seqlens) & ((i - j < recent_window) | (position < sinks))


def _sees(tokens: int, device, cu_seqlens: Tensor | None) -> Tensor:
    """[T, T] bool: slot j is in query i's document and not after it."""
    i = torch.arange(tokens, device=device)
    position, _ = document_positions(tokens, cu_seqlens, device)
    return (i <= i[:, None]) & (i >= (i - position)[:, None])


def gated_attention_reference(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    gate_BTG: Tensor,
    *,
    scale: float,
    sinks: int = 0,
    recent_window: int = 1,
    gradient_cap: float = GATE_GRADIENT_CAP,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Renormalised gating with gradients to q, k, v and to every gate, dropped slots included.

    ∂L/∂gate_j = Σ_i (e^{s_ij}/Z_i)·⟨∂L/∂o_i, v_j − o_i⟩ does not vanish at gate 0, so a dropped slot can come back.

    Args:
        q_BTHD: queries; k_BTGD, v_BTGD: keys and values, H a multiple of G.
        gate_BTG: gates in [0, 1] per KV head, or [B, T, 1] shared by all.
        scale: softmax scale, normally D^-½.
        sinks, recent_window: slots that no gate hides; the own slot is always one of them.
        gradient_cap: bounds the gradient of dropped slots' gates. A slot whose weight e^{s_ij}/Z_i, summed over the
            queries i that see it through its gate and averaged over its KV head's query heads, exceeds e^cap has its
            gate's gradient scaled down by the ratio; below, it is exact.
        cu_seqlens: [n + 1] boundaries of documents packed into one window (B = 1); no attention across them.

    Returns:
        [B, T, H, D] in q's dtype. Memory is O(T²).
    """
    T, device = q_BTHD.shape[1], q_BTHD.device
    sees = _sees(T, device, cu_seqlens)
    free = always_visible(T, sinks, recent_window, device, cu_seqlens)
    return _gated(q_BTHD, k_BTGD, v_BTGD, gate_BTG, sees, free, scale, gradient_cap)


def span_gated_attention_reference(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    gate_BTG: Tensor,
    *,
    spans: Spans,
    scale: float,
    sinks: int = 0,
    gradient_cap: float = GATE_GRADIENT_CAP,
) -> Tensor:
    """Gates that apply to rows behind a cut alone: the equation of the module with

        g_ij = 1        where slot j lies in row i's span, or is one of the first `sinks` slots of its document
             = gate_j   where slot j lies in an earlier span of row i's document
             = 0        after row i, and in other documents

    Args:
        spans: see method.spans; others, the result and the gradients as gated_attention_reference.
    """
    T, device = q_BTHD.shape[1], q_BTHD.device
    first_BT1, start_BT1 = (x[..., None] for x in spans.rows(device))
    j = torch.arange(T, device=device)
    sees = (j <= j[:, None]) & (j >= first_BT1)
    free = sees & ((j >= start_BT1) | (j < first_BT1 + sinks))
    sees, free = (x[:, None, None] for x in (sees, free))
    return _gated(q_BTHD, k_BTGD, v_BTGD, gate_BTG, sees, free, scale, gradient_cap)


def _gated(q_BTHD, k_BTGD, v_BTGD, gate_BTG, sees, free, scale: float, gradient_cap: float) -> Tensor:
    """The module's equation. sees, free: [T, T] or [B, 1, 1, T, T] bool: slot j is visible to query i, whatever its gate."""
    B, T, H, D = q_BTHD.shape
    G = k_BTGD.shape[2]
    q = q_BTHD.view(B, T, G, H // G, D).permute(0, 2, 3, 1, 4)
    k, v = (x.permute(0, 2, 1, 3)[:, :, None] for x in (k_BTGD, v_BTGD))
    s_BGNTT = (q @ k.transpose(-1, -2)) * scale
    gate = gate_BTG.to(s_BGNTT.dtype).expand(B, T, G).permute(0, 2, 1)[:, :, None, None]
    g = torch.where(free, torch.ones_like(gate), gate) * sees
    level = (s_BGNTT + g.log()).logsumexp(-1, keepdim=True).detach()
    # Hidden slots may lie far above the visible ones; the future is cut before exp so that it cannot overflow.
    gap = (s_BGNTT - level).masked_fill(~sees, float("-inf"))
    excess = _log_weight(gap.detach(), sees & ~free) - gradient_cap
    e = g * torch.where(g.detach() > 0, gap, gap - excess.clamp(min=0)).exp()
    o = (e / e.sum(-1, keepdim=True)) @ v
    return o.permute(0, 3, 1, 2, 4).reshape(B, T, H, D).to(q_BTHD.dtype)


def _log_weight(gap_BGNTT: Tensor, gated: Tensor) -> Tensor:
    """[B, G, 1, 1, T]: log of e^gap summed over the queries to which the slot is gated, mean over the N heads; or −inf."""
    total = gap_BGNTT.masked_fill(~gated, float("-inf")).logsumexp((2, 3), keepdim=True)
    return total - math.log(gap_BGNTT.shape[2])
