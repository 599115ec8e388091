"""kernels/attention/columns.py as Triton kernels: one launch where PyTorch takes ten, and each tensor is read and written once.

Every program has one token of one KV head: its N query heads and all of their columns. `query_columns`, `slot_columns`,
`gradient_columns`, `gate_sums`, `gate_gradient`, `merge_own`, `own_gradients` and `own_and_gated_gradients` take the arguments
of their namesakes and return the same; numbers in 16-bit types are computed in float32 and rounded once.

Letters as in kernels/attention/columns.py.
"""

from __future__ import annotations

import functools
import math
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcat_nemo.kernels.attention import columns as plain
from kvcat_nemo.kernels.attention.columns import HIDDEN


@triton.jit
def _at(ptr, b, t, h, sb, st, sh):
    """The first number of token t's head h."""
    return ptr + b.to(tl.int64) * sb + t.to(tl.int64) * st + h * sh


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
    TWICE: tl.constexpr,
    W2: tl.constexpr,
    WIDE: tl.constexpr,
):
    b, t, h = tl.program_id(0) // T, tl.program_id(0) % T, tl.program_id(1)
    c = tl.arange(0, W2)
    x = tl.load(_at(x_ptr, b, t, h, sb, st, sh) + c * sd, mask=c < D, other=0.0).to(WIDE)
    x = tl.where((c >= D) & (c < D + TWICE), 1.0, x)
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
    TWICE: tl.constexpr,
    W2: tl.constexpr,
    WIDE: tl.constexpr,
):
    b, t, g = tl.program_id(0) // T, tl.program_id(0) % T, tl.program_id(1)
    j = t - window  # the slot that comes to lie here
    there = j >= 0
    inside = there & (tl.load(position_ptr + t) >= window)  # the slot is of this token's document
    c = tl.arange(0, W2)
    k = tl.load(_at(k_ptr, b, j, g, kb, kt, kh) + c * kd, mask=there & (c < D), other=0.0).to(WIDE)
    v = tl.load(_at(v_ptr, b, j, g, vb, vt, vh) + c * vd, mask=there & (c < E), other=0.0).to(WIDE)
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
    if TWICE == 2:
        k = tl.where(c == D + 1, low, k)
    seen = opened & inside
    v = tl.where((c >= E) & (c < E + TWICE), tl.where(seen, 1.0, 0.0), tl.where(seen, v, 0.0))
    place = tl.program_id(0).to(tl.int64) * G + g
    tl.store(wide_k_ptr + place * K_WIDTH + c, k.to(wide_k_ptr.dtype.element_ty), mask=c < K_WIDTH)
    tl.store(wide_v_ptr + place * V_WIDTH + c, v.to(wide_v_ptr.dtype.element_ty), mask=c < V_WIDTH)
    held = high.to(tl.float64)
    if TWICE == 2:
        held += low.to(tl.float64)
    at = (b.to(tl.int64) * (T - window) + j) * G + g
    tl.store(held_ptr + at, held * scale, mask=there)


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
    TWICE: tl.constexpr,
    W2: tl.constexpr,
    WIDE: tl.constexpr,
):
    b, t, h = tl.program_id(0) // T, tl.program_id(0) % T, tl.program_id(1)
    c = tl.arange(0, W2)
    do = tl.load(_at(do_ptr, b, t, h, db, dt, dh) + c * dd, mask=c < E, other=0.0).to(WIDE)
    o = tl.load(_at(o_ptr, b, t, h, ob, ot, oh) + c * od, mask=c < E, other=0.0).to(WIDE)
    delta = tl.sum(do * o, axis=0)
    high = (-delta).to(out_ptr.dtype.element_ty).to(WIDE)
    do = tl.where(c == E, high, do)
    if TWICE == 2:
        do = tl.where(c == E + 1, -delta - high, do)
    do = tl.where(c == E + TWICE, 1.0, do)
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
    TWICE: tl.constexpr,
    E2: tl.constexpr,
    WIDE: tl.constexpr,
):
    b, t, g = tl.program_id(0) // T, tl.program_id(0) % T, tl.program_id(1)
    later = t + window
    there = later < T
    e = tl.arange(0, E2)
    dv_row = _at(dv_ptr, b, later, g, wb, wt, wh)
    dv = tl.load(dv_row + e * wd, mask=there & (e < E), other=0.0).to(WIDE)
    v = tl.load(_at(v_ptr, b, t, g, vb, vt, vh) + e * vd, mask=e < E, other=0.0).to(WIDE)
    dropped = tl.sum(dv * v, axis=0) + tl.load(dv_row + E * wd, mask=there, other=0.0).to(WIDE)
    if TWICE == 2:
        dropped += tl.load(dv_row + (E + 1) * wd, mask=there, other=0.0).to(WIDE)
    weight = tl.load(dv_row + (E + TWICE) * wd, mask=there, other=0.0).to(WIDE)
    kept = tl.load(_at(dk_ptr, b, later, g, kb, kt, kh) + D * kd, mask=there, other=0.0).to(WIDE) / scale
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


