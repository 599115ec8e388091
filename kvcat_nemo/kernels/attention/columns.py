"""What surrounds the fused call of gated attention, in plain PyTorch: columns, gates' gradients, the own slot.

kernels/attention/columns_triton.py has the same functions, one Triton kernel each. kernels/attention/gated_function.py derives the formulas, and its
shapes are used here: B batch, T tokens, H query heads, G KV heads, N query heads per KV head, D width of keys, E of values.

`terms` is the number of columns that hold one number: 1, or 2 in 16-bit types, where the second holds the rounding error of
the first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HIDDEN = 30000.0
"""Logits by which a slot is lowered so that it has no weight at all."""


def query_columns(q: Tensor, width: int, terms: int) -> Tensor:
    """q' = [q | 1 | 0], [B, T, H, width]."""
    D = q.shape[-1]
    out = _wider(q, width)
    out[..., D : D + terms] = 1
    return out


def slot_columns(
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    position: Tensor,
    *,
    window: int,
    widths: tuple[int, int],
    terms: int,
    scale: float,
    shift: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:
    """k' = [k | β | 0] and v' = [m·v | m | 0], `window` tokens later, m = 1 where the gate is open at all.

    Args:
        k, v: [B, T, G, D], [B, T, G, E]. gate: [B, T, G] in at least float32.
        position: each token's place in its document, [T].
        widths: of k' and v'. shift: −β of a shut gate, a number or [B, T, G].

    Returns:
        k' [B, T, G, widths[0]], v' [B, T, G, widths[1]], and each slot's β as the columns hold it, [B, T − window, G] float64.
    """
    D, E = k.shape[-1], v.shape[-1]
    empty = position < window  # places of delayed slots where no slot of the document lies
    wide_k = _wider(k, widths[0], window)
    _put(wide_k, D, terms, _delayed(_beta(gate, shift), -HIDDEN, window, empty) / scale)
    wide_v = _wider(v, widths[1], window)
    visible = _delayed((gate > 0).to(v.dtype), 0, window, empty)[..., None]
    wide_v[..., :E] *= visible
    wide_v[..., E : E + terms] = visible
    held = wide_k[:, window:, :, D : D + terms].double().sum(-1) * scale
    return wide_k, wide_v, held


def key_bias(gate: Tensor, position: Tensor, window: int) -> Tensor:
    """β of the delayed slots, [B, T, G]: shut gates and places without a slot are lowered by HIDDEN."""
    return _delayed(_beta(gate, HIDDEN), -HIDDEN, window, position < window)


def delayed(x: Tensor, window: int) -> Tensor:
    """[B, T, G, D] `window` tokens later, zeros at first."""
    return _wider(x, x.shape[-1], window)


def gradient_columns(do: Tensor, o: Tensor, width: int, terms: int) -> tuple[Tensor, Tensor]:
    """do' = [do | −δ | 1 | 0], [B, T, H, width], and δ = ⟨do, o⟩, [B, T, H]."""
    E = do.shape[-1]
    delta = dot(do, o)
    out = _wider(do, width)
    _put(out, E, terms, -delta)
    out[..., E + terms] = 1
    return out, delta


def gate_sums(
    dk: Tensor, dv: Tensor, v: Tensor, gate: Tensor, *, window: int, D: int, terms: int, scale: float
) -> Tensor:
    """What backward sums over rows for each gate: the gradient's sum and the slot's weight, [B, T, G, 2].

    Args:
        dk, dv: the wide call's gradients, [B, T, G, ...], of slots `window` tokens later.
    """
    E, T = v.shape[-1], gate.shape[1]
    dk, dv, keep = dk[:, window:], dv[:, window:], gate[:, : T - window] > 0
    # β_j's own gradient: the kernel sums dS_ij before it rounds, so kept slots' terms cancel in full precision.
    kept = dk[..., D].to(gate.dtype) / scale
    dropped = dot(dv[..., :E], v[:, : T - window]) + dv[..., E : E + terms].to(gate.dtype).sum(-1)
    sums = torch.stack([torch.where(keep, kept, dropped), dv[..., E + terms].to(gate.dtype)], -1)
    return torch.cat([sums, sums.new_zeros(*sums.shape[:1], window, *sums.shape[2:])], 1)


def gate_gradient(sums: Tensor, beta: Tensor, gate: Tensor, sink: Tensor, cap: float, heads: int) -> Tensor:
    """The gates' gradients, [B, T, G], from what was summed over rows.

    Args:
        sums: `gate_sums`. beta: `slot_columns`' β, [B, T or fewer, G]; slots behind have none. sink: [B or 1, T].
        cap: logarithm of the most that a dropped slot may weigh; heads: query heads per KV head.
    """
    beta = torch.cat([beta, beta.new_zeros(len(beta), gate.shape[1] - beta.shape[1], beta.shape[2])], 1)
    weight = sums[..., 1].double().clamp(min=torch.finfo(torch.float64).tiny)
    unlowered = (-beta).clamp(max=700).exp()
    factor = torch.where(gate > 0, unlowered, unlowered.minimum(math.exp(cap) * heads / weight))
    return (sums[..., 0] * factor).to(gate.dtype).masked_fill(sink[..., None], 0.0)


def merge_own(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float):
    """The gated slots' o and lse with the own slot's: o in q's dtype, L and the own slot's logit, [B, T, H]."""
    own = dot(q, k) * scale
    merged_lse = torch.logaddexp(lse, own)
    out = o * (lse - merged_lse).exp()[..., None]
    weight = (own - merged_lse).exp()[..., None]
    out = grouped(out, v).addcmul_(grouped(weight, v), v[:, :, :, None]).flatten(2, 3)
    return out.to(q.dtype), merged_lse, own


def own_gradients(do, delta, q, k, v, merged_lse, own, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of the own slots alone."""
    p = (own - merged_lse).exp()
    ds = (p * (dot(do, v) - delta) * scale).to(q.dtype)[..., None]
    dq = grouped(ds, k) * k[:, :, :, None]
    dk = (grouped(ds, k) * grouped(q, k)).sum(3)
    dv = (grouped(p.to(q.dtype)[..., None], v) * grouped(do, v)).sum(3)
    return dq.flatten(2, 3), dk, dv


def add_gated(recent: tuple[Tensor, ...], past_grads: tuple[Tensor, ...], gate: Tensor, window: int) -> tuple:
    """dq, dk and dv of the always-visible slots and of the gated call together, in the memory of the first."""
    T = gate.shape[1]
    dq, dk, dv = recent
    D, E = dk.shape[-1], dv.shape[-1]
    dq += past_grads[0][..., :D]
    dk[:, : T - window] += past_grads[1][:, window:, :, :D]
    dv[:, : T - window].addcmul_(
        past_grads[2][:, window:, :, :E], (gate[:, : T - window, :, None] > 0).to(dv.dtype)
    )
    return dq, dk, dv


def own_and_gated_gradients(do, delta, q, k, v, merged_lse, own, scale: float, past_grads, gate) -> tuple:
    """`own_gradients` and `add_gated` in one, for a window of one."""
    return add_gated(own_gradients(do, delta, q, k, v, merged_lse, own, scale), past_grads, gate, 1)


def grouped(x_BTHD: Tensor, like_BTGD: Tensor) -> Tensor:
    """[B, T, H, D] as [B, T, G, N, D]."""
    return x_BTHD.unflatten(2, (like_BTGD.shape[2], -1))


def dot(a_BTHD: Tensor, b_BTGD: Tensor) -> Tensor:
    """⟨a_h, b_{h/N}⟩ for every head of a, [B, T, H], in at least float32."""
    wide = torch.promote_types(a_BTHD.dtype, torch.float32)
    a, b = grouped(a_BTHD, b_BTGD), b_BTGD[:, :, :, None]
    out = torch.linalg.vecdot(a, b) if a.dtype == b.dtype == wide else (a.to(wide) * b).sum(-1)
    return out.flatten(2)


def _wider(x: Tensor, width: int, window: int = 0) -> Tensor:
    out = x.new_empty(*x.shape[:-1], width)
    out[:, :window] = 0
    out[:, window:, :, : x.shape[-1]] = x[:, : x.shape[1] - window]
    out[:, window:, :, x.shape[-1] :] = 0
    return out


def _put(out: Tensor, column: int, terms: int, x: Tensor) -> None:
    out[..., column] = x
    if terms == 2:
        out[..., column + 1] = x - out[..., column]


def _delayed(x_BTG: Tensor, empty_value: float, window: int, empty_T: Tensor) -> Tensor:
    out = torch.full_like(x_BTG, empty_value)
    out[:, window:] = x_BTG[:, : x_BTG.shape[1] - window]
    return out.masked_fill_(empty_T[:, None], empty_value)


def _beta(gate: Tensor, shift: Tensor | float) -> Tensor:
    return torch.where(gate > 0, gate.clamp(min=torch.finfo(gate.dtype).tiny).log(), -shift)
