"""A query's own slot, merged with the gated ones and in backward, as Triton kernels.

Shapes and formulas as in kernels/attention/columns.py. Every program has one token of one KV head, or of one query head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcat_nemo.kernels.attention.columns_shared_triton import WIDE_TYPES, power_of_two, row_of


@triton.jit
def _merge_own(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    out_ptr,
    merged_ptr,
    own_ptr,
    qb,
    qt,
    qh,
    qd,
    kb,
    kt,
    kh,
    kd,
    vb,
    vt,
    vh,
    vd,
    ob,
    ot,
    oh,
    od,
    lb,
    lt,
    lh,
    T,
    HEADS,
    N,
    D,
    E,
    scale,
    W2: tl.constexpr,
    WIDE: tl.constexpr,
):
    b, t, h = tl.program_id(0) // T, tl.program_id(0) % T, tl.program_id(1)
    g = h // N
    c = tl.arange(0, W2)
    q = tl.load(row_of(q_ptr, b, t, h, qb, qt, qh) + c * qd, mask=c < D, other=0.0).to(WIDE)
    k = tl.load(row_of(k_ptr, b, t, g, kb, kt, kh) + c * kd, mask=c < D, other=0.0).to(WIDE)
    v = tl.load(row_of(v_ptr, b, t, g, vb, vt, vh) + c * vd, mask=c < E, other=0.0).to(WIDE)
    o = tl.load(row_of(o_ptr, b, t, h, ob, ot, oh) + c * od, mask=c < E, other=0.0).to(WIDE)
    lse = tl.load(lse_ptr + b.to(tl.int64) * lb + t * lt + h * lh).to(WIDE)
    own = tl.sum(q * k, axis=0) * scale
    top = tl.maximum(lse, own)
    merged_lse = top + tl.log(tl.exp(lse - top) + tl.exp(own - top))
    out = o * tl.exp(lse - merged_lse) + v * tl.exp(own - merged_lse)
    place = tl.program_id(0).to(tl.int64) * HEADS + h
    tl.store(out_ptr + place * E + c, out.to(out_ptr.dtype.element_ty), mask=c < E)
    tl.store(merged_ptr + place, merged_lse)
    tl.store(own_ptr + place, own)


@triton.jit
def _own_gradients(
    do_ptr,
    delta_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    merged_ptr,
    own_ptr,
    far_q_ptr,
    far_k_ptr,
    far_v_ptr,
    gate_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    ob,
    ot,
    oh,
    od,
    qb,
    qt,
    qh,
    qd,
    kb,
    kt,
    kh,
    kd,
    vb,
    vt,
    vh,
    vd,
    fqb,
    fqt,
    fqh,
    fqd,
    fkb,
    fkt,
    fkh,
    fkd,
    fvb,
    fvt,
    fvh,
    fvd,
    gb,
    gt,
    gg,
    T,
    G,
    D,
    E,
    scale,
    N: tl.constexpr,
    ADD: tl.constexpr,
    W2: tl.constexpr,
    WIDE: tl.constexpr,
):
    b, t, g = tl.program_id(0) // T, tl.program_id(0) % T, tl.program_id(1)
    c = tl.arange(0, W2)
    k = tl.load(row_of(k_ptr, b, t, g, kb, kt, kh) + c * kd, mask=c < D, other=0.0).to(WIDE)
    v = tl.load(row_of(v_ptr, b, t, g, vb, vt, vh) + c * vd, mask=c < E, other=0.0).to(WIDE)
    dk = tl.zeros((W2,), WIDE)
    dv = tl.zeros((W2,), WIDE)
    if ADD:
        later = t + 1
        there = later < T
        gate = tl.load(gate_ptr + b.to(tl.int64) * gb + t * gt + g * gg)
        opened = there & (gate > 0)
        dk += tl.load(
            row_of(far_k_ptr, b, later, g, fkb, fkt, fkh) + c * fkd, mask=there & (c < D), other=0.0
        ).to(WIDE)
        dv += tl.load(
            row_of(far_v_ptr, b, later, g, fvb, fvt, fvh) + c * fvd, mask=opened & (c < E), other=0.0
        ).to(WIDE)
    for n in range(N):
        h = g * N + n
        place = tl.program_id(0).to(tl.int64) * (G * N) + h
        q = tl.load(row_of(q_ptr, b, t, h, qb, qt, qh) + c * qd, mask=c < D, other=0.0).to(WIDE)
        do = tl.load(row_of(do_ptr, b, t, h, ob, ot, oh) + c * od, mask=c < E, other=0.0).to(WIDE)
        p = tl.exp(tl.load(own_ptr + place) - tl.load(merged_ptr + place))
        ds = p * (tl.sum(do * v, axis=0) - tl.load(delta_ptr + place)) * scale
        dq = ds * k
        if ADD:
            dq += tl.load(row_of(far_q_ptr, b, t, h, fqb, fqt, fqh) + c * fqd, mask=c < D, other=0.0).to(WIDE)
        dk += ds * q
        dv += p * do
        tl.store(dq_ptr + place * D + c, dq.to(dq_ptr.dtype.element_ty), mask=c < D)
    slot = tl.program_id(0).to(tl.int64) * G + g
    tl.store(dk_ptr + slot * D + c, dk.to(dk_ptr.dtype.element_ty), mask=c < D)
    tl.store(dv_ptr + slot * E + c, dv.to(dv_ptr.dtype.element_ty), mask=c < E)


def merge_own(q, k, v, o, lse, scale):
    B, T, H, D = q.shape
    G, E = v.shape[2:]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(B, T, H, E)
    merged_lse, own = (q.new_empty(B, T, H, dtype=wide) for _ in range(2))
    strides = (*q.stride(), *k.stride(), *v.stride(), *o.stride(), *lse.stride())
    settings = {"W2": power_of_two(max(D, E)), "WIDE": WIDE_TYPES[wide]}
    _merge_own[(B * T, H)](
        q, k, v, o, lse, out, merged_lse, own, *strides, T, H, H // G, D, E, scale, **settings
    )
    return out, merged_lse, own


def own_gradients(do, delta, q, k, v, merged_lse, own, scale):
    return _own(do, delta, q, k, v, merged_lse, own, scale, None, None)


def own_and_gated_gradients(do, delta, q, k, v, merged_lse, own, scale, past_grads, gate):
    return _own(do, delta, q, k, v, merged_lse, own, scale, past_grads, gate)


def _own(do, delta, q, k, v, merged_lse, own, scale, past_grads, gate):
    B, T, H, D = q.shape
    G, E = v.shape[2:]
    dq, dk, dv = q.new_empty(B, T, H, D), k.new_empty(B, T, G, D), v.new_empty(B, T, G, E)
    add = past_grads is not None
    dq_, dk_, dv_ = past_grads[:3] if add else (q, k, v)
    gate = gate if add else delta
    strides = [s for x in (do, q, k, v, dq_, dk_, dv_, gate) for s in x.stride()]
    delta, merged_lse, own = delta.contiguous(), merged_lse.contiguous(), own.contiguous()
    settings = {"N": H // G, "ADD": add, "W2": power_of_two(max(D, E)), "WIDE": WIDE_TYPES[merged_lse.dtype]}
    _own_gradients[(B * T, G)](
        do,
        delta,
        q,
        k,
        v,
        merged_lse,
        own,
        dq_,
        dk_,
        dv_,
        gate,
        dq,
        dk,
        dv,
        *strides,
        T,
        G,
        D,
        E,
        scale,
        **settings,
    )
    return dq, dk, dv
