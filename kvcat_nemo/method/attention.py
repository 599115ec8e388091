"""Gated attention in its plainest form: the oracle of every kernel.

    A_ij = g_ij·exp(s_ij) / Σ_{l≤i} g_il·exp(s_il),   g_ij = 1 where slot j is always visible to query i, else gate_j

Shapes: B batch, T tokens, H query heads, G KV heads, N query heads per KV head, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

GATE_GRADIENT_CAP = 30.0
"""In its gate's gradient, a dropped slot's weight is at most exp(30) times that of the row's visible slots together.

The output is unaffected (the gate is 0). Without a cap the gradient is as large as the exponential of the gap and
overflows where a dropped slot dominates a row by some eighty logits.
"""


def always_visible(tokens: int, sinks: int, recent_window: int, device=None) -> Tensor:
    """[T, T] bool: slot j is visible to query i whatever its gate (own slot and recent window, sinks)."""
    i = torch.arange(tokens, device=device)[:, None]
    j = torch.arange(tokens, device=device)[None, :]
    return (j <= i) & ((i - j < recent_window) | (j < sinks))


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
) -> Tensor:
    """Renormalised gating with gradients to q, k, v and to every gate, dropped slots included.

    ∂L/∂gate_j = Σ_i (e^{s_ij}/Z_i)·⟨∂L/∂o_i, v_j − o_i⟩ does not vanish at gate 0, so a dropped slot can come back.

    Args:
        q_BTHD: queries; k_BTGD, v_BTGD: keys and values, H a multiple of G.
        gate_BTG: gates in [0, 1] per KV head, or [B, T, 1] shared by all.
        scale: softmax scale, normally D^-½.
        sinks, recent_window: slots that no gate hides; the own slot is always one of them.
        gradient_cap: logits by which a dropped slot may exceed the visible ones together in its gate's gradient; exact
            below.

    Returns:
        [B, T, H, D] in q's dtype. Memory is O(T²).
    """
    B, T, H, D = q_BTHD.shape
    G = k_BTGD.shape[2]
    q = q_BTHD.view(B, T, G, H // G, D).permute(0, 2, 3, 1, 4)
    k, v = (x.permute(0, 2, 1, 3)[:, :, None] for x in (k_BTGD, v_BTGD))
    s_BGNTT = (q @ k.transpose(-1, -2)) * scale
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    free = always_visible(T, sinks, recent_window, q.device)
    gate = gate_BTG.to(s_BGNTT.dtype).expand(B, T, G).permute(0, 2, 1)[:, :, None, None]
    g = torch.where(free, torch.ones_like(gate), gate) * causal
    level = (s_BGNTT + g.log()).logsumexp(-1, keepdim=True).detach()
    # Hidden slots may lie far above the visible ones; the future is cut before exp so that it cannot overflow.
    gap = (s_BGNTT - level).masked_fill(~causal, float("-inf"))
    e = g * torch.where(g.detach() > 0, gap, gap.clamp(max=gradient_cap)).exp()
    o = (e / e.sum(-1, keepdim=True)) @ v
    return o.permute(0, 3, 1, 2, 4).reshape(B, T, H, D).to(q_BTHD.dtype)
