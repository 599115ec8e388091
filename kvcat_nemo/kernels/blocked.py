"""Gated attention in plain PyTorch, block by block: exact, any dtype and host, no T×T matrix.

The softmax runs over s_ij + log g_ij, so a hidden slot (g = 0) takes no part in it. Backward recomputes each block's
scores from the row's log-sum-exp and gives every gate its gradient, those of hidden slots included:

    W_ij = exp(s_ij − lse_i)    A_ij = g_ij·W_ij    D_ij = ⟨do_i, v_j⟩ − ⟨do_i, o_i⟩
    ds = A ⊙ D      dgate_j = Σ_i W_ij·D_ij over the queries i that do not always see j

Shapes: B batch, G KV heads, N query heads per KV head, T tokens, D head dim, Q queries of a block, J slots up to its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def _gates(gate_BGT: Tensor, first: int, last: int, sinks: int, recent_window: int) -> tuple[Tensor, Tensor]:
    """g_ij of queries first … last−1 and slots 0 … last−1, [B, G, 1, Q, J], and where the gate decides it, [Q, J]."""
    i = torch.arange(first, last, device=gate_BGT.device)[:, None]
    j = torch.arange(last, device=gate_BGT.device)[None, :]
    gated = (i - j >= recent_window) & (j >= sinks)
    g = torch.where(gated, gate_BGT[:, :, None, None, :last], 1.0)
    return g.masked_fill(j > i, 0.0), gated


class _BlockedGatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, gate, scale, sinks, recent_window, gradient_cap):
        T = q.shape[3]
        out = torch.empty_like(q[..., :1]).expand(*q.shape[:-1], v.shape[-1]).contiguous()
        lse = q.new_empty(q.shape[:-1])
        for first in range(0, T, BLOCK):
            last = min(first + BLOCK, T)
            g, _ = _gates(gate, first, last, sinks, recent_window)
            s = (q[..., first:last, :] * scale) @ k[..., :last, :].transpose(-1, -2)
            s += g.log()  # log 0 = −inf: not in the softmax; a query's own slot always is
            lse[..., first:last] = s.logsumexp(-1)
            out[..., first:last, :] = s.sub_(lse[..., first:last, None]).exp_() @ v[..., :last, :]
        ctx.save_for_backward(q, k, v, gate, out, lse)
        ctx.settings = scale, sinks, recent_window, gradient_cap
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, gate, out, lse = ctx.saved_tensors
        scale, sinks, recent_window, gradient_cap = ctx.settings
        T = q.shape[3]
        dq, dk, dv, dgate = (torch.zeros_like(x) for x in (q, k, v, gate))
        delta = (grad * out).sum(-1, keepdim=True)
        for first in range(0, T, BLOCK):
            last = min(first + BLOCK, T)
            rows = (..., slice(first, last), slice(None))
            slots = (..., slice(0, last), slice(None))
            g, gated = _gates(gate, first, last, sinks, recent_window)
            w = (q[rows] * scale) @ k[slots].transpose(-1, -2)
            w = w.sub_(lse[..., first:last, None])
            # A hidden slot's weight has no bound of its own: cap it, in its gate's gradient alone. Others' is 1/g at most.
            w = w.masked_fill_((g == 0) & (w > gradient_cap), gradient_cap).exp_()
            d = grad[rows] @ v[slots].transpose(-1, -2) - delta[rows]
            dgate[..., :last] += (w * d).masked_fill_(~gated, 0.0).sum((2, 3))
            a = w.mul_(g)
            dv[slots] += (a.transpose(-1, -2) @ grad[rows]).sum(2, keepdim=True)
            ds = d.mul_(a)
            dq[rows] = (ds @ k[slots]) * scale
            dk[slots] += (ds.transpose(-1, -2) @ q[rows]).sum(2, keepdim=True) * scale
        return dq, dk, dv, dgate, None, None, None, None


def blocked_gated_attention(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    gate_BTG: Tensor,
    *,
    scale: float,
    sinks: int,
    recent_window: int,
    gradient_cap: float,
) -> Tensor:
    """See kernels.gated_attention. Computes in at least float32; memory is O(T·BLOCK) per head beyond its inputs."""
    B, T, H, D = q_BTHD.shape
    G = k_BTGD.shape[2]
    wide = torch.promote_types(q_BTHD.dtype, torch.float32)
    q = q_BTHD.to(wide).reshape(B, T, G, H // G, D).permute(0, 2, 3, 1, 4)
    k, v = (x.to(wide).permute(0, 2, 1, 3)[:, :, None] for x in (k_BTGD, v_BTGD))
    gate = gate_BTG.to(wide).expand(B, T, G).transpose(1, 2)
    out = _BlockedGatedAttention.apply(q, k, v, gate, scale, sinks, recent_window, gradient_cap)
    return out.permute(0, 3, 1, 2, 4).reshape(B, T, H, -1).to(q_BTHD.dtype)
