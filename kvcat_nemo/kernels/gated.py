"""Gated and plain causal attention: one function each, whatever computes it.

Shapes: B batch, T tokens, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from kvcat_nemo.kernels.blocked import blocked_gated_attention
from kvcat_nemo.method.attention import GATE_GRADIENT_CAP, gated_attention_reference


def _oracle(q_BTHD, k_BTGD, v_BTGD, gate_BTG, **settings):
    q, k, v, gate = (x.double() for x in (q_BTHD, k_BTGD, v_BTGD, gate_BTG))
    return gated_attention_reference(q, k, v, gate, **settings).to(q_BTHD.dtype)


BACKENDS = {"plain": blocked_gated_attention, "oracle": _oracle}


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
    backend: str = "auto",
) -> Tensor:
    """Causal attention in which a query sees slot j with weight gate_j (METHOD: gate inside attention).

    Args:
        q_BTHD, k_BTGD, v_BTGD: queries, keys and values; H must be a multiple of G.
        gate_BTG: gates in [0, 1] per KV head, or [B, T, 1] shared by all heads.
        scale: softmax scale.
        sinks, recent_window: slots that no gate hides.
        gradient_cap: logits by which a dropped slot may exceed the visible ones in its gate's gradient.
        cu_seqlens: several documents in one window; not supported by today's backends.
        backend: `plain`, `oracle` (float64) or `auto`.

    Returns:
        [B, T, H, D] in q's dtype.

    Raises:
        ValueError: on shapes that do not fit, or a backend or feature that is not there.
    """
    if cu_seqlens is not None:
        raise ValueError(
            "cu_seqlens: packed documents are not supported by gated attention yet; give one document stream per window"
        )
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of auto, {', '.join(BACKENDS)}")
    B, T, H, D = q_BTHD.shape
    G = k_BTGD.shape[2]
    if k_BTGD.shape != (B, T, G, D) or v_BTGD.shape[:3] != (B, T, G) or H % G:
        raise ValueError(
            f"q {tuple(q_BTHD.shape)}, k {tuple(k_BTGD.shape)}, v {tuple(v_BTGD.shape)}: not [B,T,H,D] and [B,T,G,D] with G dividing H"
        )
    if gate_BTG.shape not in ((B, T, G), (B, T, 1)):
        raise ValueError(f"gate {tuple(gate_BTG.shape)}: give [{B}, {T}, {G}] or [{B}, {T}, 1]")
    kernel = BACKENDS["plain" if backend == "auto" else backend]
    settings = {"scale": scale, "sinks": sinks, "recent_window": recent_window, "gradient_cap": gradient_cap}
    return kernel(q_BTHD, k_BTGD, v_BTGD, gate_BTG, **settings)


def causal_attention(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, *, scale: float) -> Tensor:
    """Plain causal attention by PyTorch's fused kernel, [B, T, H, D]: the dense half of a paired pass."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(
        1, 2
    )
