"""The columns that the fused call is given in backward, and the gates' gradients, as Triton kernels.

Shapes and formulas as in kernels/attention/columns.py. Every program has one token of one KV head, or of one query head.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcat_nemo.kernels.attention.columns_shared_triton import WIDE_TYPES, power_of_two, row_of, settings_of


@triton.jit
def _gradient_columns(
    do_ptr,
    o_ptr,
    out_ptr,
    delta_ptr,
    db,
    dt,
    dh,
    dd,
    ob,
    ot,
    oh,
    od,
    T,
    HEADS,
    E,
    WIDTH,
    TERMS: tl.constexpr,
    W2: tl.constexpr,
    WIDE: tl.constexpr,
):
    b, t, h = tl.program_id(0) // T, tl.program_id(0) % T, tl.program_id(1)
    c = tl.arange(0, W2)
    do = tl.load(row_of(do_ptr, b, t, h, db, dt, dh) + c * dd, mask=c < E, other=0.0).to(WIDE)
    o = tl.load(row_of(o_ptr, b, t, h, ob, ot, oh) + c * od, mask=c < E, other=0.0).to(WIDE)
    delta = tl.sum(do * o, axis=0)
    high = (-delta).to(out_ptr.dtype.element_ty).to(WIDE)
    do = tl.where(c == E, high, do)
    if TERMS == 2:
        do = tl.where(c == E + 1, -delta - high, do)
    do = tl.where(c == E + TERMS, 1.0, do)
    place = tl.program_id(0).to(tl.int64) * HEADS + h
    tl.store(out_ptr + place * WIDTH + c, do.to(out_ptr.dtype.element_ty), mask=c < WIDTH)
    tl.store(delta_ptr + place, delta)


@triton.jit
def _gate_sums(
    dk_ptr,
    dv_ptr,
    v_ptr,
    gate_ptr,
    out_ptr,
    kb,
    kt,
    kh,
    kd,
    wb,
    wt,
    wh,
    wd,
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
    window,
    scale,
    TERMS: tl.constexpr,
    E2: tl.constexpr,
    WIDE: tl.constexpr,
):
    b, t, g = tl.program_id(0) // T, tl.program_id(0) % T, tl.program_id(1)
    later = t + window
    there = later < T
    e = tl.arange(0, E2)
    dv_row = row_of(dv_ptr, b, later, g, wb, wt, wh)
    dv = tl.load(dv_row + e * wd, mask=there & (e < E), other=0.0).to(WIDE)
    v = tl.load(row_of(v_ptr, b, t, g, vb, vt, vh) + e * vd, mask=e < E, other=0.0).to(WIDE)
    dropped = tl.sum(dv * v, axis=0) + tl.load(dv_row + E * wd, mask=there, other=0.0).to(WIDE)
    if TERMS == 2:
        dropped += tl.load(dv_row + (E + 1) * wd, mask=there, other=0.0).to(WIDE)
    weight = tl.load(dv_row + (E + TERMS) * wd, mask=there, other=0.0).to(WIDE)
    kept = tl.load(row_of(dk_ptr, b, later, g, kb, kt, kh) + D * kd, mask=there, other=0.0).to(WIDE) / scale
    gate = tl.load(gate_ptr + b.to(tl.int64) * gb + t * gt + g * gg).to(WIDE)
    place = 2 * (tl.program_id(0).to(tl.int64) * G + g)
    tl.store(out_ptr + place, tl.where(gate > 0, kept, dropped))
    tl.store(out_ptr + place + 1, weight)


@triton.jit
def _gate_gradient(
    sums_ptr,
    beta_ptr,
    gate_ptr,
    sink_ptr,
    out_ptr,
    gb,
    gt,
    gg,
    sink_b,
    T,
    BETAS,
    G,
    most,
    ROWS,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < ROWS
    b, t, g = (i // (T * G)).to(tl.int64), (i // G) % T, i % G
    value = tl.load(sums_ptr + 2 * i, mask=ok, other=0.0)
    weight = tl.load(sums_ptr + 2 * i + 1, mask=ok, other=1.0).to(tl.float64)
    gate = tl.load(gate_ptr + b * gb + t * gt + g * gg, mask=ok, other=0.0)
    sink = tl.load(sink_ptr + b * sink_b + t, mask=ok, other=0)
    beta = tl.load(beta_ptr + (b * BETAS + t) * G + g, mask=ok & (t < BETAS), other=0.0).to(tl.float64)
    factor = tl.exp(tl.minimum(-beta, 700.0))
    # The smallest normal float64: a slot that nobody sees has weight 0.
    limit = most / tl.maximum(weight, 2.2250738585072014e-308)
    factor = tl.where(gate > 0, factor, tl.minimum(factor, limit))
    out = (value.to(tl.float64) * factor).to(gate.dtype)
    tl.store(out_ptr + i, tl.where(sink != 0, 0.0, out), mask=ok)


def gradient_columns(do: Tensor, o: Tensor, width: int, terms: int) -> tuple[Tensor, Tensor]:
    B, T, H, E = do.shape
    wide = torch.promote_types(do.dtype, torch.float32)
    out, delta = do.new_empty(B, T, H, width), do.new_empty(B, T, H, dtype=wide)
    strides = (*do.stride(), *o.stride())
    settings = settings_of(do, terms, width)
    _gradient_columns[(B * T, H)](do, o, out, delta, *strides, T, H, E, width, **settings)
    return out, delta


def gate_sums(dk, dv, v, gate, *, window, D, terms, scale) -> Tensor:
    B, T, G, E = v.shape
    out = gate.new_empty(B, T, G, 2)
    strides = (*dk.stride(), *dv.stride(), *v.stride(), *gate.stride())
    settings = {"TERMS": terms, "E2": power_of_two(E), "WIDE": WIDE_TYPES[gate.dtype]}
    _gate_sums[(B * T, G)](dk, dv, v, gate, out, *strides, T, G, D, E, window, scale, **settings)
    return out


def gate_gradient(sums, beta, gate, sink, cap, heads) -> Tensor:
    B, T, G = gate.shape
    out = torch.empty(B, T, G, dtype=gate.dtype, device=gate.device)
    rows, block = B * T * G, 256
    sums, beta, sink = sums.contiguous(), beta.contiguous(), sink.contiguous().to(torch.int8)
    _gate_gradient[(triton.cdiv(rows, block),)](
        sums,
        beta,
        gate,
        sink,
        out,
        *gate.stride(),
        T if len(sink) == B and B > 1 else 0,
        T,
        beta.shape[1],
        G,
        math.exp(cap) * heads,
        rows,
        BLOCK=block,
    )
    return out
