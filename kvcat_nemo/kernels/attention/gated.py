"""Gated and plain causal attention: one function each, whatever computes it.

Shapes: B batch, T tokens, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcat_nemo.kernels.attention.context_parallel import Whole, WindowSplit
from kvcat_nemo.kernels.attention.context_parallel_kernel import SplitKernel
from kvcat_nemo.kernels.attention.gated_function import GatedAttention
from kvcat_nemo.kernels.fused.interface import FusedKernel
from kvcat_nemo.kernels.fused.selection import kernel, select_backend
from kvcat_nemo.method.attention import GATE_GRADIENT_CAP, gated_attention_reference


def gated_attention(
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
    split: WindowSplit | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention in which a query sees slot j with weight gate_j (METHOD: gate inside attention).

    O(T) memory. Output and gradients are those of method.attention.gated_attention_reference, dropped slots' gates
    included; kernels/attention/gated_function.py derives how.

    Args:
        q_BTHD, k_BTGD, v_BTGD: queries, keys and values; H must be a multiple of G.
        gate_BTG: gates in [0, 1] per KV head, or [B, T, 1] shared by all heads.
        scale: softmax scale.
        sinks, recent_window: slots that no gate hides; sinks are the first of each document.
        gradient_cap: logarithm of the most that a dropped slot's weight e^{s_ij}/Z_i may be in its gate's gradient, all
            queries that see it through its gate together; above, the gradient is scaled down.
        cu_seqlens: [n + 1] integers, boundaries 0 … T of documents packed into one window (B = 1); no attention across.
        split: all tensors hold this rank's tokens of windows that are split over a process group; a collective call,
            also in backward. Gates' gradients (the cap included) are those of the whole window.
        backend: a name of kernels.fused.selection.BACKENDS, or `auto`.

    Returns:
        [B, T, H, D] in q's dtype.

    Raises:
        ValueError: on shapes that do not fit, or a backend or feature that is not there.
    """
    B, T, G = _check_shapes(q_BTHD, k_BTGD, v_BTGD, cu_seqlens)
    if gate_BTG.shape not in ((B, T, G), (B, T, 1)):
        raise ValueError(f"gate {tuple(gate_BTG.shape)}: give [{B}, {T}, {G}] or [{B}, {T}, 1]")
    if recent_window < 1:
        raise ValueError(f"recent_window={recent_window}: give at least 1: a query always sees its own slot")
    q, k, v = q_BTHD, k_BTGD, v_BTGD
    backend = _select(
        backend, q, recent_window=recent_window, packed=cu_seqlens is not None, split=split is not None
    )
    if backend == "oracle":
        settings = {"sinks": sinks, "recent_window": recent_window, "gradient_cap": gradient_cap}
        return _oracle(q, k, v, gate_BTG, split, scale=scale, cu_seqlens=cu_seqlens, **settings)
    gate = gate_BTG.to(torch.promote_types(q.dtype, torch.float32)).expand(B, T, G)
    return GatedAttention.apply(
        q, k, v, gate, kernel(backend), scale, recent_window, gradient_cap, cu_seqlens, sinks, split
    )


def causal_attention(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor | None = None,
    split: WindowSplit | None = None,
    backend: str = "auto",
) -> Tensor:
    """Plain causal attention by the same backends, [B, T, H, D]: the dense half of a paired pass.

    Arguments and errors as gated_attention's.
    """
    B, T, _ = _check_shapes(q_BTHD, k_BTGD, v_BTGD, cu_seqlens)
    backend = _select(backend, q_BTHD, gated=False, packed=cu_seqlens is not None, split=split is not None)
    if backend == "oracle":
        gate = q_BTHD.new_ones(B, T, 1)
        return _oracle(q_BTHD, k_BTGD, v_BTGD, gate, split, scale=scale, cu_seqlens=cu_seqlens)
    return _Causal.apply(q_BTHD, k_BTGD, v_BTGD, kernel(backend), scale, cu_seqlens, split)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, fused: FusedKernel, scale, cu_seqlens, split: WindowSplit | None):
        D, E = q.shape[-1], v.shape[-1]
        fused = fused if split is None else SplitKernel(fused, split)
        widths = fused.widths(D, E)
        q, k, v = _padded(q, widths[0]), _padded(k, widths[0]), _padded(v, widths[1])
        ctx.settings = {"scale": scale, "cu_seqlens": cu_seqlens}
        slots = (k, v) if split is None else (split.whole(k), split.whole(v))
        out, lse, ctx.saved = fused.forward(q, *slots, **ctx.settings)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.fused, ctx.widths, ctx.split = fused, (D, E), split
        return out[..., :E]

    @staticmethod
    def backward(ctx, do):
        q, k, v, out, lse = ctx.saved_tensors
        (D, E), split = ctx.widths, ctx.split
        do = _padded(do, v.shape[-1])
        # A rank keeps its own keys and values alone: the whole window's are fetched again.
        slots = (k, v) if split is None else (split.whole(k), split.whole(v))
        dq, dk, dv = ctx.fused.backward(do, q, *slots, out, lse, ctx.saved, **ctx.settings)
        if split is not None:
            dk, dv = (split.sum_to_owner(x.to(k.dtype)) for x in (dk, dv))
        return dq[..., :D], dk[..., :D], dv[..., :E], None, None, None, None


def _oracle(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, split: WindowSplit | None, **settings) -> Tensor:
    """method.attention.gated_attention_reference in float64; of a split window, computed whole on every rank."""
    whole = (x.double() for x in (q, k, v, gate))
    if split is not None:
        whole = (Whole.apply(x, split) for x in whole)
    out = gated_attention_reference(*whole, **settings).to(q.dtype)
    return out if split is None else split.own(out)


def _padded(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1])) if width > x.shape[-1] else x


def _select(name: str, q_BTHD: Tensor, **features) -> str:
    return select_backend(
        name, device=q_BTHD.device, dtype=q_BTHD.dtype, head_dim=q_BTHD.shape[-1], **features
    )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    B, T, H, D = q.shape
    G = k.shape[2]
    if k.shape != (B, T, G, D) or v.shape[:3] != (B, T, G) or H % G:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: not [B,T,H,D] and [B,T,G,D] with G dividing H"
        )
    if cu_seqlens is not None and (B != 1 or cu_seqlens.dim() != 1):
        raise ValueError(
            f"cu_seqlens {tuple(cu_seqlens.shape)} with {B} windows: packed documents come as one window, [1, T, …], "
            "with their boundaries [n + 1]"
        )
    return B, T, G