@triton.jit
def _merge_own(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    out_ptr,
    level_ptr,
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
    q = tl.load(_at(q_ptr, b, t, h, qb, qt, qh) + c * qd, mask=c < D, other=0.0).to(WIDE)
    k = tl.load(_at(k_ptr, b, t, g, kb, kt, kh) + c * kd, mask=c < D, other=0.0).to(WIDE)
    v = tl.load(_at(v_ptr, b, t, g, vb, vt, vh) + c * vd, mask=c < E, other=0.0).to(WIDE)
    o = tl.load(_at(o_ptr, b, t, h, ob, ot, oh) + c * od, mask=c < E, other=0.0).to(WIDE)
    lse = tl.load(lse_ptr + b.to(tl.int64) * lb + t * lt + h * lh).to(WIDE)
    own = tl.sum(q * k, axis=0) * scale
    top = tl.maximum(lse, own)
    level = top + tl.log(tl.exp(lse - top) + tl.exp(own - top))
    out = o * tl.exp(lse - level) + v * tl.exp(own - level)
    place = tl.program_id(0).to(tl.int64) * HEADS + h
    tl.store(out_ptr + place * E + c, out.to(out_ptr.dtype.element_ty), mask=c < E)
    tl.store(level_ptr + place, level)
    tl.store(own_ptr + place, own)


@triton.jit
def _own_gradients(
    do_ptr,
    delta_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    level_ptr,
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
    k = tl.load(_at(k_ptr, b, t, g, kb, kt, kh) + c * kd, mask=c < D, other=0.0).to(WIDE)
    v = tl.load(_at(v_ptr, b, t, g, vb, vt, vh) + c * vd, mask=c < E, other=0.0).to(WIDE)
    dk = tl.zeros((W2,), WIDE)
    dv = tl.zeros((W2,), WIDE)
    if ADD:
        later = t + 1
        there = later < T
        gate = tl.load(gate_ptr + b.to(tl.int64) * gb + t * gt + g * gg)
        opened = there & (gate > 0)
        dk += tl.load(
            _at(far_k_ptr, b, later, g, fkb, fkt, fkh) + c * fkd, mask=there & (c < D), other=0.0
        ).to(WIDE)
        dv += tl.load(
            _at(far_v_ptr, b, later, g, fvb, fvt, fvh) + c * fvd, mask=opened & (c < E), other=0.0
        ).to(WIDE)
    for n in range(N):
        h = g * N + n
        place = tl.program_id(0).to(tl.int64) * (G * N) + h
        q = tl.load(_at(q_ptr, b, t, h, qb, qt, qh) + c * qd, mask=c < D, other=0.0).to(WIDE)
        do = tl.load(_at(do_ptr, b, t, h, ob, ot, oh) + c * od, mask=c < E, other=0.0).to(WIDE)
        p = tl.exp(tl.load(own_ptr + place) - tl.load(level_ptr + place))
        ds = p * (tl.sum(do * v, axis=0) - tl.load(delta_ptr + place)) * scale
        dq = ds * k
        if ADD:
            dq += tl.load(_at(far_q_ptr, b, t, h, fqb, fqt, fqh) + c * fqd, mask=c < D, other=0.0).to(WIDE)
        dk += ds * q
        dv += p * do
        tl.store(dq_ptr + place * D + c, dq.to(dq_ptr.dtype.element_ty), mask=c < D)
    slot = tl.program_id(0).to(tl.int64) * G + g
    tl.store(dk_ptr + slot * D + c, dk.to(dk_ptr.dtype.element_ty), mask=c < D)
    tl.store(dv_ptr + slot * E + c, dv.to(dv_ptr.dtype.element_ty), mask=c < E)


def query_columns(q: Tensor, width: int, twice: int) -> Tensor:
    B, T, H, D = q.shape
    out = q.new_empty(B, T, H, width)
    _query_columns[(B * T, H)](q, *q.stride(), out, T, H, D, width, **_settings(q, twice, width))
    return out


def slot_columns(k, v, gate, position, *, window, widths, twice, scale, shift):
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
        TWICE=twice,
        W2=_power(max(widths)),
        WIDE=_WIDE[wide],
    )
    return wide_k, wide_v, held


def gradient_columns(do: Tensor, o: Tensor, width: int, twice: int) -> tuple[Tensor, Tensor]:
    B, T, H, E = do.shape
    wide = torch.promote_types(do.dtype, torch.float32)
    out, delta = do.new_empty(B, T, H, width), do.new_empty(B, T, H, dtype=wide)
    strides = (*do.stride(), *o.stride())
    settings = _settings(do, twice, width)
    _gradient_columns[(B * T, H)](do, o, out, delta, *strides, T, H, E, width, **settings)
    return out, delta


def gate_sums(dk, dv, v, gate, *, window, D, twice, scale) -> Tensor:
    B, T, G, E = v.shape
    out = gate.new_empty(B, T, G, 2)
    strides = (*dk.stride(), *dv.stride(), *v.stride(), *gate.stride())
    settings = {"TWICE": twice, "E2": _power(E), "WIDE": _WIDE[gate.dtype]}
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


def merge_own(q, k, v, o, lse, scale):
    B, T, H, D = q.shape
    G, E = v.shape[2:]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(B, T, H, E)
    level, own = (q.new_empty(B, T, H, dtype=wide) for _ in range(2))
    strides = (*q.stride(), *k.stride(), *v.stride(), *o.stride(), *lse.stride())
    settings = {"W2": _power(max(D, E)), "WIDE": _WIDE[wide]}
    _merge_own[(B * T, H)](q, k, v, o, lse, out, level, own, *strides, T, H, H // G, D, E, scale, **settings)
    return out, level, own


def own_gradients(do, delta, q, k, v, level, own, scale):
    return _own(do, delta, q, k, v, level, own, scale, None, None)


def own_and_gated_gradients(do, delta, q, k, v, level, own, scale, far, gate):
    return _own(do, delta, q, k, v, level, own, scale, far, gate)


def _own(do, delta, q, k, v, level, own, scale, far, gate):
    B, T, H, D = q.shape
    G, E = v.shape[2:]
    dq, dk, dv = q.new_empty(B, T, H, D), k.new_empty(B, T, G, D), v.new_empty(B, T, G, E)
    add = far is not None
    dq_, dk_, dv_ = far[:3] if add else (q, k, v)
    gate = gate if add else delta
    strides = [s for x in (do, q, k, v, dq_, dk_, dv_, gate) for s in x.stride()]
    delta, level, own = delta.contiguous(), level.contiguous(), own.contiguous()
    settings = {"N": H // G, "ADD": add, "W2": _power(max(D, E)), "WIDE": _WIDE[level.dtype]}
    _own_gradients[(B * T, G)](
        do,
        delta,
        q,
        k,
        v,
        level,
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


_WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}


def _settings(x: Tensor, twice: int, width: int) -> dict:
    wide = torch.promote_types(x.dtype, torch.float32)
    return {"TWICE": twice, "W2": _power(width), "WIDE": _WIDE[wide]}


def _power(width: int) -> int:
    return triton.next_power_of_2(width)


@functools.cache
def failure(device: torch.device) -> str:
    """Why these kernels cannot be used on a device; empty when a small case gives the plain form's figures there.

    No GPU has run these kernels in this project's tests: a run looks for itself before it trusts them.
    """
    B, T, G, N, D, width, scale = 2, 9, 2, 2, 16, 24, 0.25
    rng = torch.Generator().manual_seed(0)

    def numbers(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, generator=rng).to(device, dtype)

    q, do, o = (numbers(B, T, G * N, D) for _ in range(3))
    k, v = (numbers(B, T, G, D) for _ in range(2))
    drawn = torch.rand(B, T, G, generator=rng)
    gate = torch.where(drawn < 0.3, 0.0, drawn).to(device)
    shift = 10 * torch.rand(B, T, G, generator=rng).to(device)
    position = torch.arange(T, device=device)
    lse = numbers(B, T, G * N, dtype=torch.float32)
    far = numbers(B, T, G * N, width), numbers(B, T, G, width), numbers(B, T, G, width)
    far[2][..., D + 2].abs_()  # a slot's weight in all rows
    sink = position[None] < 1

    def slots(form, k, v, gate, window, shift, twice=2):
        settings = {"window": window, "widths": (width, width), "twice": twice, "scale": scale}
        return form.slot_columns(k, v, gate, position, shift=shift, **settings)

    def run(form):
        out, columns = {"query columns": form.query_columns(q, width, 2)}, {}
        for name, window, by in (("slots", 1, 0.0), ("slots with a shift each", 2, shift)):
            keys, out[f"{name}, values"], out[f"{name}, held"] = slots(form, k, v, gate, window, by)
            out[f"{name}, keys"] = torch.cat([keys[..., :D], keys[..., D + 2 :]], -1)
            columns[f"{name}, β"] = keys[..., D : D + 2]
        wide_do, out["δ"] = form.gradient_columns(do, o, width, 2)
        out["output gradients"] = torch.cat([wide_do[..., :D], wide_do[..., D + 2 :]], -1)
        columns["−δ"] = wide_do[..., D : D + 2]
        sums = out["sums"] = form.gate_sums(*far[1:], v, gate, window=1, D=D, twice=2, scale=scale)
        out["gate gradient"] = form.gate_gradient(sums, out["slots, held"], gate, sink, 3.0, N)
        merged = form.merge_own(q, k, v, o.float(), lse, scale)
        own = do, out["δ"], q, k, v, *merged[1:], scale
        results = {
            "merged": merged,
            "own": form.own_gradients(*own),
            "own and gated": form.own_and_gated_gradients(*own, far, gate),
        }
        out |= {f"{name} {i}": x for name, several in results.items() for i, x in enumerate(several)}
        return out, columns

    try:
        ours, columns = run(sys.modules[__name__])
        theirs = run(plain)[0]
    except Exception as error:  # a compiler, a driver or a launch: whatever it is, the plain form is there
        return f"{type(error).__name__}: {(str(error) or repr(error)).splitlines()[0]}"
    for name, b in theirs.items():
        a, b = ours[name].double(), b.double()
        # bf16 results are rounded at different places: a few units of the last place, 2⁻⁸. Wide ones hang on β in two
        # columns, to 2⁻¹⁴ or better.
        rounding = 2**-6 if theirs[name].dtype == torch.bfloat16 else 2**-11
        # Places without a slot hold −HIDDEN, beside which no figure of a slot would count.
        size = float(b[b.abs() < HIDDEN / 2].abs().max())
        if not torch.allclose(a, b, rtol=rounding, atol=rounding * size):
            return f"{name}: differs from the plain form by {float((a - b).abs().max()):.3g}"
    wide = k.double(), v.double(), gate.double()
    exact = {
        "slots, β": slots(plain, *wide, 1, 0.0, 1)[0][..., D],
        "slots with a shift each, β": slots(plain, *wide, 2, shift.double(), 1)[0][..., D],
        "−δ": -plain.gradient_columns(do.double(), o.double(), width, 1)[1],
    }
    for name, b in exact.items():
        # One bf16 column is off by up to 2⁻⁸ of the number, two by 2⁻¹⁶, or by 2⁻¹⁴ where they are cut off and not
        # rounded, as by Triton's interpreter. float32 logarithms and sums of 16 products are good to 2⁻²⁰.
        off = (columns[name].double().sum(-1) - b).abs()
        if not bool((off <= 2**-14 * b.abs() + 2**-18).all()):
            return f"{name}: two columns hold another number, by {float(off.max()):.3g}"
    return ""
