"""The columns that the fused call is given in forward, as Triton kernels; shapes and formulas as in kernels/attention/columns.py.

Every program has one token of one KV head, or of one query head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcat_nemo.kernels.attention.columns import HIDDEN
from kvcat_nemo.kernels.attention.columns_shared_triton import WIDE_TYPES, power_of_two, row_of, settings_of


@triton.jit
def _query_columns(
    x_ptr,
    sb,
    st,
    sh,
    sd,
    out_ptr,
    T,
    HEADS,
    D,
    WIDTH,
    TERMS: tl.constexpr,
    W2: tl.constexpr,
    WIDE: tl.constexpr,
):
    b, t, h = tl.program_id(0) // T, tl.program_id(0) % T, tl.program_id(1)
    c = tl.arange(0, W2)
    x = tl.load(row_of(x_ptr, b, t, h, sb, st, sh) + c * sd, mask=c < D, other=0.0).to(WIDE)
    x = tl.where((c >= D) & (c < D + TERMS), 1.0, x)
    place = (tl.program_id(0).to(tl.int64) * HEADS + h) * WIDTH
    tl.store(out_ptr + place + c, x.to(out_ptr.dtype.element_ty), mask=c < WIDTH)


@triton.jit
def _slot_columns(
    k_ptr,
    v_ptr,
    gate_ptr,
    shift_ptr,
    position_ptr,
    wide_k_ptr,
    wide_v_ptr,
    held_ptr,
    kb,
    kt,
    kh,
    kd,
    vb,
    vt,
    vh,
    vd,
    gb,
    gt,
    gg,
    T,
    G,
    D,
    E,
    K_WIDTH,
    V_WIDTH,
    window,
    scale,
    shift,
    hidden,
    tiny,
    SHIFTED: tl.constexpr,
    TERMS: tl.constexpr,
    W2: tl.constexpr,
    WIDE: tl.constexpr,
):
    b, t, g = tl.program_id(0) // T, tl.program_id(0) % T, tl.program_id(1)
    j = t - window  # the slot that comes to lie here
    there = j >= 0
    inside = there & (tl.load(position_ptr + t) >= window)  # the slot is of this token's document
    c = tl.arange(0, W2)
    k = tl.load(row_of(k_ptr, b, j, g, kb, kt, kh) + c * kd, mask=there & (c < D), other=0.0).to(WIDE)
    v = tl.load(row_of(v_ptr, b, j, g, vb, vt, vh) + c * vd, mask=there & (c < E), other=0.0).to(WIDE)
    gate = tl.load(gate_ptr + b.to(tl.int64) * gb + j * gt + g * gg, mask=there, other=0.0).to(WIDE)
    lower = tl.full((), 0.0, WIDE) + shift
    if SHIFTED:
        lower = tl.load(shift_ptr + (b.to(tl.int64) * T + j) * G + g, mask=there, other=0.0).to(WIDE)
    opened = gate > 0
    beta = tl.where(opened, tl.log(tl.maximum(gate, tiny)), -lower)
    beta = tl.where(inside, beta, -hidden) / scale
    # Rounded to the columns' dtype, and what the rounding lost.
    high = beta.to(wide_k_ptr.dtype.element_ty).to(WIDE)
    low = (beta - high).to(wide_k_ptr.dtype.element_ty).to(WIDE)
    k = tl.where(c == D, high, k)
    if TERMS == 2:
        k = tl.where(c == D + 1, low, k)
    seen = opened & inside
    v = tl.where((c >= E) & (c < E + TERMS), tl.where(seen, 1.0, 0.0), tl.where(seen, v, 0.0))
    place = tl.program_id(0).to(tl.int64) * G + g
    tl.store(wide_k_ptr + place * K_WIDTH + c, k.to(wide_k_ptr.dtype.element_ty), mask=c < K_WIDTH)
    tl.store(wide_v_ptr + place * V_WIDTH + c, v.to(wide_v_ptr.dtype.element_ty), mask=c < V_WIDTH)
    held = high.to(tl.float64)
    if TERMS == 2:
        held += low.to(tl.float64)
    at = (b.to(tl.int64) * (T - window) + j) * G + g
    tl.store(held_ptr + at, held * scale, mask=there)


def query_columns(q: Tensor, width: int, terms: int) -> Tensor:
    B, T, H, D = q.shape
    out = q.new_empty(B, T, H, width)
    _query_columns[(B * T, H)](q, *q.stride(), out, T, H, D, width, **settings_of(q, terms, width))
    return out


def slot_columns(k, v, gate, position, *, window, widths, terms, scale, shift):
    B, T, G, D = k.shape
    E, wide = v.shape[-1], gate.dtype
    wide_k, wide_v = k.new_empty(B, T, G, widths[0]), v.new_empty(B, T, G, widths[1])
    held = torch.empty(B, T - window, G, dtype=torch.float64, device=k.device)
    shifted = isinstance(shift, Tensor)
    by_slot = shift.contiguous() if shifted else gate
    sizes = (
        T,
        G,
        D,
        E,
        *widths,
        window,
        scale,
        0.0 if shifted else float(shift),
        HIDDEN,
        torch.finfo(wide).tiny,
    )
    _slot_columns[(B * T, G)](
        k,
        v,
        gate,
        by_slot,
        position,
        wide_k,
        wide_v,
        held,
        *k.stride(),
        *v.stride(),
        *gate.stride(),
        *sizes,
        SHIFTED=shifted,
        TERMS=terms,
        W2=power_of_two(max(widths)),
        WIDE=WIDE_TYPES[wide],
    )
    return wide_k, wide_v, held
